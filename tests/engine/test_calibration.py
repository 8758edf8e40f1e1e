"""Calibration and validation: known costs are found again, and both worlds name the same operations.

Nothing here asserts a time: the machine's clock only has to run.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from clo.engine.decoder import Decoder
from clo.engine.measure import MachineRun, fastest, run_steps
from clo.engine.network import Network
from clo.engine.random_weights import random_model, random_prompt
from clo.engine.run import result_of
from clo.errors import CloError, EngineError, ProfileError, SpecError
from clo.operation_costs import (
    GEMM_ROWS,
    OperationPricer,
    OperationProfile,
    feature_values,
    load_operation_profile,
    price_key,
)
from clo.presets import load_model
from clo.pricing import Demand
from clo.profile import InterferenceCost, Source
from clo.results import Result, load_result
from clo.schedule import Lane, record_step
from clo.schedule.ops import price_name
from clo.schedule.work import Gemm
from clo.specs import Design
from clo.timeline import load_chrome_trace
from clo_calibration.calibrate import calibrate, claim_folder, network_of
from clo_calibration.comparison import ABLATIONS, compare, price_run, simulated_s
from clo_calibration.fingerprint import differences, fingerprint
from clo_calibration.interference_fit import fit_interference
from clo_calibration.operation_fit import (
    Observation,
    Timed,
    by_key,
    fit_costs,
    handover_s,
    observations,
)
from clo_calibration.probes import (
    CPU_GRID,
    CUDA_GRID,
    Grid,
    Probe,
    calibration_probes,
    local_design,
    named,
    validation_probes,
)
from clo_calibration.run_files import load_run, save_run
from clo_calibration.validate import point_of, validate
from clo_calibration.verdict import Point, Verdict, load_verdict, markdown
from clo_cli.main import clo
from clo_cli.real_machine import measure_here
from clo_sim import make_scene, simulate
from clo_sim.contention import Contention
from clo_sim.intervals import predict
from clo_sim.serving.prefill import prefill_prices
from clo_sim.simulator import run_simpy
from clo_sim.unfold import simulated_timeline

DESIGNS = ("resident", "streamed", "staged", "lru-cpu", "recall", "resolve", "clo-v1", "clo")
SHAPE = load_model("smollm2-135m").with_fields(
    num_layers=3, hidden_size=48, intermediate_size=64, head_dim=16, num_query_heads=4, num_kv_heads=2, vocab_size=64
)
CONTEXT, BATCH, BUDGET = 320, 2, 0.2


@pytest.fixture(scope="session")
def network() -> Network:
    return Network(random_model(SHAPE), SHAPE.name)


def run_of(network: Network, design: Design, *, alone: bool = False, steps: int = 3) -> MachineRun:
    with Decoder(network, design, max_new_tokens=16, one_at_a_time=alone) as decoder:
        return run_steps(decoder, [random_prompt(network, CONTEXT, seed=b) for b in range(BATCH)], steps=steps)


@pytest.fixture(scope="session")
def runs(network: Network) -> dict[str, tuple[MachineRun, MachineRun]]:
    """Alone and beside others, by design."""
    found = {}
    for name in DESIGNS:
        design = local_design(name, BUDGET).with_fields(dense_layers=1) if name != "resident" else local_design(name, 1)
        found[name] = (run_of(network, design, alone=True), run_of(network, design))
    return found


@pytest.fixture(scope="session")
def profile(runs: dict[str, tuple[MachineRun, MachineRun]]) -> OperationProfile:
    alone = by_key(row for number, (run, _) in enumerate(runs.values()) for row in observations(run, number))
    beside = by_key(row for number, (_, run) in enumerate(runs.values()) for row in observations(run, number))
    runtime = {key: timed for key, timed in beside.items() if timed.rows[0].is_runtime}
    some = next(iter(runs.values()))[0].plan
    return OperationProfile(
        name="here",
        date="2026-01-01",
        machine=some.machine,
        model=some.model,
        fingerprint=fingerprint(torch.device("cpu")),
        operations=fit_costs({key: timed for key, timed in alone.items() if not timed.rows[0].is_runtime} | runtime),
        handover_s=handover_s(run for _, run in runs.values()),
    )


class TestOneAtATime:
    def test_nothing_overlaps(self, runs: dict[str, tuple[MachineRun, MachineRun]]) -> None:
        for alone, _ in runs.values():
            for timeline in alone.timelines:
                spans = sorted((s for s in timeline.spans if s.lane != Lane.LAUNCH), key=lambda span: span.start_s)
                for before, after in pairwise(spans):
                    assert after.start_s >= before.end_s

    def test_moves_the_same_pages(self, runs: dict[str, tuple[MachineRun, MachineRun]]) -> None:
        for alone, beside in runs.values():
            assert np.array_equal(alone.traffic.fetched_pages, beside.traffic.fetched_pages)
            assert np.array_equal(alone.traffic.demand_heads, beside.traffic.demand_heads)

    def test_lanes_account_for_all_of_their_time(self, runs: dict[str, tuple[MachineRun, MachineRun]]) -> None:
        """A span begins where the last one ended, but for the waits it names."""
        for _, beside in runs.values():
            for timeline in beside.timelines:
                spans = [span for span in timeline.spans if span.lane == Lane.MAIN]
                for before, after in pairwise(spans):
                    assert after.start_s - before.end_s == pytest.approx(after.waited_s, abs=2e-6)


class TestBothWorlds:
    @pytest.mark.parametrize("name", DESIGNS)
    def test_same_operations_in_the_same_order_with_the_same_bytes(
        self, name: str, runs: dict[str, tuple[MachineRun, MachineRun]], profile: OperationProfile
    ) -> None:
        assert compare(profile, runs[name][1]).differences() == []

    @pytest.mark.parametrize("name", DESIGNS)
    def test_leaving_out_a_part_never_makes_it_slower_on_the_simulator(
        self, name: str, runs: dict[str, tuple[MachineRun, MachineRun]], profile: OperationProfile
    ) -> None:
        run = runs[name][1]
        complete = simulated_s(profile, run)
        assert all(simulated_s(profile, run, part) <= complete * (1 + 1e-9) for part in ABLATIONS)

    def test_a_difference_is_named(
        self, runs: dict[str, tuple[MachineRun, MachineRun]], profile: OperationProfile
    ) -> None:
        found = compare(profile, runs["clo"][1])
        spans = tuple(replace(s, num_bytes=7.0) if s.name == "gather_pages" else s for s in found.real.spans)
        broken = replace(found, real=replace(found.real, spans=spans))
        assert "gather_pages" in broken.differences()[0]

    def test_an_operation_that_was_never_timed_is_named(
        self, runs: dict[str, tuple[MachineRun, MachineRun]], profile: OperationProfile
    ) -> None:
        few = {key: cost for key, cost in profile.operations.items() if key != "attention:sparse"}
        with pytest.raises(ProfileError, match="attention:sparse was never timed"):
            price_run(profile.model_copy(update={"operations": few}), runs["clo"][1])


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
            assert {probe.size[1] for probe in calibration_probes(grid=grid) if probe.alone} >= set(GEMM_ROWS)

    def test_an_outlier_does_not_count(self) -> None:
        found = Timed(rows(0, 50, {"calls": 1.0}, 1e-4) + rows(0, 1, {"calls": 1.0}, 5.0))
        assert fit_costs({"a": found})["a"].per_unit["calls"] < 1.2e-4

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

    @pytest.mark.parametrize("name", DESIGNS)
    def test_the_hand_over_that_was_simulated_is_found_again(
        self, name: str, runs: dict[str, tuple[MachineRun, MachineRun]], profile: OperationProfile
    ) -> None:
        """Only lanes that sleep are woken, and operations of one name and layer are told apart."""
        run = runs[name][1]
        later = {lane: (1 + number) * 1e-3 for number, lane in enumerate(Lane)}
        priced = price_run(profile.model_copy(update={"handover_s": later}), run)
        steps = tuple(simulated_timeline(priced, step, name) for step in range(priced.num_steps))
        found = handover_s([replace(run, timelines=steps)])
        assert found == pytest.approx({lane: later[lane] for lane in found})
        assert Lane.MAIN in found

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


class TestIntervals:
    def test_no_spread_gives_points(
        self, runs: dict[str, tuple[MachineRun, MachineRun]], profile: OperationProfile
    ) -> None:
        still = {key: cost.model_copy(update={"spread": 0.0}) for key, cost in profile.operations.items()}
        priced = price_run(profile.model_copy(update={"operations": still}), runs["clo"][1])
        found = predict(priced, draws=4)
        interval = found.intervals["tpot_s"]
        assert interval.low == interval.high == pytest.approx(float(run_simpy(priced).seconds.mean()))
        assert found.known_share == 0.0

    def test_a_common_spread_alone_gives_its_quantiles(
        self, runs: dict[str, tuple[MachineRun, MachineRun]], profile: OperationProfile
    ) -> None:
        still = {key: cost.model_copy(update={"spread": 0.0}) for key, cost in profile.operations.items()}
        priced = price_run(profile.model_copy(update={"operations": still, "common_spread": 0.1}), runs["clo"][1])
        middle = float(run_simpy(priced).seconds.mean())
        interval = predict(priced, draws=2000).intervals["tpot_s"]
        assert interval.low / middle == pytest.approx(np.exp(-1.645 * 0.0998 - 0.005), rel=0.02)
        assert interval.high / middle == pytest.approx(np.exp(1.645 * 0.0998 - 0.005), rel=0.02)

    def test_more_spread_is_wider_and_the_same_seed_the_same(
        self, runs: dict[str, tuple[MachineRun, MachineRun]], profile: OperationProfile
    ) -> None:
        def width(spread: float) -> float:
            costs = {key: cost.model_copy(update={"spread": spread}) for key, cost in profile.operations.items()}
            priced = price_run(profile.model_copy(update={"operations": costs}), runs["resolve"][1])
            interval = predict(priced, draws=30).intervals["tpot_s"]
            assert interval == predict(priced, draws=30).intervals["tpot_s"]
            return interval.high - interval.low

        assert width(0.05) < width(0.3)


class TestRunFiles:
    def test_samples_come_back_as_they_were(
        self, tmp_path: Path, runs: dict[str, tuple[MachineRun, MachineRun]]
    ) -> None:
        run = runs["clo"][1]
        save_run(tmp_path / "a.npz", run)
        back = load_run(tmp_path / "a.npz", run.plan)
        assert np.array_equal(back.step_s, run.step_s)
        assert [timeline.spans for timeline in back.timelines] == [timeline.spans for timeline in run.timelines]
        assert np.array_equal(back.traffic.demand_pages, run.traffic.demand_pages)

    def test_a_cut_file_is_named(self, tmp_path: Path, runs: dict[str, tuple[MachineRun, MachineRun]]) -> None:
        run, path = runs["resident"][1], tmp_path / "a.npz"
        save_run(path, run)
        for kept in (path.read_bytes()[:-200], b""):
            path.write_bytes(kept)
            with pytest.raises(CloError, match=r"a\.npz: no samples that clo wrote, or cut short"):
                load_run(path, run.plan)

    def test_the_fastest_of_each_step_counts(self, runs: dict[str, tuple[MachineRun, MachineRun]]) -> None:
        alone, beside = runs["resolve"]
        both = fastest([alone, beside])
        assert np.array_equal(both.step_s, np.minimum(alone.step_s, beside.step_s))

    def test_runs_that_moved_other_pages_are_not_compared(self, runs: dict[str, tuple[MachineRun, MachineRun]]) -> None:
        with pytest.raises(EngineError, match="moved different pages"):
            fastest([runs["resolve"][1], runs["staged"][1]])

    def test_samples_of_another_machine_are_not_mixed_in(self, tmp_path: Path) -> None:
        claim_folder(tmp_path, {"processor": "a"}, SHAPE)
        claim_folder(tmp_path, {"processor": "a"}, SHAPE)
        with pytest.raises(CloError, match="another machine, model or version"):
            claim_folder(tmp_path, {"processor": "b"}, SHAPE)


class TestProbes:
    @pytest.mark.parametrize("grid", [CPU_GRID, CUDA_GRID])
    def test_half_of_the_grid_is_held_out(self, grid: Grid) -> None:
        probes = validation_probes(grid=grid)
        fitted = {probe.size for probe in calibration_probes(grid=grid)} | {grid.baseline}
        held_out = [probe for probe in probes if not probe.fitted]
        assert len(held_out) >= len(probes) / 2
        assert not fitted & {probe.size for probe in held_out}

    def test_keys_tell_probes_apart(self) -> None:
        probes = [*calibration_probes(), *validation_probes()]
        assert len({probe.key for probe in probes}) == len(set(probes))

    def test_unknown_designs_are_refused(self) -> None:
        with pytest.raises(SpecError, match="--designs clo,nosuch"):
            named("clo,nosuch", torch.device("cpu"))

    def test_cuda_takes_no_design_that_stores_through_the_bar(self) -> None:
        assert "clo-v2" in named(None, torch.device("cpu"))
        assert not {"clo-v1", "clo-v2"} & set(named(None, torch.device("cuda")))
        with pytest.raises(SpecError, match="--designs clo-v2: choose from resident"):
            named("clo-v2", torch.device("cuda"))


def point(real: float, simulated: float, *, design: str = "a", fitted: bool = False, half: float = 0.1) -> Point:
    return Point(
        design=design,
        context_tokens=100,
        batch=1,
        budget_fraction=0.1,
        fitted=fitted,
        real_s=real,
        disturbed_s=real,
        simulated_s=simulated,
        low_s=simulated * (1 - half),
        high_s=simulated * (1 + half),
        hit_rate=0.5,
        differences=(),
        without={"nothing": simulated, "interference": simulated / 2},
        operations={},
        lanes={},
        stalls={},
    )


def verdict(*points: Point) -> Verdict:
    return Verdict(
        profile="p", machine="m", model="x", date="2026-01-01", fingerprint={"cores": "2"}, drift=0.01, points=points
    )


class TestVerdict:
    def test_by_hand(self) -> None:
        found = verdict(
            point(1.0, 1.05, design="a"),
            point(2.0, 1.8, design="b"),
            point(0.9, 1.2, design="c"),
            point(5.0, 50.0, design="d", fitted=True),
        )
        summary = found.summary()
        assert summary["tpot_error_median"] == pytest.approx(0.1)
        assert summary["tpot_error_worst"] == pytest.approx(1 / 3)
        assert summary["tpot_error_bias"] == pytest.approx((0.05 - 0.1 + 1 / 3) / 3)
        # a is chosen for its 1.05, c would have taken 0.9
        assert summary["regret"] == pytest.approx(1 / 0.9 - 1)
        # ranks: real c a b, simulated a c b
        assert summary["rank_correlation"] == pytest.approx(0.5)
        # 1.0 in 0.945 to 1.155, 2.0 beyond 1.98, 0.9 below 1.08
        assert summary["interval_coverage"] == pytest.approx(1 / 3)
        assert found.ablation()["interference"] == pytest.approx(0.475)

    def test_text_names_every_run_and_survives_a_file(self, tmp_path: Path) -> None:
        found = verdict(point(1.0, 1.05), point(2.0, 4.0, design="b"))
        assert "| b | 100 | 1 |" in markdown(found)
        assert "(outside)" in markdown(found)
        path = tmp_path / "v.json"
        path.write_text(found.model_dump_json())
        assert load_verdict(path) == found
        path.write_text(found.model_copy(update={"schema_version": 9}).model_dump_json())
        with pytest.raises(CloError, match="schema_version"):
            load_verdict(path)

    def test_machines_differ_by_what_they_are_not_by_versions(self) -> None:
        here = fingerprint(torch.device("cpu"))
        assert differences(here, here | {"torch": "0"}) == []
        assert "processor is" in differences(here, here | {"processor": "abacus"})[0]


class TestEndToEnd:
    def test_calibrate_goes_on_where_it_stopped_and_validate_reads_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The whole way on a model of two layers: structure only."""
        grid = Grid(fitted=((160, 1, 0.2),), held_out=((200, 2, 0.25),), baseline=CPU_GRID.baseline)
        monkeypatch.setattr("clo_calibration.probes.CPU_GRID", grid)
        shape, samples = SHAPE.with_fields(num_layers=3), tmp_path / "samples"
        chosen = ("resident", "resolve", "clo-v2")

        class StopError(Exception):
            pass

        def stop(phase: str, done: int, _total: int) -> None:
            if phase == "decode steps" and done == 4:
                raise StopError

        with pytest.raises(StopError):
            calibrate(shape, samples=samples, name="t", designs=chosen, steps=2, rounds=1, progress=stop)
        kept = {path: path.stat().st_mtime_ns for path in samples.glob("*.npz")}
        assert len(kept) == 4
        found = calibrate(shape, samples=samples, name="t", designs=chosen, steps=2, rounds=1)
        assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
        calibrate(shape, samples=samples, name="t", designs=chosen, steps=2, rounds=1, again=True)
        assert all(path.stat().st_mtime_ns > when for path, when in kept.items())
        assert all(cost.source == "measured" for cost in found.operations.values())
        path = tmp_path / "t.json"
        path.write_text(found.model_dump_json())
        assert load_operation_profile(path) == found

        step = tmp_path / "step.json"
        judged = validate(
            found, samples=tmp_path / "other", designs=chosen, steps=2, rounds=2, timeline=step, any_machine=False
        )
        assert {point.fitted for point in judged.points} == {True, False}
        assert [point.differences for point in judged.points] == [()] * len(judged.points)
        assert {"tpot_error_median", "regret", "interval_coverage"} <= judged.summary().keys()
        assert [timeline.title.endswith("(simulated)") for timeline in load_chrome_trace(step)] == [False, True]

    def test_a_profile_of_another_machine_is_refused(self, profile: OperationProfile, tmp_path: Path) -> None:
        foreign = profile.model_copy(update={"fingerprint": profile.fingerprint | {"processor": "abacus"}})
        with pytest.raises(CloError, match=r"is of another machine .*abacus.*--any-machine"):
            validate(foreign, samples=tmp_path)

    def test_a_model_that_fits_no_memory_is_refused(self) -> None:
        with pytest.raises(SpecError, match=r"in single precision.*lower model\.num_layers"):
            network_of(load_model("llama-3-70b"), torch.device("cpu"))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["calibrate", "--layers", "0"], "model.num_layers = 0"),
            (["calibrate", "--layers", "100"], "--layers 100: smollm2-135m has 30"),
            (["calibrate", "--rounds", "0"], "--rounds = 0"),
            (["calibrate", "--designs", "nosuch"], "--designs nosuch"),
            (["calibrate", "--layers", "2"], "model.num_layers = 2: designs keep 2 of them dense"),
            (["validate", "--profile", "nosuch.json"], "nosuch.json: No such file"),
        ],
    )
    def test_bad_input_is_refused(self, arguments: list[str], message: str, tmp_path: Path) -> None:
        with pytest.raises(CloError, match=message.replace(".", r"\.")):
            CliRunner().invoke(
                clo, [*arguments, "--out", str(tmp_path / "p.json")], catch_exceptions=False, standalone_mode=False
            )

    def test_a_profile_of_rates_is_no_profile_of_timed_operations(self, tmp_path: Path) -> None:
        path = tmp_path / "x.json"
        path.write_text(json.dumps({"name": "h200"}))
        with pytest.raises(ProfileError, match="not a profile of timed operations"):
            load_operation_profile(path)

    def test_point_of_reports_both_worlds(
        self, runs: dict[str, tuple[MachineRun, MachineRun]], profile: OperationProfile
    ) -> None:
        probe = Probe(
            design=local_design("clo", BUDGET), size=(CONTEXT, BATCH, BUDGET), alone=False, fitted=False, steps=3
        )
        found = point_of(profile, probe, runs["clo"][1], disturbed_s=1.0)
        assert found.low_s <= found.simulated_s <= found.high_s
        assert found.lanes["main stream"].real_s > 0
        assert found.operations["attention"].simulated_s > 0


