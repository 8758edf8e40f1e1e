"""The question without the design: model, machine, workload, costs and trace, by name or as records.

Knows nothing about how a step is run.
"""

from __future__ import annotations

from dataclasses import dataclass

from clo import presets
from clo.plan import DecodePlan, make_plan
from clo.pricing import Pricer
from clo.profile import Profile
from clo.specs import Design, MachineSpec, ModelSpec, Workload
from clo_sim.priced import PricedStep, StepShape, price_step
from clo_sim.stand_in import TrafficSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Everything about a question but the design. `kv_memory_bytes` caps the device memory that KV may take."""

    model: ModelSpec
    machine: MachineSpec
    profile: Profile
    workload: Workload
    source: TrafficSource
    kv_memory_bytes: float | None = None

    def plan(self, design: Design) -> DecodePlan:
        """The design's numbers here. Raises `SpecError` where it does not fit."""
        return make_plan(self.model, self.machine, design, self.workload, kv_memory_bytes=self.kv_memory_bytes)

    def priced(self, plan: DecodePlan) -> PricedStep:
        """The design's recorded step with its prices."""
        return price_step(StepShape.of_plan(plan), Pricer(self.profile, self.machine), self.source.traffic(plan))


def make_scene(
    model: str | ModelSpec = "llama-3-8b",
    machine: str | MachineSpec = "h200",
    *,
    workload: Workload | None = None,
    context_tokens: int | None = None,
    batch: int | None = None,
    profile: str | Profile | None = None,
    source: TrafficSource | None = None,
    kv_memory_bytes: float | None = None,
) -> Scene:
    """A scene from preset names, paths or records; the committed trace stands in unless `source` is given."""
    machine_spec = presets.load_machine(machine) if isinstance(machine, str) else machine
    chosen = machine_spec.profile if profile is None else profile
    sizes = {"context_tokens": context_tokens, "batch": batch}
    changes = {name: value for name, value in sizes.items() if value is not None}
    return Scene(
        model=presets.load_model(model) if isinstance(model, str) else model,
        machine=machine_spec,
        profile=presets.load_named_profile(chosen) if isinstance(chosen, str) else chosen,
        workload=(workload or Workload()).with_fields(**changes),
        source=source or TrafficSource(presets.load_trace()),
        kv_memory_bytes=kv_memory_bytes,
    )
