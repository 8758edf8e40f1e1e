"""What each choice is worth: what is tried, and what is said of the answers."""

from __future__ import annotations

from clo import presets
from clo_sim import make_scene, simulate
from clo_sim.worth import worth_of_choices


def test_what_attends_to_everything_answers_the_same_whatever_is_changed() -> None:
    scene = make_scene(model="smollm2-135m", machine="l40s", context_tokens=4096, batch=2)
    choices = worth_of_choices(scene, simulate(scene, "streamed", executor="clock"))
    rows = [row for row in choices.alternatives if row.tpot_s is not None]
    assert {"dense_layers", "pinned_head_fraction"} <= {row.field for row in rows}
    assert not {"tau", "selector"} & {row.field for row in rows}
    assert not any("answers" in row.note for row in rows)


def test_values_are_shown_as_in_names() -> None:
    scene = make_scene(model="smollm2-135m", machine="l40s", context_tokens=4096, batch=2)
    design = presets.load_design("clo").with_fields(tau=0.801787041)
    [row] = worth_of_choices(scene, simulate(scene, design, executor="clock"), {"tau": (0.9,)}).alternatives
    assert (row.chosen, row.value) == ("0.8018", "0.9")
