"""The question without the design: model, machine, workload, costs and trace, by name or as records.

Knows nothing about how a step is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from clo import presets
from clo.errors import SpecError
from clo.operation_costs import OperationPricer, OperationProfile, load_operation_profile
from clo.plan import DecodePlan, make_plan, part_of
from clo.pricing import Pricer, Prices
from clo.profile import Profile
from clo.specs import Design, MachineSpec, ModelSpec, Workload
from clo_sim.priced import PricedStep, StepShape, price_step
from clo_sim.stand_in import TrafficSource

DEFAULT_MODEL = "llama-3-8b"

Costs = Profile | OperationProfile
"""What operations cost: a GPU's rates and tables, or the operations of one model as they were timed on one machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Everything about a question but the design. `kv_memory_bytes` caps the device memory that KV may take.

    Raises `SpecError` for costs that were timed with another model.
    """

    model: ModelSpec
    machine: MachineSpec
    profile: Costs
    workload: Workload
    source: TrafficSource
    kv_memory_bytes: float | None = None

    def __post_init__(self) -> None:
        timed = self.profile.model if isinstance(self.profile, OperationProfile) else self.model
        if self.kv_memory_bytes is not None and not self.kv_memory_bytes > 0:
            raise SpecError(f"kv_memory_bytes = {self.kv_memory_bytes:g}: must be positive")
        if self.model != timed:
            raise SpecError(
                f"model {self.model.name}: the costs of {self.machine.name} were timed with {timed.name} of "
                f"{timed.num_layers} layers: leave the model out, or calibrate with this one"
            )
        if self.machine.tensor_parallel > 1 and isinstance(self.profile, OperationProfile):
            raise SpecError(
                f"machine.tensor_parallel = {self.machine.tensor_parallel}: the costs of {self.machine.name} were "
                "timed on one device"
            )

    @property
    def part(self) -> ModelSpec:
        """What one GPU holds of the model: all of it, unless GPUs share it. `SpecError` where they cannot."""
        return part_of(self.model, self.machine)

    def plan(self, design: Design) -> DecodePlan:
        """The design's numbers here. Raises `SpecError` where it does not fit."""
        return make_plan(self.model, self.machine, design, self.workload, kv_memory_bytes=self.kv_memory_bytes)

    def priced(self, plan: DecodePlan) -> PricedStep:
        """The design's recorded step with its prices."""
        return price_step(StepShape.of_plan(plan), self.pricer(plan), self.source.traffic(plan))

    def pricer(self, plan: DecodePlan) -> Prices:
        """The prices of a plan's operations."""
        if isinstance(self.profile, OperationProfile):
            return OperationPricer(self.profile, plan)
        return Pricer(self.profile, self.machine)


def machine_and_costs(name: str, profile: str | None = None) -> tuple[MachineSpec, Costs]:
    """A machine by preset or TOML file and its profile (or another `profile`), or both from `clo calibrate`'s JSON."""
    if Path(name).suffix != ".json":
        machine = presets.load_machine(name)
        return machine, presets.load_named_profile(profile or machine.profile)
    if profile is not None:
        raise SpecError(f"--profile {profile}: {name} brings its own costs: leave the profile out")
    timed = load_operation_profile(Path(name))
    return timed.machine, timed


def gpu_tables(profile: Costs, what: str) -> Profile:
    """Costs that hold for any batch and context. Raises `SpecError` for operations timed on one machine."""
    if isinstance(profile, OperationProfile):
        raise SpecError(f"{what}: needs a profile of a GPU, not operations timed on {profile.machine.name}")
    return profile


def make_scene(
    model: str | Path | ModelSpec | None = None,
    machine: str | Path | MachineSpec = "h200",
    *,
    workload: Workload | None = None,
    context_tokens: int | None = None,
    batch: int | None = None,
    profile: str | Path | Profile | None = None,
    source: TrafficSource | None = None,
    kv_memory_bytes: float | None = None,
) -> Scene:
    """A scene from preset names, paths or records; the committed trace stands in unless `source` is given.

    Without a `model`: the one that a calibrated machine was timed with, else Llama-3-8B. Raises `SpecError` for what is
    none of these.
    """
    machine_spec, costs = _machine_and_costs(machine, profile)
    if model is None:
        model = costs.model if isinstance(costs, OperationProfile) else DEFAULT_MODEL
    for what, given, kind in (("workload", workload, Workload), ("source", source, TrafficSource)):
        if given is not None and not isinstance(given, kind):
            raise SpecError(f"{what} = {given!r}: must be a {kind.__name__}")
    sizes = {"context_tokens": context_tokens, "batch": batch}
    changes = {name: value for name, value in sizes.items() if value is not None}
    return Scene(
        model=model if isinstance(model, ModelSpec) else presets.load_model(_name(model, "model", ModelSpec)),
        machine=machine_spec,
        profile=costs,
        workload=(workload or Workload()).with_fields(**changes),
        source=source or shipped_source(),
        kv_memory_bytes=kv_memory_bytes,
    )


@cache
def shipped_source() -> TrafficSource:
    """The committed trace; scenes of one process share the replays made of it."""
    return TrafficSource(presets.load_trace())


def _machine_and_costs(
    machine: str | Path | MachineSpec, profile: str | Path | Profile | None
) -> tuple[MachineSpec, Costs]:
    known = profile if isinstance(profile, Profile) or profile is None else _name(profile, "profile", Profile)
    if isinstance(machine, MachineSpec):
        return machine, known if isinstance(known, Profile) else presets.load_named_profile(known or machine.profile)
    name = _name(machine, "machine", MachineSpec)
    return (presets.load_machine(name), known) if isinstance(known, Profile) else machine_and_costs(name, known)


def _name(given: object, what: str, record: type) -> str:
    """A name or path as text. Raises `SpecError` for anything else."""
    if not isinstance(given, str | Path):
        raise SpecError(f"{what} = {given!r}: must be a name, a path or a {record.__name__}")
    return str(given)


def design_of(given: str | Path | Design, model: ModelSpec | None = None) -> Design:
    """A design by preset name or TOML file, for a model, or as it is. Raises `SpecError` for anything else."""
    return given if isinstance(given, Design) else presets.load_design(_name(given, "design", Design), model)
