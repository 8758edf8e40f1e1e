"""`clo record`: make an attention trace from a real model. Knows nothing about how a trace is coded or measured."""

from __future__ import annotations

import json
from pathlib import Path

import click

from clo.errors import SpecError
from clo_cli.options import check_outputs


@click.command(name="record")
@click.option("--model", default="smollm2-135m", show_default=True, help="smollm2-135m, a model folder or a hub name.")
@click.option("--text", type=click.Path(path_type=Path), help="UTF-8 text to read.  [default: Python's own reference]")
@click.option("--context", default=4096, show_default=True, help="Tokens attended at the first recorded step.")
@click.option("--steps", default=160, show_default=True, help="Decode steps to record.")
@click.option("--page-size", default=16, show_default=True, help="Tokens in a page.")
@click.option("--max-budget-pages", default=64, show_default=True, help="Pages kept for each KV head and step.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("trace.npz"), show_default=True, help="File to write."
)
@click.option("--json", "as_json", is_flag=True, help="Print the header and file size as JSON.")
def record(
    model: str,
    text: Path | None,
    context: int,
    steps: int,
    page_size: int,
    max_budget_pages: int,
    out: Path,
    as_json: bool,
) -> None:
    """Record what a real model's decode steps ask of its KV cache.

    The model reads the text up to --context tokens, then decodes its continuation. The file is written whole or not at
    all.
    """
    from clo.engine.models.loading import hush
    from clo.engine.recording.record import record as record_trace
    from clo_cli.bars import phases

    check_outputs(out)
    hush()
    words, source = read_text(text)
    with phases() as progress:
        trace = record_trace(
            model,
            words,
            context_tokens=context,
            num_steps=steps,
            page_size=page_size,
            max_budget_pages=max_budget_pages,
            text_source=source,
            progress=progress,
        )
    trace.save(out)
    if as_json:
        summary = {"path": str(out), "bytes": out.stat().st_size, "header": trace.header.model_dump(mode="json")}
        click.echo(json.dumps(summary, indent=2))
    else:
        click.echo(f"{out}: {steps} steps from {context} tokens, {out.stat().st_size / 1e6:.2f} MB")


def read_text(path: Path | None) -> tuple[str, str]:
    """The text of a file, or the one that every Python carries; and what it is called."""
    from clo.engine.texts import default_text

    if path is None:
        return default_text(), "pydoc_data.topics of the recording Python"
    try:
        return path.read_text(encoding="utf-8"), path.name
    except OSError as error:
        raise SpecError(f"--text {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise SpecError(f"--text {path}: not UTF-8 text") from None
