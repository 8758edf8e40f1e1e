"""Which part of a decode step a timeline figure shows, design by design. Knows nothing about drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clo.errors import CloError
from clo.schedule.machine import Lane, Part
from clo.timeline import Span, Timeline
from clo.units import MS_PER_S, US_PER_S

LAYERS_SHOWN = 3.5


@dataclass(frozen=True, slots=True)
class Window:
    """What is shown: from `begin_s` to `end_s` around each timeline's own `zeros_s`; `label` says what zero is."""

    zeros_s: tuple[float, ...]
    begin_s: float
    end_s: float
    label: str

    @property
    def unit(self) -> tuple[float, str]:
        """Units per second, and their name."""
        return (MS_PER_S, "ms") if self.end_s - self.begin_s >= 1e-3 else (US_PER_S, "us")


def choose_window(timelines: Sequence[Timeline], *, start_s: float | None, duration_s: float | None) -> Window:
    """The window described at `clo_plots.timelines.plot_timelines`."""
    first = timelines[0]
    layers = sorted({span.layer for span in first.spans})
    usual = first.seconds * LAYERS_SHOWN / max(len(layers), 1)
    duration = usual if duration_s is None else duration_s
    if duration <= 0 or not layers:
        raise CloError(f"timeline figure: {first.title}: a window of {duration:g} s shows nothing")
    if start_s is not None:
        return Window((0.0,) * len(timelines), start_s, start_s + duration, "time from the start of the step")
    middle = layers[len(layers) // 2]
    zeros = tuple(_attention_start(timeline, middle) for timeline in timelines)
    own = ", each design in its own time" if len(timelines) > 1 else ""
    return Window(zeros, -duration / 2, duration / 2, f"time from the start of attention in layer {middle}{own}")


def _attention_start(timeline: Timeline, layer: int) -> float:
    """Where the main stream begins to attend in `layer`."""
    starts = [span.start_s for span in timeline.spans if attends(span) and span.layer == layer]
    if not starts:
        raise CloError(f"timeline figure: {timeline.title}: no attention in layer {layer} to line designs up by")
    return min(starts)


def attends(span: Span) -> bool:
    """Whether this is the main stream's attention."""
    return span.lane == Lane.MAIN and span.part == Part.ATTENTION


def visible(timeline: Timeline, window: Window, zero: float) -> list[Span]:
    """Spans that the window cuts, or whose wait it cuts; `zero` is the timeline's entry of `zeros_s`."""
    begin, end = zero + window.begin_s, zero + window.end_s
    return [span for span in timeline.spans if span.end_s > begin and span.start_s - span.waited_s < end]
