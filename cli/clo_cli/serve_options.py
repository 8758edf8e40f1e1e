"""Options of the two commands that serve requests, and what they describe. Knows nothing about results."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clo.errors import RequestError

if TYPE_CHECKING:
    from clo.specs.overrides import Overrides
    from clo_sim.scene import Scene
    from clo_sim.serving import RequestTrace, ServiceSettings

GENERATED = "To generate them: --load poisson:2 --input-tokens 32768 --output-tokens 512"

NUM_REQUESTS = 2000
"""Requests that a load generates unless told."""
ROOTS = ("model", "machine", "profile", "design")
"""What a setting may be of: batch and context are the requests' affair."""

_OPTIONS = (
    click.option(
        "--requests",
        "requests_path",
        type=click.Path(path_type=Path),
        help="Requests to serve: Mooncake JSONL or Azure CSV, as published (docs/serving.md says where).",
    ),
    click.option(
        "--load",
        metavar="KIND:RATE",
        help="Generate arrivals instead: poisson:4, bursty:4 or fixed:4 requests/s. Lengths are drawn from --requests, "
        "or set by --input-tokens and --output-tokens.",
    ),
    click.option(
        "--num-requests",
        type=click.IntRange(1),
        help="Requests that --load generates.  [default: 2000]",
    ),
    click.option("--input-tokens", type=click.IntRange(1), help="Tokens of every prompt that --load generates."),
    click.option("--output-tokens", type=click.IntRange(1), help="Tokens of every answer that --load generates."),
    click.option("--rate-scale", type=float, default=1.0, show_default=True, help="Factor on the rate of arrivals."),
    click.option("--first", type=click.IntRange(1), help="Serve only so many, the first ones."),
    click.option(
        "--model",
        default="llama-3-8b",
        show_default=True,
        help="Preset, TOML file, Hugging Face config.json or model folder.",
    ),
    click.option(
        "--routing",
        type=click.Choice(["least_loaded", "round_robin", "prefix"]),
        default="least_loaded",
        show_default=True,
        help="Which replica gets a request: with the fewest unfinished, in turn, or with the fewest prompt tokens left "
        "to compute once its prefix cache is used.",
    ),
    click.option(
        "--pressure",
        type=click.Choice(["preempt", "queue"]),
        default="preempt",
        show_default=True,
        help="When memory is short. preempt: admit what fits now, evict the newest later; queue: admit only what fits "
        "to its end.",
    ),
    click.option(
        "--network-gb-per-s",
        type=float,
        help="Network of each GPU, over which prompts' KV goes from those that only prefill.  [default: 50]",
    ),
    click.option(
        "--chunk-tokens",
        type=click.IntRange(1),
        default=2048,
        show_default=True,
        help="Most prompt tokens prefilled at once.",
    ),
    click.option(
        "--max-batch",
        type=int,
        default=256,
        show_default=True,
        help="Most sequences that decode together on a replica.",
    ),
    click.option("--no-prefix-cache", is_flag=True, help="Compute every prompt in full, whatever the trace shares."),
    click.option(
        "--executor",
        type=click.Choice(["clock", "simpy"]),
        default="clock",
        show_default=True,
        help="What prices decode steps: clock, fast; simpy, with contention.",
    ),
    click.option(
        "--seed", type=int, default=0, show_default=True, help="Seed of generated loads, stand-in heads and intervals."
    ),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="FIELD=VALUE",
        help="Any field: machine.host.memory_bytes=256e9, design.tau=0.9, model.max_positions=131072 ...",
    ),
)


def serve_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options; the command receives them as keyword arguments for the functions below."""
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(_OPTIONS), command)


def trace_from(options: dict[str, Any]) -> RequestTrace:
    """The requests: from a file, generated, or generated with the lengths of a file. Raises `CloError` on bad input."""
    from clo_sim.serving import read_requests

    path, load = options["requests_path"], options["load"]
    if path is None and load is None:
        raise RequestError(
            f"--requests FILE or --load KIND:RATE is needed: which requests are to be served? {GENERATED}"
        )
    if path is not None and not path.exists():
        raise RequestError(f"--requests {path}: no such file. {GENERATED}")
    trace = None if path is None else read_requests(path)
    if load is not None:
        trace = _generated(load, trace, options)
    elif options["input_tokens"] is not None or options["output_tokens"] is not None:
        raise RequestError("--input-tokens and --output-tokens belong to --load: a trace has its own lengths")
    elif options["num_requests"] is not None:
        raise RequestError("--num-requests belongs to --load: of a trace --first takes so many")
    assert trace is not None
    trace = trace.first(options["first"]) if options["first"] else trace
    return _without_prefixes(trace, options["no_prefix_cache"]).at_rate(options["rate_scale"])


def _generated(load: str, trace: RequestTrace | None, options: dict[str, Any]) -> RequestTrace:
    from clo_sim.serving import generate, lengths_of

    kind, _, rate = load.partition(":")
    given = (options["input_tokens"], options["output_tokens"])
    if trace is None and None in given:
        raise RequestError(
            "--load needs lengths: --requests FILE to draw them from, or --input-tokens and --output-tokens"
        )
    lengths = (
        [given]
        if trace is None
        else [(given[0] or inputs, given[1] or outputs) for inputs, outputs in lengths_of(trace)]
    )
    try:
        per_s = float(rate)
    except ValueError:
        raise RequestError(f"--load {load!r}: expected KIND:RATE, such as poisson:4 (requests/s)") from None
    count, seed = options["num_requests"] or NUM_REQUESTS, options["seed"]
    return generate(kind, rate_per_s=per_s, num_requests=count, lengths=lengths, seed=seed)  # type: ignore[arg-type]


def _without_prefixes(trace: RequestTrace, drop: bool) -> RequestTrace:
    from dataclasses import replace

    if not drop:
        return trace
    return replace(trace, requests=tuple(one._replace(prefix_blocks=()) for one in trace.requests))


def service_from(
    options: dict[str, Any], *, gpus: int, disaggregated: bool, prefill_gpus: int = 0, coalesce: bool = True
) -> ServiceSettings:
    """How the service is run. Raises `RequestError` for a network that nothing goes over."""
    from clo_sim.serving import ServiceSettings

    given = options["network_gb_per_s"]
    if given is not None and not disaggregated:
        raise RequestError(
            "--network-gb-per-s: nothing goes over it unless some GPUs only prefill (--prefill-gpus, --disaggregated)"
        )
    network = {} if given is None else {"network_bytes_per_s": given * 1e9}
    return ServiceSettings(
        gpus=gpus,
        prefill_gpus=prefill_gpus,
        **network,
        routing=options["routing"],
        pressure=options["pressure"],
        max_batch=options["max_batch"],
        coalesce=coalesce,
    )


def serving_scene(options: dict[str, Any], overrides: Overrides, machine: str, profile: str | None = None) -> Scene:
    """Model, machine and costs; batch and context are the requests' affair."""
    from clo_cli.options import scene_from

    none = dict.fromkeys(("context_tokens", "batch", "steps", "warmup_steps", "trace_path", "kv_memory_gb"))
    chosen = {"model": options["model"], "machine": machine, "profile": profile, "seed": options["seed"]}
    return scene_from({**none, **chosen, "resample_heads": False, "synthetic": False}, overrides)