class TestRun:
    def test_busy_time_and_stalls_add_up(self, runs: dict[str, tuple[MachineRun, MachineRun]]) -> None:
        for _, run in runs.values():
            result = result_of(run)
            assert sum(result.busy_s.values()) + result.total_stall_s == pytest.approx(result.tpot_s, rel=1e-3)
            assert result.tpot_s == pytest.approx(float(run.step_s.mean()))
            # a streamed layer moves the tokens there are, not whole pages
            assert result.h2d_bytes_per_step == pytest.approx(
                float(run.traffic.fetched_pages.sum(axis=1).mean()) * run.plan.page_bytes, rel=0.06
            )
            assert load_result_of(result) == result

    def test_the_command_writes_what_a_simulation_writes(self, tmp_path: Path) -> None:
        out, step = tmp_path / "r.json", tmp_path / "t.json"
        small = ["run", "--layers", "2", "--context", "200", "--steps", "2", "--design", "resolve"]
        done = CliRunner().invoke(clo, [*small, "--json", "--out", str(out), "--timeline", str(step)])
        assert done.exit_code == 0, done.output
        result = load_result(out)
        assert json.loads(done.stdout)["tpot_s"] == result.tpot_s
        assert (result.executor, result.workload.steps, result.roofline) == ("machine", 2, None)
        assert load_chrome_trace(step)[0].seconds > 0
        assert "TPOT" in CliRunner().invoke(clo, small).stdout

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--context", "0"], "--context = 0"),
            (["--context", "999999999", "--layers", "2"], "prompt of 999999999 tokens .* smollm2-135m has 8192"),
            (["--batch", "8000", "--context", "8000", "--layers", "3"], "KV cache of 8000 prompts|device memory"),
            (["--batch", "100000000"], "--batch = 100000000: must be at most 65536"),
            (["--layers", "31"], "--layers 31: smollm2-135m has 30"),
            (["--model", "llama-3-70b"], "in single precision"),
            (["--weights", "smollm2-135m", "--layers", "2"], "--layers 2: real weights"),
        ],
    )
    def test_bad_input_is_refused(self, arguments: list[str], message: str) -> None:
        with pytest.raises(CloError, match=message):
            CliRunner().invoke(clo, ["run", *arguments], catch_exceptions=False, standalone_mode=False)


