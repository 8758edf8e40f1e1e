"""Known costs are found again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clo.engine.measure import MachineRun
from clo.engine.models.network import Network
from clo.errors import ProfileError, SpecError
from clo.operation_costs import (
    GEMM_ROWS,
    OperationPricer,
    OperationProfile,
    feature_values,
    price_key,
)
from clo.pricing import Demand
from clo.profile import InterferenceCost, Source
from clo.schedule import record_step
from clo.schedule.ops import price_name
from clo.schedule.work import DecodeAttention, Gemm
from clo_calibration.calibrate import drift, fit_profile
from clo_calibration.host_benchmarks import Benchmark
from clo_calibration.interference_fit import fit_interference
from clo_calibration.operation_fit import (
    Observation,
    Timed,
    fit_costs,
)
from clo_calibration.probes import (
    CPU_GRID,
    CUDA_GRID,
    SPARE_TOKENS,
    Grid,
    Probe,
    calibration_probes,
    grid_of,
    local_design,
    named,
    validation_probes,
)
from clo_sim.contention import Contention
from tests.engine.calibration.calibrated import DESIGNS, SHAPE, SIZE


def rows(run: int, count: int, features: dict[str, float], seconds: float, **more: object) -> list[Observation]:
    settled = {"key": "a", "is_runtime": False, "beside": {}} | more
    return [Observation(run=run, features=features, seconds=seconds, **settled) for _ in range(count)]  # type: ignore[arg-type]


def overlapped(key: str, seconds: float, *groups: tuple[str, ...]) -> Timed:
    """Forty runs of an operation that takes `seconds`, beside each group for an equal part of them."""
    beside = {group: 1.0 / len(groups) for group in groups}
    return Timed([row for run in range(40) for row in rows(run, 4, {"calls": 1.0}, seconds, key=key, beside=beside)])


class TestFit:
    @given(
        st.floats(1e-6, 1e-3),
        st.floats(1e-12, 1e-8),
        st.lists(st.floats(1e2, 1e6), min_size=3, max_size=6, unique_by=lambda x: round(x, -2)),
    )
    @settings(max_examples=30, deadline=None)
    def test_linear_costs_are_found_again(self, call: float, byte: float, sizes: list[float]) -> None:
        found = Timed()
        for run, size in enumerate(sizes):
            found.rows += rows(run, 3, {"calls": 1.0, "bytes": size}, call + byte * size)
        cost = fit_costs({"a": found})["a"]
        for size in sizes:
            fitted = sum(cost.per_unit.get(name, 0.0) * value for name, value in {"calls": 1.0, "bytes": size}.items())
            assert fitted == pytest.approx(call + byte * size, rel=1e-6)
        assert cost.spread < 1e-6

    @given(st.integers(1, 24), st.integers(1, 64), st.integers(1, 64))
    def test_gemms_share_their_weights_between_the_nearest_rows(self, rows: int, n: int, k: int) -> None:
        found = feature_values(Gemm(rows, n, k), None, None)  # type: ignore[arg-type]
        weights = {int(name.split("_")[1]): value for name, value in found.items()}
        assert sum(at * value for at, value in weights.items()) == pytest.approx(rows * n * k)
        if rows <= GEMM_ROWS[-1]:
            assert sum(weights.values()) == pytest.approx(n * k)
            assert all(not min(rows, at) < between < max(rows, at) for at in weights for between in GEMM_ROWS)

    def test_a_batch_that_was_never_timed_is_named(
        self, runs: dict[str, tuple[MachineRun, MachineRun]], profile: OperationProfile
    ) -> None:
        pricer = OperationPricer(profile, runs["clo"][1].plan)
        with pytest.raises(ProfileError, match="operation out_proj was never timed for a batch of 5"):
            pricer.seconds(Gemm(5, 48, 48), runs["clo"][1].traffic, "out_proj")

    def test_every_grid_times_gemms_of_every_number_of_rows(self) -> None:
        for grid in (CPU_GRID, CUDA_GRID):
            assert {probe.size[1] for probe in calibration_probes(SHAPE, grid=grid) if probe.alone} >= set(GEMM_ROWS)

    @given(st.floats(1e-6, 1e-3), st.floats(0, 1e-3), st.floats(1e-6, 1e-4))
    def test_more_than_one_sequence_may_cost_something_once(self, one: float, several: float, each: float) -> None:
        """One sequence's tensors are contiguous wherever those of several are copied."""
        found, seconds = Timed(), [one + (several if batch > 1 else 0.0) + each * batch for batch in (1, 2, 3, 4)]
        for batch, total in enumerate(seconds, 1):
            work = DecodeAttention(batch, 64, num_query_heads=4, num_kv_heads=2, head_dim=16)
            found.rows += rows(batch, 3, feature_values(work, None, None), total)  # type: ignore[arg-type]
        assert fit_costs({"a": found})["a"].spread < 1e-6

    def test_an_outlier_does_not_count(self) -> None:
        found = Timed(rows(0, 50, {"calls": 1.0}, 1e-4) + rows(0, 1, {"calls": 1.0}, 5.0))
        assert fit_costs({"a": found})["a"].per_unit["calls"] < 1.2e-4

    def test_the_few_operations_with_much_to_do_count_in_full(self) -> None:
        """A page is stored in one step of five: rare, and many times as long, but not disturbed."""
        found = Timed()
        for run, pages in enumerate((6.0, 12.0)):
            idle, busy = {"calls": 1.0, "some": 0.0, "pages": 0.0}, {"calls": 1.0, "some": 1.0, "pages": pages}
            found.rows += rows(run, 16, idle, 2e-4) + rows(run, 4, busy, 2e-4 + 5e-4 * pages)
            found.rows += rows(run, 1, idle, 5.0) + rows(run, 1, busy, 5.0)
        cost = fit_costs({"a": found})["a"]
        for pages in (6.0, 12.0):
            fitted = cost.per_unit["calls"] + cost.per_unit.get("some", 0.0) + cost.per_unit["pages"] * pages
            # of five the disturbed one counts thrice
            assert fitted == pytest.approx(1.4 * (2e-4 + 5e-4 * pages), rel=0.1)
        assert cost.per_unit["calls"] < 1.2 * 2e-4
        quiet = Timed([row for row in found.rows if row.seconds < 5.0])
        assert fit_costs({"a": quiet})["a"].spread < 1e-4

    def test_costs_are_never_negative(self) -> None:
        found = Timed(rows(0, 3, {"calls": 1.0, "bytes": 1.0}, 2e-4) + rows(1, 3, {"calls": 1.0, "bytes": 100.0}, 1e-4))
        assert min(fit_costs({"a": found})["a"].per_unit.values()) >= 0

    def test_known_interference_is_found_again(self) -> None:
        """Two operations that always run beside each other: a three times as long, b half as long again."""
        costs = fit_costs({key: Timed(rows(0, 4, {"calls": 1.0}, 1e-3, key=key)) for key in ("a", "b")})
        beside = {"a": overlapped("a", 3e-3, ("b",)), "b": overlapped("b", 1.5e-3, ("a",))}
        found = fit_interference(beside, costs)
        slowed_a = 1 + found.slowed["a"] * found.host_share["b"]
        slowed_b = 1 + found.slowed["b"] * found.host_share["a"]
        assert slowed_a * found.lane_factor["a"] == pytest.approx(3.0, rel=0.03)
        assert slowed_b * found.lane_factor["b"] == pytest.approx(1.5, rel=0.03)

    def test_shares_of_all_that_run_beside_add_up(self) -> None:
        """What an operation suffers beside two others is what it suffers beside each: the simulator's rule."""
        keys = ("a", "b", "c")
        costs = fit_costs({key: Timed(rows(0, 4, {"calls": 1.0}, 1e-3, key=key)) for key in keys})
        beside = {
            "a": overlapped("a", 1.7e-3, ("b", "c")),
            "b": overlapped("b", 1.35e-3, ("a",), ("a", "c")),
            "c": overlapped("c", 1.35e-3, ("a",), ("a", "b")),
        }
        found = fit_interference(beside, costs)
        demands = [Demand(is_kernel=True, slowed=found.slowed[key], host_share=found.host_share[key]) for key in keys]
        rate = Contention(InterferenceCost(source=Source.MEASURED, per_sm_share=0.0, dma=0.0)).rates(tuple(demands))[0]
        assert found.lane_factor["a"] / rate == pytest.approx(1.7, rel=0.03)

    def test_a_pair_that_was_never_seen_does_not_stop(self) -> None:
        """a suffers beside b, c suffers from d; nobody saw a beside d."""
        keys = ("a", "b", "c", "d")
        costs = fit_costs({key: Timed(rows(0, 4, {"calls": 1.0}, 1e-3, key=key)) for key in keys})
        beside = {
            "a": overlapped("a", 5e-3, ("b",)),
            "b": overlapped("b", 1e-3, ("a",)),
            "c": overlapped("c", 5e-3, ("d",)),
            "d": overlapped("d", 1e-3, ("c",)),
        }
        found = fit_interference(beside, costs)
        assert found.slowed["a"] * found.host_share["d"] < 2.5

    def test_nothing_beside_means_the_prior_stays(self) -> None:
        costs = fit_costs({"a": Timed(rows(0, 4, {"calls": 1.0}, 1e-3))})
        found = fit_interference({"a": Timed(rows(0, 4, {"calls": 1.0}, 1e-3))}, costs)
        assert found.slowed["a"] == pytest.approx(1.0)
        assert found.lane_factor["a"] == pytest.approx(1.0, rel=1e-3)

    def test_every_node_of_every_design_has_a_price(
        self, runs: dict[str, tuple[MachineRun, MachineRun]], profile: OperationProfile
    ) -> None:
        for _, run in runs.values():
            pricer = OperationPricer(profile, run.plan)
            for node in record_step(run.plan).nodes:
                name, work = price_name(node.op), node.op.work
                seconds = pricer.seconds(work, run.traffic, name)
                by_hand = sum(
                    profile.operations[price_key(name, work, run.plan)].per_unit.get(feature, 0.0) * np.asarray(value)
                    for feature, value in feature_values(work, run.plan, run.traffic).items()
                )
                assert np.allclose(seconds, by_hand, rtol=1e-12)


