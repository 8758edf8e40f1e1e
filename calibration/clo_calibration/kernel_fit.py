"""Fits the kernel tables of a profile to the measurements that the package `aiconfigurator-core` carries.

A fifth of the points is held out, the grid of the rest is completed and made monotone, and the error is measured on
the held-out points with the very table that ships. Knows nothing about profiles, and nothing about how the measurements
were taken beyond the columns of the files. Needs no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from clo.errors import ProfileError
from clo.kernel_tables import DecodeAttentionTable, Floats, GemmTable, KernelTable

GPUS = {"h200": "h200_sxm", "h100": "h100_sxm", "a100": "a100_sxm", "l40s": "l40s"}
PACKAGE = "aiconfigurator_core"
PACKAGE_VERSION = "0.12.0"
HELD_OUT_SHARE = 0.2
NUM_SWEEPS = 40
FILLED_WEIGHT = 0.02
SMALLEST_HEAD_DIM = 64
MULTI_HEAD_SLOWDOWN = 1.25

Table = TypeVar("Table", bound=KernelTable)
Bools = NDArray[np.bool_]
Ints = NDArray[np.intp]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Measured points of one kernel on one GPU: `points` is [num, num arguments], `seconds` is [num]."""

    points: Floats
    seconds: Floats
    labels: dict[str, Any]

    def take(self, chosen: Bools) -> Samples:
        """The points where `chosen`, with the same labels."""
        return Samples(points=self.points[chosen], seconds=self.seconds[chosen], labels=self.labels)


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """Absolute relative errors on the held-out points of one table, beside the unsmoothed interpolation's."""

    kernel: str
    num_samples: int
    num_held_out: int
    median: float
    p90: float
    baseline_median: float
    baseline_p90: float


@dataclass(frozen=True, kw_only=True)
class FittedTables:
    """The tables of one GPU and how good they are."""

    gemm: GemmTable
    decode_attention: DecodeAttentionTable
    report: tuple[FitReport, ...]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Log-seconds on a product of axes: NaN where nothing was measured."""

    axes: tuple[Floats, ...]
    logs: Floats

    def where(self, points: Floats) -> tuple[Ints, ...]:
        """Indices of points that lie on the grid."""
        return tuple(np.searchsorted(axis, points[:, column]) for column, axis in enumerate(self.axes))


# --- reading ----------------------------------------------------------------------------------------------------------


def systems_folder(data_root: Path | None = None) -> Path:
    """Folder with `<gpu>.yaml` and `data/`. Raises `ProfileError` if the package is not installed or not there."""
    if data_root is not None:
        for folder in (data_root, data_root / "systems", data_root / PACKAGE / "systems"):
            if (folder / "data").is_dir():
                return folder
        raise ProfileError(f"{data_root}: holds no systems/data folder of {PACKAGE}")
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ProfileError(f'{PACKAGE} is not installed: pip install "clo-offload[tables]"')
    return systems_folder(Path(next(iter(spec.submodule_search_locations))))


def read_hardware(gpu: str, data_root: Path | None = None) -> dict[str, float]:
    """Datasheet HBM bytes/s and dense bfloat16 flop/s of a GPU, from its yaml file."""
    path = systems_folder(data_root) / f"{_folder_name(gpu)}.yaml"
    text = _existing(path).read_text(encoding="utf-8")
    return {"hbm_bytes_per_s": _number(text, "mem_bw", path), "flops_per_s": _number(text, "bfloat16_tc_flops", path)}


def read_gemm(gpu: str, data_root: Path | None = None) -> Samples:
    """Measured bfloat16 GEMMs of vLLM: points are (m, n, k)."""
    columns = _read(_newest(gpu, "gemm", data_root) / "gemm_perf.parquet")
    return gemm_samples(columns)


def read_decode_attention(gpu: str, data_root: Path | None = None) -> Samples:
    """Measured bfloat16 decode attention of vLLM without a sliding window, in the order of the table's arguments."""
    columns = _read(_newest(gpu, "attention", data_root) / "generation_attention_perf.parquet")
    return decode_attention_samples(columns)


def gemm_samples(columns: dict[str, NDArray[Any]]) -> Samples:
    """Select bfloat16 rows of a GEMM file (latency in milliseconds)."""
    return _samples(columns, columns["gemm_dtype"] == "bfloat16", [columns[name] for name in "mnk"])


