"""`clo heads`: the head profile of a recorded model. Knows nothing about how it is measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from clo.errors import SpecError

if TYPE_CHECKING:
    from clo.engine.heads import HeadStatistics


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
        click.echo(json.dumps(_records(recorded.header.model, found)))
    else:
        _print(recorded.header.model, found)


def _records(model: str, found: HeadStatistics) -> dict[str, Any]:
    layers, heads = found.similarity.shape
    group = found.importance.shape[1] // heads
    return {
        "model": model,
        "heads": [
            {
                "layer": layer,
                "kv_head": head,
                "importance": [float(value) for value in found.importance[layer, head * group : (head + 1) * group]],
                "similarity": float(found.similarity[layer, head]),
                "prefetchability": None if layer == 0 else float(found.prefetchability[layer, head]),
            }
            for layer in range(layers)
            for head in range(heads)
        ],
    }


def _print(model: str, found: HeadStatistics) -> None:
    from rich.table import Table

    from clo_cli.tables import console

    table = Table(title=f"KV heads of {model}, one number per head of the layer")
    for name in ("layer", "importance", "similarity of adjacent queries", "best pages predicted a layer ahead"):
        table.add_column(name, justify="right")
    layers, heads = found.similarity.shape
    importance = found.importance.reshape(layers, heads, -1).mean(-1)
    for layer in range(layers):
        table.add_row(
            str(layer),
            _numbers(importance[layer], ".2f"),
            _numbers(found.similarity[layer], ".2f"),
            "-" if layer == 0 else _numbers(found.prefetchability[layer], ".0%"),
        )
    console().print(table)


def _numbers(values: Iterable[float], form: str) -> str:
    return "  ".join(format(float(value), form) for value in values)
