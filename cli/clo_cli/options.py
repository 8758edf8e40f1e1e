"""Options that several commands share, and the scene they describe. Knows nothing about results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clo.errors import SpecError
from clo.files import check_target, sole_writer

if TYPE_CHECKING:
    from clo.specs import Design, ModelSpec, Workload
    from clo.specs.overrides import Overrides
    from clo_sim.scene import Scene
    from clo_sim.stand_in import TrafficSource

FITTING = "fitting a workload to the trace"
MOST_SEED = 2**63 - 1

ROOTS = ("model", "machine", "profile", "design", "workload")

device_option = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to decode."
)

_SCENE_OPTIONS = (
    click.option(
        "--model",
        help="Preset, TOML file, Hugging Face config.json or model folder.  [default: llama-3-8b, or what --machine "
        "was calibrated with]",
    ),
    click.option(
        "--machine",
        default="h200",
        show_default=True,
        help="Preset, TOML file, or the JSON file of `clo calibrate`.",
    ),
    click.option("--profile", help="Preset or JSON file with the costs.  [default: the machine's]"),
    click.option("--context", "context_tokens", type=int, help="Tokens per sequence.  [default: 131072]"),
    click.option("--batch", type=int, help="Sequences decoded together.  [default: 16]"),
    click.option("--steps", type=int, help="Decode steps to measure.  [default: 96]"),
    click.option("--warmup", "warmup_steps", type=int, help="Steps replayed first to fill caches.  [default: 32]"),
    click.option("--seed", type=int, help="Seed: which recorded heads stand for which heads.  [default: 0]"),
    click.option("--trace", "trace_path", help="Attention trace: preset or .npz file.  [default: smollm2-135m-4k]"),
    click.option("--resample-heads", is_flag=True, help="Let a --trace of a model with other heads stand in."),
    click.option(
        "--synthetic",
        is_flag=True,
        help="Take a synthetic trace fitted to the recorded one, for more steps than were recorded.",
    ),
    click.option("--kv-memory-gb", type=float, help="GPU memory for KV, in GB.  [default: all that is left]"),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="FIELD=VALUE",
        help="Any field (`clo show designs clo` lists them): design.tau=0.9, machine.link.h2d_bytes_per_s=50e9, "
        "profile.read_back.seconds=1e-5 ... Repeat for more.",
    ),
)


def scene_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that describe a scene; the command receives them as keyword arguments for `scene_from`."""
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(_SCENE_OPTIONS), command)


def overrides_from(settings: tuple[str, ...], roots: Sequence[str] = ROOTS) -> Overrides:
    """Parsed `--set` options by root. Raises `SpecError` for roots that the command has no use for."""
    from clo.specs.overrides import parse_overrides

    return {**{root: {} for root in ROOTS}, **parse_overrides(settings, roots)}


def scene_from(options: dict[str, Any], overrides: Overrides) -> Scene:
    """Build and check everything but the design, a bar showing what takes long. Raises `CloError` on bad input."""
    from clo import presets
    from clo.operation_costs import OperationProfile
    from clo.profile import with_costs
    from clo.specs.overrides import apply
    from clo_sim.scene import DEFAULT_MODEL, Scene, gpu_tables, machine_and_costs

    _check_said_once(options, overrides)
    workload = apply(_workload(options), overrides["workload"], "workload")
    machine, costs = machine_and_costs(options["machine"], options["profile"])
    named = options["model"] and presets.load_model(options["model"])
    timed = costs.model if isinstance(costs, OperationProfile) else presets.load_model(DEFAULT_MODEL)
    limit = options["kv_memory_gb"]
    if limit is not None and not limit > 0:
        raise SpecError(f"--kv-memory-gb = {limit:g}: must be positive")
    return Scene(
        model=apply(named or timed, overrides["model"], "model"),
        machine=apply(machine, overrides["machine"], "machine"),
        profile=with_costs(gpu_tables(costs, "--set profile.*"), overrides["profile"])
        if overrides["profile"]
        else costs,
        workload=workload,
        source=_source(options, workload),
        kv_memory_bytes=None if limit is None else limit * 1e9,
    )


