"""What each choice is worth: what is tried, and what is said of the answers."""

from __future__ import annotations

import pytest

from clo import presets
from clo_sim import make_scene, simulate
from clo_sim.worth import ALTERNATIVES, answers_differ_by, worth_of_choices


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


@pytest.mark.parametrize("name", ["clo", "resolve", "recall"])
def test_designs_with_the_same_answers_are_as_stale(name: str) -> None:
    scene = make_scene(model="smollm2-135m", machine="l40s", context_tokens=4096, batch=2)
    base = presets.load_design(name)
    overlap = simulate(scene, base, executor="clock").overlap
    changed = [
        base.with_fields(**{field: value})
        for field, values in ALTERNATIVES.items()
        for value in values
        if not (field == "cache" and name == "recall")
    ]
    same = [design for design in changed if not answers_differ_by(base, design)]
    assert len(same) >= 10
    assert {simulate(scene, design, executor="clock").overlap for design in same} == {overlap}
    stale = [design for design in changed if simulate(scene, design, executor="clock").overlap != overlap]
    assert stale
    assert all(answers_differ_by(base, design) for design in stale)


def test_answers_differ_by_what_is_attended() -> None:
    base = presets.load_design("clo")
    assert answers_differ_by(base, base.with_fields(transfer="cpu_zero_copy", slot_budgets=2, name="other")) == ()
    assert answers_differ_by(base, base.with_fields(budget_fraction=0.02, cache="lru")) == ("budget_fraction", "cache")
    assert answers_differ_by(presets.load_design("resolve"), presets.load_design("resolve").with_fields(tau=0.3)) == ()
    assert answers_differ_by(base, presets.load_design("resident")) == ("attend",)
    assert answers_differ_by(presets.load_design("streamed"), presets.load_design("resident")) == ()
