"""`clo heads`: the head profile of a recorded model. Knows nothing about how it is measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from clo.errors import SpecError

if TYPE_CHECKING:
    from clo.engine.heads import HeadStatistics
    from clo.trace import TraceHeader


@click.command()
@click.argument("trace", required=False)
@click.option("--budget", default=0.1, show_default=True, help="Share of the context whose pages are compared.")
@click.option("--json", "as_json", is_flag=True, help="Print every head as JSON.")
def heads(trace: str | None, budget: float, as_json: bool) -> None:
    """Importance, mean query similarity and prefetchability of each KV head, from TRACE (default: the shipped one).

    Thresholds per head (design.target_hit_rate), weights of a group's query heads (design.gqa_fold = importance) and
    the choice of pinned heads come from these.
    """
    from clo import presets
    from clo.engine.heads import measure_heads

    if not 0 < budget <= 1:
        raise SpecError(f"--budget = {budget}: must be a share above 0, at most 1")
    recorded = presets.load_trace(trace or presets.DEFAULT_TRACE)
    found = measure_heads(recorded, budget_fraction=budget)
    if as_json:
        click.echo(json.dumps(_records(recorded.header, found)))
    else:
        _print(recorded.header, found)


def _records(header: TraceHeader, found: HeadStatistics) -> dict[str, Any]:
    heads, group, unpredicted = header.num_kv_heads, header.group_size, header.first_predicted(1)
    return {
        "model": header.model,
        "heads": [
            {
                "layer": layer,
                "kv_head": head,
                "importance": [float(value) for value in found.importance[row, head * group : (head + 1) * group]],
                "similarity": float(found.similarity[row, head]),
                "prefetchability": None if row < unpredicted else float(found.prefetchability[row, head]),
            }
            for row, layer in enumerate(header.places)
            for head in range(heads)
        ],
    }


def _print(header: TraceHeader, found: HeadStatistics) -> None:
    from rich.table import Table

    from clo_cli.tables import console

    table = Table(title=f"KV heads of {header.model}, one number per head of the layer")
    for name in ("layer", "importance", "similarity of adjacent queries", "best pages predicted a layer ahead"):
        table.add_column(name, justify="right")
    importance = found.importance.reshape(*found.similarity.shape, -1).mean(-1)
    for row, layer in enumerate(header.places):
        table.add_row(
            str(layer),
            _numbers(importance[row], ".2f"),
            _numbers(found.similarity[row], ".2f"),
            "-" if row < header.first_predicted(1) else _numbers(found.prefetchability[row], ".0%"),
        )
    console().print(table)


def _numbers(values: Iterable[float], form: str) -> str:
    return "  ".join(format(float(value), form) for value in values)
