"""What each choice of the fastest design is worth."""

from __future__ import annotations

from pathlib import Path

import pytest
from figure_data import make_choices, words

from clo.choices import Alternative, Choices, load_choices
from clo.errors import CloError
from clo_plots.choices import plot_choices, ranked


def test_alternatives_are_grouped_by_field_largest_effect_first() -> None:
    order = [(one.field, one.value) for one in ranked(make_choices())]
    assert order == [
        ("cache", "none"),
        ("cache", "lru"),
        ("transfer", "cpu_zero_copy"),
        ("prefetch_depth", "0"),
        ("prefetch_depth", "2"),
    ]


def test_changes_are_written_in_percent_and_milliseconds() -> None:
    shown = words(plot_choices(make_choices()))
    assert "+37.5 %  (+7.50 ms)" in shown
    assert "−2.50 %  (−0.50 ms)" in shown
    assert "cache: head_reuse →" in shown


def test_choices_that_tie_share_a_row_and_no_difference_is_neither_slower_nor_faster() -> None:
    values = {"host": 0.021, "events": 0.021, "flags": 0.0211, "graph": 0.020}
    tied = [Alternative(field="sync", chosen="none", value=v, tpot_s=s) for v, s in values.items()]
    other = Alternative(field="cache", chosen="lru", value="none", tpot_s=0.021)
    figure = plot_choices(Choices(best_name="clo", best_tpot_s=0.020, alternatives=(*tied, other)))
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert shown == ["flags", "host, events", "graph", "none"]
    assert words(figure).count("no difference") == 1


def test_the_title_says_which_model_and_machine() -> None:
    where = "llama-3-8b on h200, 16 x 131072 tokens"
    title = plot_choices(make_choices().with_fields(where=where)).axes[0].get_title(loc="left")
    assert title.splitlines() == [where, "clo (20 ms) with one choice changed"]


def test_what_does_not_run_stands_in_small_print() -> None:
    note = next(word for word in words(plot_choices(make_choices())) if "does not run" in word)
    assert note.startswith("slot_budgets = 8 does not run: needs 300 GB of 121 GB needs")
    assert max(len(line) for line in note.splitlines()) <= 130


def test_scale_is_logarithmic_only_for_large_changes() -> None:
    assert plot_choices(make_choices()).axes[0].get_xscale() == "symlog"
    small = make_choices().with_fields(alternatives=make_choices().alternatives[:3])
    assert plot_choices(small).axes[0].get_xscale() == "linear"


def test_choices_come_back_from_their_file(tmp_path: Path) -> None:
    make_choices().save(tmp_path / "choices.json")
    assert load_choices(tmp_path / "choices.json") == make_choices()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "not JSON, or truncated"),
        ("[]", "choices"),
        ('{"best_name": "clo", "best_tpot_s": -1, "alternatives": []}', "best_tpot_s = -1"),
        ('{"best_name": "clo", "best_tpot_s": 1, "alternatives": [], "color": 1}', "color: unknown field"),
    ],
)
def test_bad_choices_are_named(content: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "choices.json"
    path.write_text(content)
    with pytest.raises(CloError, match=problem) as caught:
        load_choices(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