def decode_attention_samples(columns: dict[str, NDArray[Any]]) -> Samples:
    """Select bfloat16 rows without a window; the cache holds `step` tokens and the `isl` new ones."""
    chosen = (columns["attn_dtype"] == "bfloat16") & (columns["kv_cache_dtype"] == "bfloat16")
    if "window_size" in columns:
        chosen &= columns["window_size"] == 0
    names = ("batch_size", "num_heads", "num_key_value_heads", "head_dim")
    tokens = columns["step"] + columns["isl"]
    return _samples(columns, chosen, [*(columns[name] for name in names), tokens])


def _samples(columns: dict[str, NDArray[Any]], chosen: Bools, arguments: list[NDArray[Any]]) -> Samples:
    points = np.stack([values[chosen].astype(np.float64) for values in arguments], axis=1)
    if not len(points):
        raise ProfileError("no bfloat16 row in the measurements")
    kernels = sorted({str(name) for name in columns["kernel_source"][chosen]})
    labels = {
        "framework_version": f"vllm {columns['version'][chosen][0]}",
        "device": str(columns["device"][chosen][0]),
        "kernels": tuple(kernels),
    }
    return _fastest(points, columns["latency"][chosen].astype(np.float64) / 1e3, labels)


def _fastest(points: Floats, seconds: Floats, labels: dict[str, Any]) -> Samples:
    # two kernels that serve the same shape: a framework would pick the faster one
    unique, inverse = np.unique(points, axis=0, return_inverse=True)
    best = np.full(len(unique), np.inf)
    np.minimum.at(best, inverse.reshape(-1), seconds)
    return Samples(points=unique, seconds=best, labels=labels)


def _read(path: Path) -> dict[str, NDArray[Any]]:
    table = pq.read_table(_existing(path))
    return {name: table.column(name).to_numpy() for name in table.column_names}


def _newest(gpu: str, kernel: str, data_root: Path | None) -> Path:
    folder = systems_folder(data_root) / "data" / _folder_name(gpu) / kernel / "vllm"
    versions = [path for path in _existing(folder).iterdir() if path.is_dir()]
    return max(versions, key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)])


def _existing(path: Path) -> Path:
    if not path.exists():
        raise ProfileError(f"{path}: no such file in this version of {PACKAGE}")
    return path


def _folder_name(gpu: str) -> str:
    if gpu not in GPUS:
        raise ValueError(f"gpu = {gpu!r}: must be one of {', '.join(GPUS)}")
    return GPUS[gpu]


def _number(text: str, name: str, path: Path) -> float:
    found = re.search(rf"^\s*{name}:\s*([0-9.eE+]+)", text, flags=re.MULTILINE)
    if found is None:
        raise ProfileError(f"{path}: no number called {name}")
    return float(found.group(1))


# --- completing the grid ----------------------------------------------------------------------------------------------


def make_grid(points: Floats, seconds: Floats, axes: Sequence[Floats] | None = None) -> Grid:
    """Put points on the product of their values (or of `axes`)."""
    chosen = tuple(axes) if axes is not None else tuple(np.unique(column) for column in points.T)
    grid = Grid(axes=chosen, logs=np.full([len(axis) for axis in chosen], np.nan))
    grid.logs[grid.where(points)] = np.log(seconds)
    return grid


def interpolate(grid: Grid) -> Floats:
    """Log-seconds of every cell from its measured neighbours along each axis (itself left out); NaN where none.

    The axes' guesses are averaged with weights `error^-3`, `error` being how far off guesses across as wide a gap are
    along that axis on measured cells: neighbouring head counts say more than neighbouring batch sizes.
    """
    total = np.zeros(grid.logs.shape)
    weight = np.zeros(grid.logs.shape)
    for axis, values in enumerate(grid.axes):
        guess, gap = _between_neighbours(grid.logs, np.log(values), axis)
        known = np.isfinite(guess)
        trust = _typical_error(guess - grid.logs, gap)[known] ** -3.0
        total[known] += trust * guess[known]
        weight[known] += trust
    return np.where(weight > 0.0, total / np.where(weight > 0.0, weight, 1.0), np.nan)


def fill(grid: Grid, guess: Floats, roofline: Callable[..., Any]) -> Floats:
    """Complete a grid: interpolated where possible, else neighbours scaled along the roofline above the floor."""
    logs = np.where(np.isfinite(grid.logs), grid.logs, guess)
    floor = math.exp(float(np.nanmin(grid.logs)))
    bound = roofline(*np.meshgrid(*grid.axes, indexing="ij"))
    while np.isnan(logs).any():
        logs = np.where(np.isfinite(logs), logs, _scaled_neighbours(logs, bound, floor))
    return logs


