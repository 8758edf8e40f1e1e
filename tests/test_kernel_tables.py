"""Kernel tables: monotone everywhere, exact on the grid, on the roofline beyond it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_laws import HARDWARE, at, decode_law, monotone_case, small_decode, small_gemm

from clo.kernel_tables import LOG_STEP, AllReduceTable, GemmTable, KernelTable


@given(data=st.data(), kind=st.sampled_from([small_gemm(), small_decode()]))
@settings(max_examples=200, deadline=None)
def test_never_decreases_on_small_tables(data: st.DataObject, kind: KernelTable) -> None:
    monotone_case(kind, data)


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
    assert table.seconds(1, 1, 16, 64, 2) < 1.01 * table.seconds(1, 1, 8, 64, 2)


def test_below_the_table_is_the_first_cell() -> None:
    assert small_gemm().seconds(0.25, 3, 7) == small_gemm().seconds(1, 64, 64)


def test_extrapolation_is_continuous_at_the_edge() -> None:
    table = small_decode()
    inside, outside = table.seconds(64, 16, 8, 128, 65536), table.seconds(64, 16, 8, 128, 65536 * (1 + 1e-9))
    assert outside == pytest.approx(inside, rel=1e-6)


def test_scalars_and_arrays_agree_and_broadcast() -> None:
    table = small_decode()
    tokens = np.array([1, 5, 4096, 100_000])
    many = table.seconds(8, 32, 8, 128, tokens)
    assert many.dtype == np.float64
    assert many.shape == (4,)
    np.testing.assert_allclose(many, [table.seconds(8, 32, 8, 128, float(t)) for t in tokens], rtol=1e-12)
    assert table.seconds(np.ones((3, 1)), 32, 8, 128, tokens).shape == (3, 4)
    assert isinstance(table.seconds(8, 32, 8, 128, np.int64(7)), float)
    assert isinstance(table.seconds(8, 32, 8, 128, np.asarray(7)), float)


def test_arguments_are_not_changed() -> None:
    tokens = np.array([3.0, 50.0])
    small_decode().seconds(8, 32, 8, 128, tokens)
    np.testing.assert_array_equal(tokens, [3.0, 50.0])


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf"), np.array([4.0, -2.0])])
def test_sizes_that_are_not_positive_are_named(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"n = .*must be positive"):
        small_gemm().seconds(1, bad, 64)
    with pytest.raises(ValueError, match=r"kv_tokens = .*must be positive"):
        small_decode().seconds(1, 8, 8, 64, bad)


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


def test_sizes_come_in_order_or_by_name() -> None:
    table = small_gemm()
    assert table.seconds(k=4096, m=16, n=1024) == table.seconds(16, 1024, 4096)
    for values, named in (((16, 1024), {}), ((16, 1024, 4096, 1), {}), ((16,), {"n": 1024, "k": 4096}), ((), {"m": 1})):
        with pytest.raises(TypeError, match=r"GemmTable\.seconds: takes m, n, k, in this order or by name"):
            table.seconds(*values, **named)
