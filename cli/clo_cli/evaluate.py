"""`clo evaluate`: how good a real model's answers stay under designs. Knows nothing about how that is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from clo_cli.options import design_from, overrides_from


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True, help="smollm2-135m, a model folder or a hub name.")
@click.option("--designs", default="resident,resolve,clo", show_default=True, help="Presets or TOML files.")
@click.option("--taus", help="Try designs that reuse heads at each of these thresholds: 0.7,0.8,0.9.")
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Change a field: design.slot_budgets=1.")
@click.option("--context", default=1024, show_default=True, help="Tokens of each prompt.")
@click.option("--texts", default=4, show_default=True, help="Places in the text to decode from.")
@click.option("--tokens", default=64, show_default=True, help="Tokens decoded at each place, fed and generated.")
@click.option("--passkeys", default=10, show_default=True, help="Passkeys hidden at evenly spread depths.")
@click.option("--text", "text_path", type=click.Path(path_type=Path), help="UTF-8 text [default: Python's reference].")
@click.option("--seed", default=0, show_default=True, help="Chooses places, keys and depths.")
@click.option("--heads", "trace_path", help="A trace of the model, from which head thresholds and weights are taken.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the records as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON.")
def evaluate(
    model: str,
    designs: str,
    taus: str | None,
    settings: tuple[str, ...],
    context: int,
    texts: int,
    tokens: int,
    passkeys: int,
    text_path: Path | None,
    seed: int,
    trace_path: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Decode held-out text under designs and compare with full attention.

    Every decoded token goes through the design: text that is fed (perplexity), text that is generated, and the question
    for a hidden passkey.

    \b
    clo evaluate --designs resident,resolve,clo --context 1024
    clo evaluate --designs clo --taus 0.6,0.7,0.8,0.9 --out taus.json
    """
    from clo.files import check_target, write_text

    chosen = _designs(designs, taus, overrides_from(settings))
    if out is not None:
        check_target(out)
    records = _evaluate(model, chosen, text_path, trace_path, _settings(context, texts, tokens, passkeys, seed))
    if out is not None:
        write_text(out, json.dumps(records, indent=1))
    if as_json:
        click.echo(json.dumps(records, indent=1))
    else:
        _print(records)


def _settings(context: int, texts: int, tokens: int, passkeys: int, seed: int) -> dict[str, int]:
    return {
        "context_tokens": context,
        "num_texts": texts,
        "decoded_tokens": tokens,
        "num_passkeys": passkeys,
        "seed": seed,
    }


def _designs(names: str, taus: str | None, overrides: Any) -> list[Any]:
    from clo.errors import SpecError

    listed = [name.strip() for name in names.split(",") if name.strip()]
    if not listed:
        raise SpecError(f"--designs = {names!r}: name at least one design")
    chosen = [design_from(name, overrides) for name in listed]
    if taus is None:
        return chosen
    try:
        values = [float(value) for value in taus.split(",")]
    except ValueError:
        raise SpecError(f"--taus = {taus!r}: numbers separated by commas are expected") from None
    tried: list[Any] = []
    for design in chosen:
        if design.gated:
            tried += [
                design.with_fields(tau=tau, target_hit_rate=None, name=f"{design.name} tau={tau:g}") for tau in values
            ]
        else:
            tried.append(design)
    return tried


def _evaluate(
    name: str, designs: list[Any], text_path: Path | None, trace_path: str | None, asked: dict[str, int]
) -> list[dict[str, Any]]:
    from clo.engine.evaluate import EvaluationSettings
    from clo.engine.evaluate import evaluate as run
    from clo_cli.models import load_for_decoding, progress_bar, with_heads
    from clo_cli.record import read_text

    settings, (words, _) = EvaluationSettings(**asked), read_text(text_path)
    model, tokenizer = load_for_decoding(name)
    prepared = [with_heads(design, model, trace_path) for design in designs]
    with progress_bar() as progress:
        found = run(model, tokenizer, words, prepared, settings, progress)
    return [quality.as_record() for quality in found]


def _print(records: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from clo_cli.tables import console

    table = Table(title=f"Answers at {records[0]['context_tokens']} tokens, against full attention")
    table.add_column("design")
    columns = (
        "change of NLL",
        "passkeys",
        "agreement",
        "hit rate",
        "heads that missed",
        "h2d/step MB",
        "budget, slots",
    )
    for name in columns:
        table.add_column(name, justify="right")
    for record in records:
        rate = record["passkey_rate"]
        table.add_row(
            record["design"],
            f"{record['delta_nll']:+.4f} ± {record['delta_nll_se']:.4f}",
            "-" if rate is None else f"{round(rate * record['passkeys'])}/{record['passkeys']}",
            f"{record['agreement']:.0%}",
            f"{record['hit_rate']:.1%}",
            f"{record['demand_miss_rate']:.0%}",
            f"{record['h2d_bytes_per_step'] / 1e6:.3g}",
            f"{record['budget_pages']}, {record['slot_pages']} pages",
        )
    console().print(table)