def load_result_of(result: Result) -> Result:
    return Result.model_validate_json(result.model_dump_json())


FEW = ("--input-tokens", "100", "--output-tokens", "2", "--num-requests", "2")


class TestExploringACalibratedMachine:
    """What was timed here is a machine like any other, and real runs have the last word."""

    @pytest.fixture
    def path(self, profile: OperationProfile, tmp_path: Path) -> Path:
        path = tmp_path / "here.json"
        path.write_text(profile.model_dump_json())
        return path

    @pytest.mark.parametrize("design", ["resident", "streamed", "resolve", "clo"])
    def test_a_clock_step_is_priced_by_timed_operations(self, design: str, path: Path) -> None:
        scene = make_scene(machine=str(path), context_tokens=CONTEXT, batch=BATCH)
        timed = load_operation_profile(path)
        assert scene.model == timed.model
        plan = scene.plan(local_design(design, BUDGET).with_fields(dense_layers=1))
        priced = scene.priced(plan)
        traffic, seconds = priced.traffic, np.zeros(priced.num_steps)
        for node in record_step(plan).nodes:
            if node.lane is Lane.MAIN:
                cost = timed.operations[price_key(price_name(node.op), node.op.work, plan)]
                for feature, value in feature_values(node.op.work, plan, traffic).items():
                    here = np.asarray(value)[:, node.op.layer] if np.ndim(value) else value
                    seconds += cost.per_unit.get(feature, 0.0) * here
        total = sum(priced.seconds(node.op) for node in priced.graph.nodes if node.lane is Lane.MAIN)
        np.testing.assert_allclose(np.broadcast_to(total, seconds.shape), seconds, rtol=1e-9)
        result = simulate(scene, plan.design)
        assert result.measured_share == 1.0
        assert result.tpot_s >= seconds.mean() * (1 - 1e-9)

    def test_the_finalists_run_for_real_and_decide(self, path: Path) -> None:
        arguments = ["explore", "--machine", str(path), "--context", str(CONTEXT), "--batch", str(BATCH), "--json"]
        arguments += ["--set", "design.dense_layers=1", "--designs", "clo,resolve", "--steps", "3", "--measure"]
        arguments += ["--vary", "design.cache=lru,head_reuse", "--finalists", "2"]
        done = CliRunner().invoke(clo, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert [one["executor"] for one in found["measured"]] == ["machine", "machine"]
        assert {one["executor"] for one in found["finalists"]} == {"simpy"}
        fastest_run = min(found["measured"], key=lambda one: one["tpot_s"])
        assert found["best"]["executor"] == "machine"
        assert found["best"]["tpot_s"] == fastest_run["tpot_s"]
        assert {one["workload"]["steps"] for one in found["measured"]} == {3}
        arguments.remove("--json")
        assert "Finalists, run on this machine" in CliRunner().invoke(clo, arguments, catch_exceptions=False).stdout

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["explore", "--measure"], "--measure: --machine must be the JSON file"),
            (["simulate", "--machine", "HERE", "--model", "llama-3-8b"], "were timed with smollm2-135m of 3 layers"),
            (["simulate", "--machine", "HERE", "--profile", "h200"], "brings its own costs"),
            (["simulate", "--machine", "HERE", "--set", "profile.read_back.seconds=1"], "needs a profile of a GPU"),
            (["serve-sim", "--machine", "HERE", "--load", "poisson:1", *FEW], "were timed with smollm2-135m"),
            (["simulate", "--machine", "nosuch.json"], "nosuch.json: No such file"),
        ],
    )
    def test_bad_input_is_refused(self, arguments: list[str], message: str, path: Path) -> None:
        with pytest.raises(CloError, match=message):
            CliRunner().invoke(
                clo,
                [str(path) if word == "HERE" else word for word in arguments],
                catch_exceptions=False,
                standalone_mode=False,
            )

    def test_services_need_costs_of_any_batch_and_context(self, path: Path) -> None:
        scene, design = make_scene(machine=str(path)), local_design("clo", BUDGET)
        with pytest.raises(SpecError, match="serving: needs a profile of a GPU"):
            prefill_prices(scene, design, chunk_tokens=64, keeps_prefixes=False)

    def test_another_machine_is_not_run_on(self, profile: OperationProfile, path: Path) -> None:
        foreign = profile.model_copy(update={"fingerprint": profile.fingerprint | {"processor": "abacus"}})
        path.write_text(foreign.model_dump_json())
        with pytest.raises(SpecError, match=r"--measure: here is of another machine: processor is .*, not abacus"):
            measure_here(make_scene(machine=str(path), context_tokens=CONTEXT, batch=BATCH))
