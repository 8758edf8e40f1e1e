"""Fleets in which some GPUs only prefill: the fewest of both, and the two commands that serve with them."""

from __future__ import annotations

import json
import re

import pytest
from commands import refuse, run
from toy_service import growing_clock, toy_costs, trace_of

import clo_sim
from clo import presets
from clo.errors import SpecError
from clo_sim.serving import ServiceSettings, generate, parse_slo, worker_costs
from clo_sim.serving.fleet_search import attempt, search_disaggregated
from clo_sim.serving.intervals import drawn_fleet
from clo_sim.serving.plan import alone_values, smallest_fleet, with_head_room

SLO = parse_slo("ttft_p95<4s, tpot_p95<12ms")
LOAD = generate("poisson", rate_per_s=3.0, num_requests=300, lengths=[(32768, 300), (8192, 500)], seed=5)
SCENE = clo_sim.make_scene()
DESIGN = presets.load_design("resident")
SERVICE = ["--load", "poisson:2", "--num-requests", 200, "--input-tokens", 16384, "--output-tokens", 100]


def test_the_smallest_fleet_is_the_smallest_of_all_splits() -> None:
    costs = worker_costs(SCENE, DESIGN, LOAD)
    fleet = smallest_fleet(SCENE, DESIGN, LOAD, SLO, ServiceSettings(), disaggregated=True)
    assert fleet.gpus is not None
    assert fleet.prefill_gpus > 1
    met = {
        (gpus, of_prefill): attempt(LOAD, costs, SLO, ServiceSettings(gpus=gpus, prefill_gpus=of_prefill)).met
        for gpus in range(2, fleet.gpus + 1)
        for of_prefill in range(1, gpus)
    }
    assert [split for split, does in met.items() if does] == [(fleet.gpus, fleet.prefill_gpus)]
    for near in (1, fleet.gpus, 40):
        assert smallest_fleet(SCENE, DESIGN, LOAD, SLO, ServiceSettings(), near=near, disaggregated=True) == fleet
    (drawn,) = drawn_fleet(fleet, SCENE, DESIGN, LOAD, SLO, ServiceSettings(), draws=[0]).tried
    assert (drawn.gpus, drawn.prefill_gpus) == (fleet.gpus, fleet.prefill_gpus)


def test_head_room_is_that_of_the_split() -> None:
    """The fleet bears what it says, and not a tenth more."""
    costs = worker_costs(SCENE, DESIGN, LOAD)
    fleet = smallest_fleet(SCENE, DESIGN, LOAD, SLO, ServiceSettings(), disaggregated=True)
    roomy = with_head_room(fleet, SCENE, DESIGN, LOAD, SLO, ServiceSettings())
    assert fleet.gpus is not None
    assert roomy.head_room is not None
    split = ServiceSettings(gpus=fleet.gpus, prefill_gpus=fleet.prefill_gpus)
    assert attempt(LOAD.at_rate(roomy.head_room), costs, SLO, split).met
    assert not attempt(LOAD.at_rate(roomy.head_room * 1.1), costs, SLO, split).met


def test_alone_is_a_bound_with_the_way() -> None:
    trace, slo = trace_of([(0, 40, 11)]), parse_slo("ttft_max<1s, tpot_mean<1s")
    costs = toy_costs(clock=growing_clock, token_ns=1000)
    together, apart = alone_values(trace, costs, slo), alone_values(trace, costs, slo, network_bytes_per_s=1e6)
    assert apart["ttft_max"] == together["ttft_max"]
    way_s = costs.hand_over_ns(40, 1e6) / 1e9
    assert apart["tpot_mean"] == pytest.approx(together["tpot_mean"] + way_s / 10)
    split = ServiceSettings(gpus=2, prefill_gpus=1, network_bytes_per_s=1e6)
    assert attempt(trace, costs, slo, split).values == pytest.approx(apart)


def test_a_network_too_slow_for_the_slo_says_so() -> None:
    slow = ServiceSettings(network_bytes_per_s=1e8)
    fleet = smallest_fleet(SCENE, DESIGN, LOAD, SLO, slow, disaggregated=True)
    assert fleet.gpus is None
    assert re.match(r"tpot_p95 is .* alone on an idle GPU and, once prefilled, on the way to another", fleet.problem)


@pytest.mark.parametrize(("most", "problem"), [(1, "take 2 GPUs, 1 may be tried"), (2, "not with 1 GPUs: ttft_p95")])
def test_too_few_gpus(most: int, problem: str) -> None:
    fleet = smallest_fleet(SCENE, DESIGN, LOAD, SLO, ServiceSettings(), max_gpus=most, disaggregated=True)
    assert fleet.gpus is None
    assert problem in fleet.problem


def test_whole_replicas() -> None:
    scene = clo_sim.make_scene("llama-3-70b", presets.load_machine("h200").with_fields(tensor_parallel=2))
    fleet = smallest_fleet(scene, DESIGN, LOAD, parse_slo("ttft_p95<60s"), ServiceSettings(), disaggregated=True)
    assert fleet.gpus is not None
    assert fleet.gpus % 2 == fleet.prefill_gpus % 2 == 0
    costs = worker_costs(scene, DESIGN, LOAD)
    with pytest.raises(SpecError, match="prefill_gpus = 1: a replica takes 2"):
        attempt(LOAD, costs, SLO, ServiceSettings(gpus=4, prefill_gpus=1))


def test_limits_that_cannot_be_split_are_refused() -> None:
    with pytest.raises(SpecError, match="how much of it is prefill's"):
        search_disaggregated(trace_of([(0, 1, 1)]), toy_costs(), parse_slo("e2e_p99<9s"), ServiceSettings(), 4)


class TestCommands:
    def test_a_service_says_who_does_what(self) -> None:
        text = run("serve-sim", *SERVICE, "--gpus", 3, "--prefill-gpus", 2)
        assert "clo on 3 x h200 (2 to prefill, 1 to decode)" in text
        command = ["serve-sim", *SERVICE, "--gpus", 3, "--prefill-gpus", 2, "--json"]
        fast, slow = (json.loads(run(*command, *more)) for more in ([], ["--network-gb-per-s", 0.5]))
        assert fast["prefill_gpus"] == slow["prefill_gpus"] == 2
        assert slow["ttft_s_p95"] == fast["ttft_s_p95"]
        # 2.15 GB at 0.5 GB/s rather than at 50, in 99 gaps
        assert slow["tpot_s_p50"] - fast["tpot_s_p50"] == pytest.approx(2.147 * (2 - 0.02) / 99, rel=0.1)

    def test_a_plan_says_who_does_what(self) -> None:
        plan = ["--slo", "ttft_p95<3s, tpot_p95<20ms", "--machines", "h200", "--designs", "clo", "--no-map"]
        assert "1 to decode: ttft_p95" in run("plan", *SERVICE, *plan, "--disaggregated")

    @pytest.mark.parametrize(
        ("more", "problem"),
        [
            (["--gpus", "2", "--prefill-gpus", "2"], "must leave some of gpus = 2 to decode on"),
            (["--gpus", "2", "--network-gb-per-s", "9"], "nothing goes over it unless some GPUs only prefill"),
            (["--gpus", "2", "--prefill-gpus", "1", "--network-gb-per-s", "0"], "must be positive and finite"),
        ],
    )
    def test_nonsense_is_refused(self, more: list[str], problem: str) -> None:
        assert problem in refuse("serve-sim", *map(str, SERVICE), *more)
