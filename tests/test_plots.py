"""Figures: what they show, that nothing in them is cut or covered, and how they are saved."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from figure_data import (
    TPOT_MS,
    make_answers,
    make_choices,
    make_points,
    make_result,
    make_results,
    make_timeline,
    make_timelines,
)
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from clo.choices import Alternative, Choices, load_choices
from clo.errors import CloError
from clo.timeline import Timeline
from clo_plots.answers import parse_answers, plot_answers
from clo_plots.choices import plot_choices, ranked
from clo_plots.pareto import DesignPoint, pareto_front, plot_pareto
from clo_plots.stalls import plot_stalls, scale_limit_s, segments
from clo_plots.style import save_figure
from clo_plots.timelines import plot_timelines
from clo_plots.window import choose_window


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_choices_that_tie_share_a_row_and_no_difference_is_neither_slower_nor_faster() -> None:
    values = {"host": 0.021, "events": 0.021, "flags": 0.0211, "graph": 0.020}
    tied = [Alternative(field="sync", chosen="none", value=v, tpot_s=s) for v, s in values.items()]
    other = Alternative(field="cache", chosen="lru", value="none", tpot_s=0.021)
    figure = plot_choices(Choices(best_name="clo", best_tpot_s=0.020, alternatives=(*tied, other)))
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert shown == ["flags", "host, events", "graph", "none"]
    assert words(figure).count("no difference") == 1


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


FIGURES = {
    "pareto": lambda: plot_pareto(make_points(), title="Llama-3-8B on H200", memory_bytes=124e9),
    "pareto of one": lambda: plot_pareto(make_points()[:1], title="one"),
    "pareto of named": lambda: plot_pareto(make_points()[-7:], title="named"),
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


def texts_of(figure: Figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in texts_of(figure)]


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


# --- pareto


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


# --- stalls


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


# --- timelines


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


def test_designs_on_different_machines_are_told_apart() -> None:
    one, other, *_ = make_results()
    assert one.design.name in words(plot_stalls([one, other]))
    assert f"{one.design.name}, 4 x h200" in words(plot_stalls([one.with_fields(machine="4 x h200"), other]))


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


# --- choices


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


# --- saving


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf", "PNG"])
def test_the_same_figure_gives_the_same_bytes(suffix: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.{suffix}" for name in ("one", "two")]
    for path in paths:
        save_figure(plot_stalls(make_results()), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["figure", "figure.jpg", "figure.png.gz"])
def test_another_suffix_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(CloError, match=r"must be one of \.png, \.svg, \.pdf"):
        save_figure(plot_stalls(make_results()), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, figure = tmp_path / "figure.png", plot_stalls(make_results())
    path.write_bytes(b"old")

    def fail(file: object, **_: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(CloError, match="No space left"):
        save_figure(figure, path)
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("figure.png", b"old")]


def test_settings_of_matplotlib_stay(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    save_figure(plot_stalls(make_results()), tmp_path / "figure.svg")
    assert dict(matplotlib.rcParams) == before


def test_drawing_needs_neither_simulator_nor_torch_nor_pyplot() -> None:
    modules = "choices, labels, pareto, stalls, style, sweep_table, timelines, window"
    code = f"from clo_plots import {modules}; import sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"clo_sim", "torch", "matplotlib.pyplot"} & set(loaded)


def test_the_command_imports_nothing_heavy() -> None:
    code = "import clo_cli.plot, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"matplotlib", "numpy", "pyarrow", "pydantic"} & set(loaded)


# --- answers


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
