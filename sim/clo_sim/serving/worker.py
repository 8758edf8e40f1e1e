"""What one worker (a replica, its share of the host included) costs and holds under one design. Knows no arrivals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from clo.errors import SpecError
from clo.placement import hosted_block_bytes, hosted_token_bytes
from clo.specs import Design
from clo_sim.intervals import CostDraw
from clo_sim.run import Executor
from clo_sim.scene import Scene
from clo_sim.serving.clocks import StepClock
from clo_sim.serving.decode import BATCHES, DecodePrices
from clo_sim.serving.memory import MemoryNeed, MemoryRoom, memory_need, memory_room
from clo_sim.serving.prefill import PrefillPrices, prefill_prices
from clo_sim.serving.requests import NS_PER_S, RequestTrace

MAX_BATCH = BATCHES[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerCosts:
    """Prices and memory of a worker. `clock(batch)` prices decode steps, `prefill` chunks of prompts.

    `block_bytes` is a prefix block of `block_tokens` in host memory (both 0: none is kept); `max_tokens` the longest
    sequence the model accepts; `replica_gpus` the GPUs that a worker is, of which one's memory and transfers count.
    `goes_on_at_blocks`: a prompt can go on at the ends of blocks only, where states of linear attention are kept.
    `handed_bytes` and, for each token, `handed_token_bytes` are what a GPU sends of a prompt that goes on elsewhere.
    """

    clock: Callable[[int], StepClock]
    prefill: PrefillPrices
    need: MemoryNeed
    room: MemoryRoom
    max_tokens: int
    block_bytes: int = 0
    block_tokens: int = 0
    replica_gpus: int = 1
    goes_on_at_blocks: bool = False
    handed_bytes: float = 0.0
    handed_token_bytes: float = 0.0
    decode_prices: DecodePrices | None = None

    def alone_ns(self, input_tokens: int, cached: int = 0) -> int:
        """Prefill of a prompt on an idle worker, of which the first `cached` tokens are in the host's memory."""
        free = self.room.device - self.need.device(input_tokens + 1)
        return self.prefill.alone_ns(input_tokens, cached, free_bytes=free)

    def hand_over_ns(self, input_tokens: int, bytes_per_s: float) -> int:
        """Sending what a prompt has left in the caches of a worker to another one."""
        num_bytes = self.handed_bytes + input_tokens * self.handed_token_bytes
        return round(num_bytes / bytes_per_s * NS_PER_S)

    def reused_tokens(self, blocks: int, block_tokens: int, tokens: int) -> int:
        """What so many kept blocks save of `tokens` to prefill: never the last one, whose logits are needed."""
        most = max(0, tokens - 1)
        if self.goes_on_at_blocks:
            return min(blocks, most // block_tokens) * block_tokens
        return min(blocks * block_tokens, most)


def worker_costs(
    scene: Scene,
    design: Design,
    trace: RequestTrace,
    *,
    chunk_tokens: int = 2048,
    keeps_prefixes: bool | None = None,
    executor: Executor = "clock",
) -> WorkerCosts:
    """Costs of `design` in `scene` for the contexts of `trace`; decode steps are priced as they are needed.

    `keeps_prefixes` (default: where the trace names prefixes) sends prompts to a prefix cache in host memory. Raises
    `SpecError` where the model does not fit a replica, or the design not the shortest context.
    """
    prices = DecodePrices(scene, design, max_context=trace.max_total_tokens + 1, executor=executor)
    keeps = trace.has_prefixes if keeps_prefixes is None else keeps_prefixes
    block_tokens = trace.block_tokens if keeps else 0
    block_bytes = int(hosted_block_bytes(scene.part, design, trace.block_tokens) / scene.machine.num_owners)
    return WorkerCosts(
        clock=prices.clock,
        prefill=prefill_prices(scene, design, chunk_tokens=chunk_tokens, block_tokens=block_tokens),
        need=memory_need(scene, design),
        room=memory_room(scene),
        max_tokens=scene.model.max_positions,
        block_bytes=block_bytes if keeps else 0,
        block_tokens=block_tokens,
        replica_gpus=scene.machine.tensor_parallel,
        goes_on_at_blocks=scene.model.linear is not None,
        handed_bytes=scene.part.state_bytes,
        handed_token_bytes=hosted_token_bytes(scene.part, design),
        decode_prices=prices,
    )


def drawn_costs(costs: WorkerCosts, draw: CostDraw) -> WorkerCosts:
    """The same worker with costs drawn from their spreads. Raises `SpecError` where no step executor prices them."""
    prices = costs.decode_prices
    if prices is None:
        raise SpecError("these worker costs are given as such: their spread is not known")
    drawn = prices.drawn(draw)
    prefill = prefill_prices(
        prices.scene,
        prices.design,
        chunk_tokens=costs.prefill.chunk_tokens,
        block_tokens=costs.block_tokens,
        draw=draw,
    )
    return replace(costs, clock=drawn.clock, prefill=prefill, decode_prices=drawn)
