"""Spans of one decode step, from whichever executor, and their export as a Chrome trace that Perfetto opens.

Knows nothing about how the spans came about.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clo.errors import CloError
from clo.files import write_text
from clo.units import US_PER_S

_STALL = "stall"
"""Category of slices that show waits; no operation's part is called so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One operation on one lane, seconds from the start of the step.

    `waits` says what its lane stood still for just before it: (cause, seconds) in the order in which inputs came.
    """

    lane: str
    name: str
    layer: int
    part: str
    start_s: float
    end_s: float
    num_bytes: float = 0.0
    waits: tuple[tuple[str, float], ...] = ()

    @property
    def waited_s(self) -> float:
        """Idle time of the lane just before this operation."""
        return sum(seconds for _, seconds in self.waits)

    @property
    def cause(self) -> str:
        """What most of that time was spent waiting for; empty if the lane did not wait."""
        return max(self.waits, key=lambda wait: wait[1])[0] if self.waits else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The spans of one step in order of their start; lanes run from the host down to the copy engines."""

    title: str
    spans: tuple[Span, ...]
    lanes: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """End of the last span."""
        return max((span.end_s for span in self.spans), default=0.0)

    def busy_s(self, lane: str) -> float:
        """Time `lane` spends in operations (lanes are in-order: spans do not overlap)."""
        return sum(span.end_s - span.start_s for span in self.spans if span.lane == lane)

    def num_bytes(self, name: str) -> float:
        """Bytes of all operations whose name ends with `name` (prefetch and on-demand alike)."""
        return sum(span.num_bytes for span in self.spans if span.name == name or span.name.endswith(f".{name}"))

    def to_chrome_trace(self, *, process: int = 1) -> dict[str, Any]:
        """Chrome trace event format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU."""
        names = [_metadata("process_name", process, 0, {"name": self.title})]
        events = [_event(span, process, self.lanes.index(span.lane)) for span in self.spans]
        for number, lane in enumerate(self.lanes):
            names += _track(process, number, lane, sort_index=2 * number)
            below = len(self.lanes) + number
            if stalls := [stall for span in self.spans if span.lane == lane for stall in _stalls(span, process, below)]:
                names += _track(process, below, f"stalls of {lane}", sort_index=2 * number + 1)
                events += stalls
        return {"displayTimeUnit": "ms", "traceEvents": names + events}


def _track(process: int, thread: int, name: str, *, sort_index: int) -> list[dict[str, Any]]:
    return [
        _metadata("thread_name", process, thread, {"name": name}),
        _metadata("thread_sort_index", process, thread, {"sort_index": sort_index}),
    ]


def _metadata(name: str, process: int, thread: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": process, "tid": thread, "args": args}


def _stalls(span: Span, process: int, thread: int) -> Iterator[dict[str, Any]]:
    """What the lane waited for before `span`, one slice after the other; read back from the span, not from here."""
    start = span.start_s - span.waited_s
    for cause, seconds in span.waits:
        yield {
            "ph": "X",
            "name": f"stall: {cause}",
            "cat": _STALL,
            "pid": process,
            "tid": thread,
            "ts": max(0.0, start) * US_PER_S,
            "dur": seconds * US_PER_S,
            "args": {"before": f"{span.name} [{span.layer}]"},
        }
        start += seconds


def _event(span: Span, process: int, thread: int) -> dict[str, Any]:
    args: dict[str, Any] = {"layer": span.layer, "part": span.part}
    if span.num_bytes:
        args["bytes"] = span.num_bytes
    if span.waits:
        args["waits_us"] = {cause: seconds * US_PER_S for cause, seconds in span.waits}
    return {
        "ph": "X",
        "name": f"{span.name} [{span.layer}]",
        "cat": span.part,
        "pid": process,
        "tid": thread,
        "ts": span.start_s * US_PER_S,
        "dur": (span.end_s - span.start_s) * US_PER_S,
        "args": args,
    }


def save_chrome_trace(path: Path, timelines: list[Timeline]) -> None:
    """Write timelines as processes of one trace file, whole or not at all."""
    merged: dict[str, Any] = {"displayTimeUnit": "ms", "traceEvents": []}
    for process, timeline in enumerate(timelines, start=1):
        merged["traceEvents"] += timeline.to_chrome_trace(process=process)["traceEvents"]
    write_text(path, json.dumps(merged))


def load_chrome_trace(path: Path) -> list[Timeline]:
    """Read back what `save_chrome_trace` wrote. Raises `CloError` naming the file."""
    try:
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        processes = sorted({event["pid"] for event in events})
        return [_timeline([event for event in events if event["pid"] == process]) for process in processes]
    except OSError as error:
        raise CloError(f"{path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        raise CloError(f"{path}: not a timeline that clo wrote") from None


def _timeline(events: list[dict[str, Any]]) -> Timeline:
    title = next(event["args"]["name"] for event in events if event["name"] == "process_name")
    drawn = {event["tid"] for event in events if event["ph"] == "X" and event["cat"] == _STALL}
    named = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    lanes = {thread: name for thread, name in named.items() if thread not in drawn}
    spans = tuple(_span(event, lanes) for event in events if event["ph"] == "X" and event["cat"] != _STALL)
    return Timeline(title=title, spans=spans, lanes=tuple(lanes[number] for number in sorted(lanes)))


def _span(event: dict[str, Any], lanes: dict[int, str]) -> Span:
    args, start = event["args"], _seconds(event["ts"])
    return Span(
        lane=lanes[event["tid"]],
        name=event["name"].rsplit(" [", 1)[0],
        layer=int(args["layer"]),
        part=str(args["part"]),
        start_s=start,
        end_s=start + _seconds(event["dur"]),
        num_bytes=_number(args.get("bytes", 0.0)),
        waits=tuple((cause, _seconds(waited)) for cause, waited in args.get("waits_us", {}).items()),
    )


def _seconds(microseconds: Any) -> float:
    return _number(microseconds) / US_PER_S


def _number(value: Any) -> float:
    """JSON as Python reads it has NaN and infinities, which no time and no size can be."""
    if not isinstance(value, float | int) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r} is no time or size")
    return value
