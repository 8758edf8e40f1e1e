"""Kernel tables: monotone everywhere, exact on the grid, on the roofline beyond it, and fitted as well as claimed."""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clo import presets
from clo.errors import ProfileError
from clo.kernel_scaling import scaled_seconds
from clo.kernel_tables import (
    LOG_STEP,
    AllReduceTable,
    DecodeAttentionTable,
    ExpertsTable,
    GemmTable,
    KernelTable,
    LatentAttentionTable,
    LatentMapTable,
)
from clo.specs import GpuSpec
from clo_calibration.tables import fit, measurements, monotone

TABLES = Path(__file__).parents[1] / "calibration" / "profiles"
SIZE_CAP_BYTES = 300_000
HARDWARE = {"hbm_bytes_per_s": 1e12, "flops_per_s": 1e14}
KINDS: dict[str, type[KernelTable]] = {
    "gemm": GemmTable,
    "decode_attention": DecodeAttentionTable,
    "all_reduce": AllReduceTable,
    "experts": ExpertsTable,
    "gemm_fp8": GemmTable,
    "experts_fp8": ExpertsTable,
    "latent_attention": LatentAttentionTable,
    "latent_map": LatentMapTable,
    "decode_attention_fp8": DecodeAttentionTable,
    "latent_attention_fp8": LatentAttentionTable,
}
FEWEST_HELD_OUT = {
    "all_reduce": 8,
    "latent_map": 30,
    **dict.fromkeys(("latent_attention", "latent_attention_fp8"), 200),
    **dict.fromkeys(("gemm", "decode_attention", "decode_attention_fp8", "experts", "gemm_fp8", "experts_fp8"), 500),
}

needs_package = pytest.mark.skipif(
    importlib.util.find_spec(measurements.PACKAGE) is None,
    reason="aiconfigurator-core is not installed (extra `tables`)",
)


def small_gemm() -> GemmTable:
    axes = {"m": (1.0, 16.0, 4096.0), "n": (64.0, 1024.0, 8192.0), "k": (64.0, 4096.0)}
    m, n, k = np.meshgrid(*axes.values(), indexing="ij")
    seconds = 2e-6 + np.maximum(2 * (m * k + k * n + m * n) / 8e11, 2 * m * n * k / 7e13)
    return GemmTable.from_latencies(seconds, **axes, **HARDWARE)


def decode_law(batch: Any, heads: Any, kv_heads: Any, head_dim: Any, kv_tokens: Any) -> Any:
    return 5e-6 + 4.0 * batch * head_dim * (kv_heads * kv_tokens + heads) / 8e11


def small_decode() -> DecodeAttentionTable:
    axes = {
        "batch": (1.0, 4.0, 64.0),
        "num_query_heads": (1.0, 8.0, 32.0),
        "num_kv_heads": (1.0, 8.0),
        "head_dim": (64.0, 128.0),
        "kv_tokens": (2.0, 128.0, 4096.0, 65536.0),
    }
    seconds = decode_law(*np.meshgrid(*axes.values(), indexing="ij"))
    return DecodeAttentionTable.from_latencies(seconds, **axes, **HARDWARE)


def shipped(gpu: str, kind: str) -> Any:
    return KINDS[kind].model_validate(json.loads((TABLES / f"{gpu}.json").read_text())[kind])


def kinds_of(gpu: str) -> list[str]:
    """Tables that a GPU has."""
    return [kind for kind in KINDS if gpu not in fit.WITHOUT_FP8.get(kind, ())]


SHIPPED = [(gpu, kind) for gpu in measurements.GPUS for kind in kinds_of(gpu)]


@pytest.fixture(scope="module", params=SHIPPED, ids="-".join)
def shipped_table(request: pytest.FixtureRequest) -> Any:
    return shipped(*request.param)


def at(table: KernelTable, values: Any) -> Any:
    return table.seconds(**dict(zip(table.ARGUMENTS, values, strict=True)))  # type: ignore[attr-defined]


