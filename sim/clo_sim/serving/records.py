"""What is written down while a service runs: stamps of requests, gaps between tokens, memory. Knows no policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

NOT_YET = -1


class Sample(NamedTuple):
    """The state of a worker at a moment; bytes of sequences, and of prefix blocks in host memory.

    Moments are evenly spaced, whatever happens then. `running` are all that were admitted, their prompts done or not.
    """

    now_ns: int
    waiting: int
    running: int
    device_bytes: int
    host_bytes: int
    prefix_bytes: int


@dataclass(slots=True)
class Limits:
    """A run may end once so many requests exceed a limit that an SLO on a percentile cannot be met any more."""

    ttft_ns: float = float("inf")
    tpot_ns: float = float("inf")
    allowed_ttft: int = 0
    allowed_tpot: int = 0


@dataclass(slots=True)
class Stamps:
    """By request number, nanoseconds since the first arrival; `NOT_YET` where it never came."""

    first_ns: list[int]
    finish_ns: list[int]
    late_first: int = 0
    late_tokens: int = 0

    @classmethod
    def of(cls, count: int) -> Stamps:
        """Nothing has happened yet."""
        return cls([NOT_YET] * count, [NOT_YET] * count)


@dataclass(slots=True)
class Tally:
    """Sums of one worker. `gaps` counts tokens by the time since the token before; `area_ns` is requests times time.

    `dense_prefill_ns` is that of prefill's dense layers, `computed_prefill_ns` of chunks that computing was longest of,
    and `computed_dense_ns` that of their dense layers.
    """

    gaps: dict[int, int] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    area_ns: int = 0
    decode_area_ns: int = 0
    context_area: int = 0
    decode_ns: int = 0
    prefill_ns: int = 0
    dense_prefill_ns: int = 0
    computed_prefill_ns: int = 0
    computed_dense_ns: int = 0
    decode_steps: int = 0
    iterations: int = 0
    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    peak_device_bytes: int = 0
    peak_host_bytes: int = 0
    peak_prefix_bytes: int = 0
    peak_running: int = 0
