"""What one sequence needs of GPU and host memory, as a straight line over its tokens. Knows nothing about time.

The line lies above what `clo.plan.make_plan` counts for the sequence with the smallest cache the design works with, by
at most the rounding to whole pages and budgets. Integer bytes: sums over sequences are exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from clo.plan import DecodePlan, kv_room, make_plan
from clo.specs import Design, Workload
from clo_sim.scene import Scene

ROOMY_BYTES = 1e18
"""Memory of a machine on which everything fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeed:
    """Bytes of a sequence of T tokens: `device_base + device_per_token * T` and `host_per_token * T`.

    Where `owners` GPUs have sequences of their own, which are taken to fill them evenly, what each has of it in the
    mean.
    """

    device_base: int
    device_per_token: int
    host_per_token: int
    owners: int = 1

    def device(self, tokens: int) -> int:
        """GPU bytes."""
        return self.device_base + self.device_per_token * tokens

    def host(self, tokens: int) -> int:
        """Host bytes."""
        return self.host_per_token * tokens

    def fits(self, tokens: int, room: MemoryRoom) -> tuple[bool, bool]:
        """Whether a GPU, and its host, have room for one sequence, which is whole on one of them."""
        return self.owners * self.device(tokens) <= room.device, self.owners * self.host(tokens) <= room.host


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRoom:
    """Bytes of one worker that KV may take."""

    device: int
    host: int


def memory_room(scene: Scene) -> MemoryRoom:
    """What weights and reserve leave on the GPU, and the host's pinned memory. Raises `SpecError` if none is left."""
    device = kv_room(scene.model, scene.machine, scene.kv_memory_bytes)
    return MemoryRoom(device=int(device), host=int(scene.machine.host.memory_bytes))


def memory_need(scene: Scene, design: Design) -> MemoryNeed:
    """The line through the needs of the longest context and of half of it, raised above those in between."""
    lengths = _probes(scene.model.max_positions, scene.model.window_tokens or 1)
    plans = {tokens: smallest_plan(scene, design, batch=1, context_tokens=tokens) for tokens in lengths}
    long, half = lengths[-1], max(1, lengths[-1] // 2)
    per_token = math.ceil(max(0.0, (plans[long].memory.kv - plans[half].memory.kv) / max(1, long - half)))
    # budgets and pages are rounded: between two probes a need may be up to a page of slots above the line
    rounding = plans[long].memory.slots / plans[long].slot_pages * (design.slot_budgets or 1.0)
    over = max(plan.memory.kv - per_token * tokens for tokens, plan in plans.items())
    owners = scene.machine.num_owners
    host_per_token = max(plan.host_bytes / tokens for tokens, plan in plans.items())
    return MemoryNeed(
        device_base=math.ceil((max(0.0, over) + rounding) / owners),
        device_per_token=math.ceil(per_token / owners),
        host_per_token=math.ceil(host_per_token / owners),
        owners=owners,
    )


def _probes(longest: int, window: int) -> list[int]:
    lengths = {longest, max(1, longest // 2), min(window, longest)}
    length = 16
    while length < longest:
        lengths |= {length, length + 1}
        length *= 2
    return sorted(lengths)


def smallest_plan(scene: Scene, design: Design, *, batch: int, context_tokens: int) -> DecodePlan:
    """The plan with the smallest cache the design works with, on a machine where memory is no question."""
    least = {"slot_budgets": 1.0} if design.slot_pages is None and design.slot_budgets is None else {}
    chosen = at_context(design, context_tokens).with_fields(**least)
    return make_plan(scene.model, roomy(scene).machine, chosen, _workload(scene, batch, context_tokens))


def roomy(scene: Scene) -> Scene:
    """The scene with memory for everything; rates are as they were."""
    machine = scene.machine
    gpu = machine.gpu.model_copy(update={"memory_bytes": ROOMY_BYTES})
    host = machine.host.model_copy(update={"memory_bytes": ROOMY_BYTES})
    return replace(scene, machine=machine.model_copy(update={"gpu": gpu, "host": host}), kv_memory_bytes=None)


def at_context(design: Design, context_tokens: int) -> Design:
    """A budget in pages is at most the pages there are: short sequences attend to all they have."""
    pages = math.ceil(context_tokens / design.page_size)
    if design.budget_pages is None or design.budget_pages <= pages:
        return design
    return design.with_fields(budget_pages=pages)


def _workload(scene: Scene, batch: int, context_tokens: int) -> Workload:
    return scene.workload.model_copy(update={"batch": batch, "context_tokens": context_tokens})