def monotone_case(table: KernelTable, data: st.DataObject) -> None:
    size = st.floats(min_value=-1.5, max_value=7.0).map(lambda exponent: 10.0**exponent)
    point = [data.draw(st.one_of(size, st.sampled_from(getattr(table, name))), label=name) for name in table.ARGUMENTS]
    axis = data.draw(st.sampled_from(table.rising_axes()), label="axis")
    factor = data.draw(st.one_of(st.floats(1.0, 1.001), st.floats(1.0, 1e4)), label="factor")
    further = [value * factor if i == axis else value for i, value in enumerate(point)]
    assert at(table, further) >= at(table, point) * (1.0 - 1e-12)


@given(data=st.data(), kind=st.sampled_from([small_gemm(), small_decode()]))
@settings(max_examples=200, deadline=None)
def test_never_decreases_on_small_tables(data: st.DataObject, kind: KernelTable) -> None:
    monotone_case(kind, data)


@given(data=st.data(), of=st.sampled_from(SHIPPED))
@settings(max_examples=150, deadline=None)
def test_never_decreases_on_shipped_tables(data: st.DataObject, of: tuple[str, str]) -> None:
    gpu, kind = of
    monotone_case(CACHE.setdefault((gpu, kind), shipped(gpu, kind)), data)


CACHE: dict[tuple[str, str], Any] = {}


def test_shipped_tables_never_decrease_along_dense_lines(shipped_table: Any) -> None:
    rng = np.random.default_rng(1)
    for axis in shipped_table.rising_axes():
        point: list[Any] = [
            np.exp(rng.uniform(-1, np.log(3 * getattr(shipped_table, name)[-1]), (200, 1)))
            for name in shipped_table.ARGUMENTS
        ]
        point[axis] = np.geomspace(0.3, 1e7, 400)
        lines = at(shipped_table, point)
        assert lines.shape == (200, 400)
        assert (np.diff(lines, axis=1) >= -1e-12 * lines[:, 1:]).all()


@pytest.mark.parametrize("table", [small_gemm(), small_decode()], ids=["gemm", "decode"])
def test_grid_points_are_reproduced(table: KernelTable) -> None:
    axes = [getattr(table, name) for name in table.ARGUMENTS]
    expected = np.exp(table._grid.logs)
    grid = at(table, np.meshgrid(*axes, indexing="ij"))
    np.testing.assert_allclose(grid, expected, rtol=1e-12)
    for index, point in zip(np.ndindex(*expected.shape), itertools.product(*axes), strict=True):
        assert at(table, point) == pytest.approx(expected[index], rel=1e-12)


def test_stored_latency_is_within_half_a_step() -> None:
    table = small_decode()
    axes = [getattr(table, name) for name in table.ARGUMENTS]
    points = np.meshgrid(*axes, indexing="ij")
    np.testing.assert_allclose(at(table, points), decode_law(*points), rtol=LOG_STEP / 2 * 1.01)


def test_between_grid_points_the_logarithm_is_interpolated() -> None:
    table = small_gemm()
    corners = table.seconds(4096, 8192, 64), table.seconds(4096, 8192, 4096)
    assert table.seconds(4096, 8192, 512) == pytest.approx(np.sqrt(corners[0] * corners[1]), rel=1e-9)


@pytest.mark.parametrize("name", ["batch", "kv_tokens", "num_kv_heads"])
def test_past_the_edge_doubling_the_bytes_doubles_decode_time(name: str) -> None:
    table = small_decode()
    edge = {key: getattr(table, key)[-1] for key in table.ARGUMENTS}
    once = table.seconds(**edge)
    for factor in (2.0, 16.0):
        assert table.seconds(**edge | {name: factor * edge[name]}) == pytest.approx(factor * once, rel=0.01)