def _neighbours(known: Bools) -> tuple[Ints, Ints]:
    """Index of the nearest known cell strictly before and after along the last axis (-1 and n where there is none)."""
    size = known.shape[-1]
    index = np.arange(size)
    before = np.full(known.shape, -1)
    before[..., 1:] = np.maximum.accumulate(np.where(known, index, -1), axis=-1)[..., :-1]
    after = np.full(known.shape, size)
    after[..., :-1] = np.minimum.accumulate(np.where(known, index, size)[..., ::-1], axis=-1)[..., ::-1][..., 1:]
    return before, after


def _between_neighbours(logs: Floats, x: Floats, axis: int) -> tuple[Floats, Floats]:
    lines = np.moveaxis(logs, axis, -1)
    before, after = _neighbours(np.isfinite(lines))
    inside = (before >= 0) & (after < len(x))
    left, right = np.maximum(before, 0), np.minimum(after, len(x) - 1)
    gap = np.where(inside, x[right] - x[left], np.inf)
    low, high = np.take_along_axis(lines, left, -1), np.take_along_axis(lines, right, -1)
    guess = np.where(inside, low + (high - low) * (x - x[left]) / gap, np.nan)
    return np.moveaxis(guess, -1, axis), np.moveaxis(gap, -1, axis)


def _typical_error(error: Floats, gap: Floats, num_bins: int = 8) -> Floats:
    """Median absolute error among measured cells whose gap is as wide, for every cell."""
    seen = np.isfinite(error)
    if not seen.any():
        return np.ones(gap.shape)
    edges = np.unique(np.quantile(gap[seen], np.linspace(0.0, 1.0, num_bins + 1)))[1:-1]
    bins = np.searchsorted(edges, gap)
    overall = float(np.median(np.abs(error[seen])))
    medians = [
        float(np.median(np.abs(error[seen & (bins == b)]))) if (seen & (bins == b)).any() else overall
        for b in range(len(edges) + 1)
    ]
    return np.asarray(np.maximum(medians, 1e-4)[bins], dtype=np.float64)


def _scaled_neighbours(logs: Floats, bound: Floats, floor: float) -> Floats:
    total, weight = np.zeros(logs.shape), np.zeros(logs.shape)
    for axis in range(logs.ndim):
        for guess, steps in _from_one_side(logs, bound, floor, axis):
            known = np.isfinite(guess)
            total[known] += guess[known] * steps[known] ** -2.0
            weight[known] += steps[known] ** -2.0
    return np.where(weight > 0.0, total / np.where(weight > 0.0, weight, 1.0), np.nan)


def _from_one_side(logs: Floats, bound: Floats, floor: float, axis: int) -> Iterator[tuple[Floats, Floats]]:
    lines, bounds = np.moveaxis(logs, axis, -1), np.moveaxis(bound, axis, -1)
    size = lines.shape[-1]
    for side in _neighbours(np.isfinite(lines)):
        known, at = (side >= 0) & (side < size), np.clip(side, 0, size - 1)
        above = np.maximum(np.exp(np.take_along_axis(lines, at, -1)) - floor, 0.0)
        guess: Floats = np.log(floor + above * bounds / np.take_along_axis(bounds, at, -1))
        steps = np.abs(np.arange(size) - side).astype(np.float64)
        yield np.moveaxis(np.where(known, guess, np.nan), -1, axis), np.moveaxis(steps, -1, axis)


# --- making it monotone -----------------------------------------------------------------------------------------------


def monotone(logs: Floats, weights: Floats, num_sweeps: int = NUM_SWEEPS) -> Floats:
    """The grid that never decreases along any axis nearest to `logs` in weighted least squares (Dykstra's method).

    The sweeps converge but do not end exactly, so the last step averages the two exact monotone envelopes.
    """
    current = logs.copy()
    corrections = [np.zeros(logs.shape) for _ in range(logs.ndim)]
    for _ in range(num_sweeps):
        for axis, correction in enumerate(corrections):
            wanted = current + correction
            current = isotonic(wanted, weights, axis)
            correction[...] = wanted - current
    return envelope(current)


def envelope(logs: Floats) -> Floats:
    """Mean of the smallest monotone grid above and the largest below: the least worst-case change."""
    upper, lower = logs, logs
    for axis in range(logs.ndim):
        upper = np.maximum.accumulate(upper, axis=axis)
        lower = np.flip(np.minimum.accumulate(np.flip(lower, axis), axis=axis), axis)
    return (upper + lower) / 2.0


