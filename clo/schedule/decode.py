"""One decode step, written once for every design: what is launched where, what waits for what, who moves which bytes.

The generators run on any `Machine`: the recorder that feeds clock and simulator, or a real device. They know nothing
about time, tensors or which heads missed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from clo.plan import DecodePlan
from clo.schedule.machine import Cause, HostWait, Lane, Machine, Op, Step, Token
from clo.schedule.ops import Stage, StepOps
from clo.schedule.transfer import Arrival, fetch, needs_host, wait_for
from clo.specs import Attend, Cache, ResolveOn, Sync

BEST_TOKEN_VALUES = 4
"""A GPU has a part of the vocabulary: of each sequence it sends its best token and that one's logit, 4 bytes each."""


@dataclass(slots=True)
class _Flight:
    """What is under way while the step is being submitted, by the layer it is for."""

    chosen: dict[int, Token] = field(default_factory=dict)
    arrived: dict[int, Arrival] = field(default_factory=dict)
    speculated: Arrival | None = None
    written_back: Token | None = None


def decode_step(plan: DecodePlan, m: Machine) -> Step:
    """Submit one decode step of `plan` to `m`; ends when the launching thread knows the new tokens.

    A step starts and ends with every lane idle: what a step prefetches for the next one has arrived when it ends.
    """
    ops, flight = StepOps(plan), _Flight()
    if plan.design.sync is Sync.GRAPH:
        m.begin_graph()
    _first_streamed_layers(m, ops, flight)
    _add_up(m, ops, 0)
    for layer in range(plan.model.num_layers):
        yield from _layer(m, ops, flight, layer)
    m.launch(Lane.MAIN, ops.hidden_norm("final_norm", ops.last_layer))
    _collect(m, ops, ops.last_layer)
    m.launch(Lane.MAIN, ops.lm_head())
    yield from _join(m, ops, flight)


def _join(m: Machine, ops: StepOps, flight: _Flight) -> Step:
    if flight.written_back is not None:
        m.wait(Lane.MAIN, flight.written_back, Cause.ORDER)
    if flight.speculated is not None:
        wait_for(m, Lane.MAIN, flight.speculated, ops.last_layer, Cause.PREFETCH)
    sampled = m.launch(Lane.MAIN, ops.sample())
    if ops.shares_model:
        sampled = m.launch(Lane.MAIN, ops.all_reduce(ops.last_layer, BEST_TOKEN_VALUES))
    yield HostWait(sampled, ops.host_action("read_back", ops.last_layer), Cause.SYNC)


def _layer(m: Machine, ops: StepOps, flight: _Flight, layer: int) -> Step:
    target = _prefetch_target(ops.plan, layer)
    m.launch(Lane.MAIN, ops.hidden_norm("input_norm", layer))
    predicts = target is not None and ops.plan.design.selects
    projected = _launch(m, ops.to_queries(layer, predicted_layers=int(predicts)))
    if ops.plan.model.linear_in(layer) is None:
        appended = m.launch(Lane.MAIN, ops.append_kv(layer))
        _write_back(m, ops, flight, layer, appended)
    if target is not None:
        _choose_ahead(m, ops, flight, target, projected)
    yield from _demand(m, ops, flight, layer)
    # on-demand pages go first where both kinds share a lane: the main stream is waiting for them
    if target in flight.chosen and not needs_host(ops):
        yield from _fetch_ahead(m, ops, flight, target)
    attended = _attend(m, ops, flight, layer)
    _mlp(m, ops, layer)
    # a host-driven transfer is submitted after this layer's kernels: the GPU works while the host waits
    if target in flight.chosen and target not in flight.arrived:
        yield from _fetch_ahead(m, ops, flight, target)
    yield from _speculate(m, ops, flight, layer, attended)


def _launch(m: Machine, operations: tuple[Op, ...]) -> Token:
    """One after the other on the main stream; the last one's token."""
    *before, last = operations
    for operation in before:
        m.launch(Lane.MAIN, operation)
    return m.launch(Lane.MAIN, last)


def _mlp(m: Machine, ops: StepOps, layer: int) -> None:
    _launch(m, ops.to_hidden(layer))
    if not ops.deals_sequences:
        _add_up(m, ops, layer)
    m.launch(Lane.MAIN, ops.hidden_norm("post_norm", layer))
    _collect(m, ops, layer)
    if ops.plan.model.mlp_width(layer):
        m.launch(Lane.MAIN, ops.gate_up_proj(layer))
        m.launch(Lane.MAIN, ops.activation(layer))
        m.launch(Lane.MAIN, ops.down_proj(layer))
    if experts := ops.plan.model.experts_in(layer):
        m.launch(Lane.MAIN, ops.router_proj(layer, experts))
        m.launch(Lane.MAIN, ops.route(layer, experts))
        m.launch(Lane.MAIN, ops.experts(layer, experts))
    _add_up(m, ops, layer)


def _add_up(m: Machine, ops: StepOps, layer: int) -> None:
    """What GPUs that share the model have each computed of the hidden state becomes one."""
    if ops.shares_model:
        m.launch(Lane.MAIN, ops.all_reduce(layer, ops.plan.model.hidden_size))


def _collect(m: Machine, ops: StepOps, layer: int) -> None:
    """What follows needs every sequence's hidden state on all GPUs, where each has attended for its own."""
    if ops.deals_sequences:
        _add_up(m, ops, layer)


def _write_back(m: Machine, ops: StepOps, flight: _Flight, layer: int, appended: Token) -> None:
    if ops.copies_back and ops.plan.is_sparse(layer):
        m.wait(Lane.D2H, appended, Cause.ORDER)
        flight.written_back = m.launch(Lane.D2H, ops.write_back(layer))


