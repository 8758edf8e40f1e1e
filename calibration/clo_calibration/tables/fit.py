"""Fits the kernel tables of a profile to measurements.

A fifth of the points is held out, the grid of the rest is completed and made monotone, and the error is measured on
the held-out points with the very table that ships. Knows nothing about profiles or about files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from clo.kernel_tables import (
    AllReduceTable,
    DecodeAttentionTable,
    ExpertsTable,
    Floats,
    GemmTable,
    KernelTable,
    LatentAttentionTable,
    LatentMapTable,
)
from clo_calibration.tables import experts
from clo_calibration.tables.grid import Grid, fill, interpolate, make_grid
from clo_calibration.tables.measurements import (
    BF16,
    BF16_CACHE,
    FP4,
    FP8,
    FP8_CACHE,
    PACKAGE_VERSION,
    WIDENED_4BIT,
    Bools,
    Cache,
    Samples,
    Weights,
    read_all_reduce,
    read_decode_attention,
    read_experts,
    read_gemm,
    read_hardware,
    read_latent_attention,
    read_latent_maps,
)
from clo_calibration.tables.monotone import monotone

HELD_OUT_SHARE = 0.2
FILLED_WEIGHT = 0.02
SMALLEST_HEAD_DIM = 64
MULTI_HEAD_SLOWDOWN = 1.25
WITHOUT_NVLINK = ("l40s", "rtx-pro-6000")
"""GPUs that reach each other by PCIe only."""
EXPERTS_OF = {"a100": "h100"}
"""GPUs whose experts were never timed evenly used, by the one whose times they borrow."""

WITHOUT = {
    "gemm_4bit": ("h200", "h100", "a100", "l40s"),
    "experts_4bit": (),
    "gemm_fp8": ("a100",),
    "experts_fp8": ("a100",),
    "decode_attention_fp8": ("a100",),
    "latent_attention_fp8": ("rtx-pro-6000", "l40s"),
}
"""GPUs without a table of that name: their tensor cores know no such numbers, or no good kernel of them was timed."""
WITH_FP4 = ("gb200", "b200", "rtx-pro-6000")
"""GPUs whose tensor cores multiply in four bits; others widen weights of four bits to bf16."""
WEIGHT_BYTES = {BF16: 2.0, FP8: 1.0, FP4: 0.5625, WIDENED_4BIT: 0.5625}
"""Scales included: a byte for every 16 weights of four bits (NVFP4)."""
ARITHMETIC_BYTES = {FP4: 0.5, WIDENED_4BIT: 2.0}
CACHE_BYTES = {BF16_CACHE: 2.0, FP8_CACHE: 1.0}

Table = TypeVar("Table", bound=KernelTable)


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """Absolute relative errors on the held-out points of one table, beside the unsmoothed interpolation's."""

    kernel: str
    num_samples: int
    num_held_out: int
    median: float
    p90: float
    baseline_median: float | None = None
    baseline_p90: float | None = None


@dataclass(frozen=True, kw_only=True)
class FittedTables:
    """The tables of one GPU, by their names in a profile, and how good they are."""

    tables: Mapping[str, KernelTable]
    report: tuple[FitReport, ...]


def split(num_samples: int, seed: int) -> Bools:
    """Mask of the held-out points: a random fifth."""
    held_out = np.zeros(num_samples, dtype=bool)
    chosen = np.random.default_rng(seed).permutation(num_samples)[: round(num_samples * HELD_OUT_SHARE)]
    held_out[chosen] = True
    return held_out


def fit_gemm(
    samples: Samples, hardware: dict[str, float], *, weights: Weights = BF16, seed: int = 0, **extra: Any
) -> tuple[GemmTable, FitReport]:
    """Fit a GEMM table to four fifths of the samples and test it on the rest."""
    axes = _axes(samples)
    return _fit(GemmTable, samples, hardware, seed=seed, axes=axes, weight_bytes=WEIGHT_BYTES[weights], **extra)


def fit_decode_attention(
    samples: Samples, hardware: dict[str, float], *, cache: Cache = BF16_CACHE, seed: int = 0
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
        kv_bytes=CACHE_BYTES[cache],
    )


def fit_all_reduce(
    samples: Samples, hardware: dict[str, float], *, over_host_link: bool = False, seed: int = 0
) -> tuple[AllReduceTable, FitReport]:
    """Fit a table of all-reduces: measured at so few sizes that none is left out of what ships.

    Its errors are those of a table without a fifth of them.
    """
    axes = _axes(samples)
    return _fit(AllReduceTable, samples, hardware, seed=seed, axes=axes, ship_all=True, over_host_link=over_host_link)


def fit_latent_attention(
    samples: Samples, hardware: dict[str, float], *, cache: Cache = BF16_CACHE, seed: int = 0
) -> tuple[LatentAttentionTable, FitReport]:
    """Fit a table of latent attention to four fifths of the samples and test it on the rest."""
    width = CACHE_BYTES[cache]
    return _fit(LatentAttentionTable, samples, hardware, seed=seed, axes=_axes(samples), kv_bytes=width)


