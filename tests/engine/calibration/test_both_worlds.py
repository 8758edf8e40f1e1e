"""The machine's runs and their simulation name the same operations. Nothing here asserts a time."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from clo.engine.measure import MachineRun, fastest
from clo.errors import CloError, EngineError, ProfileError
from clo.operation_costs import (
    OperationProfile,
)
from clo.schedule import Lane
from clo_calibration.calibrate import claim_samples
from clo_calibration.comparison import (
    ABLATIONS,
    LAUNCH_COSTS,
    SYNC_COSTS,
    Ablation,
    compare,
    price_run,
    simulated_s,
)
from clo_calibration.probes import Probe
from clo_calibration.run_files import load_run, save_run
from clo_calibration.validate import point_of
from tests.engine.calibration.calibrated import BATCH, BUDGET, CONTEXT, DESIGNS, SHAPE


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

    @pytest.mark.parametrize("part", ABLATIONS[1:])
    def test_leaving_out_a_part_takes_all_of_it_away(
        self, part: Ablation, runs: dict[str, tuple[MachineRun, MachineRun]], profile: OperationProfile
    ) -> None:
        """A part that is there takes time, and left out it takes as much as if it cost nothing."""
        run = runs["clo-v1"][1]
        names = {"launch cost": LAUNCH_COSTS, "synchronisation cost": SYNC_COSTS}.get(part, ())
        there, gone = (
            profile.model_copy(
                update={
                    "operations": {
                        name: cost.model_copy(
                            update={"host_share": 0.5}
                            | ({"slowed": factor} if part == "interference" else {})
                            | ({"per_unit": {"calls": factor * 1e-3}} if name in names else {})
                        )
                        for name, cost in profile.operations.items()
                    },
                    "handover_s": dict.fromkeys(Lane, factor * 1e-3) if part == "synchronisation cost" else {},
                }
            )
            for factor in (1.0, 0.0)
        )
        assert simulated_s(there, run) > 1.01 * simulated_s(gone, run)
        assert simulated_s(there, run, part) == pytest.approx(simulated_s(gone, run))

    def test_an_operation_that_costs_nothing_is_there_in_both(
        self, runs: dict[str, tuple[MachineRun, MachineRun]], profile: OperationProfile
    ) -> None:
        free = {
            key: cost.model_copy(update={"per_unit": {}}) if key.startswith(("score_pages", "hit_test")) else cost
            for key, cost in profile.operations.items()
        }
        assert free != profile.operations
        assert compare(profile.model_copy(update={"operations": free}), runs["clo"][1]).differences() == []

    def test_stalls_are_what_the_main_stream_waited_for(
        self, runs: dict[str, tuple[MachineRun, MachineRun]], profile: OperationProfile
    ) -> None:
        found = compare(profile, runs["clo-v1"][1])
        stalls = found.stalls()
        for which, timeline in enumerate((found.real, found.simulated)):
            waited = sum(span.waited_s for span in timeline.spans if span.lane == Lane.MAIN)
            assert sum(pair[which] for pair in stalls.values()) == pytest.approx(waited)
            assert 0 < waited < timeline.seconds

    def test_one_step_that_was_held_up_counts_for_nothing(
        self, runs: dict[str, tuple[MachineRun, MachineRun]], profile: OperationProfile
    ) -> None:
        """A point is of the median step, in both worlds."""
        run = runs["resolve"][1]
        slowest = int(np.argmax(run.step_s))
        *others, last = run.timelines[slowest].spans
        held_up = replace(last, end_s=last.end_s + 100.0)
        timelines = list(run.timelines)
        timelines[slowest] = replace(run.timelines[slowest], spans=(*others, held_up))
        late = replace(run, timelines=tuple(timelines))
        assert late.step_s[slowest] > 100.0
        probe = Probe(
            design=run.plan.design, size=(CONTEXT, BATCH, BUDGET), alone=False, fitted=False, steps=len(timelines)
        )
        point = point_of(profile, probe, late, disturbed_s=0.0)
        assert point.real_s == pytest.approx(float(np.median(run.step_s)))
        assert point.simulated_s == simulated_s(profile, run)

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
        claim_samples(tmp_path, {"processor": "a"}, SHAPE)
        claim_samples(tmp_path, {"processor": "a"}, SHAPE)
        with pytest.raises(CloError, match="another machine, model or version"):
            claim_samples(tmp_path, {"processor": "b"}, SHAPE)
