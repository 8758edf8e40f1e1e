"""What a service run says: latencies, goodput, memory, stability. Times in seconds; knows nothing about policies.

| Name | From | To |
|---|---|---|
| TTFT | a request arrives | its first token comes out |
| TPOT | first token | last token, over one less than its tokens (requests of one token have none) |
| ITL | a token | the next one of the same request, over all tokens of all requests |
| E2E | a request arrives | its last token comes out |
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clo_sim.serving.records import Sample, Tally
from clo_sim.serving.requests import NS_PER_S
from clo_sim.serving.service import ServiceRun
from clo_sim.serving.slo import Slo, Term
from clo_sim.serving.stability import judge

Floats = NDArray[np.float64]
PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Statistics of one metric, seconds; all none where there is nothing to count."""

    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    max: float | None = None

    @classmethod
    def of(cls, values: Floats, counts: NDArray[np.int64] | None = None) -> Latency:
        """From values, each counted so many times."""
        if not len(values):
            return cls()
        times = np.ones(len(values), dtype=np.int64) if counts is None else counts
        order = np.argsort(values, kind="stable")
        ordered, passed = values[order], np.cumsum(times[order])
        points = {f"p{q}": quantile(ordered, passed, q / 100) for q in PERCENTILES}
        mean = float(values @ times / passed[-1])
        return cls(mean=mean, **points, max=float(ordered[-1]))