def fit_latent_map(samples: Samples, hardware: dict[str, float], *, seed: int = 0) -> tuple[LatentMapTable, FitReport]:
    """Fit a table of its maps likewise."""
    return _fit(LatentMapTable, samples, hardware, seed=seed, axes=_axes(samples))


def fit_experts(
    samples: Samples, hardware: dict[str, float], *, weights: Weights = BF16, **extra: float
) -> tuple[ExpertsTable, FitReport]:
    """Fit a table of mixtures of experts to all samples; its errors are on models that it was fitted without."""
    width = {"weight_bytes": WEIGHT_BYTES[weights], **extra}
    groups = experts.models(samples.points)
    predicted = np.empty(len(groups))
    for group in np.unique(groups):
        without = _experts_table(samples.take(groups != group), hardware, width)
        predicted[groups == group] = without.seconds(*experts.sizes(samples.points[groups == group]).T)
    median, p90 = abs_relative_errors(predicted, samples.seconds)
    report = FitReport(
        kernel=ExpertsTable.__name__,
        num_samples=len(groups),
        num_held_out=len(groups),
        median=median,
        p90=p90,
    )
    return _experts_table(samples, hardware, width).with_fields(**_quality(report)), report


def fp8_experts(gpu: str, data_root: Path | None = None) -> Samples:
    """Measured mixtures of experts with fp8 weights, without kernels that bf16 ones outrun."""
    return experts.no_slower(read_experts(gpu, data_root, weights=FP8), read_experts(gpu, data_root))


def four_bit_experts(gpu: str, data_root: Path | None = None) -> Samples:
    """Those with weights of four bits, likewise, and of models that were not timed in bf16.

    Some took less time than reading their weights does (by 1.6, DeepSeek-V3's on B200): those are left out.
    """
    weights, bandwidth = _four_bits(gpu), read_hardware(gpu, data_root)["hbm_bytes_per_s"]
    timed = read_experts(gpu, data_root, weights=weights)
    possible = experts.no_faster_than_memory(timed, WEIGHT_BYTES[weights], bandwidth)
    return experts.no_slower(possible, read_experts(gpu, data_root), unmatched=True)


def _four_bits(gpu: str) -> Weights:
    return FP4 if gpu in WITH_FP4 else WIDENED_4BIT


def _experts_table(samples: Samples, hardware: dict[str, float], width: dict[str, float]) -> ExpertsTable:
    wide = hardware | width
    empty = ExpertsTable.from_latencies([[1.0]], weight_values=(1.0,), rows=(1.0,), **wide)
    nodes = experts.on_nodes(samples, empty.roofline_seconds)
    axes = _axes(nodes)
    grid = make_grid(nodes.points, nodes.seconds, axes)
    table, _ = _table(ExpertsTable, grid, _fields(ExpertsTable, axes, samples, wide))
    return table.with_fields(num_filled=_unmeasured(grid))


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
    ratios = multi_head_ratios(samples)
    return bool(ratios) and float(np.quantile(ratios, 0.9)) > MULTI_HEAD_SLOWDOWN


def multi_head_ratios(samples: Samples) -> list[float]:
    """What one query head per KV head takes over what two take, wherever both were measured."""
    seconds = {tuple(point): value for point, value in zip(samples.points.tolist(), samples.seconds, strict=True)}
    return [
        value / seconds[batch, 2 * heads, kv_heads, *rest]
        for (batch, heads, kv_heads, *rest), value in seconds.items()
        if heads == kv_heads and (batch, 2 * heads, kv_heads, *rest) in seconds
    ]


def _axes(samples: Samples) -> list[Floats]:
    return [np.unique(column) for column in samples.points.T]


def _fit(
    kind: type[Table],
    samples: Samples,
    hardware: dict[str, float],
    *,
    seed: int,
    axes: list[Floats],
    ship_all: bool = False,
    **extra: Any,
) -> tuple[Table, FitReport]:
    """A table of four fifths of the samples and how far off it is on the rest; with `ship_all`, then one of all."""
    held_out = split(len(samples.seconds), seed)
    train, test = samples.take(~held_out), samples.take(held_out)
    fields = _fields(kind, axes, samples, hardware) | extra
    grid = make_grid(train.points, train.seconds, axes)
    table, plain = _table(kind, grid, fields)
    report = _report(kind, table, plain[grid.where(test.points)], train, test)
    if ship_all:
        grid = make_grid(samples.points, samples.seconds, axes)
        table, _ = _table(kind, grid, fields)
    counts = {"num_samples": len(samples.seconds if ship_all else train.seconds), "num_filled": _unmeasured(grid)}
    return table.with_fields(**(_quality(report) | counts)), report


def _fields(
    kind: type[KernelTable], axes: list[Floats], samples: Samples, hardware: dict[str, float]
) -> dict[str, Any]:
    named = dict(zip(kind.ARGUMENTS, (tuple(axis.tolist()) for axis in axes), strict=True))
    return named | hardware | samples.labels | {"package_version": PACKAGE_VERSION}


