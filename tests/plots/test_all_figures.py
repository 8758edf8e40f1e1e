"""Every figure: no text is cut or covered, nothing to draw is an error, and drawing imports little."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from figure_data import make_answers, make_choices, make_points, make_results, make_timelines, texts_of
from matplotlib.figure import Figure
from matplotlib.text import Text

from clo.errors import CloError
from clo_plots.answers import plot_answers
from clo_plots.choices import plot_choices
from clo_plots.pareto import DesignPoint, plot_pareto
from clo_plots.stalls import plot_stalls
from clo_plots.style import save_figure
from clo_plots.timelines import plot_timelines

LONG_BEST = DesignPoint(
    name="clo tau=0.5006 budget_fraction=0.02007 slot_budgets=none cache=lru",
    kv_device_bytes=1e11,
    tpot_s=0.02,
    finalist=True,
    best=True,
)

FIGURES = {
    "pareto": lambda: plot_pareto(make_points(), title="Llama-3-8B on H200", memory_bytes=124e9),
    "pareto of one": lambda: plot_pareto(make_points()[:1], title="one"),
    "pareto of named": lambda: plot_pareto(make_points()[-7:], title="named"),
    "pareto of a long best": lambda: plot_pareto([*make_points(), LONG_BEST], title="long"),
    "stalls": lambda: plot_stalls(make_results()),
    "stalls of one": lambda: plot_stalls(make_results()[:1]),
    "timeline": lambda: plot_timelines(make_timelines()),
    "timeline of one": lambda: plot_timelines(make_timelines()[:1]),
    "timeline window": lambda: plot_timelines(make_timelines(), start_s=0.0, duration_s=5e-3),
    "answers": lambda: plot_answers(make_answers()),
    "answers of one": lambda: plot_answers(make_answers("staged")),
    "choices": lambda: plot_choices(make_choices()),
    "choices of a long name": lambda: plot_choices(
        make_choices().with_fields(best_name="clo prefetch_depth=1 transfer=cpu_zero_copy cache=head_reuse")
    ),
    "small choices": lambda: plot_choices(make_choices().with_fields(alternatives=make_choices().alternatives[1:3])),
}


def _shown(figure: Figure) -> list[Text]:
    """Tick labels outside of the limits exist, but are not drawn."""
    hidden: set[int] = set()
    for axes in figure.axes:
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            for tick in [*axis.majorTicks, *axis.minorTicks]:
                outside = not min(limits) <= tick.get_loc() <= max(limits)
                hidden |= {id(tick.label1)} if outside else set()
                hidden.add(id(tick.label2))
    return [text for text in texts_of(figure) if id(text) not in hidden]


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_is_cut_or_covered_by_text(name: str, tmp_path: Path) -> None:
    figure = FIGURES[name]()
    save_figure(figure, tmp_path / "figure.png")
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in _shown(figure)]
    for text, box in boxes:
        assert box.x0 >= -1, f"{text} is cut"
        assert box.y0 >= -1, f"{text} is cut"
        assert box.x1 <= figure.bbox.x1 + 1, f"{text} is cut"
        assert box.y1 <= figure.bbox.y1 + 1, f"{text} is cut"
    for (one, first), (other, second) in itertools.combinations(boxes, 2):
        width = min(first.x1, second.x1) - max(first.x0, second.x0)
        height = min(first.y1, second.y1) - max(first.y0, second.y0)
        # extents include the room of descenders: neighbours may share a little of it
        assert min(width, height) < 4, f"{one!r} covers {other!r}"


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plot_pareto([], title="none"),
        lambda: plot_stalls([]),
        lambda: plot_timelines([]),
        lambda: plot_choices(make_choices().with_fields(alternatives=())),
        lambda: plot_answers(make_answers("none")),
    ],
)
def test_nothing_to_draw_is_an_error(draw: Callable[[], Figure]) -> None:
    with pytest.raises(CloError, match="nothing to draw"):
        draw()


def test_drawing_needs_neither_simulator_nor_torch_nor_pyplot() -> None:
    modules = "choices, labels, pareto, stalls, style, sweep_table, timelines, window"
    code = f"from clo_plots import {modules}; import sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"clo_sim", "torch", "matplotlib.pyplot"} & set(loaded)


def test_the_command_imports_nothing_heavy() -> None:
    code = "import clo_cli.plot, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"matplotlib", "numpy", "pyarrow", "pydantic"} & set(loaded)