def _prefetch_target(plan: DecodePlan, layer: int) -> int | None:
    """The layer whose pages start to move while `layer` computes."""
    target = layer + plan.design.prefetch_depth
    return target if plan.design.prefetches_layers and plan.is_sparse(target) else None


def _attend(m: Machine, ops: StepOps, flight: _Flight, layer: int) -> Token:
    if linear := ops.plan.model.linear_in(layer):
        return m.launch(Lane.MAIN, ops.linear_attention(layer, linear))
    if not ops.plan.is_sparse(layer):
        return m.launch(Lane.MAIN, ops.dense_attention(layer))
    arrived = flight.arrived.pop(layer, None)
    if arrived is not None:
        wait_for(m, Lane.MAIN, arrived, layer, Cause.PREFETCH)
    pinned = ops.plan.pinned_heads_per_layer
    if pinned == ops.plan.model.num_kv_heads:
        return m.launch(Lane.MAIN, ops.pinned_attention(layer))
    attended = m.launch(Lane.MAIN, ops.attention(layer))
    return m.launch(Lane.MAIN, ops.pinned_attention(layer)) if pinned else attended


def _demand(m: Machine, ops: StepOps, flight: _Flight, layer: int) -> Step:
    """The real query decides: what is not yet on the device is fetched now, and the main stream waits for it."""
    plan = ops.plan
    predicted = flight.chosen.pop(layer, None)
    on_its_way = predicted is not None or layer in flight.arrived
    if not plan.is_sparse(layer) or (plan.design.cache is Cache.NONE and on_its_way):
        return
    if plan.design.attend is Attend.FULL:
        m.wait(Lane.MAIN, m.launch(Lane.H2D, ops.copy_pages(Stage.DEMAND, layer)), Cause.DEMAND)
        return
    if predicted is not None:
        # the anchors and page tables that the prefetch moved must be settled before the real query is tested
        m.wait(Lane.MAIN, predicted, Cause.PREFETCH)
    chosen = _select(m, ops, Stage.DEMAND, layer, Lane.MAIN)
    if not plan.design.offloads:
        return
    ahead = flight.arrived.pop(layer, None)
    arrived = yield from fetch(m, ops, Stage.DEMAND, layer, chosen, Lane.MAIN, ahead)
    if ahead is not None and ahead.seen is None:
        # on a shared lane on-demand data queues behind what was prefetched: that part of the wait is the prefetch's
        m.wait(Lane.MAIN, ahead.done, Cause.PREFETCH)
    wait_for(m, Lane.MAIN, arrived, layer, Cause.DEMAND)


def _select(m: Machine, ops: StepOps, stage: Stage, layer: int, stream: Lane) -> Token:
    """What to attend to: chosen here or, where layers share an indexer, before; then, on the GPU, resolved."""
    design = ops.plan.design
    if ops.plan.shares_choice(layer):
        chosen = m.launch(stream, ops.share_pages(stage, layer))
    else:
        chosen = _choose(m, ops, stage, layer, stream)
    if design.resolve_on is ResolveOn.GPU and design.cache in (Cache.LRU, Cache.HEAD_REUSE):
        chosen = m.launch(stream, ops.resolve_pages(stage, layer))
    return chosen


def _choose(m: Machine, ops: StepOps, stage: Stage, layer: int, stream: Lane) -> Token:
    """Hit test where there is a gate, then score and select: two kernels of ours, or the model's own indexer."""
    design = ops.plan.design
    if design.gated and not (design.speculates_last_step and stage is Stage.PREFETCH):
        m.launch(stream, ops.hit_test(stage, layer))
    if design.asks_indexer:
        return m.launch(stream, ops.index_tokens(stage, layer))
    m.launch(stream, ops.score_pages(stage, layer))
    return m.launch(stream, ops.select_pages(stage, layer))


def _choose_ahead(m: Machine, ops: StepOps, flight: _Flight, target: int, projected: Token) -> None:
    """Selection for a later layer by its predicted query; a streamed layer needs none and starts to move."""
    if not ops.plan.design.selects:
        # the buffer of `target` is free once this projection ran: the attention that read it came before
        m.wait(Lane.H2D, projected, Cause.PREFETCH)
        flight.arrived[target] = Arrival(m.launch(Lane.H2D, ops.copy_pages(Stage.PREFETCH, target)))
        return
    m.wait(Lane.PREFETCH, projected, Cause.ORDER)
    flight.chosen[target] = _select(m, ops, Stage.PREFETCH, target, Lane.PREFETCH)


def _fetch_ahead(m: Machine, ops: StepOps, flight: _Flight, target: int) -> Step:
    chosen = flight.chosen[target]
    flight.arrived[target] = yield from fetch(m, ops, Stage.PREFETCH, target, chosen, Lane.PREFETCH)


def _speculate(m: Machine, ops: StepOps, flight: _Flight, layer: int, attended: Token) -> Step:
    """This step's query chooses what the next step attends to."""
    if ops.plan.design.speculates_last_step and ops.plan.is_sparse(layer):
        m.wait(Lane.PREFETCH, attended, Cause.ORDER)
        chosen = _select(m, ops, Stage.PREFETCH, layer, Lane.PREFETCH)
        flight.speculated = yield from fetch(m, ops, Stage.PREFETCH, layer, chosen, Lane.PREFETCH)


def _first_streamed_layers(m: Machine, ops: StepOps, flight: _Flight) -> None:
    """Streamed layers need no query: the first ones are on their way before the step computes anything."""
    plan = ops.plan
    if plan.design.offloads and not plan.design.selects:
        for layer in filter(plan.is_sparse, range(plan.design.prefetch_depth)):
            flight.arrived[layer] = Arrival(m.launch(Lane.H2D, ops.copy_pages(Stage.PREFETCH, layer)))