def isotonic(logs: Floats, weights: Floats, axis: int) -> Floats:
    """Weighted isotonic regression of every line along `axis`: `max over j <= i of min over k >= i of mean(j..k)`."""
    lines, mass = np.moveaxis(logs, axis, -1), np.moveaxis(weights, axis, -1)
    rising = (np.diff(lines, axis=-1) >= 0.0).all(axis=-1)
    out = lines.copy()
    if not rising.all():
        out[~rising] = _min_max(lines[~rising], mass[~rising])
    return np.moveaxis(out, -1, axis)


def _min_max(lines: Floats, mass: Floats) -> Floats:
    size = lines.shape[-1]
    pad = np.zeros((len(lines), 1))
    area = np.concatenate([pad, np.cumsum(lines * mass, axis=-1)], axis=-1)
    total = np.concatenate([pad, np.cumsum(mass, axis=-1)], axis=-1)
    best = np.full(lines.shape, -np.inf)
    for first in range(size):
        means = (area[:, first + 1 :] - area[:, first, None]) / (total[:, first + 1 :] - total[:, first, None])
        smallest = np.minimum.accumulate(means[:, ::-1], axis=-1)[:, ::-1]
        best[:, first:] = np.maximum(best[:, first:], smallest)
    return best


# --- fitting ----------------------------------------------------------------------------------------------------------


def split(num_samples: int, seed: int) -> Bools:
    """Mask of the held-out points: a random fifth."""
    held_out = np.zeros(num_samples, dtype=bool)
    chosen = np.random.default_rng(seed).permutation(num_samples)[: round(num_samples * HELD_OUT_SHARE)]
    held_out[chosen] = True
    return held_out


def fit_gemm(samples: Samples, hardware: dict[str, float], *, seed: int = 0) -> tuple[GemmTable, FitReport]:
    """Fit a GEMM table to four fifths of the samples and test it on the rest."""
    return _fit(GemmTable, samples, hardware, seed=seed, axes=_axes(samples))


def fit_decode_attention(
    samples: Samples, hardware: dict[str, float], *, seed: int = 0
) -> tuple[DecodeAttentionTable, FitReport]:
    """Fit a decode-attention table. The smallest usual head size is added if unmeasured, scaled along the roofline."""
    min_group = 2 if has_own_multi_head_kernel(samples) else 1
    samples = fitted_groups(samples, min_group)
    axes = _axes(samples)
    column = DecodeAttentionTable.ARGUMENTS.index("head_dim")
    measured = axes[column]
    axes[column] = np.union1d(measured, [min(SMALLEST_HEAD_DIM, measured[0])])
    return _fit(
        DecodeAttentionTable,
        samples,
        hardware,
        seed=seed,
        axes=axes,
        measured_head_dim=tuple(map(int, measured)),
        min_query_heads_per_kv_head=min_group,
    )


def fitted_groups(samples: Samples, min_group: int) -> Samples:
    """Decode attention samples with at least `min_group` query heads per KV head."""
    heads, kv_heads = (
        samples.points[:, DecodeAttentionTable.ARGUMENTS.index(f"num_{x}_heads")] for x in ("query", "kv")
    )
    return samples.take(heads >= min_group * kv_heads)


def has_own_multi_head_kernel(samples: Samples) -> bool:
    """Whether one query head per KV head often takes much longer than two (decode attention samples).

    FlashAttention 2 in vLLM seems to split the KV cache over thread blocks only for grouped queries, so multi-head
    attention can be tens of times slower there. No table that grows with the query heads can hold both.
    """
    seconds = {tuple(point): value for point, value in zip(samples.points.tolist(), samples.seconds, strict=True)}
    ratios = [
        value / seconds[batch, 2 * heads, kv_heads, *rest]
        for (batch, heads, kv_heads, *rest), value in seconds.items()
        if heads == kv_heads and (batch, 2 * heads, kv_heads, *rest) in seconds
    ]
    return bool(ratios) and float(np.quantile(ratios, 0.9)) > MULTI_HEAD_SLOWDOWN


def _axes(samples: Samples) -> list[Floats]:
    return [np.unique(column) for column in samples.points.T]


