"""Measured decode steps as files: raw samples are kept, so that a fit can be made again and an interrupted job goes on.

Knows nothing about what the samples are for.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from clo.engine.measure import MachineRun
from clo.errors import CloError
from clo.files import read_json, write_json, write_whole
from clo.plan import DecodePlan
from clo.timeline import Span, Timeline
from clo.traffic import COUNTS, SEQUENCE_COUNTS, Traffic
from clo_calibration.host_benchmarks import Benchmark

EVERY_COUNT = (*COUNTS, *SEQUENCE_COUNTS)


def save_run(path: Path, run: MachineRun) -> None:
    """One `.npz`, whole or not at all."""
    spans = [(step, span) for step, timeline in enumerate(run.timelines) for span in timeline.spans]
    arrays = {
        "title": np.array(run.timelines[0].title),
        "step": np.array([step for step, _ in spans], dtype=np.int32),
        "layer": np.array([span.layer for _, span in spans], dtype=np.int32),
        "times": np.array([(span.start_s, span.end_s, span.num_bytes) for _, span in spans]),
        "waits": np.array([";".join(f"{cause}={seconds!r}" for cause, seconds in span.waits) for _, span in spans]),
        "heads": np.array(run.traffic.heads),
        **{name: np.array([getattr(span, name) for _, span in spans]) for name in ("lane", "name", "part")},
        **{f"traffic_{name}": value for name in EVERY_COUNT if (value := getattr(run.traffic, name)) is not None},
    }
    write_whole(path, lambda file: np.savez_compressed(file, **arrays))


def load_run(path: Path, plan: DecodePlan) -> MachineRun:
    """Read back what `save_run` wrote of a run under `plan`. Raises `CloError` naming the file."""
    try:
        with np.load(path, allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
        return _run_of(arrays, plan)
    except (OSError, EOFError, ValueError, KeyError, IndexError, zipfile.BadZipFile):
        raise CloError(f"{path}: no samples that clo wrote, or cut short: delete it") from None


def save_benchmarks(path: Path, benchmarks: Sequence[Benchmark]) -> None:
    """Every repetition of every microbenchmark, as JSON."""
    write_json(path, [asdict(benchmark) for benchmark in benchmarks])


def load_benchmarks(path: Path) -> list[Benchmark]:
    """Read back what `save_benchmarks` wrote. Raises `CloError` naming the file."""
    try:
        return [Benchmark(**row | {"seconds": tuple(row["seconds"])}) for row in read_json(path)]
    except (TypeError, KeyError):
        raise CloError(f"{path}: no samples that clo wrote, or cut short: delete it") from None


def _run_of(arrays: dict[str, np.ndarray], plan: DecodePlan) -> MachineRun:
    by_step: dict[int, list[Span]] = {}
    columns = (arrays[name].tolist() for name in ("step", "lane", "name", "part", "layer", "times", "waits"))
    for step, lane, name, part, layer, (start, end, num_bytes), waits in zip(*columns, strict=True):
        span = Span(
            lane=lane,
            name=name,
            layer=layer,
            part=part,
            start_s=start,
            end_s=end,
            num_bytes=num_bytes,
            waits=tuple(_wait(text) for text in waits.split(";") if text),
        )
        by_step.setdefault(step, []).append(span)
    title = str(arrays["title"])
    lanes = tuple(dict.fromkeys(arrays["lane"].tolist()))
    timelines = tuple(Timeline(title=title, spans=tuple(by_step[step]), lanes=lanes) for step in sorted(by_step))
    there = [name for name in EVERY_COUNT if name in COUNTS or f"traffic_{name}" in arrays]
    counts: dict[str, Any] = {name: arrays[f"traffic_{name}"] for name in there}
    traffic = Traffic(heads=float(arrays["heads"]), overlap=float("nan"), **counts)
    return MachineRun(plan, timelines, traffic)


def _wait(text: str) -> tuple[str, float]:
    cause, seconds = text.split("=")
    return cause, float(seconds)
