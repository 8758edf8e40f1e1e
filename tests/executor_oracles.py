"""What clock and simulator are held to, written apart from both: the longest path through the recorded operations, and
a slow fluid service of the same step that knows no device, no fast path and no SimPy.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from itertools import takewhile
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from tiny import random_trace, tiny_design, tiny_profile, tiny_scene

from clo import presets
from clo.profile import (
    FixedCost,
    InterferenceCost,
)
from clo.schedule import Lane
from clo.specs import Design
from clo.timeline import Timeline
from clo_sim.contention import Contention
from clo_sim.priced import PricedStep
from clo_sim.unfold import clock_timeline, simulated_timeline

DESIGNS = presets.names("designs")
TRANSFERS = ("page_copies", "staged", "cpu_zero_copy", "gpu_zero_copy")
SYNCS = ("host", "events", "flags", "graph")


def without_contention(priced: PricedStep) -> Contention:
    return Contention(priced.pricer.interference, share_links=False, interfere=False)


def designs() -> st.SearchStrategy[Design]:
    """Valid combinations of every choice that decides the order of a step."""

    def build(choices: dict[str, Any]) -> Design | None:
        if choices["attend"] == "full":
            choices = choices | {"pinned_head_fraction": 0.0, "transfer": "page_copies"}
        try:
            return tiny_design(4, **choices)
        except ValueError:
            return None

    fields = st.fixed_dictionaries(
        {
            "attend": st.sampled_from(["sparse"] * 5 + ["full"]),
            "cache": st.sampled_from(["none", "none", "lru", "lru", "head_reuse", "resident"]),
            "on_miss": st.sampled_from(["diff", "replace"]),
            "prefetch_depth": st.sampled_from([0, 1, 2]),
            "prefetch_query": st.sampled_from(["layer_ahead", "layer_ahead", "previous_step"]),
            "transfer": st.sampled_from(TRANSFERS),
            "sync": st.sampled_from(SYNCS),
            "resolve_on": st.sampled_from(["gpu", "cpu"]),
            "dense_layers": st.sampled_from([0, 1]),
            "pinned_head_fraction": st.sampled_from([0.0, 0.5]),
            "slot_pages": st.sampled_from([4, 7]),
        }
    )
    return fields.map(build).filter(lambda design: design is not None)


def costly_profile() -> Any:
    """Costs that make every kind of wait matter in the tiny world."""
    cost = {"source": "assumed"}
    return tiny_profile(
        **{name: FixedCost(seconds=0.125, **cost) for name in ("kernel_launch", "graph_launch", "thread_wake")},
        **{name: FixedCost(seconds=0.5, **cost) for name in ("stream_sync", "read_back", "doorbell", "ready_flag")},
        interference=InterferenceCost(per_sm_share=0.5, dma=0.25, **cost),
    )


class Handover(NamedTuple):
    """Until a lane sees what others have done, by lane; and how long the launching thread hides what it submits."""

    by_lane: Mapping[Lane, float] = MappingProxyType({})
    hold_s: float = 0.0


AT_ONCE = Handover()


class HandingOver:
    """Prices of a machine whose lanes see what others have done some time later."""

    def __init__(self, prices: Any, handover_s: Mapping[Lane, float], launch_hold_s: float) -> None:
        self.prices, self.handover_s, self.launch_hold_s = prices, handover_s, launch_hold_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self.prices, name)


def tiny_priced(design: Design, seed: int = 0, handover: Handover = AT_ONCE) -> PricedStep:
    trace = random_trace(seed)
    tiny = tiny_scene(trace, profile=costly_profile())
    priced = tiny.priced(tiny.plan(design))
    return replace(priced, pricer=HandingOver(priced.pricer, *handover))


def handovers() -> st.SearchStrategy[Handover]:
    """By lane: none, less than any operation takes, more than most. Held: not, for two launches, for a whole step."""
    by_lane = st.dictionaries(st.sampled_from(list(Lane)), st.sampled_from([0.0625, 0.7]))
    return st.builds(Handover, by_lane, st.sampled_from([0.0, 0.3, 1e3]))


def lane_sums(priced: PricedStep) -> dict[Lane, Any]:
    sums: dict[Lane, Any] = defaultdict(lambda: np.zeros(priced.num_steps))
    for segment, seconds in zip(priced.segments, priced.durations, strict=True):
        sums[segment.lane] = sums[segment.lane] + seconds
    return sums


def longest_path(priced: PricedStep, step: int) -> float:
    """When the launching thread is done: the longest path through single operations, without segments."""
    nodes, hold_s = priced.graph.nodes, priced.pricer.launch_hold_s
    alone = [float(np.broadcast_to(priced.seconds(node.op), priced.num_steps)[step]) for node in nodes]
    shown: list[float] = []
    lane_end: dict[Lane, float] = defaultdict(float)
    for number, node in enumerate(nodes):
        ready = [shown[wait.node] + priced.handover_s.get(node.lane, 0.0) for wait in node.after]
        lane_end[node.lane] = end = max([lane_end[node.lane], *ready]) + alone[number]
        if node.lane is Lane.LAUNCH:
            later = [n for n in range(number + 1, len(nodes)) if nodes[n].lane is Lane.LAUNCH]
            until_it_blocks = takewhile(lambda n: not nodes[n].after, later)
            end = min(end + hold_s, end + sum(alone[n] for n in until_it_blocks))
        shown.append(end)
    return lane_end[Lane.LAUNCH]


def slow_fluid_ends(priced: PricedStep, step: int, rules: Contention) -> list[float]:
    """End of every segment when all lanes, the launching thread among them, are served side by side.

    Written apart from the simulator: work left is counted down from one event to the next, nothing is looked up.
    """
    segments, shares = priced.segments, ("h2d", "d2h", "hbm", "host_memory")
    # demands that agree to a percent contend alike
    demands = [
        replace(demand, **{name: round(getattr(demand, name), 2) for name in shares}) for demand in priced.demands
    ]
    queues = {lane: [n for n, segment in enumerate(segments) if segment.lane is lane] for lane in priced.graph.lanes()}
    left: dict[int, float] = {}
    ends: dict[int, float] = {}
    shown: dict[int, float] = {}
    hold_s = priced.pricer.launch_hold_s
    now = 0.0
    while len(ends) < len(segments):
        launching = queues[Lane.LAUNCH]
        blocked = not launching or (launching[0] not in left and bool(segments[launching[0]].after))
        for number, end in ends.items():
            held = segments[number].lane is Lane.LAUNCH and not blocked
            if number not in shown and (not held or now >= end + hold_s):
                shown[number] = now
        due = [math.inf, *(ends[number] + hold_s for number in ends if number not in shown)]
        for number in (queue[0] for queue in queues.values() if queue and queue[0] not in left):
            if all(wait.segment in shown for wait in segments[number].after):
                later = priced.handover_s.get(segments[number].lane, 0.0)
                seen = max([now, *(shown[wait.segment] + later for wait in segments[number].after)])
                if seen > now:
                    due.append(seen)
                else:
                    left[number] = float(priced.durations[number, step])
        rates = dict(zip(left, rules.rates(tuple(demands[number] for number in left)), strict=True))
        soonest = min(left, key=lambda number: left[number] / rates[number], default=None)
        until = now + left[soonest] / rates[soonest] if soonest is not None else math.inf
        if min(due) < until:
            soonest, until = None, min(due)
        left = {number: work - (until - now) * rates[number] for number, work in left.items() if number != soonest}
        now = until
        if soonest is not None:
            ends[soonest] = now
            queues[segments[soonest].lane].pop(0)
    return [ends[number] for number in range(len(segments))]


def inward_bytes(timeline: Timeline) -> float:
    """Bytes host to device, by whichever engine."""
    return sum(timeline.num_bytes(op) for op in ("gather_pages", "copy_pages", "copy_staged", "bar_write"))


def timeline_of(priced: PricedStep, step: int, executor: str) -> Timeline:
    unfold = clock_timeline if executor == "clock" else simulated_timeline
    return unfold(priced, step, "test")


def spans(timeline: Timeline, lane: Lane) -> list[tuple[str, int, float, float]]:
    """Everything that takes a measurable time on a lane."""
    found = [span for span in timeline.spans if span.lane == lane and span.end_s - span.start_s > 1e-6]
    return [(span.name, span.layer, round(span.start_s, 6), round(span.end_s, 6)) for span in found]
