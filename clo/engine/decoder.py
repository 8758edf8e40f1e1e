"""Decodes a batch under a design: prefill, then one schedule step after another on a machine.

Knows nothing about prompts' text, about evaluation or about commands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from clo import presets
from clo.engine.bar import Bar, open_bar
from clo.engine.bar import is_installed as bar_is_installed
from clo.engine.cpu_machine import DEFAULT_PATIENCE_S, CpuMachine
from clo.engine.cuda_device import torch_device
from clo.engine.cuda_machine import CudaMachine
from clo.engine.finite import explain_prompt
from clo.engine.layers import DenseLayer, HeadSettings, Layer, LayerShape, OffloadedLayer, StreamedLayer
from clo.engine.memory import check_memory, explain_need, host_memory_bytes
from clo.engine.network import Network
from clo.engine.operations import Operations
from clo.engine.prefill import PREFILL_CHUNK_TOKENS, read_into
from clo.engine.words import two_memories
from clo.errors import EngineError, SpecError, ran_out
from clo.plan import DecodePlan, make_plan
from clo.schedule import Op, decode_step
from clo.schedule.ops import Stage
from clo.specs import (
    Attend,
    Design,
    GpuSpec,
    GqaFold,
    HostSpec,
    LinkSpec,
    MachineSpec,
    ModelSpec,
    Selector,
    Sync,
    Transfer,
    Workload,
)
from clo.timeline import Timeline

DEFAULT_SLOT_BUDGETS = 2.0
"""Cache size where a design leaves it to the memory: a CPU's "device" has no size of its own."""

Sampler = Callable[[torch.Tensor], torch.Tensor]
"""Logits `[batch, vocab_size]` to tokens `[batch]`."""


@dataclass(frozen=True, slots=True)
class HeadProfile:
    """What was learnt about a model's heads beforehand. Layers by KV heads, and layers by query heads.

    `pinned` has the KV heads of each layer, first those to pin first; without it a design pins those of lowest number.
    `refresh_rate` replaces the gate by a clock, for comparison: the share of steps in which each head selects anew.
    """

    tau: torch.Tensor | None = None
    importance: torch.Tensor | None = None
    pinned: tuple[tuple[int, ...], ...] = ()
    refresh_rate: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTraffic:
    """What one decode step moved, and how its heads fared. Pages and heads are summed over layers and batch."""

    fetched_pages: int
    prefetched_pages: int
    requested_pages: int
    written_back_pages: int
    demand_misses: int
    offloaded_heads: int
    page_bytes: float

    @classmethod
    def of(cls, plan: DecodePlan, layers: Sequence[Layer]) -> StepTraffic:
        """Summed over `layers`."""
        counts = [layer.counts for layer in layers]
        offloaded = sum(isinstance(layer, StreamedLayer | OffloadedLayer) for layer in layers)
        return cls(
            fetched_pages=sum(count.fetched[Stage.DEMAND] for count in counts),
            prefetched_pages=sum(count.fetched[Stage.PREFETCH] for count in counts),
            requested_pages=sum(count.requested for count in counts),
            written_back_pages=sum(count.written_back for count in counts),
            demand_misses=sum(count.missed[Stage.DEMAND] for count in counts),
            offloaded_heads=plan.offloaded_heads * offloaded,
            page_bytes=plan.page_bytes,
        )

    @property
    def h2d_bytes(self) -> float:
        """Bytes from the host to the device."""
        return (self.fetched_pages + self.prefetched_pages) * self.page_bytes

    @property
    def hit_rate(self) -> float:
        """Share of the attended pages that needed no transfer in their step (1 where nothing is fetched)."""
        moved = self.fetched_pages + self.prefetched_pages
        return 1.0 - min(1.0, moved / self.requested_pages) if self.requested_pages else 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A prompt that has been read: rotated keys and values `[kv_heads, tokens, head_dim]` by layer, and the logits."""

    kv: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    logits: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt."""
        return int(self.kv[0][0].shape[1])


