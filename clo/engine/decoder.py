"""Decodes a batch under a design: prefill, then one schedule step after another on a machine.

Knows nothing about prompts' text, about evaluation or about commands.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from clo import presets
from clo.engine.checks import (
    check_alike,
    check_design,
    check_device,
    check_heads,
    check_recordable,
    check_shared_choices,
    check_tokens,
    stores_through_bar,
)
from clo.engine.cpu_machine import DEFAULT_PATIENCE_S, CpuMachine
from clo.engine.cuda.bar import Bar, open_bar
from clo.engine.cuda.device import torch_device
from clo.engine.cuda.machine import CudaMachine
from clo.engine.finite import explain_prompt
from clo.engine.heads import HeadProfile
from clo.engine.layers import Layer, OffloadedLayer
from clo.engine.make_layers import make_layers
from clo.engine.memory import check_memory, check_weights, explain_need, local_machine
from clo.engine.models.network import Network
from clo.engine.models.probe import check_taken_apart
from clo.engine.operations import Operations
from clo.engine.prefill import read_into
from clo.engine.prompts import Prompt
from clo.engine.sampling import Sampler, greedy
from clo.engine.step_traffic import StepTraffic
from clo.errors import EngineError, SpecError, ran_out
from clo.plan import DecodePlan, make_plan
from clo.schedule import Op, decode_step
from clo.specs import Design, Workload
from clo.timeline import Timeline

DEFAULT_SLOT_BUDGETS = 2.0
"""Cache size where a design leaves it to the memory: a CPU's "device" has no size of its own."""


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
        design = presets.load_design(design, self.network.spec) if isinstance(design, str) else design
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise SpecError(f"max_new_tokens = {max_new_tokens}: must be at least 1, a whole number")
        if kv_memory_bytes is not None and not (isinstance(kv_memory_bytes, int | float) and kv_memory_bytes > 0):
            raise SpecError(f"kv_memory_bytes = {kv_memory_bytes}: must be a positive number of bytes")
        self.design = _sized(design, kv_memory_bytes)
        check_design(self.design, heads)
        self.heads = heads or HeadProfile()
        check_heads(self.heads, self.network.spec)
        self.max_new_tokens = max_new_tokens
        if prefill_chunk_tokens is not None and prefill_chunk_tokens < 1:
            raise SpecError(f"prefill_chunk_tokens = {prefill_chunk_tokens}: must be at least 1")
        self._chunk_tokens = prefill_chunk_tokens
        self._kv_memory_bytes, self._patience_s = kv_memory_bytes, patience_s
        self._one_at_a_time, self._timed = one_at_a_time, timed
        self._pool = ThreadPoolExecutor(self.design.transfer_threads, thread_name_prefix="clo transfer")
        self._machine: CpuMachine | CudaMachine | None = None
        # threads keep what they run: of a decoder that nobody has any more, and nobody closed, they are told to end
        self._running: list[CpuMachine | CudaMachine] = []
        weakref.finalize(self, _dismiss, self._running).atexit = False
        self._operations: Operations | None = None
        self._bar: Bar | None = None
        self._broken = self._closed = False
        self._prefills = self._room = 0
        self.plan: DecodePlan | None = None

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all threads; a second call does nothing. What was decoded can still be read."""
        self._closed = True
        self._close_machine()
        self._pool.shutdown()

    def _close_machine(self) -> None:
        if self._machine is not None:
            self._machine.close()
        self._running.clear()
        self._close_bar()

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
        check_taken_apart(self.network)
        check_device(self.design, self.heads, self.network.device)
        network = self.network
        check_recordable(
            self.design, network.host_sees_experts, network.device, host_sees_positions=network.host_sees_positions
        )
        for prompt in prompts:
            if not isinstance(prompt, Prompt):
                check_tokens(prompt, "prompt", self.network.spec.vocab_size)
        lengths = [prompt.num_tokens if isinstance(prompt, Prompt) else len(prompt) for prompt in prompts]
        check_alike(self.network, lengths)
        self._close_machine()
        # until everything has been read there is nothing to decode, and what was there before makes room
        self._machine = self._operations = None
        self.plan = self.make_plan(lengths)
        self._room = room = max(lengths) + self.max_new_tokens
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
        self._running.append(self._machine)
        self._operations, self._broken = operations, False
        return read

    def _new_bar(self) -> Bar | None:
        """Where CPU threads of a CUDA device's machine store into its memory."""
        device = self.network.device
        return open_bar(device) if device.type == "cuda" and stores_through_bar(self.design) else None

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def _take_in(self, layers: Sequence[Layer], sequence: int, prompt: torch.Tensor | Prompt) -> torch.Tensor:
        """Logits of what follows the prompt."""
        if not isinstance(prompt, Prompt):
            chunk = self._chunk_tokens
            return read_into(layers, sequence, self.network, prompt, patience_s=self._patience_s, chunk_tokens=chunk)
        prompt.load_into(layers, sequence)
        return prompt.logits

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Decode one token a sequence, `[batch]`; logits `[batch, vocab_size]` of the next, good until the next step.

        Raises `EngineError` if an operation failed; the decoder must then be given its prompts anew.
        """
        operations, machine = self._ready(), self._machine
        assert machine is not None
        check_tokens(tokens, "tokens", self.network.spec.vocab_size, count=len(operations.host_lengths))
        assert self.plan is not None
        if max(operations.host_lengths) + 1 > (room := self._room):
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
        choose = sampler or greedy
        logits, mine = self.prefill(prompts), self._prefills
        tokens = choose(logits)
        yield tokens
        for _ in range(self.max_new_tokens - 1):
            if self._prefills != mine:
                raise EngineError("decoder: it has been given other prompts: these cannot go on")
            tokens = choose(self.step(tokens))
            yield tokens

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
        check_shared_choices(model, self.design)
        needed = max(lengths) + self.max_new_tokens
        if needed > model.max_positions:
            raise SpecError(
                f"prompt of {max(lengths)} tokens and max_new_tokens = {self.max_new_tokens} need {needed} positions: "
                f"{model.name} has {model.max_positions}"
            )
        if needed > (alike := self.network.longest_alike(max(lengths))):
            raise SpecError(
                f"prompt of {max(lengths)} tokens and max_new_tokens = {self.max_new_tokens} need {needed} positions: "
                f"{model.name} rotates texts of more than {alike} tokens differently, what is cached of shorter ones "
                f"would be wrong: there is room for {alike - max(lengths)} new ones"
            )
        check_weights(model, self.network.device)
        workload = Workload(context_tokens=max(lengths), batch=len(lengths))
        plan = make_plan(
            model,
            local_machine(self.network.device),
            self.design,
            workload,
            kv_memory_bytes=self._kv_memory_bytes,
            most_tokens=needed,
        )
        check_memory(plan, self.network.device, needed)
        return plan


def _sized(design: Design, kv_memory_bytes: float | None) -> Design:
    left_open = design.slot_pages is None and design.slot_budgets is None
    if left_open and kv_memory_bytes is None and design.offloads and design.selects:
        return design.with_fields(slot_budgets=DEFAULT_SLOT_BUDGETS)
    return design


def _dismiss(machines: Sequence[CpuMachine | CudaMachine]) -> None:
    for machine in machines:
        machine.dismiss()


def _doer(operations: Operations) -> Callable[[Op], float]:
    """What a CPU machine does with an operation. It does not know the decoder: a cycle would keep the KV cache."""

    def do(op: Op) -> float:
        operations.run(op)
        return operations.moved_bytes(op)

    return do
