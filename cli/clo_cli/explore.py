"""`clo explore`: designs side by side, a sweep of choices, what each is worth, and the files behind it.

Knows nothing about how a step is run or drawn.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clo_cli.options import design_from, overrides_from, scene_from, scene_options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clo.results import Result
    from clo.specs import Design
    from clo.specs.overrides import Overrides
    from clo_sim.explore import Exploration, Progress
    from clo_sim.scene import Scene


@click.command()
@scene_options
@click.option("--designs", help="Comma-separated presets or TOML files to compare [default: all presets].")
@click.option("--base", default="clo", show_default=True, help="The design whose choices are swept.")
@click.option(
    "--vary",
    multiple=True,
    metavar="FIELD=V1,V2",
    help="Design field and the values to try, e.g. design.slot_budgets=1,2,none. Repeat for a grid "
    "[default: cache, slot_budgets, prefetch_depth, transfer, sync].",
)
@click.option("--no-sweep", is_flag=True, help="Compare the named designs only.")
@click.option("--finalists", type=click.IntRange(1), default=5, show_default=True, help="Swept designs to simulate.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for results and figures.")
@click.option("--figures/--no-figures", default=True, show_default=True, help="Draw figures into --out.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def explore(
    designs: str | None,
    base: str,
    vary: tuple[str, ...],
    no_sweep: bool,
    finalists: int,
    out: Path | None,
    figures: bool,
    as_json: bool,
    settings: tuple[str, ...],
    **options: Any,
) -> None:
    """Find the fastest design for a workload, and why.

    Named designs are simulated side by side at equal device memory for KV. Then choices of one design are swept: the
    clock sifts all combinations, the simulator decides among the best, and each choice of the winner is changed alone.

    \b
    clo explore
    clo explore --batch 1 --context 32768 --machine l40s
    clo explore --vary design.slot_budgets=1,2,4,none --vary design.tau=0.7,0.8,0.9
    """
    from clo.files import check_target
    from clo_sim.explore import DEFAULT_GRID
    from clo_sim.explore import explore as run

    overrides = overrides_from(settings)
    scene, named = scene_from(options, overrides), _named(designs, overrides)
    grid = {} if no_sweep else _grid(vary) or DEFAULT_GRID
    if out is not None:
        check_target(out, folder=True)
    with _progress(as_json) as progress:
        found = run(
            scene,
            named=named,
            base=design_from(base, overrides),
            grid=grid,
            num_finalists=0 if no_sweep else finalists,
            progress=progress,
        )
    best = found.best
    if as_json:
        click.echo(json.dumps(_as_json(found, best), indent=1))
    else:
        _print(scene, found, best, no_sweep)
    if out is not None:
        _write(out, scene, found, best, figures)
        if not as_json:
            click.echo(f"results{' and figures' if figures else ''} are in {out}/")


def _named(designs: str | None, overrides: Overrides) -> list[Design]:
    """The designs to compare, with `--set design.*` applied; presets that it contradicts are left out."""
    from clo import presets
    from clo.errors import SpecError

    if designs is not None:
        given = [name.strip() for name in designs.split(",")]
        if not all(given):
            raise SpecError(f"--designs {designs!r}: expected names of designs or TOML files between commas")
        return [design_from(name, overrides) for name in dict.fromkeys(given)]
    found = []
    for name in presets.names("designs"):
        try:
            found.append(design_from(name, overrides))
        except SpecError:
            continue
    return found


def _grid(vary: tuple[str, ...]) -> dict[str, list[Any]]:
    """`("design.tau=0.7,0.8",)` -> `{"tau": [0.7, 0.8]}`. Raises `SpecError` for anything but a design's field."""
    from clo.errors import SpecError
    from clo.specs import Design
    from clo.specs.overrides import parse_value

    grid: dict[str, list[Any]] = {}
    for text in vary:
        path, separator, values = text.partition("=")
        field = path.strip().removeprefix("design.")
        if not separator or field not in Design.model_fields or field in ("name", "description"):
            raise SpecError(f"--vary {text}: expected design.FIELD=V1,V2 (fields: clo show designs clo)")
        if field in grid:
            raise SpecError(f"--vary {text}: design.{field} is varied twice: give all its values to one --vary")
        tried = [value.strip() for value in values.split(",")]
        if not all(tried):
            raise SpecError(f"--vary {text}: a value is missing (none stands for no value)")
        grid[field] = [parse_value(value) for value in tried]
    for field, parsed in grid.items():
        for value in parsed:
            # a typo is an error, not an empty sweep; previous_step is valid with an LRU cache only
            Design.parse({field: value} | ({"cache": "lru"} if value == "previous_step" else {}))
    return grid


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress | None]:
    """A bar on stderr while designs are tried."""
    if quiet:
        yield None
        return
    from clo_cli.bars import progress_bar

    with progress_bar() as bar:
        task = bar.add_task("trying designs", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print(scene: Scene, found: Exploration, best: Result, no_sweep: bool) -> None:
    from clo_cli.tables import console, print_choices, print_designs, print_roofline, print_sources

    load, machine = scene.workload, scene.machine
    question = f"{scene.model.name} on {machine.name}: {load.batch} x {load.context_tokens} tokens"
    console().print(question, style="bold")
    offloads = best.design.offloads
    print_roofline(best, f"an exact design with {best.design.name}'s memory" if offloads else "this workload")
    shown = {result.design.name: result for result in (*found.named, *([] if no_sweep else [best]))}
    print_designs(list(shown.values()), found.not_run, "Designs at equal device memory for KV, simulated")
    if not no_sweep:
        tried = [candidate for candidate in found.candidates if candidate.tpot_s is not None]
        swept = f"{len(found.candidates)} swept ({len(tried)} can run, the best simulated) and {len(found.named)} named"
        console().print(f"Best of {swept}: {best.design.name}: {_choices_of(best)}")
    if found.choices is not None:
        print_choices(found.choices)
    print_sources(shown.values())


def _choices_of(best: Result) -> str:
    design, size = best.design, f"{best.slot_pages} slots a head ({best.slot_pages / best.budget_pages:.1f} budgets)"
    if not design.offloads:
        return "everything on the GPU"
    return (
        f"cache {design.cache} of {size}, prefetch depth {design.prefetch_depth}, {design.transfer} transfer, "
        f"{design.sync} synchronisation: TPOT {best.tpot_s * 1e3:.2f} ms"
    )


def _as_json(found: Exploration, best: Result) -> dict[str, Any]:
    return {
        "best": best.model_dump(mode="json"),
        "named": [result.model_dump(mode="json") for result in found.named],
        "not_run": dict(found.not_run),
        "finalists": [result.model_dump(mode="json") for result in found.finalists],
        "num_candidates": len(found.candidates),
        "choices": found.choices.model_dump(mode="json") if found.choices else None,
    }


def _write(out: Path, scene: Scene, found: Exploration, best: Result, figures: bool) -> None:
    from clo.files import write_text
    from clo_cli.outputs import draw_figures, write_sweep, write_timelines

    write_text(out / "designs.json", json.dumps({"results": _as_json(found, best)["named"]}, indent=1))
    best.save(out / "best.json")
    write_sweep(out / "sweep.parquet", found)
    if found.choices is not None:
        found.choices.save(out / "choices.json")
    timelines = write_timelines(out / "timeline.json", scene, found, best)
    if figures:
        draw_figures(out, scene, found, best, timelines)
