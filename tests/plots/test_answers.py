"""Answers over bytes moved."""

from __future__ import annotations

from typing import Any

import pytest
from figure_data import make_answers

from clo.errors import CloError
from clo_plots.answers import Answer, Answers, parse_answers, plot_answers


def answers_record() -> dict[str, Any]:
    about = {"model": "smollm2-135m", "context_tokens": 4096, "num_texts": 12, "text": "topics"}
    rows = [
        {"design": "resident", "h2d_bytes_per_step": 0, "refetch_bytes_per_step": 0, "delta_nll": 0, "delta_nll_se": 0},
        {
            "design": "clo tau=0.8",
            "h2d_bytes_per_step": 2e5,
            "refetch_bytes_per_step": 1e6,
            "delta_nll": 0.03,
            "delta_nll_se": None,
        },
    ]
    return {"evaluation": about, "answers": rows}


def test_answers_at_several_contexts_make_no_figure() -> None:
    record = answers_record()
    record["evaluation"]["context_tokens"] = [1024, 2048]
    with pytest.raises(CloError, match="here: answers at 2 contexts, a figure shows one"):
        parse_answers(record, where="here")


def test_answers_are_placed_by_the_share_of_bytes_and_the_change() -> None:
    (point,) = parse_answers(answers_record(), where="here").points
    assert (point.name, point.share, point.delta_nll, point.delta_nll_se) == ("clo tau=0.8", 0.2, 0.03, 0.0)
    assert (point.family, point.setting) == ("clo", "0.8")


@pytest.mark.filterwarnings("error")
def test_a_design_that_moved_nothing_is_named_and_has_no_place() -> None:
    record = answers_record()
    record["answers"].append(record["answers"][1] | {"design": "clo, by clock", "h2d_bytes_per_step": 0.0})
    answers = parse_answers(record, where="here")
    assert [point.name for point in answers.points] == ["clo tau=0.8"]
    assert "moved nothing, not shown: clo, by clock" in plot_answers(answers).axes[0].get_title(loc="left")


def test_a_narrow_range_has_several_numbers_on_its_axis() -> None:
    points = tuple(Answer(name=str(share), share=share, delta_nll=0.1, delta_nll_se=0.0) for share in (0.08, 0.12))
    figure = plot_answers(Answers(title="narrow", points=points))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    shown = [tick.label1.get_text() for tick in axes.xaxis.get_minor_ticks() if tick.label1.get_text()]
    assert len(shown) >= 3


def test_designs_of_one_family_are_joined() -> None:
    axes = plot_answers(make_answers()).axes[0]
    lines = [line for line in axes.get_lines() if line.get_linestyle() == "-" and len(line.get_xdata()) == 3]
    assert [float(x) for x in lines[0].get_xdata()] == [0.13, 0.21, 0.3]


@pytest.mark.parametrize(("missing"), ["evaluation", "answers"])
def test_bad_answers_are_named(missing: str) -> None:
    record = answers_record()
    del record[missing]
    with pytest.raises(CloError, match=f"some.json: not what clo evaluate --out writes: KeyError.*{missing}"):
        parse_answers(record, where="some.json")
