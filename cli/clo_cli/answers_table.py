"""The table that `clo evaluate` prints. Knows nothing about how answers are measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    "change of NLL",
    "passkeys",
    "agreement",
    "same best",
    "output error",
    "mass recalled",
    "selects",
    "h2d/step MB",
    "of refetching",
    "index/step MB",
    "budget, slots",
)


def print_answers(records: list[dict[str, Any]], against: str | None) -> None:
    """One table a context, one row a design; with `against`, also the change of NLL from that design."""
    from clo_cli.tables import console

    out = console()
    for context in dict.fromkeys(record["context_tokens"] for record in records):
        out.print(_table([record for record in records if record["context_tokens"] == context], against))
    out.print(
        "agreement: generated tokens until the first that differs; selects: heads that chose anew; of refetching: "
        "bytes moved, as a share of fetching all that is attended in every step"
    )


def _table(records: list[dict[str, Any]], against: str | None) -> Table:
    from rich.table import Table

    table = Table(title=f"Answers at {records[0]['context_tokens']} tokens, against full attention")
    table.add_column("design", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right")
        if name == COLUMNS[0] and against is not None:
            table.add_column(f"from {against}", justify="right")
    for record in records:
        table.add_row(record["design"], *_cells(record, against is not None))
    return table


def _cells(record: dict[str, Any], compares: bool) -> list[str]:
    found, refetch = record["passkeys_found"], record["refetch_bytes_per_step"]
    change = [_change(record["delta_nll"], record["delta_nll_se"])]
    if compares:
        change.append(_change(record["delta_against"], record["delta_against_se"]))
    return [
        *change,
        f"{sum(found)}/{len(found)}" if found else "-",
        f"{record['agreement']:.0%}",
        f"{record['top1_agreement']:.1%}",
        _or_dash(record["output_error"], ".3f"),
        _or_dash(record["mass_recalled"], ".1%"),
        f"{record['selections_per_head']:.0%}",
        f"{record['h2d_bytes_per_step'] / 1e6:.3g}",
        f"{record['h2d_bytes_per_step'] / refetch:.1%}" if refetch else "-",
        f"{record['index_bytes_per_step'] / 1e6:.3g}",
        f"{record['budget_pages']}, {record['slot_pages']} pages",
    ]


def _change(mean: float, error: float | None) -> str:
    return f"{mean:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
