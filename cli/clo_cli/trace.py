"""`clo trace`: show what an attention trace holds. Knows nothing about how the statistics are made."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.table import Table


@click.command(name="trace")
@click.argument("name", metavar="[TRACE]", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print every statistic as JSON.")
def trace(name: str | None, as_json: bool) -> None:
    """Show statistics of an attention trace: a preset or a file (default: the one that ships with clo)."""
    from clo import presets
    from clo.trace_stats import describe

    described = describe(presets.load_trace(presets.DEFAULT_TRACE if name is None else name))
    if as_json:
        click.echo(json.dumps(described, indent=2))
    else:
        _print(described)


def _print(described: dict[str, Any]) -> None:
    from clo_cli.tables import console

    out = console()
    out.print(_about(described), highlight=False)
    out.print(_cosine_table(described))
    if described["attention_mass"]["best_pages"]:
        out.print(_overlap_table(described))
    if described["layers"]:
        out.print(_layer_table(described["layers"]))


def _about(described: dict[str, Any]) -> str:
    header, (first, last) = described["header"], described["candidate_pages"]
    mass = described["attention_mass"]
    best = ", ".join(f"{budget} pages {_number(share)}" for budget, share in mass["best_pages"].items())
    return (
        f"{header['model']}: {header['num_layers']} layers, {header['num_query_heads']} query heads, "
        f"{header['num_kv_heads']} KV heads, head_dim {header['head_dim']}\n"
        f"{header['num_steps']} decode steps from {header['context_tokens']} tokens of {header['text_source']}, "
        f"recorded {header['recorded_at']}\n"
        f"pages of {header['page_size']} tokens, {first} to {last} candidates, best {header['max_budget_pages']} kept\n"
        f"attention mass: {_number(mass['resident'])} on resident tokens"
        f"{best and f'; on the best {best}'}"
    )


def _cosine_table(described: dict[str, Any]) -> Table:
    table = _table("Queries of a KV head", ["measure", "value"])
    for lag, value in described["cosine_at_lag"].items():
        table.add_row(f"cosine, {lag} step{'s' if lag != '1' else ''} apart", _number(value))
    for ahead, value in described["lookahead_cosine"].items():
        table.add_row(f"cosine, approximated {_layers(ahead)} ahead", _number(value))
    for tau, value in described["hit_rate_at_tau"].items():
        table.add_row(f"steps within tau = {tau} of the anchor", _number(value))
    return table


def _overlap_table(described: dict[str, Any]) -> Table:
    rows = []
    for selector, values in described["adjacent_overlap"].items():
        rows.append((f"{selector}: adjacent steps", values))
    for selector, by_distance in described["lookahead_overlap"].items():
        rows += [(f"{selector}: {_layers(ahead)} ahead", values) for ahead, values in by_distance.items()]
    for selector, values in described["overlap_with_exact"].items():
        rows.append((f"{selector}: with exact", values))
    budgets = list(rows[0][1]) if rows else []
    table = _table("Share of pages that two choices have in common", ["choices", *(f"{b} pages" for b in budgets)])
    for label, values in rows:
        table.add_row(label, *(_number(values[budget]) for budget in budgets))
    return table


def _layer_table(layers: list[dict[str, Any]]) -> Table:
    # approximate queries of every distance and selector would not fit a terminal: the JSON has them
    columns = [name for name in layers[0] if "_ahead_" not in name or name.startswith("exact_ahead_1")]
    named = [name.replace("_", " ") + (" pages" if "_overlap_" in name else "") for name in columns]
    table = _table("Layers", named)
    for row in layers:
        table.add_row(str(row["layer"]), *(_number(row[name]) for name in columns[1:]))
    return table


def _table(title: str, columns: list[str]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    return table


def _layers(count: str) -> str:
    return "1 layer" if count == "1" else f"{count} layers"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