def quantile(ordered: Floats, passed: NDArray[np.int64], share: float) -> float:
    """The smallest value that at least `share` of all are not above (no interpolation); `passed` counts up to each."""
    needed = share * int(passed[-1])
    return float(ordered[min(int(np.searchsorted(passed, needed - 1e-9)), len(ordered) - 1)])


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceResult:
    """One service under one load. Of an unstable one, TTFT and E2E are left out: they depend on the run's length.

    `goodput_per_s` counts completed requests whose own TTFT, TPOT and E2E are within the SLO's limits, over the time of
    the run; none without an SLO. `slo_met` is by term. Memory is per GPU: peaks of the fullest worker's,
    on the host apart for sequences and for the prefixes in what they leave.

    Where they were asked for: `intervals` are 90% prediction intervals by the flat names of `as_dict`, infinite at an
    end where the service does not keep up; `interval_share` is the share of busy time on costs whose spread is known,
    `slo_chance` the share of draws in which a term of the SLO holds, `chance` that in which the service keeps up and
    all of them hold.
    """

    trace: str
    model: str
    machine: str
    design: str
    gpus: int
    routing: str
    pressure: str
    requests: int
    completed: int
    rejected: int
    rejected_by: Mapping[str, int]
    rate_per_s: float
    duration_s: float
    completed_per_s: float
    output_tokens_per_s: float
    unstable: bool | None
    excess_share: float
    ttft_s: Latency
    tpot_s: Latency
    itl_s: Latency
    e2e_s: Latency
    goodput_per_s: float | None
    slo: str
    slo_met: Mapping[str, bool]
    busy_share: float
    prefill_share: float
    mean_running: float
    peak_running: int
    mean_context_tokens: float
    preemptions: int
    prefix_hit_rate: float
    peak_device_bytes: int
    room_device_bytes: int
    peak_host_bytes: int
    peak_prefix_bytes: int
    room_host_bytes: int
    iterations: int
    measured_share: float | None
    requests_per_cpu_s: float | None
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    interval_share: float | None = None
    slo_chance: Mapping[str, float] = field(default_factory=dict)
    chance: float | None = None
    prefill_gpus: int = 0
    replica_gpus: int = 1
    samples: tuple[tuple[Sample, ...], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the usual percentiles also by flat names, `ttft_s_p95` and so on; none for what is infinite."""
        data = asdict(self)
        data["samples"] = [[sample._asdict() for sample in worker] for worker in self.samples]
        data |= self.latencies()
        data["rate_per_s"] = None if math.isinf(self.rate_per_s) else self.rate_per_s
        data["intervals"] = {
            name: [None if math.isinf(end) else end for end in ends] for name, ends in self.intervals.items()
        }
        return data

    def latencies(self) -> dict[str, float | None]:
        """Every statistic of every metric by a flat name, `ttft_s_p95` and so on, seconds."""
        return {
            f"{name}_{statistic}": value
            for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s")
            for statistic, value in asdict(getattr(self, name)).items()
        }

    def met(self) -> bool:
        """Whether the service keeps up, serves every request it accepts, and meets every term."""
        return not self.unstable and all(self.slo_met.values())


def reasons_of(rejected: Mapping[str, int]) -> str:
    """Rejections as people read them: `longer than model: 3, empty output: 1`."""
    return ", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in rejected.items())


def summarise_service(
    run: ServiceRun,
    *,
    model: str = "",
    machine: str = "",
    design: str = "",
    slo: Slo | None = None,
    cpu_s: float | None = None,
    with_measured_share: bool = False,
) -> ServiceResult:
    """Sum up a run that was not stopped. `cpu_s` is what it took to simulate."""
    stamps = _Stamps(run)
    tallies = [replica.tally for replica in run.replicas]
    decoders = [replica.tally for replica in run.decoders]
    verdict = judge(stamps.arrival, stamps.finish)
    values = latency_values(run)
    lost = verdict.unstable
    end_ns = int(stamps.finish.max(initial=1))
    return ServiceResult(
        trace=run.trace.name,
        model=model,
        machine=machine,
        design=design,
        gpus=run.settings.gpus,
        prefill_gpus=run.settings.prefill_gpus,
        replica_gpus=run.costs.replica_gpus,
        routing=run.settings.routing,
        pressure=run.settings.pressure,
        requests=len(run.trace),
        completed=len(stamps.finish),
        rejected=run.rejected.total(),
        rejected_by=dict(run.rejected),
        rate_per_s=run.trace.rate_per_s,
        duration_s=end_ns / NS_PER_S,
        completed_per_s=len(stamps.finish) / end_ns * NS_PER_S,
        output_tokens_per_s=float(stamps.outputs.sum()) / end_ns * NS_PER_S,
        unstable=verdict.unstable,
        excess_share=verdict.excess_share,
        ttft_s=Latency() if lost else Latency.of(values["ttft"][0]),
        tpot_s=Latency.of(values["tpot"][0]),
        itl_s=Latency.of(*values["itl"]),
        e2e_s=Latency() if lost else Latency.of(values["e2e"][0]),
        goodput_per_s=None if slo is None else _good(slo, values, stamps) / end_ns * NS_PER_S,
        slo="" if slo is None else str(slo),
        slo_met={} if slo is None else {term.name: _holds(term, values, bool(lost)) for term in slo.terms},
        busy_share=_total(tallies, "decode_ns", "prefill_ns") / (end_ns * len(tallies)),
        prefill_share=_total(tallies, "prefill_ns") / (end_ns * len(tallies)),
        mean_running=_total(decoders, "decode_area_ns") / (end_ns * len(decoders)),
        peak_running=max(tally.peak_running for tally in decoders),
        mean_context_tokens=_mean_context(tallies),
        preemptions=_total(tallies, "preemptions"),
        prefix_hit_rate=_total(tallies, "prefix_hit_tokens") / max(1, _total(tallies, "prompt_tokens")),
        peak_device_bytes=max(tally.peak_device_bytes for tally in tallies),
        room_device_bytes=run.costs.room.device,
        peak_host_bytes=max(tally.peak_host_bytes for tally in tallies),
        peak_prefix_bytes=max(tally.peak_prefix_bytes for tally in tallies),
        room_host_bytes=run.costs.room.host,
        iterations=_total(tallies, "iterations"),
        measured_share=_measured_share(run, tallies) if with_measured_share else None,
        requests_per_cpu_s=None if not cpu_s else len(run.trace) / cpu_s,
        samples=tuple(tuple(tally.samples) for tally in tallies),
    )


class _Stamps:
    """Arrays over completed requests: arrival, first token and finish in ns, answer lengths."""

    def __init__(self, run: ServiceRun) -> None:
        finish = np.array(run.stamps.finish_ns, dtype=np.int64)
        served = finish >= 0
        requests = run.trace.requests
        self.arrival = np.array([one.arrival_ns for one in requests], dtype=np.int64)[served]
        self.outputs = np.array([one.output_tokens for one in requests], dtype=np.int64)[served]
        self.first = np.array(run.stamps.first_ns, dtype=np.int64)[served]
        self.finish = finish[served]


def latency_values(run: ServiceRun) -> dict[str, tuple[Floats, NDArray[np.int64] | None]]:
    """Values of every metric of completed requests, seconds, and how often each counts (none: once)."""
    stamps = _Stamps(run)
    several = stamps.outputs > 1
    decoding = (stamps.finish - stamps.first)[several] / (stamps.outputs[several] - 1)
    gaps: Counter[int] = Counter()
    for replica in run.replicas:
        gaps.update(replica.tally.gaps)
    itl = np.array(list(gaps), dtype=np.float64), np.array(list(gaps.values()), dtype=np.int64)
    return {
        "ttft": ((stamps.first - stamps.arrival) / NS_PER_S, None),
        "tpot": (decoding / NS_PER_S, None),
        "itl": (itl[0] / NS_PER_S, itl[1]),
        "e2e": ((stamps.finish - stamps.arrival) / NS_PER_S, None),
    }


def term_value(term: Term, values: Mapping[str, tuple[Floats, NDArray[np.int64] | None]]) -> float:
    """What the term's statistic is; zero where there is nothing to count."""
    seconds, counts = values[term.metric]
    if not len(seconds):
        return 0.0
    times = np.ones(len(seconds), dtype=np.int64) if counts is None else counts
    if term.quantile is None:
        return float(seconds @ times / times.sum())
    order = np.argsort(seconds, kind="stable")
    return quantile(seconds[order], np.cumsum(times[order]), term.quantile)


def _holds(term: Term, values: Mapping[str, Any], unstable: bool) -> bool:
    if unstable and term.metric in ("ttft", "e2e"):
        return False
    return term_value(term, values) < term.limit_s


def _good(slo: Slo, values: Mapping[str, Any], stamps: _Stamps) -> int:
    """Requests that are within every limit on their own; ITL has no value of a single request here."""
    good = (values["ttft"][0] < slo.limit_s("ttft")) & (values["e2e"][0] < slo.limit_s("e2e"))
    good[stamps.outputs > 1] &= values["tpot"][0] < slo.limit_s("tpot")
    return int(good.sum())


def _total(tallies: list[Tally], *names: str) -> int:
    return sum(getattr(tally, name) for tally in tallies for name in names)


def _mean_context(tallies: list[Tally]) -> float:
    """Of the sequences of a decode step, averaged over decode time, tokens."""
    return _total(tallies, "context_area") / max(1, _total(tallies, "decode_ns"))


def _measured_share(run: ServiceRun, tallies: list[Tally]) -> float | None:
    """Share of busy time whose costs were measured: GEMMs and attention of prefill, and decode as at its mean batch and
    context."""
    prices = run.costs.decode_prices
    if prices is None:
        return None
    in_tables = run.costs.prefill.table_share if prices.kernels_measured else 0.0
    attention_ns = _total(tallies, "computed_prefill_ns") - _total(tallies, "computed_dense_ns")
    measured_ns = in_tables * _total(tallies, "dense_prefill_ns") + run.costs.prefill.attention_measured * attention_ns
    return _share(run, measured_ns, prices.measured_share)


def known_spread_share(run: ServiceRun) -> float | None:
    """Share of busy time on costs of known spread: of prefill where computing takes longest, and of decode as at its
    mean batch and context."""
    tallies, prices = [replica.tally for replica in run.replicas], run.costs.decode_prices
    if prices is None:
        return None
    computed_ns, dense_ns = _total(tallies, "computed_prefill_ns"), _total(tallies, "computed_dense_ns")
    unknown_ns = (1 - run.costs.prefill.known_share) * dense_ns
    if not run.costs.prefill.attention_known:
        unknown_ns += computed_ns - dense_ns
    return _share(run, computed_ns - unknown_ns, prices.known_share)


def _share(run: ServiceRun, of_prefill_ns: float, of_decode: Callable[[int, int], float]) -> float | None:
    tallies, decoders = ([one.tally for one in these] for these in (run.replicas, run.decoders))
    decode_ns, busy = _total(tallies, "decode_ns"), _total(tallies, "decode_ns", "prefill_ns")
    if not busy:
        return None
    batch = round(_total(tallies, "decode_area_ns") / max(1, _total(decoders, "decode_ns", "prefill_ns")))
    share = of_decode(batch, round(_mean_context(tallies))) if decode_ns else 0.0
    return (of_prefill_ns + share * decode_ns) / busy