def read_prompt(
    network: Network,
    tokens: torch.Tensor,
    *,
    known: Prompt | None = None,
    shared: int = 0,
    chunk_tokens: int = PREFILL_CHUNK_TOKENS,
) -> Prompt:
    """Prefill in chunks with the model's own attention. Raises `SpecError` for a prompt that is empty or too long.

    The first `shared` tokens are those of the prompt `known`, which has been read: they are not read again.
    """
    from transformers import DynamicCache

    limit = network.spec.max_positions
    if not 1 <= len(tokens) <= limit:
        raise SpecError(f"prompt of {len(tokens)} tokens: {network.spec.name} takes 1 to {limit}")
    if not 0 <= shared < len(tokens) or shared > (known.num_tokens if known else 0):
        raise SpecError(f"prompt of {len(tokens)} tokens: {shared} of them cannot be shared with what has been read")
    cache, logits = DynamicCache(), torch.empty(0)
    with torch.inference_mode():
        for layer, (keys, values) in enumerate(known.kv if known and shared else ()):
            cache.update(keys[None, :, :shared], values[None, :, :shared], layer)
        for start in range(shared, len(tokens), chunk_tokens):
            chunk = tokens[None, start : start + chunk_tokens].to(network.device)
            logits = network.model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return Prompt(tuple((layer.keys[0], layer.values[0]) for layer in cache.layers), logits[0, -1])