def test_drift_is_the_spread_of_which_few_repeats_are_a_sample(
    runs: dict[str, tuple[MachineRun, MachineRun]],
) -> None:
    """Four repeats of a step that varies by a tenth: a tenth on average, in the square."""
    run, source = runs["resident"][1], np.random.default_rng(0)

    def repeated(seconds: float) -> MachineRun:
        span = replace(run.timelines[0].spans[0], start_s=0.0, end_s=seconds)
        return replace(run, timelines=(replace(run.timelines[0], spans=(span,)),))

    found = [drift([repeated(seconds) for seconds in source.normal(1.0, 0.1, 4)]) for _ in range(400)]
    assert np.sqrt(np.mean(np.square(found))) == pytest.approx(0.1, rel=0.08)


def test_held_out_runs_teach_nothing(network: Network, runs: dict[str, tuple[MachineRun, MachineRun]]) -> None:
    benchmarks = [
        Benchmark(name=name, parameters={}, unit="x", amount=1e9, seconds=(0.1, 0.11)) for name in ("copy", "matmul")
    ]

    def probe(name: str, *, alone: bool, fitted: bool = True) -> Probe:
        return Probe(design=local_design(name, SIZE, SHAPE), size=SIZE, alone=alone, fitted=fitted, steps=3)

    def fitted(measured: list[tuple[Probe, MachineRun]]) -> OperationProfile:
        return fit_profile(measured, benchmarks, name="t", here={}, network=network)

    taught = [(probe("resolve", alone=alone), runs["resolve"][0 if alone else 1]) for alone in (True, False)]
    held_out = [(probe("clo", alone=alone, fitted=False), runs["clo"][0 if alone else 1]) for alone in (True, False)]
    assert fitted(taught + held_out) == fitted(taught)
    assert fitted(taught + [(probe("clo", alone=one.alone), run) for one, run in held_out]) != fitted(taught)


