"""`clo generate`: text from a real model that decodes under a design. Knows nothing about how it decodes."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clo.errors import SpecError
from clo_cli.options import check_outputs, check_seed, design_from, overrides_from

if TYPE_CHECKING:
    from clo.specs import Design


@click.command()
@click.argument("prompt")
@click.option("--model", default="smollm2-135m", show_default=True, help="smollm2-135m, a model folder or a hub name.")
@click.option("--design", "design_name", default="clo", show_default=True, help="Preset or TOML file.")
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Change a field: design.tau=0.9.")
@click.option("--tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens to generate.")
@click.option("--temperature", default=0.0, show_default=True, help="0: the most likely token each time.")
@click.option("--seed", default=0, show_default=True, help="For sampling.")
@click.option(
    "--trace", "trace_path", help="Trace of the model that says what its heads need.  [default: the shipped one]"
)
@click.option("--timeline", type=click.Path(path_type=Path), help="Write the last step as Chrome trace JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print text and figures as JSON, nothing before the end.")
def generate(
    prompt: str,
    model: str,
    design_name: str,
    settings: tuple[str, ...],
    tokens: int,
    temperature: float,
    seed: int,
    trace_path: str | None,
    timeline: Path | None,
    as_json: bool,
) -> None:
    """Continue PROMPT (or the text of @FILE) with a real model whose KV cache is offloaded under a design.

    \b
    clo generate "The three laws of" --tokens 40
    clo generate @book.txt --design resolve --timeline step.json
    """
    design, words = design_from(design_name, overrides_from(settings, ("design",))), _prompt(prompt)
    if not 0 <= temperature < math.inf:
        raise SpecError(f"--temperature = {temperature}: must be 0 or a positive number")
    check_seed(seed)
    check_outputs(timeline)
    figures = _generate(model, design, words, tokens, temperature, seed, trace_path, timeline, as_json)
    if as_json:
        click.echo(json.dumps(figures, indent=1))
    else:
        click.echo(f"\n\n{_line(figures)}", err=True)


def _line(figures: dict[str, Any]) -> str:
    tokens = f"{figures['design']}: {figures['prompt_tokens']} + {figures['tokens']} tokens"
    kept = (
        f"KV on the device {figures['kv_device_bytes'] / 1e6:.3g} MB, on the host {figures['host_bytes'] / 1e6:.3g} MB"
    )
    if figures["tpot_s"] is None:
        return f"{tokens}, the first of which comes with the prompt: no decode step was run; {kept}"
    return (
        f"{tokens}, TPOT {1e3 * figures['tpot_s']:.0f} ms, hit rate {figures['hit_rate']:.1%}, "
        f"{figures['h2d_bytes_per_step'] / 1e6:.3g} MB a step host to device, {kept}"
    )


def _prompt(given: str) -> str:
    if not given.startswith("@"):
        if not given:
            raise SpecError("PROMPT: empty")
        return given
    try:
        return Path(given[1:]).read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(f"PROMPT {given}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise SpecError(f"PROMPT {given}: not UTF-8 text") from None


def _generate(
    name: str,
    design: Design,
    words: str,
    count: int,
    temperature: float,
    seed: int,
    trace_path: str | None,
    timeline: Path | None,
    as_json: bool,
) -> dict[str, Any]:
    from clo_cli.models import heads_from, load_for_decoding, need_engine

    need_engine("decoding")
    from clo.engine.decoder import Decoder
    from clo.engine.sampling import sampler_of

    model, tokenizer = load_for_decoding(name)
    heads = heads_from(design, model, trace_path)
    ids = tokenizer(words, return_tensors="pt", verbose=False).input_ids[0]
    said: list[int] = []
    seconds, moved, hits, shown = [], 0.0, 0.0, ""
    with Decoder(model, design, max_new_tokens=count, heads=heads) as decoder:
        began = time.perf_counter()
        for token in decoder.generate([ids], sampler=sampler_of(temperature, seed)):
            if said:
                seconds.append(time.perf_counter() - began)
                moved, hits = moved + decoder.traffic.h2d_bytes, hits + decoder.traffic.hit_rate
            began = time.perf_counter()
            said.append(int(token))
            if not as_json:
                now = tokenizer.decode(said)
                click.echo(now[len(shown) :], nl=False)
                shown = now
            if said[-1] == tokenizer.eos_token_id:
                break
        if timeline is not None and decoder.timeline is not None:
            from clo.timeline import save_chrome_trace

            save_chrome_trace(timeline, [decoder.timeline])
        plan = decoder.plan
        assert plan is not None
    steps = len(seconds)
    return {
        "text": tokenizer.decode(said),
        "model": plan.model.name,
        "design": plan.design.name,
        "prompt_tokens": len(ids),
        "tokens": len(said),
        "tpot_s": sum(seconds) / steps if steps else None,
        "hit_rate": hits / steps if steps else None,
        "h2d_bytes_per_step": moved / steps if steps else None,
        "kv_device_bytes": plan.memory.kv,
        "host_bytes": plan.host_bytes,
    }
