"""`clo plot`: figures from files that other commands wrote. Knows nothing about how a figure is drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clo.errors import CloError
from clo.files import read_json
from clo_cli.options import check_outputs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from clo.choices import Choices
    from clo.results import Result
    from clo.timeline import Timeline
    from clo_plots.answers import Answers
    from clo_plots.pareto import DesignPoint

Paths = tuple[Path, ...]

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
@click.option("--kind", type=click.Choice(KINDS), help="What to draw.  [default: what the files hold]")
def plot(paths: Paths, out: Path, kind: str | None) -> None:
    """Draw one figure from the files given.

    \b
    stalls    results (JSON): where each design's time goes
    pareto    sweeps (Parquet): time against memory, and the best of both
    timeline  timelines (JSON of --timeline): a few layers, lane by lane
    choices   choices (JSON): what each choice of the best design is worth
    answers   answers (JSON of clo evaluate): how good, against bytes moved
    """
    from clo_plots import save_figure

    check_outputs(figure=out)
    chosen = kind or _kind_of(paths)
    data = _LOADERS[chosen](paths)
    try:
        figure = _draw(chosen, data, paths)
    except CloError as error:
        raise CloError(f"{', '.join(str(path) for path in paths)}: {error}") from None
    save_figure(figure, out)
    click.echo(f"{out}: {chosen} figure of {', '.join(str(path) for path in paths)}")


def _kind_of(paths: Paths) -> str:
    kind = detect(paths[0])
    for path in paths[1:]:
        if (other := detect(path)) != kind:
            raise CloError(f"{path}: is for a {other} figure, {paths[0]} for a {kind} figure: give files of one kind")
    return kind


def detect(path: Path) -> str:
    """The kind of figure that the content of `path` is for. Raises `CloError` when there is none."""
    try:
        with path.open("rb") as file:
            if file.read(len(_PARQUET_MAGIC)) == _PARQUET_MAGIC:
                return "pareto"
    except OSError as error:
        raise CloError(f"{path}: {error.strerror or error}") from None
    data = read_json(path)
    for key, kind in _KEYS.items():
        if isinstance(data, dict) and key in data:
            return kind
    raise CloError(f"{path}: neither a result, a sweep, a timeline, choices nor answers that clo wrote (see --kind)")


def _load_results(paths: Paths) -> list[Result]:
    return [result for path in paths for result in _results(path)]


def _results(path: Path) -> list[Result]:
    """One result, or those of a list under `results`."""
    from clo.results import Result

    data = read_json(path)
    rows = data["results"] if isinstance(data, dict) and "results" in data else [data]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CloError(f"{path}: not a result, and no list of results either")
    return [Result.parse(row, where=str(path)) for row in rows]


def _load_points(paths: Paths) -> list[DesignPoint]:
    from clo_plots.sweep_table import load_points

    return [point for path in paths for point in load_points(path)]


def _load_timelines(paths: Paths) -> list[Timeline]:
    """Those of one title are told apart by their files."""
    from clo.timeline import load_chrome_trace

    loaded = [(path, timeline) for path in paths for timeline in load_chrome_trace(path)]
    titles = Counter(timeline.title for _, timeline in loaded)
    return [replace(one, title=f"{path.name}: {one.title}") if titles[one.title] > 1 else one for path, one in loaded]


def _load_choices(paths: Paths) -> Choices:
    from clo.choices import load_choices

    return load_choices(_only(paths, "a choices"))


def _load_answers(paths: Paths) -> Answers:
    from clo_plots import parse_answers

    path = _only(paths, "an answers")
    return parse_answers(read_json(path), where=str(path))


def _only(paths: Paths, what: str) -> Path:
    if len(paths) > 1:
        raise CloError(f"{paths[1]}: {what} figure is drawn from one file")
    return paths[0]


_LOADERS: dict[str, Callable[[Paths], Any]] = {
    "stalls": _load_results,
    "pareto": _load_points,
    "timeline": _load_timelines,
    "choices": _load_choices,
    "answers": _load_answers,
}


def _draw(kind: str, data: Any, paths: Paths) -> Figure:
    from clo_plots import plot_answers, plot_choices, plot_pareto, plot_stalls, plot_timelines

    if kind == "pareto":
        return plot_pareto(data, title=", ".join(path.stem for path in paths))
    draw: dict[str, Callable[[Any], Figure]] = {
        "stalls": plot_stalls,
        "timeline": plot_timelines,
        "choices": plot_choices,
        "answers": plot_answers,
    }
    return draw[kind](data)