def test_past_the_edge_more_query_heads_cost_nothing_until_compute_bound() -> None:
    table = small_decode()
    edge = {key: getattr(table, key)[-1] for key in table.ARGUMENTS}
    assert table.seconds(**edge | {"num_query_heads": 64.0}) == pytest.approx(table.seconds(**edge), rel=0.01)
    assert table.seconds(**edge | {"num_query_heads": 32000.0}) > 10 * table.seconds(**edge)


@pytest.mark.parametrize("name", ["m", "n", "k"])
def test_past_the_edge_doubling_the_flops_doubles_gemm_time(name: str) -> None:
    table = small_gemm()
    edge = {"m": 4096.0, "n": 8192.0, "k": 4096.0}
    assert table.seconds(**edge | {name: 2 * edge[name]}) == pytest.approx(2 * table.seconds(**edge), rel=0.01)


def test_past_the_edge_a_latency_bound_cell_stays_latency_bound() -> None:
    table = small_decode()
    assert table.seconds(1, 2, 1, 16, 64) < 1.01 * table.seconds(1, 2, 1, 8, 64)


def test_below_the_table_is_the_first_cell() -> None:
    assert small_gemm().seconds(0.25, 3, 7) == small_gemm().seconds(1, 64, 64)


def test_extrapolation_is_continuous_at_the_edge() -> None:
    table = small_decode()
    inside, outside = table.seconds(64, 65536, 16, 8, 128), table.seconds(64, 65536 * (1 + 1e-9), 16, 8, 128)
    assert outside == pytest.approx(inside, rel=1e-6)


def test_scalars_and_arrays_agree_and_broadcast() -> None:
    table = small_decode()
    tokens = np.array([1, 5, 4096, 100_000])
    many = table.seconds(8, tokens, 32, 8, 128)
    assert many.dtype == np.float64
    assert many.shape == (4,)
    np.testing.assert_allclose(many, [table.seconds(8, float(t), 32, 8, 128) for t in tokens], rtol=1e-12)
    assert table.seconds(np.ones((3, 1)), tokens, 32, 8, 128).shape == (3, 4)
    assert isinstance(table.seconds(8, np.int64(7), 32, 8, 128), float)
    assert isinstance(table.seconds(8, np.asarray(7), 32, 8, 128), float)


def test_arguments_are_not_changed() -> None:
    tokens = np.array([3.0, 50.0])
    small_decode().seconds(8, tokens, 32, 8, 128)
    np.testing.assert_array_equal(tokens, [3.0, 50.0])


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf"), np.array([4.0, -2.0])])
def test_sizes_that_are_not_positive_are_named(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"n = .*must be positive"):
        small_gemm().seconds(1, bad, 64)
    with pytest.raises(ValueError, match=r"kv_tokens = .*must be positive"):
        small_decode().seconds(1, bad, 8, 8, 64)


def test_tables_that_decrease_are_refused() -> None:
    axes = {"m": (1.0, 2.0), "n": (1.0,), "k": (1.0, 2.0)}
    with pytest.raises(ValueError, match="must not decrease with m"):
        GemmTable.from_latencies([[[2.0, 3.0]], [[1.0, 3.0]]], **axes, **HARDWARE)
    with pytest.raises(ValueError, match="must not decrease along the last axis"):
        GemmTable.from_latencies([[[2.0, 1.0]], [[2.0, 2.0]]], **axes, **HARDWARE)
    with pytest.raises(ValueError, match="positive and finite"):
        GemmTable.from_latencies([[[2.0, np.nan]], [[2.0, 2.0]]], **axes, **HARDWARE)


