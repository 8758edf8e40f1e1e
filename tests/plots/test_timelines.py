"""Timelines of designs lined up at a layer."""

from __future__ import annotations

import pytest
from figure_data import make_timeline, make_timelines, words
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from clo.errors import CloError
from clo.timeline import Timeline
from clo_plots.timelines import plot_timelines
from clo_plots.window import choose_window


def bars_of(axes: Axes) -> list[Rectangle]:
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def test_panels_show_the_same_layer_for_the_same_time() -> None:
    timelines = make_timelines()
    window = choose_window(timelines, start_s=None, duration_s=None)
    assert window.end_s - window.begin_s == pytest.approx(3.5 * 0.6e-3)
    assert window.zeros_s == pytest.approx([16.6 * 0.6e-3, 16.6 * 1.7e-3, 16.6 * 15e-3])
    figure = plot_timelines(timelines)
    label = figure.axes[-1].get_xlabel()
    assert "attention in layer 16" in label
    assert "each design in its own time" in label
    for axes in figure.axes:
        assert axes.get_xlim() == pytest.approx((-1.05, 1.05))
        assert any(bar.get_x() == pytest.approx(0.0) for bar in bars_of(axes))


def test_stalls_are_hatched_and_named_and_layers_numbered() -> None:
    figure = plot_timelines(make_timelines())
    slow = figure.axes[2]
    assert any(bar.get_hatch() and bar.get_width() == pytest.approx(7.5) for bar in bars_of(slow))
    assert "on-demand transfer" in [text.get_text() for text in slow.texts]
    numbers = [text.get_text() for text in figure.axes[0].texts if text.get_text().isdigit()]
    assert numbers == ["15", "16", "17"]
    assert "stall: on-demand transfer" in words(figure)


def test_a_given_window_is_the_same_time_of_every_step() -> None:
    figure = plot_timelines(make_timelines(), start_s=0.0, duration_s=0.5e-3)
    assert figure.axes[-1].get_xlim() == pytest.approx((0.0, 500.0))
    assert figure.axes[-1].get_xlabel() == "time from the start of the step (us)"


def test_what_happens_outside_of_the_window_is_not_drawn() -> None:
    assert len(plot_timelines(make_timelines()[:1]).axes[0].patches) < 30


@pytest.mark.parametrize("duration", [0.0, -1.0])
def test_an_empty_window_is_an_error(duration: float) -> None:
    with pytest.raises(CloError, match=r"clo: a window of .* shows nothing"):
        plot_timelines(make_timelines(), duration_s=duration)


def test_designs_without_a_common_layer_cannot_be_lined_up() -> None:
    timelines = [make_timeline("deep", 1e-3), make_timeline("shallow", 1e-3, num_layers=8)]
    with pytest.raises(CloError, match="shallow: no attention in layer 16"):
        plot_timelines(timelines)
    assert len(plot_timelines(timelines, start_s=0.0).axes) == 2


def test_a_timeline_without_spans_is_an_error() -> None:
    with pytest.raises(CloError, match="shows nothing"):
        plot_timelines([Timeline(title="idle", spans=(), lanes=("main stream",))], duration_s=1.0)
