"""The shipped kernel tables: monotone, small, labelled, as good on held-out points as they say."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_laws import HARDWARE, KINDS, SHIPPED, TABLES, at, kinds_of, monotone_case, shipped
from needs import needs_measurements

from clo_calibration.tables import fit, measurements

SIZE_CAP_BYTES = 350_000

FEWEST_HELD_OUT = {
    "all_reduce": 8,
    "latent_map": 30,
    **dict.fromkeys(("latent_attention", "latent_attention_fp8"), 200),
    **dict.fromkeys(
        ("gemm", "decode_attention", "decode_attention_fp8", "experts", "gemm_fp8", "experts_fp8", "gemm_4bit"), 500
    ),
    "experts_4bit": 300,
}


@pytest.fixture(scope="module", params=SHIPPED, ids="-".join)
def shipped_table(request: pytest.FixtureRequest) -> Any:
    return shipped(*request.param)


CACHE: dict[tuple[str, str], Any] = {}


@given(data=st.data(), of=st.sampled_from(SHIPPED))
@settings(max_examples=150, deadline=None)
def test_never_decreases_on_shipped_tables(data: st.DataObject, of: tuple[str, str]) -> None:
    gpu, kind = of
    monotone_case(CACHE.setdefault((gpu, kind), shipped(gpu, kind)), data)


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


@pytest.mark.parametrize("gpu", list(measurements.GPUS))
def test_shipped_file_is_small_and_labelled(gpu: str) -> None:
    path = TABLES / f"{gpu}.json"
    assert path.stat().st_size <= SIZE_CAP_BYTES
    data = json.loads(path.read_text())
    assert {kind for kind in KINDS if data[kind] is not None} == set(kinds_of(gpu))
    for kind in kinds_of(gpu):
        table = shipped(gpu, kind)
        assert (table.source, table.license) == ("aiconfigurator", "Apache-2.0")
        timed = fit.EXPERTS_OF.get(gpu, gpu) if kind in ("experts", "experts_4bit") else gpu
        assert timed.replace("-", " ").upper() in table.device
        assert table.num_held_out > FEWEST_HELD_OUT[kind]
        assert 0.0 < table.median_abs_relative_error < table.p90_abs_relative_error


@needs_measurements
@pytest.mark.parametrize("gpu", list(measurements.GPUS))
def test_shipped_tables_are_as_good_on_held_out_points_as_they_say(gpu: str) -> None:
    readers: dict[str, Any] = {
        "gemm": measurements.read_gemm,
        "gemm_fp8": partial(measurements.read_gemm, weights=measurements.FP8),
        "gemm_4bit": partial(measurements.read_gemm, weights=measurements.FP4),
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


@needs_measurements
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