def test_sums_may_take_more_gpus_less_time_but_larger_sums_never() -> None:
    axes = {"num_gpus": (2.0, 4.0), "num_values": (128.0, 4096.0)}
    table = AllReduceTable.from_latencies([[1.0, 9.0], [2.0, 5.0]], **axes, **HARDWARE)
    assert [table.seconds(gpus, 4096) for gpus in (2, 4)] == pytest.approx([9.0, 5.0], rel=LOG_STEP)
    with pytest.raises(ValueError, match="must not decrease"):
        AllReduceTable.from_latencies([[9.0, 1.0], [2.0, 5.0]], **axes, **HARDWARE)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("m", (1.0, 1.0, 4096.0), "strictly ascending"),
        ("m", (1.0, 16.0), "the axes need"),
        ("log_latency", "!", "not base64"),
        ("log_latency", "AAAA", "not base64 of zlib"),
        ("colour", "red", "unknown field"),
    ],
)
def test_broken_tables_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GemmTable.parse(small_gemm().model_dump() | {field: value})


@pytest.mark.parametrize("table", [small_gemm(), small_decode()], ids=["gemm", "decode"])
def test_json_round_trip(table: KernelTable) -> None:
    at(table, [1.0] * len(table.ARGUMENTS))  # the decoded grid must not leak into the file or the comparison
    again = type(table).model_validate_json(table.model_dump_json())
    assert again == table
    assert again.model_dump_json() == table.model_dump_json()


@pytest.mark.parametrize("gpu", list(measurements.GPUS))
def test_shipped_file_is_small_and_labelled(gpu: str) -> None:
    path = TABLES / f"{gpu}.json"
    assert path.stat().st_size <= SIZE_CAP_BYTES
    data = json.loads(path.read_text())
    assert {kind for kind in KINDS if data[kind] is not None} == set(kinds_of(gpu))
    for kind in kinds_of(gpu):
        table = shipped(gpu, kind)
        assert (table.source, table.license) == ("aiconfigurator", "Apache-2.0")
        timed = fit.EXPERTS_OF.get(gpu, gpu) if kind == "experts" else gpu
        assert timed.replace("-", " ").upper() in table.device
        assert table.num_held_out > FEWEST_HELD_OUT[kind]
        assert 0.0 < table.median_abs_relative_error < table.p90_abs_relative_error


