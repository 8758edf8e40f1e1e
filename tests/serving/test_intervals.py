"""Prediction intervals of services and fleets: what scales with the costs, coverage, the chance that an SLO holds."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_service import toy_costs

import clo_sim
from clo import presets
from clo.errors import SpecError
from clo.profile import PREFILL_ATTENTION
from clo_cli.fleet_prices import Priced
from clo_cli.serve_tables import print_service
from clo_sim.intervals import CostDraw, interval_of
from clo_sim.scene import Scene, gpu_tables
from clo_sim.serving import (
    RequestTrace,
    ServiceSettings,
    WorkerCosts,
    generate,
    parse_slo,
    serve,
    summarise_service,
    worker_costs,
)
from clo_sim.serving.fleet_search import attempt
from clo_sim.serving.intervals import drawn_fleet, fleet_with_intervals, numbers, of_counts, with_intervals
from clo_sim.serving.metrics import known_spread_share
from clo_sim.serving.plan import Fleet, alone_values, smallest_fleet
from clo_sim.serving.prefill import prefill_prices
from clo_sim.serving.worker import drawn_costs

LOAD = generate("poisson", rate_per_s=2.0, num_requests=40, lengths=[(4096, 8)], seed=3)
SCENE = clo_sim.make_scene()
RESIDENT = presets.load_design("resident")


class Constant(CostDraw):
    """The same factor for every cost."""

    def __init__(self, value: float) -> None:
        super().__init__(np.random.default_rng(0))
        self._value = value

    def factor(self, entry: str, spread: float) -> float:
        return self._value


class KnownLonger(CostDraw):
    """What has a spread, or only some entries of it, is longer by a thousandth."""

    BY = 1e-3

    def __init__(self, *only: str) -> None:
        super().__init__(np.random.default_rng(0))
        self._only = only

    def factor(self, entry: str, spread: float) -> float:
        return 1 + self.BY if spread and (not self._only or entry in self._only) else 1.0


def growth(load: RequestTrace, costs: WorkerCosts, longer: KnownLonger) -> float:
    """Of the busy time with those costs, relative to theirs."""
    busy = []
    for one in (costs, drawn_costs(costs, longer)):
        tallies = [replica.tally for replica in serve(load, one, ServiceSettings()).replicas]
        busy.append(sum(tally.decode_ns + tally.prefill_ns for tally in tallies))
    return (busy[1] / busy[0] - 1) / longer.BY


def without_spread(scene: Scene) -> Scene:
    tables = gpu_tables(scene.profile, "test")
    exact: dict[str, Any] = {"p90_abs_relative_error": 0.0}
    gemm, attention = tables.gemm.model_copy(update=exact), tables.decode_attention.model_copy(update=exact)
    prefill = tables.prefill_attention.model_copy(update={"spread": 0.0})
    changes = {"gemm": gemm, "decode_attention": attention, "prefill_attention": prefill}
    return replace(scene, profile=tables.model_copy(update=changes))


def costs_of(trace: RequestTrace, scene: Scene = SCENE, design: str = "resident") -> WorkerCosts:
    return worker_costs(scene, presets.load_design(design), trace)


class TestDraws:
    @settings(max_examples=20, deadline=None)
    @given(factor=st.floats(0.2, 5.0), batch=st.sampled_from([1, 3, 8]), context=st.integers(200, 4000))
    def test_times_are_homogeneous_in_the_costs(self, factor: float, batch: int, context: int) -> None:
        """Every cost so many times as large: a decode step and a chunk of computing take so many times as long."""
        base = costs_of(LOAD, design="clo")
        drawn = drawn_costs(base, Constant(factor))
        times = [one.decode_prices.seconds(batch, context) for one in (drawn, base) if one.decode_prices is not None]
        # whole steps have a factor too
        assert times[0] == pytest.approx(factor**2 * times[1])
        for tokens, pairs, finished in ((1, 4096.0, 1), (2048, 1e6, 0)):
            computing = [one.prefill.compute_ns(tokens, pairs, finished) for one in (drawn, base)]
            assert computing[0] == pytest.approx(factor * computing[1], rel=1e-4)
        assert drawn.prefill.in_ns == base.prefill.in_ns

    def test_decode_and_prefill_share_the_error_of_one_table(self) -> None:
        """The draw's factor for GEMMs, found again in a chunk without attention."""
        base, draw = costs_of(LOAD), CostDraw(np.random.default_rng(5))
        drawn = drawn_costs(base, draw)
        table = gpu_tables(SCENE.profile, "test").gemm
        known = draw.factor("Gemm", 123.0)  # drawn already: its spread is not asked for again
        assert known != 1.0
        assert drawn.prefill.head_ns / base.prefill.head_ns == pytest.approx(known, rel=1e-4)
        assert draw.factor("DecodeAttention", table.p90_abs_relative_error) != known
        # prefill attention is another kernel: its error is its own
        attention = drawn.prefill.pair_ns / base.prefill.pair_ns
        assert attention == pytest.approx(draw.factor("prefill_attention", 123.0))
        assert attention != pytest.approx(draw.factor("DecodeAttention", 123.0))

    @pytest.mark.parametrize("spread", [0.05, 0.12, 0.5])
    def test_factors_have_mean_one_and_their_spread(self, spread: float) -> None:
        source = np.random.default_rng(1)
        logs = np.log([CostDraw(source).factor("any", spread) for _ in range(20_000)])
        # of a log-normal with mean 1 and standard deviation s: logs of variance log(1 + s^2), mean half of that below 0
        variance = math.log(1 + spread**2)
        assert logs.var() == pytest.approx(variance, rel=0.05)
        assert logs.mean() == pytest.approx(-variance / 2, abs=4 * math.sqrt(variance / 20_000))

    def test_prefill_attention_varies_as_it_was_measured(self) -> None:
        base, source = costs_of(LOAD).prefill.pair_ns, np.random.default_rng(2)
        spread = gpu_tables(SCENE.profile, "test").prefill_attention.spread
        logs = []
        for _ in range(400):
            drawn = prefill_prices(SCENE, RESIDENT, chunk_tokens=1, draw=CostDraw(source))
            logs.append(math.log(drawn.pair_ns / base))
        assert np.std(logs) == pytest.approx(spread, rel=0.12)

    def test_where_nobody_measured_it_as_shares_of_the_literature_do(self) -> None:
        """Equally likely shares of the datasheet rate between 0.5 and 0.75: standard deviation over mean."""
        assert PREFILL_ATTENTION.spread == pytest.approx(0.25 / math.sqrt(12) / 0.625, rel=0.05)

    def test_prefixes_chunks_and_executor_stay_as_they_were(self) -> None:
        base = worker_costs(SCENE, RESIDENT, LOAD, chunk_tokens=512, keeps_prefixes=True, executor="simpy")
        drawn = drawn_costs(base, Constant(2.0))
        assert drawn.prefill.chunk_tokens == 512
        assert drawn.prefill.out_ns == base.prefill.out_ns > 0
        assert drawn.block_bytes == base.block_bytes > 0
        assert drawn.decode_prices is not None
        assert (drawn.decode_prices.executor, drawn.decode_prices.max_context) == ("simpy", LOAD.max_total_tokens + 1)

    def test_given_costs_have_no_spread(self) -> None:
        with pytest.raises(SpecError, match="spread is not known"):
            drawn_costs(toy_costs(), Constant(1.0))

    def test_infinite_draws(self) -> None:
        assert interval_of([1.0] * 30 + [math.inf] * 10).high == math.inf
        assert interval_of([math.inf] * 40).low == math.inf
        assert interval_of([1.0] * 39 + [math.inf]).high == 1.0


