"""Spans of one decode step, from whichever executor, and their export as a Chrome trace that Perfetto opens.

Knows nothing about how the spans came about.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clo.errors import CloError
from clo.files import write_text
from clo.units import US_PER_S


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
        for number, lane in enumerate(self.lanes):
            names.append(_metadata("thread_name", process, number, {"name": lane}))
            names.append(_metadata("thread_sort_index", process, number, {"sort_index": number}))
        events = [_event(span, process, self.lanes.index(span.lane)) for span in self.spans]
        return {"displayTimeUnit": "ms", "traceEvents": names + events}


def _metadata(name: str, process: int, thread: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": process, "tid": thread, "args": args}


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
    except (ValueError, KeyError, TypeError, StopIteration):
        raise CloError(f"{path}: not a timeline that clo wrote") from None


def _timeline(events: list[dict[str, Any]]) -> Timeline:
    title = next(event["args"]["name"] for event in events if event["name"] == "process_name")
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    spans = tuple(_span(event, lanes) for event in events if event["ph"] == "X")
    return Timeline(title=title, spans=spans, lanes=tuple(lanes[number] for number in sorted(lanes)))


def _span(event: dict[str, Any], lanes: dict[int, str]) -> Span:
    args, start = event["args"], event["ts"] / US_PER_S
    return Span(
        lane=lanes[event["tid"]],
        name=event["name"].rsplit(" [", 1)[0],
        layer=args["layer"],
        part=args["part"],
        start_s=start,
        end_s=start + event["dur"] / US_PER_S,
        num_bytes=args.get("bytes", 0.0),
        waits=tuple((cause, waited / US_PER_S) for cause, waited in args.get("waits_us", {}).items()),
    )