class Decoder:
    """One batch of sequences decoding under `design`: a record, a preset's name or a TOML file.

    A budget that is a share of the context is one of the batch's longest prompt, for every sequence.
    `prefill` the prompts, then `step` with each next token, or `generate`. Close it, or use it in a `with` block.
    `max_new_tokens` is what there is room for after the prompts; `one_at_a_time` lets nothing overlap. Without `timed`
    a CUDA step records no times but its own: an event costs about as much as a small kernel. Prompts are read in chunks
    of `prefill_chunk_tokens` (512, on CUDA 2,048): longer ones bring less back from the host and take more memory.
    Raises `SpecError` where the design does not fit.
    """

    def __init__(
        self,
        model: Any,
        design: str | Design,
        *,
        max_new_tokens: int = 256,
        heads: HeadProfile | None = None,
        kv_memory_bytes: float | None = None,
        patience_s: float = DEFAULT_PATIENCE_S,
        one_at_a_time: bool = False,
        timed: bool = True,
        prefill_chunk_tokens: int | None = None,
    ) -> None:
        self.network = model if isinstance(model, Network) else Network(model)
        design = presets.load_design(design) if isinstance(design, str) else design
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise SpecError(f"max_new_tokens = {max_new_tokens}: must be at least 1, a whole number")
        if kv_memory_bytes is not None and not (isinstance(kv_memory_bytes, int | float) and kv_memory_bytes > 0):
            raise SpecError(f"kv_memory_bytes = {kv_memory_bytes}: must be a positive number of bytes")
        self.design = _sized(design, kv_memory_bytes)
        check_design(self.design, heads)
        self.heads = heads or HeadProfile()
        _check_heads(self.heads, self.network.spec)
        self.max_new_tokens = max_new_tokens
        if prefill_chunk_tokens is not None and prefill_chunk_tokens < 1:
            raise SpecError(f"prefill_chunk_tokens = {prefill_chunk_tokens}: must be at least 1")
        self._chunk_tokens = prefill_chunk_tokens
        self._kv_memory_bytes, self._patience_s = kv_memory_bytes, patience_s
        self._one_at_a_time, self._timed = one_at_a_time, timed
        self._pool = ThreadPoolExecutor(self.design.transfer_threads, thread_name_prefix="clo transfer")
        self._machine: CpuMachine | CudaMachine | None = None
        self._operations: Operations | None = None
        self._bar: Bar | None = None
        self._broken = self._closed = False
        self._prefills = 0
        self.plan: DecodePlan | None = None

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all threads; a second call does nothing. What was decoded can still be read."""
        self._closed = True
        if self._machine is not None:
            self._machine.close()
        self._close_bar()
        self._pool.shutdown()

    @property
    def lengths(self) -> list[int]:
        """Tokens that each sequence has in its cache."""
        return list(self._ready().host_lengths)

    @property
    def timeline(self) -> Timeline | None:
        """When each operation of the last step ran; None before there is one."""
        return None if self._machine is None else self._machine.timeline

    def time_operations(self, timed: bool) -> None:
        """From the next step on; on a CPU they always are."""
        self._timed = timed
        if isinstance(self._machine, CudaMachine):
            self._machine.timed = timed

    @property
    def layers(self) -> Sequence[Layer]:
        """The KV cache, layer by layer."""
        return self._ready().layers

    def prefill(self, prompts: Sequence[torch.Tensor | Prompt]) -> torch.Tensor:
        """Read the prompts, token ids `[tokens]` of any length each; logits `[batch, vocab_size]` of what follows.

        Their pages go to the host while the next chunk is computed. Prompts that have been read before (`read_prompt`)
        are only taken in. Starts the decoder anew: after an error there is nothing to decode.
        """
        if self._closed:
            raise EngineError("the decoder is closed: make a new one")
        self._prefills += 1
        check_device(self.design, self.heads, self.network.device)
        for prompt in prompts:
            if not isinstance(prompt, Prompt):
                _check_tokens(prompt, "prompt", self.network.spec.vocab_size)
        lengths = [prompt.num_tokens if isinstance(prompt, Prompt) else len(prompt) for prompt in prompts]
        if self._machine is not None:
            self._machine.close()
        self._close_bar()
        # until everything has been read there is nothing to decode, and what was there before makes room
        self._machine = self._operations = None
        self.plan = self.make_plan(lengths)
        room = max(lengths) + self.max_new_tokens
        try:
            layers = make_layers(self.network, self.plan, self.heads, room)
            if self.network.device.type == "cuda":
                for layer in layers:
                    if isinstance(layer, OffloadedLayer):
                        layer.exercise()
            logits = [self._take_in(layers, sequence, prompt) for sequence, prompt in enumerate(prompts)]
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            raise EngineError(f"{explain_need(self.plan, room)}: {error}") from error
        read = torch.stack(logits)
        if not bool(torch.isfinite(read).all()):
            raise EngineError(f"prefill: the logits are not finite, {explain_prompt(layers, lengths)}")
        self._bar = self._new_bar()
        operations = Operations(self.network, self.plan, layers, self._pool, self._bar)
        operations.take(lengths)
        self._machine = self._new_machine(operations)
        self._operations, self._broken = operations, False
        return read

    def _new_bar(self) -> Bar | None:
        """Where CPU threads of a CUDA device's machine store into its memory."""
        device = self.network.device
        return open_bar(device) if device.type == "cuda" and _stores_through_bar(self.design) else None

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def _take_in(self, layers: Sequence[Layer], sequence: int, prompt: torch.Tensor | Prompt) -> torch.Tensor:
        """Logits of what follows the prompt."""
        if not isinstance(prompt, Prompt):
            chunk = self._chunk_tokens
            return read_into(layers, sequence, self.network, prompt, patience_s=self._patience_s, chunk_tokens=chunk)
        for layer, (keys, values) in zip(layers, prompt.kv, strict=True):
            layer.load(sequence, keys, values)
        return prompt.logits

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Decode one token a sequence, `[batch]`; logits `[batch, vocab_size]` of the next, good until the next step.

        Raises `EngineError` if an operation failed; the decoder must then be given its prompts anew.
        """
        operations, machine = self._ready(), self._machine
        assert machine is not None
        _check_tokens(tokens, "tokens", self.network.spec.vocab_size, count=len(operations.host_lengths))
        assert self.plan is not None
        room = min(layer.shape.max_tokens for layer in operations.layers)
        if max(operations.host_lengths) + 1 > room:
            raise EngineError(
                f"the cache has room for {room} tokens a sequence: give the decoder a larger max_new_tokens "
                f"(now {self.max_new_tokens})"
            )
        self._broken = True
        with torch.inference_mode():
            operations.begin(tokens.to(self.network.device))
            title = f"{self.design.name} (machine)"
            machine.execute(decode_step(self.plan, machine), title=title, prepare=operations.embed)
            operations.check()
        self._broken = False
        return operations.logits

    def generate(
        self, prompts: Sequence[torch.Tensor | Prompt], *, sampler: Sampler | None = None
    ) -> Iterator[torch.Tensor]:
        """Tokens `[batch]` one after another, `max_new_tokens` of them; greedy unless a `sampler` is given.

        Raises `EngineError` if the decoder was given other prompts meanwhile.
        """
        choose = sampler or _greedy
        logits, mine = self.prefill(prompts), self._prefills
        for _ in range(self.max_new_tokens):
            tokens = choose(logits)
            yield tokens
            if self._prefills != mine:
                raise EngineError("decoder: it has been given other prompts: these cannot go on")
            logits = self.step(tokens)

    @property
    def traffic(self) -> StepTraffic:
        """What the last step moved. Raises `EngineError` before there is one."""
        if self.plan is None or self._operations is None:
            raise EngineError("decoder: no prompt yet: call prefill first")
        return StepTraffic.of(self.plan, self.layers)

    def _ready(self) -> Operations:
        if self._operations is None:
            raise EngineError("decoder: no prompt yet: call prefill first")
        if self._broken:
            raise EngineError("decoder: the last step failed half-way: call prefill again")
        return self._operations

    def _new_machine(self, operations: Operations) -> CpuMachine | CudaMachine:
        if self.network.device.type != "cuda":
            return CpuMachine(_doer(operations), patience_s=self._patience_s, one_at_a_time=self._one_at_a_time)
        return CudaMachine(
            operations,
            torch_device(self.network.device),
            patience_s=self._patience_s,
            one_at_a_time=self._one_at_a_time,
            timed=self._timed,
        )

    def make_plan(self, lengths: Sequence[int]) -> DecodePlan:
        """The design's numbers for prompts of these lengths. Raises `SpecError` where it does not fit the model or the
        memory that is available now."""
        if not lengths or min(lengths) < 1:
            raise SpecError(f"prompts: lengths {list(lengths)}: each needs at least one token")
        model = self.network.spec
        needed = max(lengths) + self.max_new_tokens
        if needed > model.max_positions:
            raise SpecError(
                f"prompt of {max(lengths)} tokens and max_new_tokens = {self.max_new_tokens} need {needed} positions: "
                f"{model.name} has {model.max_positions}"
            )
        workload = Workload(context_tokens=max(lengths), batch=len(lengths))
        plan = make_plan(
            model, local_machine(self.network.device), self.design, workload, kv_memory_bytes=self._kv_memory_bytes
        )
        check_memory(plan, self.network.device, needed)
        return plan


def make_layers(network: Network, plan: DecodePlan, heads: HeadProfile, max_tokens: int) -> list[Layer]:
    """The KV cache that `plan` asks for, layer by layer, with room for `max_tokens` a sequence."""
    model = plan.model
    shape = LayerShape(
        batch=plan.workload.batch,
        num_query_heads=model.num_query_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        max_tokens=max_tokens,
        dtype=network.dtype,
        device=network.device,
        scale=network.scale,
        recorded=two_memories(network.device) and plan.design.sync is Sync.GRAPH,
    )
    layers: list[Layer] = []
    for layer in range(model.num_layers):
        if layer < plan.dense_layers:
            layers.append(DenseLayer(shape))
        elif plan.design.attend is Attend.FULL:
            layers.append(StreamedLayer(shape))
        else:
            layers.append(OffloadedLayer(plan, shape, _settings(plan, heads, layer)))
    return layers


def _settings(plan: DecodePlan, heads: HeadProfile, layer: int) -> HeadSettings:
    tau = torch.full((plan.model.num_kv_heads,), plan.design.tau)
    pinned = heads.pinned[layer] if heads.pinned else tuple(range(plan.pinned_heads_per_layer))
    return HeadSettings(
        tau=tau if heads.tau is None else heads.tau[layer],
        importance=None if heads.importance is None else heads.importance[layer],
        pinned=pinned[: plan.pinned_heads_per_layer],
        refresh_rate=heads.refresh_rate,
    )


def check_design(design: Design, heads: HeadProfile | None) -> None:
    """Raise `SpecError` for what needs a head profile that is not given, or whole layers where heads are streamed."""
    if design.gated and design.target_hit_rate is not None and (heads is None or heads.tau is None):
        raise SpecError(
            "design.target_hit_rate: thresholds per head come from a head profile: give heads (see "
            "clo.engine.heads.heads_for), or set tau"
        )
    if design.gated and design.gqa_fold is GqaFold.IMPORTANCE and (heads is None or heads.importance is None):
        raise SpecError(
            "design.gqa_fold = importance: the weights come from a head profile: give heads (see "
            "clo.engine.heads.heads_for), or choose mean"
        )
    if design.attend is Attend.FULL and design.offloads and design.pinned_head_fraction:
        raise SpecError("design.pinned_head_fraction: the decoder streams whole layers: set it to 0")


def _stores_through_bar(design: Design) -> bool:
    return design.offloads and design.selects and design.transfer is Transfer.CPU_ZERO_COPY


def check_device(design: Design, heads: HeadProfile, device: torch.device) -> None:
    """Raise `SpecError` for what cannot run on a CUDA device: it is simulated only, or needs the host in every step."""
    if device.type != "cuda":
        return
    if _stores_through_bar(design) and not bar_is_installed(device):
        raise SpecError(
            "design.transfer = cpu_zero_copy: CPU stores through the PCIe BAR need GDRCopy (libgdrapi and its driver), "
            "which is not installed: here this is simulated only: choose gpu_zero_copy, page_copies or staged"
        )
    if design.sync is not Sync.GRAPH:
        return
    if design.selects and design.selector is Selector.EXACT:
        raise SpecError(
            "design.selector = exact reads lengths on the host in every layer, which a recorded graph cannot: "
            "choose another selector, or sync = events"
        )
    if heads.refresh_rate is not None:
        raise SpecError("heads.refresh_rate: a recorded graph cannot ask the host's clock: choose design.sync = events")


def local_machine(device: torch.device) -> MachineSpec:
    """This machine's memory, for plans; rates are not known without calibration and are not used."""
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else host_memory_bytes()
    return MachineSpec(
        name=f"this machine ({device.type})",
        source="as reported by the operating system",
        profile="none",
        gpu=GpuSpec(memory_bytes=float(memory), num_sms=1, hbm_bytes_per_s=1.0, peak_flops_per_s=1.0),
        link=LinkSpec(h2d_bytes_per_s=1.0, d2h_bytes_per_s=1.0),
        host=HostSpec(memory_bytes=host_memory_bytes(), memory_bytes_per_s=1.0, num_threads=torch.get_num_threads()),
        reserve_bytes=0.0,
    )


