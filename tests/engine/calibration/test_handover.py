"""How lanes see each other, found again in steps that were simulated so."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from clo.engine.measure import MachineRun
from clo.operation_costs import OperationProfile
from clo.schedule import Lane
from clo_calibration.comparison import price_run
from clo_calibration.handover_fit import handover_s, launch_hold_s
from clo_sim.unfold import simulated_timeline
from tests.engine.calibration.calibrated import DESIGNS

Runs = dict[str, tuple[MachineRun, MachineRun]]

TURN_S = sys.getswitchinterval()


def simulated(
    profile: OperationProfile, run: MachineRun, later: dict[Lane, float], launch_hold_s: float = 0.0
) -> MachineRun:
    """The same steps where lanes see each other so much later, and launches once the launching thread blocks."""
    changed = profile.model_copy(update={"handover_s": later, "launch_hold_s": launch_hold_s})
    priced = price_run(changed, run)
    name = run.plan.design.name
    steps = tuple(simulated_timeline(priced, step, name, everything=True) for step in range(priced.num_steps))
    return replace(run, timelines=steps)


@pytest.mark.parametrize("hold_s", [0.0, TURN_S])
@pytest.mark.parametrize("name", DESIGNS)
def test_the_hand_over_that_was_simulated_is_found_again(
    name: str, hold_s: float, runs: Runs, profile: OperationProfile
) -> None:
    """Only lanes that sleep are woken, and operations of one name and layer are told apart."""
    later = {lane: (1 + number) * 1e-3 for number, lane in enumerate(Lane)}
    found = handover_s([simulated(profile, runs[name][1], later, hold_s)], hold_s)
    assert found == pytest.approx({lane: later[lane] for lane in found})
    assert Lane.MAIN in found


@pytest.mark.parametrize("hold_s", [0.0, TURN_S])
def test_a_launching_thread_that_keeps_the_interpreter_is_told_from_one_that_does_not(
    hold_s: float, runs: Runs, profile: OperationProfile
) -> None:
    later = dict.fromkeys(Lane, 1e-4)
    assert launch_hold_s([simulated(profile, run, later, hold_s) for _, run in runs.values()]) == hold_s


def test_nothing_is_held_where_nothing_says_so() -> None:
    assert launch_hold_s([]) == 0.0


def test_a_lane_that_once_was_not_woken_for_long_counts_for_little(runs: Runs, profile: OperationProfile) -> None:
    run = simulated(profile, runs["resolve"][1], dict.fromkeys(Lane, 0.001))
    # the end of the last step comes a second late
    *before, end = run.timelines
    *others, last = end.spans
    assert last.lane == Lane.LAUNCH
    late = replace(last, start_s=last.start_s + 1.0, end_s=last.end_s + 1.0)
    disturbed = replace(run, timelines=(*before, replace(end, spans=(*others, late))))
    undisturbed = replace(run, timelines=tuple(before))
    assert handover_s([disturbed], 0.0) == pytest.approx(dict.fromkeys(handover_s([undisturbed], 0.0), 0.001))