def _fit(
    kind: type[Table], samples: Samples, hardware: dict[str, float], *, seed: int, axes: list[Floats], **extra: Any
) -> tuple[Table, FitReport]:
    held_out = split(len(samples.seconds), seed)
    train, test = samples.take(~held_out), samples.take(held_out)
    fields = dict(zip(kind.ARGUMENTS, (tuple(axis.tolist()) for axis in axes), strict=True))
    fields |= hardware | samples.labels | extra | {"package_version": PACKAGE_VERSION}
    empty = kind.from_latencies(np.ones([len(axis) for axis in axes]), **fields)
    grid = make_grid(train.points, train.seconds, axes)
    plain = fill(grid, interpolate(grid), empty.roofline_seconds)
    known = np.isfinite(grid.logs)
    table = kind.from_latencies(np.exp(monotone(plain, np.where(known, 1.0, FILLED_WEIGHT))), **fields)
    report = _report(kind, table, plain[grid.where(test.points)], train, test)
    counts = {
        "num_samples": len(train.seconds),
        "num_filled": int((~known).sum()),
        "num_held_out": len(test.seconds),
        "median_abs_relative_error": round(report.median, 5),
        "p90_abs_relative_error": round(report.p90, 5),
    }
    return table.with_fields(**counts), report


def _report(kind: type[KernelTable], table: Any, plain: Floats, train: Samples, test: Samples) -> FitReport:
    predicted = table.seconds(**dict(zip(kind.ARGUMENTS, test.points.T, strict=True)))
    median, p90 = abs_relative_errors(predicted, test.seconds)
    baseline_median, baseline_p90 = abs_relative_errors(np.exp(plain), test.seconds)
    return FitReport(
        kernel=kind.__name__,
        num_samples=len(train.seconds),
        num_held_out=len(test.seconds),
        median=median,
        p90=p90,
        baseline_median=baseline_median,
        baseline_p90=baseline_p90,
    )


def abs_relative_errors(predicted: Floats, seconds: Floats) -> tuple[float, float]:
    """Median and 90th percentile of `|predicted / seconds - 1|`."""
    errors = np.abs(predicted / seconds - 1.0)
    return float(np.median(errors)), float(np.quantile(errors, 0.9))


def fit_tables(gpu: str, data_root: Path | None = None, seed: int = 0) -> FittedTables:
    """Fit every table of a GPU of `GPUS`.

    `data_root` is the package's folder if it is not installed. Raises `ProfileError` if the measurements are missing,
    `ValueError` for an unknown GPU.
    """
    hardware = read_hardware(gpu, data_root)
    gemm, gemm_report = fit_gemm(read_gemm(gpu, data_root), hardware, seed=seed)
    decode, decode_report = fit_decode_attention(read_decode_attention(gpu, data_root), hardware, seed=seed)
    return FittedTables(gemm=gemm, decode_attention=decode, report=(gemm_report, decode_report))


# --- command line -----------------------------------------------------------------------------------------------------


def to_json(tables: FittedTables) -> str:
    """The tables as one JSON object, keys `gemm` and `decode_attention`."""
    data = {
        "gemm": tables.gemm.model_dump(mode="json"),
        "decode_attention": tables.decode_attention.model_dump(mode="json"),
    }
    return json.dumps(data, separators=(",", ":")) + "\n"


def markdown_row(gpu: str, report: FitReport) -> str:
    """One row of the table of errors."""
    return (
        f"| {gpu} | {report.kernel} | {report.num_samples} | {report.num_held_out}"
        f" | {report.median:.1%} / {report.p90:.1%} | {report.baseline_median:.1%} / {report.baseline_p90:.1%} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, write `<out>/<gpu>.json`, and print the errors as a markdown table."""
    parser = argparse.ArgumentParser(description="Fit GPU kernel tables to the measurements of aiconfigurator-core.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write <gpu>.json to")
    parser.add_argument("--data", type=Path, default=None, help="folder of an unpacked aiconfigurator_core")
    parser.add_argument("--seed", type=int, default=0, help="seed of the held-out split")
    parser.add_argument("--gpu", choices=list(GPUS), action="append", help="only these (default: all)")
    options = parser.parse_args(arguments)
    try:
        systems_folder(options.data)
    except ProfileError as error:
        parser.exit(1, f"{error}\n")
    options.out.mkdir(parents=True, exist_ok=True)
    print("| GPU | Table | Fitted points | Held-out points | Error, median / p90 | Unsmoothed, median / p90 | File |")
    print("|---|---|---|---|---|---|---|")
    for gpu in options.gpu or GPUS:
        tables = fit_tables(gpu, options.data, options.seed)
        text = to_json(tables)
        (options.out / f"{gpu}.json").write_text(text, encoding="utf-8")
        for report in tables.report:
            print(f"{markdown_row(gpu, report)} {len(text) / 1e3:.0f} kB |")


if __name__ == "__main__":
    main()