def synthetic_decode(noise: float) -> dict[str, np.ndarray[Any, Any]]:
    values = ([1, 2, 4, 8, 16], [1, 2, 4, 8, 16], [1, 2, 4], [64, 128], [2**i - 1 for i in range(1, 15)])
    grid = [np.ravel(column) for column in np.meshgrid(*values, indexing="ij")]
    batch, heads, kv_heads, head_dim, step = (column[grid[1] >= grid[2]] for column in grid)
    rng = np.random.default_rng(3)
    size = len(batch)
    wobble = np.exp(noise * rng.standard_normal(size))
    columns: dict[str, Any] = {
        "batch_size": batch,
        "num_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "step": step,
        "isl": np.ones(size, dtype=int),
        "latency": 1e3 * decode_law(batch, heads, kv_heads, head_dim, step + 1) * wobble,
    }
    labels = {"attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "version": "1.0", "device": "Test GPU"}
    return columns | {k: np.full(size, v, dtype=object) for k, v in (labels | {"kernel_source": "flash"}).items()}


@pytest.mark.parametrize(("noise", "median_limit"), [(0.0, 0.01), (0.05, 0.05)])
def test_fit_recovers_a_known_law(noise: float, median_limit: float) -> None:
    samples = measurements.decode_attention_samples(synthetic_decode(noise))
    table, report = fit.fit_decode_attention(samples, HARDWARE)
    assert report.num_samples + report.num_held_out == len(samples.seconds)
    assert report.median < median_limit
    assert report.p90 < 1.5 * report.baseline_p90
    tokens = np.array([4, 64, 1024, 16384])
    np.testing.assert_allclose(table.seconds(8, tokens, 8, 2, 128), decode_law(8, 8, 2, 128, tokens), rtol=0.12)
    assert table.seconds(16, 131072, 16, 4, 128) == pytest.approx(decode_law(16, 16, 4, 128, 131072), rel=0.1)


def test_kv_tokens_count_the_new_token() -> None:
    samples = measurements.decode_attention_samples(synthetic_decode(0.0))
    assert set(samples.points[:, 4]) == {2.0**i for i in range(1, 15)}


def test_windows_and_other_dtypes_are_left_out() -> None:
    columns = synthetic_decode(0.0)
    columns["window_size"] = np.arange(len(columns["step"])) % 2 * 128
    columns["kv_cache_dtype"] = np.where(np.arange(len(columns["step"])) % 3 == 0, "fp8", "bfloat16")
    kept = measurements.decode_attention_samples(columns)
    assert len(kept.seconds) == np.sum((columns["window_size"] == 0) & (columns["kv_cache_dtype"] == "bfloat16"))


def test_all_reduces_are_those_of_graphs() -> None:
    def law(gpus: Any, values: Any) -> Any:
        return 4e-6 + gpus * values * 1e-12

    gpus, values = (column.ravel() for column in np.meshgrid([2, 4, 8], 2 ** np.arange(7, 28), indexing="ij"))
    rows = np.arange(2 * len(gpus))
    eager, narrow = rows % 2 == 1, rows % 10 == 0
    columns = {
        "num_gpus": np.repeat(gpus, 2),
        "message_size": np.repeat(values, 2),
        "latency": 1e3 * np.where(eager, 20e-6, 1.0 * law(np.repeat(gpus, 2), np.repeat(values, 2))),
        "allreduce_dtype": np.where(narrow, "int8", "bfloat16"),
        "kernel_source": np.where(eager, "vLLM_custom_eager", "vLLM_custom_graph"),
        "version": np.full(len(rows), "0"),
        "device": np.full(len(rows), "a GPU"),
    }
    samples = measurements.all_reduce_samples(columns)
    assert len(samples.seconds) == np.sum(~eager & ~narrow)
    table, report = fit.fit_all_reduce(samples, HARDWARE, over_host_link=True)
    assert table.over_host_link
    assert table.seconds(4, 2.0**20) == pytest.approx(law(4, 2.0**20), rel=0.05)
    assert report.median < 0.05


def test_multi_head_attention_with_a_slower_kernel_is_left_out() -> None:
    columns = synthetic_decode(0.0)
    columns["latency"] = np.where(columns["num_heads"] == columns["num_key_value_heads"], 5.0, 1.0) * columns["latency"]
    samples = measurements.decode_attention_samples(columns)
    table, _ = fit.fit_decode_attention(samples, HARDWARE)
    assert table.min_query_heads_per_kv_head == 2
    assert table.seconds(8, 16384, 4, 4, 128) == pytest.approx(decode_law(8, 4, 4, 128, 16384), rel=0.1)


def test_an_unmeasured_small_head_is_scaled_along_the_roofline() -> None:
    columns = synthetic_decode(0.0)
    wide = {name: values[columns["head_dim"] == 128] for name, values in columns.items()}
    table, _ = fit.fit_decode_attention(measurements.decode_attention_samples(wide), HARDWARE)
    assert table.measured_head_dim == (128,)
    assert table.seconds(16, 16384, 8, 4, 64) == pytest.approx(decode_law(16, 8, 4, 64, 16384), rel=0.1)


def test_fit_is_deterministic() -> None:
    samples = measurements.decode_attention_samples(synthetic_decode(0.05))
    first, second = (fit.fit_decode_attention(samples, HARDWARE, seed=5)[0] for _ in range(2))
    assert first == second
    assert first != fit.fit_decode_attention(samples, HARDWARE, seed=6)[0]


def test_isotonic_is_the_weighted_least_squares_fit() -> None:
    lines = np.array([[1.0, 3.0, 2.0, 2.0, 5.0]])
    weights = np.array([[1.0, 1.0, 1.0, 2.0, 1.0]])
    np.testing.assert_allclose(monotone.isotonic(lines, weights, 1), [[1.0, 2.25, 2.25, 2.25, 5.0]])


def test_monotone_leaves_a_monotone_grid_alone_and_repairs_another() -> None:
    rising = np.add.outer(np.arange(4.0), np.arange(5.0) ** 2)
    np.testing.assert_allclose(monotone.monotone(rising, np.ones(rising.shape), (0, 1)), rising)
    noisy = rising + np.random.default_rng(0).normal(size=rising.shape)
    smooth = monotone.monotone(noisy, np.ones(rising.shape), (0, 1))
    assert all((np.diff(smooth, axis=axis) >= 0.0).all() for axis in (0, 1))
    assert np.mean((smooth - rising) ** 2) < np.mean((noisy - rising) ** 2)


def test_monotone_leaves_other_axes_as_they_are() -> None:
    noisy = np.random.default_rng(0).normal(size=(4, 5))
    smooth = monotone.monotone(noisy, np.ones(noisy.shape), (1,))
    assert (np.diff(smooth, axis=1) >= 0.0).all()
    for line, wanted in zip(smooth, noisy, strict=True):
        np.testing.assert_allclose(line, monotone.isotonic(wanted[None], np.ones((1, 5)), 1)[0])


def test_missing_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ProfileError, match=r'^[^\n]*pip install "clo-offload\[tables\]"$'):
        fit.fit_tables("h200")
    with pytest.raises(ProfileError, match="holds no systems/data folder"):
        fit.fit_tables("h200", tmp_path)