def _sized(design: Design, kv_memory_bytes: float | None) -> Design:
    left_open = design.slot_pages is None and design.slot_budgets is None
    if left_open and kv_memory_bytes is None and design.offloads and design.selects:
        return design.with_fields(slot_budgets=DEFAULT_SLOT_BUDGETS)
    return design


def _doer(operations: Operations) -> Callable[[Op], float]:
    """What a CPU machine does with an operation. It does not know the decoder: a cycle would keep the KV cache."""

    def do(op: Op) -> float:
        operations.run(op)
        return operations.moved_bytes(op)

    return do


def _check_tokens(tokens: torch.Tensor, what: str, vocab_size: int, count: int | None = None) -> None:
    """Raise `SpecError` for what are no token ids, `count` of them; ids on a device are not looked at."""
    if tokens.ndim != 1 or tokens.is_floating_point() or count not in (None, len(tokens)):
        wanted = "[tokens]" if count is None else f"[{count}], one a sequence"
        raise SpecError(f"{what}: {tokens.dtype} of shape {list(tokens.shape)}, expected integers {wanted}")
    if tokens.device.type == "cpu" and bool(((tokens < 0) | (tokens >= vocab_size)).any()):
        raise SpecError(
            f"{what}: ids from {int(tokens.min())} to {int(tokens.max())}, the model has 0 to {vocab_size - 1}"
        )


def _check_heads(heads: HeadProfile, model: ModelSpec) -> None:
    """Raise `SpecError` for a profile of another model."""
    for name, found, count in (
        ("tau", heads.tau, model.num_kv_heads),
        ("importance", heads.importance, model.num_query_heads),
    ):
        if found is not None and tuple(found.shape) != (model.num_layers, count):
            raise SpecError(f"heads.{name}: shape {list(found.shape)}, {model.name} has {[model.num_layers, count]}")


def sampler_of(temperature: float, seed: int) -> Sampler:
    """Draws from the logits' distribution at a temperature; the most likely token at 0."""
    if temperature == 0:
        return _greedy
    source = torch.Generator().manual_seed(seed)
    return lambda logits: torch.multinomial((logits.cpu() / temperature).softmax(-1), 1, generator=source)[:, 0]


def _greedy(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)
