"""One worker's scheduler: admission by memory, prefill in chunks, continuous batching, preemption under pressure.

An iteration is a chunk of prefill, if a prompt waits and fits, followed by a decode step of all running sequences; all
their tokens come out at its end. While nobody can be admitted, decode steps up to the next arrival, completion or
shortage of memory are taken at once; the clock's sums make that exact. Knows nothing about routing or how prices arise.
"""

from __future__ import annotations

from collections import deque
from heapq import heapify, heappop, heappush
from typing import Literal

from clo_sim.serving.clocks import StepClock
from clo_sim.serving.prefix import PrefixCache
from clo_sim.serving.records import NOT_YET, Limits, Sample, Stamps, Tally
from clo_sim.serving.requests import Request
from clo_sim.serving.sampler import Sampler
from clo_sim.serving.worker import WorkerCosts

Pressure = Literal["preempt", "queue"]

NEVER = 1 << 62
"""Later than any simulated moment, ns."""
WATERMARK = 0.01
"""Share of memory that an admission leaves free while others run, so that it does not push them out at once."""


class Sequence:
    """A request in a worker. `target` is what must be prefilled: the prompt, and after a preemption its own tokens.

    `resident` of those prefilled are still on the GPU in offloaded layers, while the prompt is under way. One that was
    prefilled elsewhere (its first token came out there at `handed_ns`) has nothing to compute unless it is preempted.
    """

    __slots__ = (
        "blocks",
        "cached",
        "emitted",
        "handed_ns",
        "last_ns",
        "number",
        "order",
        "prefilled",
        "request",
        "resident",
        "target",
    )

    def __init__(self, number: int, request: Request, block_tokens: int, handed_ns: int = NOT_YET) -> None:
        self.number = number
        self.handed_ns = handed_ns
        self.request = request
        self.blocks = request.prefix_blocks[: request.input_tokens // block_tokens]
        self.target = request.input_tokens
        self.prefilled = 0
        self.resident = 0
        self.cached = 0
        self.emitted = 0
        self.last_ns = NOT_YET
        self.order = 0

    @property
    def arrives_prefilled(self) -> bool:
        """Whether its prompt's KV came from elsewhere, and is not lost."""
        return self.handed_ns != NOT_YET and not self.emitted

    def __lt__(self, other: Sequence) -> bool:
        return self.order < other.order


Piece = tuple[Sequence, int, int]
"""A part of a prompt in a chunk: whose, from which token, how many."""


class Replica:
    """A worker. `advance(until)` runs iterations that begin before `until`; `enqueue` hands it a request."""

    def __init__(
        self,
        costs: WorkerCosts,
        stamps: Stamps,
        limits: Limits,
        *,
        pressure: Pressure = "preempt",
        max_batch: int = 256,
        block_tokens: int = 512,
        coalesce: bool = True,
        sample_every_ns: int = 0,
    ) -> None:
        self.costs = costs
        self.now_ns = 0
        self.unfinished = 0
        self.waiting_tokens = 0
        self.tally = Tally()
        self.prefixes = PrefixCache() if costs.block_bytes else None
        self._stamps, self._limits = stamps, limits
        self._max_batch, self._block_tokens, self._coalesce = max_batch, block_tokens, coalesce
        self._sampler = Sampler(self.tally.samples, sample_every_ns or NEVER)
        self._waiting: deque[Sequence] = deque()
        self._partial: Sequence | None = None
        self._running: list[tuple[int, Sequence]] = []
        self._waits: dict[int, int] = {}
        self._steps_done = self._context_sum = self._admitted = 0
        self._device_used = self._host_used = 0
        self._grows = pressure == "preempt"
        self._next_change_ns: int | None = None
        self._growth = (costs.need.device_per_token, costs.need.host_per_token) if self._grows else (0, 0)

    @property
    def next_change_ns(self) -> int:
        """No request finishes, and no prompt is prefilled, before this moment unless another one arrives."""
        if self._next_change_ns is None:
            self._next_change_ns = self._find_next_change()
        return self._next_change_ns

    def _find_next_change(self) -> int:
        if self._waiting or self._partial is not None:
            return self.now_ns
        if not self._running:
            return NEVER
        steps = self._steps_until_event()
        return self.now_ns + self._clock().total(self._mean_context(), steps)

    def tokens_to_prefill(self, sequence: Sequence) -> int:
        """Prompt tokens that wait here or are under way, and those of a newcomer that no cached prefix saves."""
        partial = self._partial.target - self._partial.prefilled if self._partial is not None else 0
        held = self.prefixes.held(sequence.blocks) if self.prefixes is not None else 0
        saved = self.costs.reused_tokens(held, self._block_tokens, sequence.target)
        return self.waiting_tokens + partial + sequence.target - saved

    def enqueue(self, sequence: Sequence) -> None:
        """A request arrives; it is looked at when the iteration under way ends."""
        arrival = sequence.request.arrival_ns
        if self.now_ns > arrival:
            self.tally.area_ns += self.now_ns - arrival
        elif not self.unfinished:
            self._sample_until(arrival, 0)
            self.now_ns = arrival
        self._sampler.count_arrival(arrival)
        self._next_change_ns = None
        self.unfinished += 1
        self.waiting_tokens += sequence.target
        self._waiting.append(sequence)

    def advance(self, until_ns: int) -> None:
        """Run every iteration that begins before `until_ns`."""
        self._next_change_ns = None
        while self.now_ns < until_ns and self.unfinished:
            if self._grows:
                self._make_room()
            chunk = self._next_chunk() if self._waiting or self._partial is not None else None
            if chunk:
                self._mixed(chunk)
            else:
                self._decode(until_ns)

    def fits_alone(self, request: Request) -> str:
        """Empty where an idle worker can serve the request to its end, else which memory is too small."""
        device_fits, host_fits = self.costs.need.fits(request.total_tokens, self.costs.room)
        if not device_fits:
            return "gpu_memory"
        return "" if host_fits else "host_memory"

    def _next_chunk(self) -> list[Piece]:
        """Fill a chunk from the prompt under way and the waiting ones, in order of arrival."""
        room, pieces, joining = self.costs.prefill.chunk_tokens, [], 0
        while room:
            sequence = self._partial or self._admit(joining)
            if sequence is None:
                break
            left = sequence.target - sequence.prefilled
            tokens = left if sequence.arrives_prefilled else min(room, left)
            pieces.append((sequence, sequence.prefilled, tokens))
            sequence.prefilled += tokens
            room -= 0 if sequence.arrives_prefilled else tokens
            ends = sequence.prefilled == sequence.target
            self._partial = None if ends else sequence
            joining += ends
        return pieces

    def _admit(self, joining: int) -> Sequence | None:
        """The first waiting request, if memory and batch have room for it beside a step of those that run."""
        running = len(self._running) + joining
        if not self._waiting or running >= self._max_batch:
            return None
        sequence, need, room = self._waiting[0], self.costs.need, self.costs.room
        held = self._held_at_start(sequence)
        device, host = self._device_used + need.device(held), self._host_used + need.host(held)
        if running:
            # one that arrives prefilled grows in the same step
            growing = running + sequence.arrives_prefilled
            device += growing * self._growth[0] + int(WATERMARK * room.device)
            host += growing * self._growth[1]
        if device > room.device or host > room.host:
            return None
        self._waiting.popleft()
        self.waiting_tokens -= sequence.target
        self._device_used += need.device(held)
        self._host_used += need.host(held)
        sequence.order = self._admitted
        self._admitted += 1
        self._reuse_prefix(sequence)
        return sequence

    def _held_at_start(self, sequence: Sequence) -> int:
        """Tokens that memory is taken for on admission: with the next one, or up to the end where nobody is evicted."""
        return sequence.target + 1 if self._grows else sequence.request.total_tokens

    def _reuse_prefix(self, sequence: Sequence) -> None:
        """What the prefix cache holds need not be computed; the last token always is, its logits are needed."""
        sequence.cached = 0
        if self.prefixes is not None:
            self.prefixes.shrink(self._prefix_limit())
            held = self.prefixes.use(sequence.blocks)
            sequence.cached = self.costs.reused_tokens(held, self._block_tokens, sequence.target)
        sequence.prefilled, sequence.resident = sequence.cached, 0
        if not sequence.arrives_prefilled:
            self.tally.prompt_tokens += sequence.target
            self.tally.prefix_hit_tokens += sequence.cached

    def _mixed(self, chunk: list[Piece]) -> None:
        """A chunk of prefill, then a decode step of those that were running, and of those that arrived prefilled."""
        handed = [sequence for sequence, _, _ in chunk if sequence.arrives_prefilled]
        chunk = [piece for piece in chunk if not piece[0].arrives_prefilled]
        for sequence in handed:
            self._join(sequence)
        prefill, tokens, pairs, read_back, finished = self.costs.prefill, 0, 0.0, 0, 0
        hits: list[int] = []
        kept = prefill.kept_tokens(self.costs.room.device - self._device_used)
        for sequence, start, count in chunk:
            tokens += count
            pairs += prefill.pairs(start, count)
            read_back += start - min(sequence.resident, kept)
            sequence.resident = min(start + count, kept)
            if start and start == sequence.cached:
                hits.append(start)
            finished += start + count == sequence.target
        compute_ns = prefill.compute_ns(tokens, pairs, finished)
        chunk_ns = prefill.chunk_ns(compute_ns, tokens, read_back, hits)
        self.tally.prefill_ns += chunk_ns
        dense_ns = min(chunk_ns, prefill.dense_ns[tokens])
        self.tally.dense_prefill_ns += dense_ns
        if compute_ns >= chunk_ns:
            self.tally.computed_prefill_ns += chunk_ns
            self.tally.computed_dense_ns += dense_ns
        self._step(chunk_ns)
        for sequence, start, count in chunk:
            if start + count == sequence.target:
                self._join(sequence)

    def _step(self, chunk_ns: int) -> None:
        """End an iteration: a chunk, and a decode step if anything runs."""
        batch, duration = len(self._running), chunk_ns
        tally = self.tally
        if batch:
            mean = self._context_sum // batch
            step_ns = self._clock().total(mean, 1)
            duration += step_ns
            tally.gaps[duration] = tally.gaps.get(duration, 0) + batch
            self._lengthen_gaps(duration)
            tally.decode_ns += step_ns
            tally.context_area += mean * step_ns
        self._pass(duration, batch, 1)

    def _lengthen_gaps(self, duration: int) -> None:
        """Of those that joined since the last step, prefilled elsewhere: the gap before their second token is longer.

        Of the step's gaps of this `duration`, already counted, one each was too short.
        """
        gaps = self.tally.gaps
        for wait in self._waits.values():
            gaps[duration] -= 1
            gaps[duration + wait] = gaps.get(duration + wait, 0) + 1
        self._waits.clear()

    def _join(self, sequence: Sequence) -> None:
        """A prompt is done: its first token comes out, and it decodes from the next iteration on."""
        number, request = sequence.number, sequence.request
        if sequence.arrives_prefilled:
            self._waits[number] = self.now_ns - sequence.handed_ns
        elif sequence.emitted == 0:
            self._stamps.first_ns[number] = self.now_ns
            self._stamps.late_first += self.now_ns - request.arrival_ns > self._limits.ttft_ns
        else:
            gap = self.now_ns - sequence.last_ns
            self.tally.gaps[gap] = self.tally.gaps.get(gap, 0) + 1
        sequence.emitted += 1
        if self.prefixes is not None:
            self.prefixes.add(sequence.blocks, self._prefix_limit())
            held = len(self.prefixes) * self.costs.block_bytes
            self.tally.peak_prefix_bytes = max(self.tally.peak_prefix_bytes, held)
        left = request.output_tokens - sequence.emitted
        if left:
            heappush(self._running, (self._steps_done + left, sequence))
            self._context_sum += sequence.target + 1
            self.tally.peak_running = max(self.tally.peak_running, len(self._running))
        else:
            self._leave(sequence)

    def _clock(self) -> StepClock:
        return self.costs.clock(len(self._running))

    def _mean_context(self) -> int:
        return self._context_sum // len(self._running)

    def _steps_until_event(self) -> int:
        """Decode steps until the first sequence finishes or memory has no room for another one."""
        steps, batch = self._running[0][0] - self._steps_done, len(self._running)
        device, host = self._growth
        if device:
            steps = min(steps, (self.costs.room.device - self._device_used) // (batch * device))
        if host:
            steps = min(steps, (self.costs.room.host - self._host_used) // (batch * host))
        return steps

    def _decode(self, until_ns: int) -> None:
        """Decode steps until something happens, all at once."""
        batch, mean, clock = len(self._running), self._mean_context(), self._clock()
        steps = 1
        if self._coalesce:
            steps = self._steps_until_event()
            if until_ns < NEVER:
                steps = min(steps, clock.steps_to_pass(mean, until_ns - self.now_ns))
        tally, gaps = self.tally, self.tally.gaps
        for step_ns, count in clock.pieces(mean, steps):
            gaps[step_ns] = gaps.get(step_ns, 0) + batch * count
            # mean contexts m, m + 1, ... of equal steps: their sum in closed form
            tally.context_area += step_ns * (count * mean + count * (count - 1) // 2)
            mean += count
        if self._waits:
            self._lengthen_gaps(clock.total(mean - steps, 1))
        duration = clock.total(mean - steps, steps)
        tally.decode_ns += duration
        self._pass(duration, batch, steps)

    def _pass(self, duration: int, batch: int, steps: int) -> None:
        """Let an iteration or several pass: time, growth, completions."""
        tally = self.tally
        self._sample_until(self.now_ns + duration, steps)
        self.now_ns += duration
        tally.iterations += steps
        tally.area_ns += duration * self.unfinished
        if not batch:
            self._note_peaks()
            return
        tally.decode_area_ns += duration * batch
        tally.decode_steps += steps
        self._steps_done += steps
        self._context_sum += batch * steps
        self._device_used += self._growth[0] * batch * steps
        self._host_used += self._growth[1] * batch * steps
        self._note_peaks()
        running = self._running
        while running and running[0][0] == self._steps_done:
            sequence = heappop(running)[1]
            self._context_sum -= sequence.request.total_tokens
            self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """A request is complete: its memory is free, its stamps are set."""
        number, request = sequence.number, sequence.request
        # with its only token a sequence leaves as it came; otherwise it grew to its full length
        held = request.total_tokens
        self._device_used -= self.costs.need.device(held)
        self._host_used -= self.costs.need.host(held)
        self.unfinished -= 1
        stamps = self._stamps
        stamps.finish_ns[number] = self.now_ns
        decoding = self.now_ns - stamps.first_ns[number]
        stamps.late_tokens += decoding > self._limits.tpot_ns * (request.output_tokens - 1)

    def _make_room(self) -> None:
        """Preempt the newest sequences until the next step's tokens fit. What they computed is lost, not their tokens.

        The last one always fits: a request that does not fit alone never comes here.
        """
        device, host = self._growth
        room = self.costs.room
        while self._running:
            batch = len(self._running)
            if self._device_used + batch * device <= room.device and self._host_used + batch * host <= room.host:
                return
            self._preempt()

    def _preempt(self) -> None:
        left, newest = max(self._running, key=lambda item: item[1].order)
        if self._partial is not None and self._partial.order > newest.order:
            newest, self._partial = self._partial, None
            self._release(newest.target + 1)
        else:
            self._running.remove((left, newest))
            heapify(self._running)
            remaining = left - self._steps_done
            tokens = newest.request.total_tokens - remaining
            self._context_sum -= tokens
            newest.emitted = newest.request.output_tokens - remaining
            # without a step since it came its last token is the one that came out elsewhere
            joined = self._waits.pop(newest.number, None) is not None
            newest.last_ns = newest.handed_ns if joined else self.now_ns
            newest.target = newest.request.input_tokens + newest.emitted
            self._release(tokens)
        newest.prefilled = 0
        self.waiting_tokens += newest.target
        self._waiting.appendleft(newest)
        self.tally.preemptions += 1

    def _release(self, tokens: int) -> None:
        self._device_used -= self.costs.need.device(tokens)
        self._host_used -= self.costs.need.host(tokens)

    def _prefix_limit(self) -> int:
        """Blocks that host memory has room for beside the sequences."""
        return (self.costs.room.host - self._host_used) // self.costs.block_bytes

    def _note_peaks(self) -> None:
        """Peaks so far; prefixes make way for what the sequences have grown by."""
        tally = self.tally
        if self.prefixes is not None:
            self.prefixes.shrink(self._prefix_limit())
        if self._device_used > tally.peak_device_bytes:
            tally.peak_device_bytes = self._device_used
        if self._host_used > tally.peak_host_bytes:
            tally.peak_host_bytes = self._host_used

    def _sample_until(self, end_ns: int, steps: int) -> None:
        """Keep the state at every moment that is due up to `end_ns`, over which nothing but `steps` steps happen."""
        while (due := self._sampler.next_ns) <= end_ns:
            self._sampler.keep(self._state_at(due, steps))

    def _state_at(self, due_ns: int, steps: int) -> Sample:
        taken = 0
        if steps > 1:
            taken = self._clock().steps_to_pass(self._mean_context(), due_ns - self.now_ns) - 1
        grown = len(self._running) * taken
        device, host = (used + each * grown for used, each in zip(self._used, self._growth, strict=True))
        waiting = len(self._waiting)
        return Sample(due_ns, waiting, self.unfinished - waiting, device, host, self._prefix_bytes_beside(host))

    @property
    def _used(self) -> tuple[int, int]:
        return self._device_used, self._host_used

    def _prefix_bytes_beside(self, host_bytes: int) -> int:
        """What prefixes take once they have made way for sequences of so many bytes."""
        if self.prefixes is None:
            return 0
        room = (self.costs.room.host - host_bytes) // self.costs.block_bytes
        return min(len(self.prefixes), room) * self.costs.block_bytes