class TestProbes:
    @pytest.mark.parametrize("grid", [CPU_GRID, CUDA_GRID])
    def test_half_of_the_grid_is_held_out(self, grid: Grid) -> None:
        probes = validation_probes(SHAPE, grid=grid)
        fitted = {probe.size for probe in calibration_probes(SHAPE, grid=grid)} | {grid.baseline}
        held_out = [probe for probe in probes if not probe.fitted]
        assert len(held_out) >= len(probes) / 2
        assert not fitted & {probe.size for probe in held_out}

    @pytest.mark.parametrize("grid", [CPU_GRID, CUDA_GRID])
    def test_held_out_sizes_are_run_between_fitted_ones(self, grid: Grid) -> None:
        """What slows the machine for minutes must show in the runs that say how much slower it is."""
        sizes = dict.fromkeys((probe.size, probe.fitted) for probe in validation_probes(SHAPE, grid=grid))
        assert [fitted for _, fitted in sizes] == [True, False] * 4

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    @given(positions=st.integers(304, 200_000))
    def test_contexts_are_as_long_as_the_model_takes(self, device: str, positions: int) -> None:
        model = SHAPE.with_fields(max_positions=positions)
        grid, full = grid_of(torch.device(device), model), CUDA_GRID if device == "cuda" else CPU_GRID
        assert grid.longest_context + SPARE_TOKENS <= positions
        assert grid == full or 2 * grid.longest_context + SPARE_TOKENS > positions
        shares = {tuple(size[1:] for size in sizes) for sizes in (grid.fitted, full.fitted)}
        assert len(shares) == 1
        assert not {*grid.fitted, grid.baseline} & set(grid.held_out)

    def test_a_model_for_short_texts_is_refused(self) -> None:
        with pytest.raises(SpecError, match="has 303 positions: calibration takes 304 and more"):
            grid_of(torch.device("cpu"), SHAPE.with_fields(max_positions=303))

    @pytest.mark.parametrize("count", [3, 4, 6, 8, len(DESIGNS)])
    def test_the_baseline_comes_back_often_enough_to_have_a_spread(self, count: int) -> None:
        probes = calibration_probes(SHAPE, DESIGNS[:count])
        assert sum(probe.size == CPU_GRID.baseline for probe in probes) >= 3

    def test_keys_tell_probes_apart(self) -> None:
        probes = [*calibration_probes(SHAPE), *validation_probes(SHAPE)]
        assert len({probe.key for probe in probes}) == len(set(probes))

    def test_unknown_designs_are_refused(self) -> None:
        with pytest.raises(SpecError, match="--designs clo,nosuch"):
            named("clo,nosuch", torch.device("cpu"), SHAPE)

    def test_cuda_takes_no_design_that_stores_through_the_bar(self) -> None:
        assert "clo-v2" in named(None, torch.device("cpu"), SHAPE)
        assert not {"clo-v1", "clo-v2"} & set(named(None, torch.device("cuda"), SHAPE))
        with pytest.raises(SpecError, match="--designs clo-v2: choose from resident"):
            named("clo-v2", torch.device("cuda"), SHAPE)
