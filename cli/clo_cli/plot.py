"""`clo plot`: figures from files that other commands wrote. Knows nothing about how a figure is drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from clo.choices import Choices
    from clo.results import Result
    from clo.timeline import Timeline
    from clo_plots.answers import Answers
    from clo_plots.pareto import DesignPoint

KINDS = ("stalls", "pareto", "timeline", "choices", "answers")
_PARQUET_MAGIC = b"PAR1"
# the key that only this kind's JSON has
_KEYS = {
    "traceEvents": "timeline",
    "alternatives": "choices",
    "answers": "answers",
    "results": "stalls",
    "stall_s": "stalls",
}


@click.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File to write: .png, .svg or .pdf.")
@click.option("--kind", type=click.Choice(KINDS), help="What to draw.  [default: what the first file holds]")
def plot(paths: tuple[Path, ...], out: Path, kind: str | None) -> None:
    """Draw one figure from the files given.

    \b
    stalls    results (JSON): where each design's time goes
    pareto    sweeps (Parquet): time against memory, and the best of both
    timeline  timelines (JSON of --timeline): a few layers, lane by lane
    choices   choices (JSON): what each choice of the best design is worth
    answers   answers (JSON of clo evaluate): how good, against bytes moved
    """
    from clo.errors import CloError
    from clo.files import check_target
    from clo_plots.style import check_suffix, save_figure

    check_suffix(out)
    check_target(out)
    chosen = kind or detect(paths[0])
    load, draw = _KINDS[chosen]
    data = load(paths)
    try:
        figure = draw(data)
    except CloError as error:
        raise CloError(f"{', '.join(str(path) for path in paths)}: {error}") from None
    save_figure(figure, out)
    click.echo(f"{out}: {chosen} figure of {', '.join(str(path) for path in paths)}")


def detect(path: Path) -> str:
    """The kind of figure that the content of `path` is for. Raises `CloError` when there is none."""
    from clo.errors import CloError

    try:
        with path.open("rb") as file:
            if file.read(len(_PARQUET_MAGIC)) == _PARQUET_MAGIC:
                return "pareto"
    except OSError as error:
        raise CloError(f"{path}: {error.strerror or error}") from None
    data = _read_json(path)
    for key, kind in _KEYS.items():
        if isinstance(data, dict) and key in data:
            return kind
    raise CloError(f"{path}: neither a result, a sweep, a timeline, choices nor answers that clo wrote (see --kind)")


def _read_json(path: Path) -> Any:
    from clo.files import read_json

    return read_json(path)


def _load_results(paths: tuple[Path, ...]) -> list[Result]:
    return [result for path in paths for result in _results(path)]


def _results(path: Path) -> list[Result]:
    """One result, or those of a list under `results`."""
    from clo.errors import CloError
    from clo.results import Result

    data = _read_json(path)
    rows = data["results"] if isinstance(data, dict) and "results" in data else [data]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CloError(f"{path}: not a result, and no list of results either")
    return [Result.parse(row, where=str(path)) for row in rows]


def _draw_stalls(results: list[Result]) -> Figure:
    from clo_plots.stalls import plot_stalls

    return plot_stalls(results)


def _load_sweep(paths: tuple[Path, ...]) -> tuple[str, list[DesignPoint]]:
    from clo_plots.sweep_table import load_points

    return ", ".join(path.stem for path in paths), [point for path in paths for point in load_points(path)]


def _draw_pareto(sweep: tuple[str, list[DesignPoint]]) -> Figure:
    from clo_plots.pareto import plot_pareto

    title, points = sweep
    return plot_pareto(points, title=title)


def _load_timelines(paths: tuple[Path, ...]) -> list[Timeline]:
    """Those of one title are told apart by their files."""
    from dataclasses import replace

    from clo.timeline import load_chrome_trace

    loaded = [(path, timeline) for path in paths for timeline in load_chrome_trace(path)]
    titles = Counter(timeline.title for _, timeline in loaded)
    return [replace(one, title=f"{path.name}: {one.title}") if titles[one.title] > 1 else one for path, one in loaded]


def _draw_timelines(timelines: list[Timeline]) -> Figure:
    from clo_plots.timelines import plot_timelines

    return plot_timelines(timelines)


def _load_choices(paths: tuple[Path, ...]) -> Choices:
    from clo.choices import load_choices
    from clo.errors import CloError

    if len(paths) > 1:
        raise CloError(f"{paths[1]}: a choices figure is drawn from one file")
    return load_choices(paths[0])


def _draw_choices(choices: Choices) -> Figure:
    from clo_plots.choices import plot_choices

    return plot_choices(choices)


def _load_answers(paths: tuple[Path, ...]) -> Answers:
    from clo.errors import CloError
    from clo_plots.answers import parse_answers

    if len(paths) > 1:
        raise CloError(f"{paths[1]}: an answers figure is drawn from one file")
    return parse_answers(_read_json(paths[0]), where=str(paths[0]))


def _draw_answers(answers: Answers) -> Figure:
    from clo_plots.answers import plot_answers

    return plot_answers(answers)


_KINDS: dict[str, tuple[Callable[[tuple[Path, ...]], Any], Callable[[Any], Figure]]] = {
    "stalls": (_load_results, _draw_stalls),
    "pareto": (_load_sweep, _draw_pareto),
    "timeline": (_load_timelines, _draw_timelines),
    "choices": (_load_choices, _draw_choices),
    "answers": (_load_answers, _draw_answers),
}
