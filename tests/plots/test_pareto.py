"""Time over memory: the front, names, legend."""

from __future__ import annotations

import pytest
from figure_data import TPOT_MS, make_points, texts_of, words
from hypothesis import given
from hypothesis import strategies as st

from clo_plots.pareto import DesignPoint, pareto_front, plot_pareto

_coordinates = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=30)


@given(_coordinates)
def test_front_is_what_nobody_beats(coordinates: list[tuple[int, int]]) -> None:
    points = [DesignPoint(name=str(i), kv_device_bytes=m, tpot_s=t) for i, (m, t) in enumerate(coordinates)]
    front = pareto_front(points)
    unbeaten = {
        (m, t) for m, t in coordinates if not any(a <= m and b <= t and (a, b) != (m, t) for a, b in coordinates)
    }
    at = [(point.kv_device_bytes, point.tpot_s) for point in front]
    assert set(at) == unbeaten
    assert at == sorted(unbeaten)
    assert all(
        next(p for p in points if (p.kv_device_bytes, p.tpot_s) == (f.kv_device_bytes, f.tpot_s)) is f for f in front
    )


def test_named_designs_and_the_memory_line_are_labelled() -> None:
    figure = plot_pareto(make_points(), title="Llama-3-8B on H200", memory_bytes=124e9)
    assert {*TPOT_MS, "124 GB available", "Llama-3-8B on H200"} <= set(words(figure))
    assert figure.axes[0].get_yscale() == "log"


def test_names_of_close_markers_come_in_their_order() -> None:
    points = [DesignPoint(name=f"d{i}", kv_device_bytes=1e10, tpot_s=0.08 + 0.002 * i, named=True) for i in range(3)]
    far = DesignPoint(name="far", kv_device_bytes=9e10, tpot_s=0.01)
    figure = plot_pareto([*points, far], title="close")
    heights = {text.get_text(): text.get_window_extent().y0 for text in texts_of(figure)}
    assert heights["d0"] < heights["d1"] < heights["d2"]


def test_finalists_are_told_apart_from_the_swept() -> None:
    points = [DesignPoint(name=str(n), kv_device_bytes=n * 1e9, tpot_s=1 / n, finalist=n > 3) for n in range(1, 6)]
    figure = plot_pareto([*points, *make_points()], title="search")
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert any("finalists" in text for text in legend)
    [drawn] = [line for line in figure.axes[0].lines if "finalists" in str(line.get_label())]
    assert list(drawn.get_xdata()) == [4, 5]


def test_the_best_is_in_the_legend() -> None:
    swept = [
        DesignPoint(name=f"clo tau=0.{n}", kv_device_bytes=n * 1e9, tpot_s=0.2 / n, finalist=n > 3, best=n == 5)
        for n in range(1, 6)
    ]
    figure = plot_pareto([*swept, *make_points()], title="search")
    assert "best: clo tau=0.5, 40 ms" in [text.get_text() for text in figure.legends[0].get_texts()]
    [ring] = [line for line in figure.axes[0].lines if "best:" in str(line.get_label())]
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([5], [pytest.approx(40)])


def test_a_limit_far_above_every_design_takes_no_room() -> None:
    points = make_points()
    most_gb = max(point.kv_device_bytes for point in points) / 1e9
    axes = plot_pareto(points, title="small", memory_bytes=50 * most_gb * 1e9).axes[0]
    assert axes.get_xlim()[1] < 2 * most_gb
    assert f"of {50 * most_gb:.0f}" in axes.get_xlabel()
