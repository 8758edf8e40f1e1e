"""`clo run`: decode steps of a real decoder, reported like simulated ones. Knows nothing about how it decodes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from clo.errors import SpecError
from clo_cli.options import check_design, check_outputs, design_from, device_option, overrides_from

if TYPE_CHECKING:
    from clo.engine.measure import MachineRun
    from clo.engine.models.network import Network
    from clo.specs import Design, ModelSpec

LARGEST_BATCH = 65536
PREPARING = "weights and prompts"
DEFAULT_MODEL = "smollm2-135m"
BY_HEAD_PROFILE = ("target_hit_rate", "tau_importance_power", "gqa_fold")
"""Fields that a head profile gives a meaning, which made-up contexts have none of."""


@click.command()
@click.option("--model", help="Shape of the model: preset, TOML file, config.json or folder.  [default: smollm2-135m]")
@click.option("--weights", help="Real weights: smollm2-135m, a model folder or a hub name.  [default: random ones]")
@click.option("--layers", type=int, help="Layers to run (random weights only).  [default: all]")
@click.option("--design", "design_name", default="clo", show_default=True, help="Preset or TOML file.")
@click.option(
    "--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Any field of the design: design.tau=0.9."
)
@device_option
@click.option(
    "--context",
    type=click.IntRange(1),
    default=2048,
    show_default=True,
    help="Tokens per sequence before the first step.",
)
@click.option(
    "--batch", type=click.IntRange(1, LARGEST_BATCH), default=1, show_default=True, help="Sequences decoded together."
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Decode steps to measure, after two that are not.",
)
@click.option("--timeline", type=click.Path(path_type=Path), help="Write the median step as Chrome trace JSON.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the result as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def run(
    model: str | None,
    weights: str | None,
    layers: int | None,
    design_name: str,
    settings: tuple[str, ...],
    device: str,
    context: int,
    batch: int,
    steps: int,
    timeline: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Really decode under a design on this machine, and print where a step's time goes.

    The result and the timeline are those of `clo simulate`. Contexts and text are made up, and so are weights unless
    --weights names some: a shape of any size needs no download. Made-up weights move about as many pages as real ones.
    --device cuda decodes on a GPU, in bfloat16; it has not yet run on one.

    \b
    clo run --design resolve --context 4096 --timeline step.json
    clo run --model llama-3-8b --layers 4 --design clo
    """
    overrides = overrides_from(settings, ("design",))
    check_design(design_name, overrides)
    if weights and model:
        raise SpecError(f"--model {model}: real weights have their own shape: leave it out, or --weights")
    if weights and layers:
        raise SpecError(f"--layers {layers}: real weights have their own layers: leave it out, or --weights")
    check_outputs(timeline, out)
    with_design = partial(design_from, design_name, overrides)
    design, measured = _measured(model or DEFAULT_MODEL, weights, layers, with_design, device, context, batch, steps)
    _report(measured, design, timeline, out, as_json)


def _measured(
    model: str,
    weights: str | None,
    layers: int | None,
    with_design: Callable[[ModelSpec], Design],
    device: str,
    context: int,
    batch: int,
    steps: int,
) -> tuple[Design, MachineRun]:
    """The design as it suits the model, and the run."""
    from clo_cli.bars import phases
    from clo_cli.models import need_engine

    need_engine("decoding")
    from clo.engine.decoder import Decoder
    from clo.engine.measure import run_steps
    from clo.engine.random_weights import random_prompt

    with phases() as tell:
        tell(PREPARING, 0, None)
        network = _network(model, weights, layers, device)
        design = with_design(network.spec)
        with Decoder(network, design.as_without_head_profile(), max_new_tokens=steps + 4) as decoder:
            decoder.make_plan([context] * batch)  # what does not fit is refused before a prompt is made up
            prompts = [random_prompt(network, context, seed=seed) for seed in range(batch)]

            def progress(done: int, total: int) -> None:
                tell(PREPARING, 1, 1)
                tell("decode steps", done, total)

            return design, run_steps(decoder, prompts, steps=steps, progress=progress)


def _network(model: str, weights: str | None, layers: int | None, device: str) -> Network:
    from clo import presets
    from clo.engine.models.network import Network
    from clo.engine.random_weights import checked, dtype_on, need_device, random_model
    from clo_cli.models import cut_to, load_for_decoding

    if weights:
        return Network(load_for_decoding(weights, device)[0])
    need_device(device)
    whole = presets.load_model(model)
    shape = cut_to(whole, layers)
    name = shape.name if shape == whole else f"{shape.name} ({shape.num_layers} layers)"
    return Network(random_model(checked(shape, device), dtype=dtype_on(device), device=device), name)


def _left_out(design: Design) -> tuple[str, ...]:
    """What of the design was not run as it was asked for."""
    asked, ran = design, design.as_without_head_profile()
    changed = [name for name in BY_HEAD_PROFILE if getattr(asked, name) != getattr(ran, name)]
    if not changed:
        return ()
    fields = ", ".join(f"design.{name} = {getattr(asked, name)}" for name in changed)
    return (f"{fields}: left out, made-up contexts have no head profile: tau = {ran.tau:g} and a group's mean for all",)


def _report(measured: MachineRun, design: Design, timeline: Path | None, out: Path | None, as_json: bool) -> None:
    from clo.engine.run import result_of
    from clo.timeline import save_chrome_trace

    result = result_of(measured)
    result = result.with_fields(assumptions=result.assumptions + _left_out(design))
    if timeline is not None:
        save_chrome_trace(timeline, [measured.timelines[measured.median_step]])
    if out is not None:
        result.save(out)
    if as_json:
        click.echo(result.model_dump_json(indent=1))
        return
    from clo_cli.tables import print_result

    print_result(result)
    if timeline is not None:
        click.echo(f"timeline of the median step: {timeline} (open in https://ui.perfetto.dev)")
