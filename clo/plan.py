"""Turns (model, machine, design, workload) into the numbers of one decode step: pages, slots, bytes of device memory.

Every rule that involves more than one of the four is checked here, before any work starts. Knows nothing about time.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from clo.errors import SpecError
from clo.placement import (
    CODED_BYTES_PER_VALUE,
    STEP_VALUES,
    choosing_layers,
    dense_layers,
    index_bytes_per_head,
    is_sparse,
    own_indexer,
    page_bytes_per_value,
    paged_head_token_bytes,
    paged_layer_token_bytes,
    pinned_heads,
    shares_choice,
    sparse_layers,
)
from clo.specs import Attend, Cache, Design, MachineSpec, ModelSpec, Workload
from clo.specs.machine import MOST_GPUS
from clo.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Device bytes by use. `kv` is what designs compete for; `total` must fit the GPU."""

    weights: float
    reserve: float
    window: float
    dense_layers: float
    pinned_heads: float
    index: float
    slots: float
    states: float = 0.0

    @property
    def kv(self) -> float:
        """Everything that is there because of the KV cache, or in its place, bytes."""
        return self.window + self.dense_layers + self.pinned_heads + self.index + self.slots + self.states

    @property
    def total(self) -> float:
        """All device memory in use, bytes."""
        return self.weights + self.reserve + self.kv


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """One decode step's fixed numbers. Page counts are per KV head and sequence.

    Where GPUs share the model they all do the same: `model` is one GPU's part of it, and all else is of that GPU.
    `kv_copies` of them keep the same KV heads.
    """

    model: ModelSpec
    machine: MachineSpec
    design: Design
    workload: Workload
    num_pages: int
    budget_pages: int
    slot_pages: int
    pinned_heads_per_layer: int
    memory: DeviceMemory
    host_bytes: float
    kv_copies: int = 1

    @property
    def page_bytes(self) -> float:
        """Keys and values of one page of one KV head, as it is kept and moved, bytes."""
        return self.design.page_size * paged_head_token_bytes(self.model, self.design)

    @property
    def attended_bytes_per_value(self) -> float:
        """Bytes of a key or value element in the mean over what an offloaded head attends to.

        Sinks and window are as computed.
        """
        if not self.design.codes_pages:
            return self.model.kv_bytes_per_value
        plain = self.window_tokens / self.attended_tokens
        return plain * self.model.kv_bytes_per_value + (1 - plain) * page_bytes_per_value(self.model, self.design)

    @property
    def sequences(self) -> int:
        """Sequences that this GPU attends for, and whose KV it keeps."""
        return self.machine.own_sequences(self.workload.batch)

    @property
    def kv_heads_of_all(self) -> int:
        """KV heads of a layer of the whole model."""
        dealt = not self.machine.deals_sequences and self.model.latent is None
        return self.model.num_kv_heads * (self.machine.tensor_parallel // self.kv_copies if dealt else 1)

    @property
    def query_heads_of_all(self) -> int:
        """Query heads of a layer of the whole model."""
        return self.model.num_query_heads * (1 if self.machine.deals_sequences else self.machine.tensor_parallel)

    @property
    def offloaded_heads(self) -> int:
        """KV heads of one layer, summed over this GPU's sequences, whose pages come from the host."""
        return (self.model.num_kv_heads - self.pinned_heads_per_layer) * self.sequences

    @property
    def window_tokens(self) -> int:
        """Sinks and recent tokens, always on the device."""
        return min(self.workload.context_tokens, self.design.num_sink_tokens + self.design.recent_window_tokens)

    @property
    def attended_tokens(self) -> int:
        """Tokens an offloaded head attends to in a step."""
        if self.design.attend is Attend.FULL:
            return self.workload.context_tokens
        return min(self.workload.context_tokens, self.budget_pages * self.design.page_size + self.window_tokens)

    @property
    def dense_layers(self) -> int:
        """First layers whose KV stays on the device and is attended in full."""
        return dense_layers(self.model, self.design)

    def is_sparse(self, layer: int) -> bool:
        """Whether pages of a layer are selected, or come from the host: not in dense, windowed or linear layers."""
        return is_sparse(self.model, self.design, layer)

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """All such layers, ascending."""
        return sparse_layers(self.model, self.design)

    def shares_choice(self, layer: int) -> bool:
        """Whether a layer attends to what a layer before it chose."""
        return shares_choice(self.model, self.design, layer)

    @property
    def index_bytes_per_head(self) -> float:
        """Bytes that scoring all pages of one KV head of one sequence reads."""
        return index_bytes_per_head(self.model, self.design, self.workload)


def make_plan(
    model: ModelSpec,
    machine: MachineSpec,
    design: Design,
    workload: Workload,
    *,
    kv_memory_bytes: float | None = None,
    most_tokens: int | None = None,
) -> DecodePlan:
    """Check the four against each other and fix the cache size.

    `kv_memory_bytes` is the device memory that the KV cache may take (default: what weights and reserve leave). No
    budget or cache is larger than the pages of `most_tokens`, what a sequence may come to (default: the context).
    Raises `SpecError` that says what is needed, what there is, and which field to change.
    """
    _check_context(model, workload)
    _check_coding(model, design)
    _check_indexer(model, design)
    copies = 1 if machine.deals_sequences else model.kv_copies(machine.tensor_parallel)
    model, sequences = part_of(model, machine), machine.own_sequences(workload.batch)
    most_pages = math.ceil((most_tokens or workload.context_tokens) / design.page_size)
    budget = _budget_pages(design, workload, most_pages)
    pinned = pinned_heads(model, design)
    room = _room(model, machine, kv_memory_bytes)
    fixed = _fixed_memory(model, machine, design, workload, pinned)
    room -= fixed.kv
    page_row_bytes = _slot_row_bytes(model, design, sequences, pinned)
    pages = _num_pages(design, workload)
    slots = _slot_pages(design, most_pages, budget, room, page_row_bytes) if design.offloads else pages
    memory = replace(fixed, slots=slots * page_row_bytes)
    _check_device(model, machine, design, memory, room, slots * page_row_bytes)
    host_bytes = _host_bytes(model, machine, design, workload.context_tokens * sequences)
    return DecodePlan(
        model=model,
        machine=machine,
        design=design,
        workload=workload,
        num_pages=pages,
        budget_pages=budget,
        slot_pages=slots,
        pinned_heads_per_layer=pinned,
        memory=memory,
        host_bytes=host_bytes,
        kv_copies=copies,
    )


def _check_context(model: ModelSpec, workload: Workload) -> None:
    if workload.context_tokens > model.max_positions:
        raise SpecError(
            f"workload.context_tokens = {workload.context_tokens}: {model.name} accepts at most "
            f"{model.max_positions} positions (model.max_positions)"
        )


def _check_coding(model: ModelSpec, design: Design) -> None:
    if not design.codes_pages:
        return
    coded, plain = CODED_BYTES_PER_VALUE[design.page_coding], model.kv_bytes_per_value
    if coded >= plain:
        raise SpecError(
            f"design.page_coding = {design.page_coding}: coded pages take {coded:g} bytes a value, the KV cache of "
            f"{model.name} {plain:g} as it is (model.kv_bytes_per_value): leave page_coding at none"
        )
    if model.head_dim % STEP_VALUES:
        raise SpecError(
            f"design.page_coding = {design.page_coding}: model.head_dim = {model.head_dim} is no multiple of the "
            f"{STEP_VALUES} values that share a step"
        )


def _check_indexer(model: ModelSpec, design: Design) -> None:
    """A model with an indexer attends to what that chooses, in every layer that has one or shares its choice."""
    if model.indexer is not None and design.attend is Attend.FULL:
        raise SpecError(
            f"design {design.name}: attend = full is not what {model.name} does, which attends to the "
            f"{model.indexer.top_tokens} tokens that its indexer chooses: choose a design with attend = sparse "
            "(resident-sparse keeps everything on the GPU)"
        )
    if not design.asks_indexer:
        return
    indexer = own_indexer(model)
    if design.page_size != indexer.block_tokens:
        unit = "single tokens" if indexer.block_tokens == 1 else f"blocks of {indexer.block_tokens} tokens"
        raise SpecError(
            f"design.page_size = {design.page_size}: the indexer of {model.name} chooses {unit}: set it to "
            f"{indexer.block_tokens}, or choose pages by another selector (design.selector)"
        )
    where = f"in all but its first {indexer.dense_layers} layers" if indexer.dense_layers else "everywhere"
    chooses = f"{model.name} attends to the {indexer.top_tokens} tokens that its indexer chooses {where}"
    if design.dense_layers != indexer.dense_layers:
        raise SpecError(f"design.dense_layers = {design.dense_layers}: {chooses}: set it to {indexer.dense_layers}")
    if design.pinned_head_fraction:
        raise SpecError(f"design.pinned_head_fraction = {design.pinned_head_fraction:g}: {chooses}: set it to 0")


def _num_pages(design: Design, workload: Workload) -> int:
    return math.ceil(workload.context_tokens / design.page_size)


def _budget_pages(design: Design, workload: Workload, most_pages: int) -> int:
    pages = _num_pages(design, workload)
    if design.attend is Attend.FULL:
        return pages
    if design.budget_pages is not None and design.budget_pages > most_pages and design.asks_indexer:
        return pages  # an indexer that may choose more tokens than there are chooses all
    if design.budget_pages is not None and design.budget_pages > most_pages:
        raise SpecError(
            f"design.budget_pages = {design.budget_pages}: the context holds only {most_pages} pages of "
            f"{design.page_size} tokens (workload.context_tokens = {workload.context_tokens}, and what is generated)"
        )
    share = max(design.min_budget_pages, round(design.budget_fraction * pages))
    return design.budget_pages or min(most_pages, share)


def part_of(model: ModelSpec, machine: MachineSpec) -> ModelSpec:
    """What one GPU of `machine` holds of `model`. Raises `SpecError` where it cannot be dealt out evenly."""
    return model.shard(machine.tensor_parallel, whole_attention=machine.deals_sequences)


def kv_room(model: ModelSpec, machine: MachineSpec, kv_memory_bytes: float | None = None) -> float:
    """Device bytes that weights and reserve leave for KV on a GPU, at most `kv_memory_bytes`. `SpecError` if none."""
    return _room(part_of(model, machine), machine, kv_memory_bytes)


def _room(model: ModelSpec, machine: MachineSpec, kv_memory_bytes: float | None) -> float:
    free = machine.gpu.memory_bytes - machine.reserve_bytes - model.weight_bytes
    if free <= 0:
        count = machine.tensor_parallel
        gpus, each = (f"{count} GPUs", " on each") if count > 1 else ("one GPU", "")
        most = f"up to {MOST_GPUS} may share it where all-reduces of so many were timed (machine.tensor_parallel)"
        more = f": simulated, {most}" if count < MOST_GPUS else ""
        whole = ", with attention's weights whole on each (machine.attention_by = heads shares those too)"
        raise SpecError(
            f"model {model.name}: weights take {format_bytes(model.weight_bytes)}{each} and the reserve "
            f"{format_bytes(machine.reserve_bytes)}, but {machine.name} has {format_bytes(machine.gpu.memory_bytes)} "
            f"of device memory (machine.gpu.memory_bytes): this model does not fit {gpus}"
            f"{whole if machine.deals_sequences else ''}{more}"
        )
    return free if kv_memory_bytes is None else min(free, kv_memory_bytes)


def _fixed_memory(
    model: ModelSpec, machine: MachineSpec, design: Design, workload: Workload, pinned: int
) -> DeviceMemory:
    sparse = len(sparse_layers(model, design))
    kept_tokens = sum(
        model.attended_at_most(layer, workload.context_tokens)
        for layer in range(model.num_layers)
        if not is_sparse(model, design, layer)
    )
    sequences = machine.own_sequences(workload.batch)
    layer_bytes = sequences * workload.context_tokens * model.layer_token_bytes
    window = min(workload.context_tokens, design.num_sink_tokens + design.recent_window_tokens + design.page_size)
    offloaded_heads = sparse * (model.num_kv_heads - pinned) * sequences
    indexed_heads = len(choosing_layers(model, design)) * (model.num_kv_heads - pinned) * sequences
    return DeviceMemory(
        weights=model.weight_bytes,
        reserve=machine.reserve_bytes,
        window=offloaded_heads * window * model.head_token_bytes,
        dense_layers=sequences * kept_tokens * model.layer_token_bytes,
        pinned_heads=sparse * layer_bytes * pinned / model.num_kv_heads,
        index=indexed_heads * index_bytes_per_head(model, design, workload),
        slots=0.0,
        states=sequences * model.state_bytes,
    )


def _slot_row_bytes(model: ModelSpec, design: Design, sequences: int, pinned: int) -> float:
    """Device bytes of one slot in every KV head that has slots at the same time."""
    sparse = sparse_layers(model, design)
    # without a cache the slots are a buffer that layers share in turn: one in use, the others being filled
    layers = _most_at_once(sparse, design.prefetch_depth) if design.cache is Cache.NONE else len(sparse)
    heads = layers * (model.num_kv_heads - pinned) * sequences
    return heads * design.page_size * paged_head_token_bytes(model, design)


def _most_at_once(layers: Sequence[int], depth: int) -> int:
    """Of ascending `layers`, the most that lie within `depth` of one of them and not before it."""
    return max((bisect_right(layers, layer + depth) - at for at, layer in enumerate(layers)), default=0)


def _slot_pages(design: Design, pages: int, budget: int, room: float, row_bytes: float) -> int:
    # a buffer, or a set that is replaced as a whole, has no use for more than the budget
    if design.cache is Cache.NONE or design.replaces_sets:
        return budget
    if design.slot_pages is not None:
        if design.slot_pages < budget:
            raise SpecError(f"design.slot_pages = {design.slot_pages}: must hold at least the budget of {budget} pages")
        return min(design.slot_pages, pages)
    if design.slot_budgets is not None:
        return min(pages, round(design.slot_budgets * budget))
    fitting = int(room // row_bytes) if row_bytes else pages
    return max(budget, min(pages, fitting))


def _check_device(
    model: ModelSpec,
    machine: MachineSpec,
    design: Design,
    memory: DeviceMemory,
    room_for_slots: float,
    slot_bytes: float,
) -> None:
    missing = slot_bytes - room_for_slots
    if missing <= 0:
        return
    available = memory.kv - missing
    raise SpecError(
        f"design {design.name}: its KV needs {format_bytes(memory.kv)} of device memory, {_one_of(machine)} has "
        f"{format_bytes(max(0.0, available))} left for KV: {_remedy(design)}{_deal_out(model, machine)}"
    )


def _deal_out(model: ModelSpec, machine: MachineSpec) -> str:
    """What helps where every GPU keeps the vectors of latent attention whole."""
    alike = machine.tensor_parallel > 1 and not machine.deals_sequences and model.latent is not None
    return ", or deal out sequences instead of heads (machine.attention_by = sequences)" if alike else ""


def _one_of(machine: MachineSpec) -> str:
    """Whose memory is meant: of GPUs that share the model each needs its own."""
    return machine.name if machine.tensor_parallel == 1 else f"each of {machine.tensor_parallel} {machine.name}"


def _remedy(design: Design) -> str:
    if not design.offloads:
        return "offload (any other design), or lower workload.batch or workload.context_tokens"
    if design.attend is Attend.FULL:
        return "lower design.prefetch_depth, workload.batch or workload.context_tokens"
    if design.asks_indexer:
        return "lower design.slot_pages or design.slot_budgets if set, workload.batch or workload.context_tokens"
    return (
        "lower design.budget_fraction, design.slot_budgets, design.dense_layers, design.pinned_head_fraction or "
        "workload.batch, or take a smaller selector index"
    )


def _host_bytes(model: ModelSpec, machine: MachineSpec, design: Design, tokens: int) -> float:
    if not design.offloads:
        return 0.0
    sparse = len(sparse_layers(model, design))
    needed = sparse * tokens * paged_layer_token_bytes(model, design)
    if needed > machine.host.memory_bytes:
        raise SpecError(
            f"design {design.name}: KV on the host needs {format_bytes(needed)} of pinned memory, "
            f"{_one_of(machine)} has {format_bytes(machine.host.memory_bytes)} (machine.host.memory_bytes): lower "
            "workload.batch or workload.context_tokens"
        )
    return needed