def check_outputs(*files: Path | None, figure: Path | None = None) -> None:
    """Whether what is asked for can be written, before the work behind it. Raises `CloError` that names the file."""
    if figure is not None:
        from clo_plots.style import check_suffix

        check_suffix(figure)
    wanted = [path for path in (*files, figure) if path is not None]
    for number, path in enumerate(wanted):
        if path.resolve() in [other.resolve() for other in wanted[:number]]:
            raise SpecError(f"{path}: asked for twice: each output is a file of its own")
        check_target(path)


def names_from(option: str, given: str) -> list[str]:
    """Names or files between commas, each once. Raises `SpecError` where one is missing."""
    names = [name.strip() for name in given.split(",")]
    if not all(names):
        raise SpecError(f"{option} = {given!r}: expected names, or files, between commas")
    return list(dict.fromkeys(names))


def claim_folder(out: Path) -> None:
    """A folder for results, this run's alone until the command ends. Raises `CloError` if it cannot be, before work."""
    check_target(out, folder=True)
    click.get_current_context().with_resource(sole_writer(out))


@contextmanager
def kept(samples: Path) -> Iterator[None]:
    """Whoever interrupts a measurement is told where it left off."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"what was measured is in {samples}: the same command goes on from there", err=True)
        raise


def check_seed(seed: int) -> None:
    """Raise `SpecError` for what no generator of random numbers here takes."""
    if not 0 <= seed <= MOST_SEED:
        raise SpecError(f"--seed = {seed}: must be from 0 to 2^63 - 1")


def design_from(name: str, overrides: Overrides, model: ModelSpec | None = None) -> Design:
    """A named design or TOML file, for a model that it is simulated with, with the `design.*` settings applied."""
    from clo import presets
    from clo.specs.overrides import apply

    settings = {path[0]: value for path, value in overrides["design"].items()}
    return apply(presets.load_design(name, model, settings), overrides["design"], "design")


def check_design(name: str, overrides: Overrides) -> None:
    """Raise `SpecError` for a design that is wrong whatever the model: before one is loaded.

    Models with an indexer of their own have other defaults, with which it may be right.
    """
    from clo import presets

    try:
        design_from(name, overrides)
    except SpecError as error:
        try:
            design_from(name, overrides, presets.load_model(WITH_INDEXER))
        except SpecError:
            raise error from None


WITH_INDEXER = "deepseek-v3.2"
"""A model that stands for all with an indexer of their own."""

_WORKLOAD = {
    "context_tokens": "--context",
    "batch": "--batch",
    "steps": "--steps",
    "warmup_steps": "--warmup",
    "seed": "--seed",
}
"""Options for fields of the workload, by those."""


def _workload(options: dict[str, Any]) -> Workload:
    from clo.specs import Workload

    return Workload.parse({name: options[name] for name in _WORKLOAD if options[name] is not None})


def _check_said_once(options: dict[str, Any], overrides: Overrides) -> None:
    for name, option in _WORKLOAD.items():
        if options[name] is not None and (name,) in overrides["workload"]:
            raise SpecError(f"{option} and --set workload.{name} say the same: give one of them")


def _source(options: dict[str, Any], workload: Workload) -> TrafficSource:
    from clo import presets
    from clo_sim.scene import shipped_source
    from clo_sim.stand_in import DISTINCT_STEPS, TrafficSource

    if options["trace_path"] is None and not options["synthetic"]:
        return shipped_source()
    trace = presets.load_trace(options["trace_path"] or presets.DEFAULT_TRACE)
    if options["synthetic"]:
        from clo_cli.bars import phases
        from clo_sim.synthetic import fit_synthetic

        steps = workload.warmup_steps + min(workload.steps, DISTINCT_STEPS)
        with phases() as tell:
            tell(FITTING, 0, None)
            fitted = fit_synthetic(trace)
            tell(FITTING, 1, 1)
            generated = fitted.generate(
                num_steps=steps, seed=workload.seed, progress=lambda done, total: tell("generating steps", done, total)
            )
        return TrafficSource(generated, repeat_steps=True)
    return TrafficSource(trace, resample_heads=options["resample_heads"])
