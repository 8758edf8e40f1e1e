"""Fits of kernel tables recover known laws from measurements, and say what is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_laws import HARDWARE, decode_law

from clo.errors import ProfileError
from clo_calibration.tables import fit, measurements


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
    np.testing.assert_allclose(table.seconds(8, 8, 2, 128, tokens), decode_law(8, 8, 2, 128, tokens), rtol=0.12)
    assert table.seconds(16, 16, 4, 128, 131072) == pytest.approx(decode_law(16, 16, 4, 128, 131072), rel=0.1)


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
    assert table.seconds(8, 4, 4, 128, 16384) == pytest.approx(decode_law(8, 4, 4, 128, 16384), rel=0.1)


def test_an_unmeasured_small_head_is_scaled_along_the_roofline() -> None:
    columns = synthetic_decode(0.0)
    wide = {name: values[columns["head_dim"] == 128] for name, values in columns.items()}
    table, _ = fit.fit_decode_attention(measurements.decode_attention_samples(wide), HARDWARE)
    assert table.measured_head_dim == (128,)
    assert table.seconds(16, 8, 4, 64, 16384) == pytest.approx(decode_law(16, 8, 4, 64, 16384), rel=0.1)


def test_fit_is_deterministic() -> None:
    samples = measurements.decode_attention_samples(synthetic_decode(0.05))
    first, second = (fit.fit_decode_attention(samples, HARDWARE, seed=5)[0] for _ in range(2))
    assert first == second
    assert first != fit.fit_decode_attention(samples, HARDWARE, seed=6)[0]


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