class TestServices:
    def test_nine_in_ten_services_are_inside(self) -> None:
        """Services whose costs are other draws of the same spreads."""
        costs = costs_of(LOAD)
        run = serve(LOAD, costs, ServiceSettings())
        sets = [with_intervals(summarise_service(run), run, seed=seed) for seed in range(6)]
        truths = [
            numbers(
                summarise_service(
                    serve(LOAD, drawn_costs(costs, CostDraw(np.random.default_rng((99, n)))), run.settings)
                )
            )
            for n in range(150)
        ]
        for name in ("ttft_s_p50", "tpot_s_mean", "e2e_s_p95"):
            spans = [found.intervals[name] for found in sets]
            values = np.array([[truth[name] for truth in truths]], dtype=float)
            low, high = np.array(spans).T[:, :, None]
            assert np.mean((low <= values) & (values <= high)) == pytest.approx(0.9, abs=0.06)
        found = sets[0]
        assert found.interval_share is not None
        assert 0.5 < found.interval_share < 1.0

    def test_the_share_that_varies_is_what_moves_with_the_factors(self) -> None:
        """Every known cost 0.1% longer: busy time grows by their share. On a GPU without tables GEMMs do not vary."""
        own = clo_sim.make_scene()
        gpu = own.machine.gpu.model_copy(update={"hbm_bytes_per_s": 3e12})
        own = replace(own, machine=own.machine.model_copy(update={"gpu": gpu}))
        # one after another, so that batches are as they were
        load = generate("fixed", rate_per_s=0.05, num_requests=6, lengths=[(8192, 4)])
        link = SCENE.machine.link.model_copy(update={"d2h_bytes_per_s": 1e9})
        slow = replace(SCENE, machine=SCENE.machine.model_copy(update={"link": link}))
        # chunks of offloaded prompts wait for the slow link: their computing does not count
        for scene, design in ((SCENE, "resident"), (own, "resident"), (slow, "clo")):
            base = costs_of(load, scene, design)
            share = known_spread_share(serve(load, base, ServiceSettings()))
            assert share == pytest.approx(growth(load, base, KnownLonger()), abs=0.02)
            assert share is not None
            assert (share > 0.5) == (scene is SCENE)

    def test_the_measured_share_of_prompts_is_that_of_their_gemms_and_attention(self) -> None:
        load = generate("fixed", rate_per_s=0.05, num_requests=6, lengths=[(8192, 1)])
        base = costs_of(load)
        result = summarise_service(serve(load, base, ServiceSettings()), with_measured_share=True)
        assert result.measured_share == pytest.approx(
            growth(load, base, KnownLonger("Gemm", "prefill_attention")), abs=0.01
        )

    def test_no_spread_gives_points(self) -> None:
        run = serve(LOAD, costs_of(LOAD, without_spread(SCENE)), ServiceSettings())
        result = summarise_service(run)
        told: list[tuple[int, int]] = []
        found = with_intervals(result, run, draws=3, progress=lambda *now: told.append(now))
        assert told == [(1, 3), (2, 3), (3, 3)]
        for name, (low, high) in found.intervals.items():
            assert low == high == pytest.approx(numbers(result)[name])

    def test_the_chance_of_a_term_is_its_share_of_draws(self) -> None:
        run = serve(LOAD, costs_of(LOAD), ServiceSettings())
        result = summarise_service(run)
        middle = result.ttft_s.p50 or 0.0
        slo = parse_slo(f"ttft_p50<{middle:.9f}s, e2e_p99<900s")
        found = with_intervals(summarise_service(run, slo=slo), run, slo=slo, draws=24)
        assert 0.1 < found.slo_chance["ttft_p50"] < 0.9
        assert found.slo_chance["e2e_p99"] == 1.0
        assert found.chance == found.slo_chance["ttft_p50"]
        # as many requests are in time as draws have it
        low, high = found.intervals["goodput_per_s"]
        assert low < high <= 1.1 * result.completed_per_s

    def test_the_chance_of_an_slo_is_that_of_all_terms_together(self) -> None:
        """Terms that follow different costs: in draws where one holds the other may not."""
        # attention is most of a long prompt, weights are most of a step
        load = generate("fixed", rate_per_s=0.01, num_requests=6, lengths=[(100_000, 4)])
        costs, settings_ = costs_of(load), ServiceSettings()
        run = serve(load, costs, settings_)
        result = summarise_service(run)
        slo = parse_slo(f"ttft_p50<{result.ttft_s.p50:.9f}s, itl_p50<{result.itl_s.p50:.9f}s")
        found = with_intervals(summarise_service(run, slo=slo), run, slo=slo, draws=24)
        met = []
        for number in range(24):
            drawn = drawn_costs(costs, CostDraw(np.random.default_rng((0, number))))
            met.append(all(summarise_service(serve(load, drawn, settings_), slo=slo).slo_met.values()))
        assert found.chance == np.mean(met)
        assert found.chance < min(found.slo_chance.values())

    def test_what_does_not_keep_up_meets_nothing(self) -> None:
        load = generate("fixed", rate_per_s=40.0, num_requests=300, lengths=[(2048, 2)], seed=0)
        run, slo = serve(load, costs_of(load), ServiceSettings()), parse_slo("tpot_mean<9s")
        found = with_intervals(summarise_service(run, slo=slo), run, slo=slo, draws=3)
        assert (found.slo_chance, found.chance) == ({"tpot_mean": 1.0}, 0.0)

    def test_what_may_not_keep_up_has_no_upper_end(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Two GPUs' worth of load on one: latencies have no bound, in JSON they are null."""
        load = generate("fixed", rate_per_s=40.0, num_requests=300, lengths=[(2048, 1)], seed=0)
        run = serve(load, costs_of(load), ServiceSettings())
        found = with_intervals(summarise_service(run), run, draws=20)
        assert found.unstable
        for name in ("ttft_s_p95", "ttft_s_mean", "e2e_s_p50"):
            assert found.intervals[name] == (math.inf, math.inf)
        assert json.loads(json.dumps(found.as_dict()))["intervals"]["ttft_s_p95"] == [None, None]
        print_service(found)
        assert "unstable to" not in capsys.readouterr().out
        assert all(math.isfinite(end) for end in found.intervals["completed_per_s"])

    def test_draws_are_served_as_the_run_was(self) -> None:
        load = generate("fixed", rate_per_s=20.0, num_requests=12, lengths=[(4096, 8)])
        settings_ = ServiceSettings(gpus=2, max_batch=2, routing="round_robin", pressure="queue")
        run = serve(load, costs_of(load, without_spread(SCENE)), settings_)
        result = summarise_service(run)
        assert result.ttft_s.p95 != summarise_service(serve(load, run.costs, ServiceSettings())).ttft_s.p95
        for name, (low, high) in with_intervals(result, run, draws=2).intervals.items():
            assert low == high == pytest.approx(numbers(result)[name])


class TestFleets:
    @pytest.mark.parametrize("draws", [20, 40, 100, 250])
    def test_counts_lie_between_order_statistics_that_hold_nine_in_ten(self, draws: int) -> None:
        """Between order statistics i and j of n lies (j - i) / (n + 1) on average: here the narrowest, outwards."""
        low, high = of_counts([float(one) for one in np.random.default_rng(0).permutation(draws) + 1])
        assert low + high == draws + 1
        assert (high - low) / (draws + 1) >= 0.9
        assert (high - low - 2) / (draws + 1) < 0.9

    def fleet(
        self, slo_text: str, load: RequestTrace = LOAD, *, draws: int, chunk_tokens: int = 2048, **options: Any
    ) -> Any:
        """The fleet as priced, and with intervals from draws in two parts."""
        given = SCENE, RESIDENT, load, parse_slo(slo_text), ServiceSettings()
        fleet = smallest_fleet(*given, chunk_tokens=chunk_tokens)
        parts = [
            drawn_fleet(fleet, *given, draws=part, chunk_tokens=chunk_tokens, **options)
            for part in (range(3), range(3, draws))
        ]
        return fleet, fleet_with_intervals(fleet, parts)

    def test_the_gpus_of_every_draw(self) -> None:
        """Each draw's own smallest fleet, searched from one GPU on, is what the interval is made of."""
        load = generate("poisson", rate_per_s=20.0, num_requests=150, lengths=[(4096, 4)], seed=1)
        slo, service = parse_slo("ttft_p90<400ms"), ServiceSettings()
        fleet, found = self.fleet("ttft_p90<400ms", load, draws=12, chunk_tokens=1024)
        costs, needed, enough = worker_costs(SCENE, RESIDENT, load, chunk_tokens=1024), [], []
        for number in range(12):
            drawn = drawn_costs(costs, CostDraw(np.random.default_rng((0, number))))
            met = [
                attempt(load, drawn, slo, replace(service, gpus=gpus), stop_early=False).met for gpus in range(1, 12)
            ]
            needed.append(1 + met.index(True))
            enough.append(met[fleet.gpus - 1])
        assert found.chance == np.mean(enough)
        assert found.gpus_interval == (min(needed), max(needed))
        assert found.result.intervals["ttft_s_p90"][0] < fleet.values["ttft_p90"] < math.inf

    def test_an_slo_on_the_edge_may_be_met_by_no_number(self) -> None:
        alone = alone_values(LOAD, costs_of(LOAD), parse_slo("ttft_mean<1s"))["ttft_mean"]
        fleet, found = self.fleet(f"ttft_mean<{1.01 * alone:.6f}s", draws=20, max_gpus=64)
        assert fleet.gpus is not None
        assert found.gpus_interval[1] == math.inf
        assert 0 < found.chance < 1

    def test_more_than_may_be_had_is_no_number(self) -> None:
        load = generate("poisson", rate_per_s=20.0, num_requests=150, lengths=[(4096, 4)], seed=1)
        fleet, found = self.fleet("ttft_p90<400ms", load, draws=20)
        assert found.gpus_interval[1] > fleet.gpus
        _, bounded = self.fleet("ttft_p90<400ms", load, draws=20, max_gpus=fleet.gpus)
        assert bounded.gpus_interval == (found.gpus_interval[0], math.inf)
        assert bounded.chance == found.chance


class TestCommands:
    AZURE = Path(__file__).parents[1] / "data" / "azure_excerpt.csv"

    def test_serve_sim(self) -> None:
        command = (
            "serve-sim",
            "--requests",
            self.AZURE,
            "--first",
            20,
            "--design",
            "resident",
            "--slo",
            "ttft_p95<900s",
        )
        result = json.loads(run(*command, "--intervals", "--json"))
        low, high = result["intervals"]["ttft_s_p95"]
        assert low < result["ttft_s_p95"] < high
        assert result["slo_chance"] == {"ttft_p95": 1.0}
        other = json.loads(run(*command, "--intervals", "--seed", 1, "--json"))
        assert other["ttft_s"] == result["ttft_s"]
        assert other["intervals"] != result["intervals"]
        text = run(*command, "--intervals")
        assert "90% prediction interval" in text
        assert "(it holds in 100% of draws)" in " ".join(text.split())
        assert "all of it, and keeping up, in 100% of draws" in " ".join(text.split())
        assert "prediction interval" not in run(*command)

    def test_no_number_of_gpus_is_null(self) -> None:
        fleet = Fleet(machine="h200", design="resident", gpus=3, gpus_interval=(2.0, math.inf), chance=0.5)
        assert Priced(fleet=fleet).as_dict()["gpus_interval"] == [2, None]

    def test_no_fleet_no_interval(self) -> None:
        command = ("plan", "--requests", self.AZURE, "--first", 20, "--machines", "h200", "--designs", "resident")
        text = run(*command, "--slo", "ttft_p95<1us", "--no-map", "--workers", 1, "--intervals", "--json")
        (fleet,) = json.loads(text)["fleets"]
        assert (fleet["gpus"], fleet["gpus_interval"], fleet["chance"]) == (None, None, None)

    def test_the_largest_fleet_holds_for_draws_too(self) -> None:
        load = ("--load", "poisson:20", "--num-requests", 150, "--input-tokens", 4096, "--output-tokens", 4)
        command = ("plan", *load, "--slo", "ttft_p90<400ms", "--machines", "h200", "--designs", "resident", "--no-map")
        command = (*command, "--workers", 1, "--intervals", "--json", "--seed", 1)
        (free,) = json.loads(run(*command))["fleets"]
        assert free["gpus_interval"][1] > free["gpus"]
        (bounded,) = json.loads(run(*command, "--max-gpus", free["gpus"]))["fleets"]
        assert bounded["gpus_interval"][1] is None

    def test_plan(self) -> None:
        command = ("plan", "--requests", self.AZURE, "--first", 20, "--machines", "h200", "--designs", "resident")
        command = (*command, "--slo", "ttft_p95<900s", "--no-map", "--workers", 1)
        (fleet,) = json.loads(run(*command, "--intervals", "--json"))["fleets"]
        assert fleet["gpus_interval"] == [1, 1]
        assert fleet["head_room"] > 1
        (other,) = json.loads(run(*command, "--intervals", "--seed", 1, "--json"))["fleets"]
        assert other["values"] == fleet["values"]
        assert other["result"]["intervals"] != fleet["result"]["intervals"]
        assert fleet["chance"] == 1.0
        text = " ".join(run(*command, "--intervals").replace("│", " ").split())
        assert "In brackets: the GPUs needed" in text
        assert f"(of costs that are {fleet['result']['interval_share']:.0%} of its time)" in text.replace(
            "(1 to 1) ", ""
        )
        assert "(1 to 1)" in text
