"""Bars of busy and stalled time."""

from __future__ import annotations

import pytest
from figure_data import TPOT_MS, make_result, make_results, words
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from clo_plots.stalls import plot_stalls, scale_limit_s, segments


def rows_of(figure: Figure) -> dict[int, list[Rectangle]]:
    rows: dict[int, list[Rectangle]] = {}
    for container in figure.axes[0].containers:
        for bar in container:
            rows.setdefault(round(bar.get_y() + bar.get_height() / 2), []).append(bar)
    return rows


def test_bars_add_up_to_tpot_fastest_first() -> None:
    figure = plot_stalls(make_results())
    widths = [sum(bar.get_width() for bar in bars) for _, bars in sorted(rows_of(figure).items())]
    assert widths == pytest.approx(sorted(TPOT_MS.values()))
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == sorted(TPOT_MS, key=TPOT_MS.__getitem__)


def test_slow_designs_go_off_scale_with_their_number() -> None:
    figure = plot_stalls(make_results())
    assert figure.axes[0].get_xlim()[1] == pytest.approx(1.04 * 75)
    assert {"1,250 ms", "5,000 ms", "500 ms", "75 ms", "20 ms"} <= set(words(figure))
    notes = [word for word in words(figure) if word.endswith("% stall: on-demand transfer")]
    assert len(notes) == 3


def test_one_slow_design_of_two_is_off_scale() -> None:
    assert scale_limit_s([0.02, 5.0]) == pytest.approx(0.0208)
    assert scale_limit_s([0.02, 0.09]) == pytest.approx(1.04 * 0.09)


def test_an_unknown_cause_is_drawn_too() -> None:
    result = make_result("clo", 0.02)
    odd = result.with_fields(stall_s=result.stall_s | {"sync": 0.0, "moon phase": 0.0005})
    assert sum(seconds for _, seconds, _ in segments(odd)) == pytest.approx(0.02)
    assert "stall: moon phase" in words(plot_stalls([odd]))


def test_designs_on_different_machines_are_told_apart() -> None:
    one, other, *_ = make_results()
    assert one.design.name in words(plot_stalls([one, other]))
    assert f"{one.design.name}, 4 x h200" in words(plot_stalls([one.with_fields(machine="4 x h200"), other]))
