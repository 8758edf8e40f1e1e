"""`clo generate`: text from a real model that decodes under a design. Knows nothing about how it decodes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from clo.errors import SpecError
from clo_cli.options import check_design, check_outputs, check_seed, design_from, device_option, overrides_from

if TYPE_CHECKING:
    from clo.engine.decoder import Decoder
    from clo.specs import Design, ModelSpec

READING = "reading the prompt"
Token = TypeVar("Token")

UNFINISHED = "\ufffd"
"""What tokenizers decode bytes to that are not, or not yet, a character."""


class Step(NamedTuple):
    """What one decode step took and moved."""

    seconds: float
    h2d_bytes: float
    hit_rate: float


@click.command()
@click.argument("prompt")
@click.option("--model", default="smollm2-135m", show_default=True, help="smollm2-135m, a model folder or a hub name.")
@click.option("--design", "design_name", default="clo", show_default=True, help="Preset or TOML file.")
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Change a field: design.tau=0.9.")
@device_option
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
    device: str,
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

    --device cuda decodes on a GPU, in bfloat16; it has not yet run on one.
    """
    overrides, words = overrides_from(settings, ("design",)), _prompt(prompt)
    check_design(design_name, overrides)
    if not 0 <= temperature < math.inf:
        raise SpecError(f"--temperature = {temperature}: must be 0 or a positive number")
    check_seed(seed)
    if timeline is not None:
        _check_steps(tokens)
    check_outputs(timeline)
    with_design = partial(design_from, design_name, overrides)
    figures = _generate(model, device, with_design, words, tokens, temperature, seed, trace_path, timeline, as_json)
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


def _check_steps(tokens: int) -> None:
    if tokens < 2:
        raise SpecError(f"--timeline: the first token comes with the prompt, there is no step: --tokens = {tokens}")


def _prompt(given: str) -> str:
    words = _text_of(given) if given.startswith("@") else given
    if not words:
        raise SpecError(f"PROMPT{given and f' {given}'}: empty")
    return words


def _text_of(given: str) -> str:
    try:
        return Path(given[1:]).read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(f"PROMPT {given}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise SpecError(f"PROMPT {given}: not UTF-8 text") from None


def _show(text: str, shown: str) -> str:
    """Print what `text` adds to what has been shown, and return what then has.

    The end of a character whose bytes are spread over several tokens waits for the others.
    """
    whole = text.rstrip(UNFINISHED)
    click.echo(whole[len(shown) :], nl=False)
    return max(shown, whole, key=len)


def _read(generation: Iterator[Token]) -> Token:
    """The first token: most of the wait for it is the prompt."""
    from clo_cli.bars import phases

    with phases() as tell:
        tell(READING, 0, None)
        return next(generation)


def _generate(
    name: str,
    device: str,
    with_design: Callable[[ModelSpec], Design],
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
    from clo.engine.models.network import spec_of
    from clo.engine.sampling import sampler_of

    model, tokenizer = load_for_decoding(name, device)
    design = with_design(spec_of(model))
    heads = heads_from(design, model, trace_path)
    ids = tokenizer(words, return_tensors="pt", verbose=False).input_ids[0]
    with Decoder(model, design, max_new_tokens=count, heads=heads) as decoder:
        generation = decoder.generate([ids], sampler=sampler_of(temperature, seed))
        said, steps = _decode(decoder, generation, tokenizer, silent=as_json)
        if timeline is not None and decoder.timeline is not None:
            from clo.timeline import save_chrome_trace

            save_chrome_trace(timeline, [decoder.timeline])
        plan = decoder.plan
        assert plan is not None
    return {
        "text": tokenizer.decode(said),
        "model": plan.model.name,
        "design": plan.design.name,
        "prompt_tokens": len(ids),
        "tokens": len(said),
        "tpot_s": _mean([step.seconds for step in steps]),
        "hit_rate": _mean([step.hit_rate for step in steps]),
        "h2d_bytes_per_step": _mean([step.h2d_bytes for step in steps]),
        "kv_device_bytes": plan.memory.kv,
        "host_bytes": plan.host_bytes,
    }


def _decode(
    decoder: Decoder, generation: Iterator[Any], tokenizer: Any, *, silent: bool
) -> tuple[list[int], list[Step]]:
    """Tokens up to the end of the text, shown as they come unless `silent`; the first comes with the prompt."""
    said, steps, shown = [int(_read(generation))], [], ""
    while True:
        if not silent:
            shown = _show(tokenizer.decode(said), shown)
        began = time.perf_counter()
        token = None if said[-1] == tokenizer.eos_token_id else next(generation, None)
        if token is None:
            break
        steps.append(Step(time.perf_counter() - began, decoder.traffic.h2d_bytes, decoder.traffic.hit_rate))
        said.append(int(token))
    if not silent:
        click.echo(tokenizer.decode(said)[len(shown) :], nl=False)
    return said, steps


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