def test_unknown_gpu_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match="gpu = 'tpu'"):
        fit.fit_tables("tpu", tmp_path)
    with pytest.raises(ProfileError, match="no such file"):
        fit.fit_tables("h200", tmp_path)


@needs_package
@pytest.mark.parametrize("gpu", list(measurements.GPUS))
def test_shipped_tables_are_as_good_on_held_out_points_as_they_say(gpu: str) -> None:
    readers: dict[str, Any] = {
        "gemm": measurements.read_gemm,
        "gemm_fp8": partial(measurements.read_gemm, weights=measurements.FP8),
        "decode_attention": measurements.read_decode_attention,
        "latent_attention": measurements.read_latent_attention,
        "latent_map": measurements.read_latent_maps,
        "decode_attention_fp8": partial(measurements.read_decode_attention, cache=measurements.FP8_CACHE),
        "latent_attention_fp8": partial(measurements.read_latent_attention, cache=measurements.FP8_CACHE),
    }
    for kind in readers.keys() & set(kinds_of(gpu)):
        table, samples = shipped(gpu, kind), readers[kind](gpu)
        if kind.startswith("decode_attention"):
            samples = fit.fitted_groups(samples, table.min_query_heads_per_kv_head)
        test = samples.take(fit.split(len(samples.seconds), seed=0))
        median, p90 = fit.abs_relative_errors(at(table, test.points.T), test.seconds)
        assert len(test.seconds) == table.num_held_out
        assert median == pytest.approx(table.median_abs_relative_error, abs=1e-4)
        assert p90 == pytest.approx(table.p90_abs_relative_error, abs=1e-4)


@needs_package
@pytest.mark.parametrize("gpu", list(measurements.GPUS))
def test_shipped_all_reduces_leave_no_measurement_out(gpu: str) -> None:
    table, samples = shipped(gpu, "all_reduce"), measurements.read_all_reduce(gpu)
    assert table.num_samples == len(samples.seconds)
    errors = np.abs(at(table, samples.points.T) / samples.seconds - 1)
    # what is left is a size that took longer than larger ones
    assert np.quantile(errors, 0.9) < 0.05
    _, report = fit.fit_all_reduce(samples, HARDWARE)
    assert report.median == pytest.approx(table.median_abs_relative_error, abs=1e-3)
    assert report.p90 == pytest.approx(table.p90_abs_relative_error, abs=1e-3)