def _unmeasured(grid: Grid) -> int:
    return int((~np.isfinite(grid.logs)).sum())


def _quality(report: FitReport) -> dict[str, Any]:
    return {
        "num_samples": report.num_samples,
        "num_held_out": report.num_held_out,
        "median_abs_relative_error": round(report.median, 5),
        "p90_abs_relative_error": round(report.p90, 5),
    }


def _table(kind: type[Table], grid: Grid, fields: dict[str, Any]) -> tuple[Table, Floats]:
    """The monotone table of what `grid` knows, and the log-seconds that it smooths."""
    empty = kind.from_latencies(np.ones(grid.logs.shape), **fields)
    plain = fill(grid, interpolate(grid), empty.roofline_seconds)
    weights = np.where(np.isfinite(grid.logs), 1.0, FILLED_WEIGHT)
    return kind.from_latencies(np.exp(monotone(plain, weights, kind.rising_axes())), **fields), plain


def _report(kind: type[KernelTable], table: Any, plain: Floats, train: Samples, test: Samples) -> FitReport:
    predicted = table.seconds(*test.points.T)
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
    hardware, timed = read_hardware(gpu, data_root), EXPERTS_OF.get(gpu, gpu)
    beside = read_hardware(timed, data_root)
    fits: dict[str, tuple[KernelTable, FitReport]] = {
        "gemm": fit_gemm(read_gemm(gpu, data_root), hardware, seed=seed),
        "decode_attention": fit_decode_attention(read_decode_attention(gpu, data_root), hardware, seed=seed),
        "all_reduce": fit_all_reduce(
            read_all_reduce(gpu, data_root), hardware, over_host_link=gpu in WITHOUT_NVLINK, seed=seed
        ),
        "experts": fit_experts(read_experts(timed, data_root), beside),
        "latent_attention": fit_latent_attention(read_latent_attention(gpu, data_root), hardware, seed=seed),
        "latent_map": fit_latent_map(read_latent_maps(gpu, data_root), hardware, seed=seed),
    }
    for name in narrow_tables(gpu):
        table, report = _NARROW_FITS[name](gpu, hardware, data_root, seed)
        fits[name] = table, replace(report, kernel=f"{report.kernel}, {name.rsplit('_', 1)[1]}")
    return FittedTables(
        tables={name: table for name, (table, _) in fits.items()},
        report=tuple(report for _, report in fits.values()),
    )


def narrow_tables(gpu: str) -> list[str]:
    """Tables of weights and caches narrower than bf16 that a GPU has, by their names in a profile."""
    return [name for name in _NARROW_FITS if gpu not in WITHOUT[name]]


def _fp8_gemm(gpu: str, hardware: dict[str, float], root: Path | None, seed: int) -> tuple[GemmTable, FitReport]:
    return fit_gemm(read_gemm(gpu, root, weights=FP8), hardware, weights=FP8, seed=seed)


def _fp8_experts(gpu: str, hardware: dict[str, float], root: Path | None, _: int) -> tuple[ExpertsTable, FitReport]:
    return fit_experts(fp8_experts(gpu, root), hardware, weights=FP8)


def _4bit_gemm(gpu: str, hardware: dict[str, float], root: Path | None, seed: int) -> tuple[GemmTable, FitReport]:
    samples = read_gemm(gpu, root, weights=FP4)
    return fit_gemm(samples, hardware, weights=FP4, seed=seed, arithmetic_bytes=ARITHMETIC_BYTES[FP4])


def _4bit_experts(gpu: str, _: dict[str, float], root: Path | None, __: int) -> tuple[ExpertsTable, FitReport]:
    timed = EXPERTS_OF.get(gpu, gpu)
    samples, weights = four_bit_experts(timed, root), _four_bits(timed)
    hardware = read_hardware(timed, root)
    return fit_experts(samples, hardware, weights=weights, arithmetic_bytes=ARITHMETIC_BYTES[weights])


def _fp8_decode_attention(
    gpu: str, hardware: dict[str, float], root: Path | None, seed: int
) -> tuple[DecodeAttentionTable, FitReport]:
    samples = read_decode_attention(gpu, root, cache=FP8_CACHE)
    return fit_decode_attention(samples, hardware, cache=FP8_CACHE, seed=seed)


def _fp8_latent_attention(
    gpu: str, hardware: dict[str, float], root: Path | None, seed: int
) -> tuple[LatentAttentionTable, FitReport]:
    samples = read_latent_attention(gpu, root, cache=FP8_CACHE)
    return fit_latent_attention(samples, hardware, cache=FP8_CACHE, seed=seed)


_NARROW_FITS: dict[str, Callable[..., tuple[KernelTable, FitReport]]] = {
    "gemm_4bit": _4bit_gemm,
    "experts_4bit": _4bit_experts,
    "gemm_fp8": _fp8_gemm,
    "experts_fp8": _fp8_experts,
    "decode_attention_fp8": _fp8_decode_attention,
    "latent_attention_fp8": _fp8_latent_attention,
}