def unlike_gpus() -> Iterator[tuple[str, str]]:
    """Pairs of measured GPUs; those with almost the same bandwidth differ by what no roofline knows."""
    for source, target in itertools.permutations(measurements.GPUS, 2):
        rates = [presets.load_machine(name).gpu.hbm_bytes_per_s for name in (source, target)]
        if max(rates) > 1.2 * min(rates):
            yield source, target


class TestAnotherGpu:
    """`scaled_seconds`: what was measured on one GPU, on another."""

    POINTS = (np.array([1.0, 16.0, 4096.0]), np.array([1024.0, 4096.0, 8192.0]), 4096.0)

    @staticmethod
    def gpu(bandwidth: float = 1.0, flops: float = 1.0) -> GpuSpec:
        """The GPU of the small tables, faster by these factors."""
        hbm, peak = HARDWARE["hbm_bytes_per_s"] * bandwidth, HARDWARE["flops_per_s"] * flops
        return GpuSpec(memory_bytes=1e9, num_sms=100, hbm_bytes_per_s=hbm, peak_flops_per_s=peak)

    def test_the_measured_gpu_keeps_its_times(self) -> None:
        table = small_gemm()
        assert np.array_equal(scaled_seconds(table, self.gpu(), *self.POINTS), table.seconds(*self.POINTS))

    @given(factor=st.floats(0.1, 10.0))
    def test_a_gpu_faster_in_all_takes_a_share_of_what_is_above_the_floor(self, factor: float) -> None:
        table = small_gemm()
        above = table.seconds(*self.POINTS) - table.floor_s
        there = scaled_seconds(table, self.gpu(factor, factor), *self.POINTS)
        assert there == pytest.approx(table.floor_s + above / factor, rel=2e-3)

    @given(factor=st.floats(1.01, 10.0))
    def test_what_arithmetic_bounds_gains_nothing_from_bandwidth(self, factor: float) -> None:
        sizes = (4096.0, 8192.0, 4096.0)  # 2.7 ms of arithmetic, 0.2 ms of bytes
        table = small_gemm()
        assert scaled_seconds(table, self.gpu(bandwidth=factor), *sizes) == pytest.approx(table.seconds(*sizes))

    @given(data=st.data(), kind=st.sampled_from([small_gemm(), small_decode()]))
    def test_a_faster_gpu_never_takes_longer(self, data: st.DataObject, kind: KernelTable) -> None:
        factor = st.floats(0.05, 20.0)
        slow = data.draw(st.tuples(factor, factor))
        fast = tuple(rate * data.draw(st.floats(1.0, 20.0)) for rate in slow)
        point = [data.draw(st.sampled_from(getattr(kind, name))) for name in kind.ARGUMENTS]
        there = [scaled_seconds(kind, self.gpu(*rates), *point) for rates in (slow, fast)]
        assert there[1] <= there[0] * (1 + 1e-3)  # rates a thousandth apart count as equal

    @pytest.mark.parametrize(("source", "target"), list(unlike_gpus()))
    @pytest.mark.parametrize("kind", ["gemm", "decode_attention"])
    def test_carried_over_is_nearer_to_what_was_measured_there(self, kind: str, source: str, target: str) -> None:
        sizes = {
            "gemm": ([1.0, 4.0, 16.0, 64.0], [4096.0, 28672.0], [4096.0, 14336.0]),
            "decode_attention": ([1.0, 4.0, 16.0], [32.0], [8.0], [128.0], [4096.0, 16384.0, 65536.0]),
        }[kind]
        points = [axis.ravel() for axis in np.meshgrid(*sizes, indexing="ij")]
        borrowed, measured = shipped(source, kind), shipped(target, kind).seconds_at(*points)
        carried = scaled_seconds(borrowed, presets.load_machine(target).gpu, *points)
        errors = [np.median(np.abs(times / measured - 1)) for times in (carried, borrowed.seconds_at(*points))]
        assert errors[0] < errors[1] / 1.5
