"""Request files, loads, SLOs, fleets, the map, and the two commands as a user meets them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from commands import run
from toy_service import toy_costs, trace_of

import clo_sim
from clo import presets
from clo.errors import RequestError, SpecError
from clo_cli.main import clo
from clo_plots import plot_crossover, plot_fleets, plot_load, plot_service
from clo_plots.fleets import FleetPoint, fleet_front
from clo_sim.serving import ServiceSettings, generate, lengths_of, parse_slo, read_requests, serve
from clo_sim.serving.clocks import StepClock
from clo_sim.serving.crossover import crossover_map
from clo_sim.serving.fleet_search import attempt, limits_of
from clo_sim.serving.metrics import Latency, latency_values, term_value
from clo_sim.serving.plan import alone_values, smallest_fleet

DATA = Path(__file__).parents[1] / "data"
MOONCAKE, AZURE = DATA / "mooncake_excerpt.jsonl", DATA / "azure_excerpt.csv"


class TestFiles:
    def test_mooncake(self) -> None:
        trace = read_requests(MOONCAKE)
        first, last = trace.requests[0], trace.requests[-1]
        assert (len(trace), first.input_tokens, first.output_tokens) == (60, 6758, 500)
        assert first.prefix_blocks == tuple(range(14))
        assert last.arrival_ns == 1_000_000 * json.loads(MOONCAKE.read_text().splitlines()[-1])["timestamp"]

    def test_azure(self) -> None:
        trace = read_requests(AZURE)
        assert (len(trace), trace.requests[0][1:3]) == (60, (374, 44))
        # 18:15:46.6805900 to 18:15:50.9951690
        assert trace.requests[1].arrival_ns == 4_314_579_000
        assert not trace.has_prefixes

    @pytest.mark.parametrize(
        ("text", "line", "names"),
        [
            (
                '{"timestamp": 5, "input_length": 1, "output_length": 1}\n{"timestamp": 4, "input_length": 1, '
                '"output_length": 1}',
                2,
                "0.001 s before",
            ),
            ('{"timestamp": 0, "input_length": 1}', 1, "output_length"),
            ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n\n{"timestamp": 0, ', 3, "not JSON"),
            ('{"timestamp": 0, "input_length": -1, "output_length": 1}', 1, "input_length = -1"),
            ('{"timestamp": 0, "input_length": 1.5, "output_length": 1}', 1, "input_length = 1.5"),
            ('{"timestamp": true, "input_length": 1, "output_length": 1}', 1, "timestamp = True"),
            ('{"timestamp": NaN, "input_length": 1, "output_length": 1}', 1, "timestamp = nan"),
            ('{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [1, 2]}', 1, "hash_ids"),
            ('{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": "1"}', 1, "hash_ids"),
            ("TIMESTAMP,ContextTokens\n2023-11-16 18:15:46.68,3", 1, "GeneratedTokens"),
            ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,3,4", 2, "TIMESTAMP = 'yesterday'"),
            ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,3", 2, "2 fields"),
            ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,3,many", 2, "GeneratedTokens = 'many'"),
            (
                "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,3,4\n2023-11-16 18:15:46.67,3,4",
                3,
                "0.01 s before",
            ),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path: Path, text: str, line: int, names: str) -> None:
        path = tmp_path / "requests.txt"
        path.write_text(text)
        with pytest.raises(RequestError, match=f"requests.txt:{line}: ") as problem:
            read_requests(path)
        assert names in str(problem.value)
        assert "\n" not in str(problem.value)

    @pytest.mark.parametrize("name", ["empty.csv", "empty.jsonl"])
    def test_an_empty_file_has_no_requests(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("")
        with pytest.raises(RequestError, match="no requests in it"):
            read_requests(tmp_path / name)

    @pytest.mark.parametrize(
        ("texts", "apart_ns"),
        [
            # the file of 2023, of 2024 with and without a fraction, and another zone
            (("2023-11-16 18:15:46.6805900", "2023-11-16 18:15:46.6805901"), 100),
            (("2024-05-10 00:00:00.009930+00:00", "2024-05-10 00:00:01+00:00"), 990_070_000),
            (("2024-05-10 00:00:00+00:00", "2024-05-10 02:00:01+02:00"), 1_000_000_000),
            (("2024-05-10 00:00:00Z", "2024-05-10T00:00:00.5Z"), 500_000_000),
        ],
    )
    def test_moments_as_published(self, tmp_path: Path, texts: tuple[str, str], apart_ns: int) -> None:
        path = tmp_path / "azure.csv"
        lines = ["TIMESTAMP,ContextTokens,GeneratedTokens", *(f"{text},3,4" for text in texts)]
        path.write_text("\n".join(lines))
        assert read_requests(path).requests[1].arrival_ns == apart_ns

    @pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"TIMESTAMP,ContextTokens,GeneratedTokens\n"])
    def test_nothing_to_serve(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "empty"
        path.write_bytes(content)
        with pytest.raises(RequestError, match="empty"):
            read_requests(path)

    @pytest.mark.parametrize(
        "text",
        [
            '\n{"timestamp": 0, "input_length": 3, "output_length": 4}\n',
            "\n\nTIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,3,4\n",
        ],
    )
    def test_empty_lines_do_not_count(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "spaced"
        path.write_text(text)
        assert read_requests(path).requests[0][1:3] == (3, 4)

    def test_zero_lengths_are_read_for_the_service_to_count(self, tmp_path: Path) -> None:
        path = tmp_path / "zero.jsonl"
        path.write_text('{"timestamp": 0, "input_length": 0, "output_length": 0}\n')
        assert serve(read_requests(path), toy_costs(), ServiceSettings()).rejected.total() == 1


class TestLoads:
    @pytest.mark.parametrize(("kind", "variation"), [("fixed", 0.0), ("poisson", 1.0), ("bursty", 10.0)])
    def test_rate_and_variation(self, kind: Any, variation: float) -> None:
        trace = generate(kind, rate_per_s=4.0, num_requests=40_000, lengths=[(3, 4)], seed=7)
        gaps = np.diff([request.arrival_ns for request in trace.requests]) / 1e9
        assert gaps.mean() == pytest.approx(0.25, rel=0.04)
        assert gaps.var() / gaps.mean() ** 2 == pytest.approx(variation, rel=0.1, abs=1e-6)

    def test_the_same_seed_gives_the_same_load(self) -> None:
        lengths = lengths_of(read_requests(AZURE))
        first, again, other = (
            generate("poisson", rate_per_s=1, num_requests=50, lengths=lengths, seed=seed).requests
            for seed in (1, 1, 2)
        )
        assert first == again != other

    def test_a_faster_trace_keeps_its_requests(self) -> None:
        trace = read_requests(AZURE)
        faster = trace.at_rate(2.5)
        assert lengths_of(faster) == lengths_of(trace)
        assert faster.rate_per_s == pytest.approx(2.5 * trace.rate_per_s)


class TestSlo:
    def test_terms(self) -> None:
        slo = parse_slo("ttft_p95<2s, tpot_p99.9<=50ms,e2e_mean<1min, itl_max<1500us")
        assert [(term.name, term.limit_s) for term in slo.terms] == [
            ("ttft_p95", 2.0),
            ("tpot_p99.9", 0.05),
            ("e2e_mean", 60.0),
            ("itl_max", 0.0015),
        ]
        assert parse_slo(str(slo)) == slo
        assert parse_slo(" ttft_p95 < 2 s,tpot_p99.9<= 50 ms , e2e_mean<1 min, itl_max<1500 us") == slo

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "ttft<2s",
            "ttft_p95>2s",
            "speed_p95<2s",
            "ttft_p95<2",
            "ttft_p95<-2s",
            "ttft_p95<0ms",
            "ttft_p0<2s",
            "ttft_p95<2s, ttft_p95<3s",
            "ttft_p95<nans",
            "ttft_p95<2 s or less",
        ],
    )
    def test_nonsense_is_refused(self, text: str) -> None:
        with pytest.raises(RequestError, match="slo"):
            parse_slo(text)

    def test_percentiles_count_values(self) -> None:
        values = np.array([5.0, 1.0, 3.0])
        counted = Latency.of(values, np.array([1, 97, 2]))
        assert (counted.p50, counted.p95, counted.p99, counted.max) == (1.0, 1.0, 3.0, 5.0)
        assert counted.mean == pytest.approx((97 + 6 + 5) / 100)

    def test_a_run_ends_early_only_if_the_slo_is_lost(self) -> None:
        trace = generate("poisson", rate_per_s=0.9, num_requests=2000, lengths=[(1, 800), (1, 1200)], seed=3)
        costs, settings = toy_costs(), ServiceSettings(max_batch=1)
        full = serve(trace, costs, settings)
        for limit in (0.5, 2.0, 6.0, 12.0, 60.0):
            slo = parse_slo(f"ttft_p90<{limit}s")
            value = term_value(slo.terms[0], latency_values(full))
            tried = attempt(trace, costs, slo, settings)
            assert tried.met == (value < limit and not (tried.result and tried.result.unstable))
            assert limits_of(slo, 2000).allowed_ttft == 200


class TestFleets:
    def test_the_smallest_fleet_is_the_smallest(self) -> None:
        scene, design = clo_sim.make_scene(), presets.load_design("resident")
        lengths = lengths_of(read_requests(MOONCAKE))
        trace = generate("poisson", rate_per_s=4, num_requests=250, lengths=lengths)
        slo, settings = parse_slo("ttft_p95<6s, tpot_p95<50ms"), ServiceSettings()
        fleet = smallest_fleet(scene, design, trace, slo, settings)
        assert fleet.gpus is not None
        assert fleet.gpus > 1
        from clo_sim.serving import worker_costs

        costs = worker_costs(scene, design, trace)
        met = [attempt(trace, costs, slo, ServiceSettings(gpus=gpus)).met for gpus in range(1, fleet.gpus + 2)]
        assert met == [False] * (fleet.gpus - 1) + [True, True]
        for near in (1, fleet.gpus, fleet.gpus + 1, 40):
            guided = smallest_fleet(scene, design, trace, slo, settings, near=near)
            assert (guided.gpus, guided.values) == (fleet.gpus, fleet.values)

    def test_an_slo_no_fleet_meets_says_by_what_it_fails(self) -> None:
        trace = read_requests(MOONCAKE).first(20)
        slo = parse_slo("tpot_p95<1s, ttft_p95<10ms")
        fleet = smallest_fleet(clo_sim.make_scene(), presets.load_design("resident"), trace, slo, ServiceSettings())
        assert fleet.gpus is None
        assert fleet.failing == ("ttft_p95",)
        assert "ttft_p95" in fleet.problem

    def test_alone_is_a_bound(self) -> None:
        trace = trace_of([(0, 40, 10), (0, 80, 5)])
        costs, slo = toy_costs(token_ns=1000), parse_slo("ttft_max<1s, tpot_mean<1s, e2e_max<1s, itl_p50<1s")
        alone = alone_values(trace, costs, slo)
        assert alone == pytest.approx({"ttft_max": 80e-6, "tpot_mean": 1e-3, "e2e_max": 40e-6 + 9e-3, "itl_p50": 1e-3})

    def test_every_gap_counts_in_the_bound_of_itl(self) -> None:
        """One long prompt with a short answer: its gaps are few among those of the others."""
        clock = StepClock.of([1_000_000, 50_000_000], shift=10)
        trace = trace_of([(0, 2000, 3), *((0, 100, 101) for _ in range(4))])
        costs, slo = toy_costs(clock=lambda batch: clock), parse_slo("itl_p90<10ms, itl_mean<10ms, itl_max<10ms")
        alone = alone_values(trace, costs, slo)
        assert alone["itl_p90"] == pytest.approx(1e-3)
        assert alone["itl_mean"] == pytest.approx((400 * 1e-3 + 2 * 50e-3) / 402)
        assert alone["itl_max"] == pytest.approx(50e-3)
        alone_on_their_own = attempt(trace, costs, slo, ServiceSettings(gpus=5), stop_early=False)
        assert all(alone_on_their_own.values[name] >= value * (1 - 1e-9) for name, value in alone.items())

    def test_a_model_that_does_not_fit_one_gpu_is_no_fleet(self) -> None:
        scene = clo_sim.make_scene("llama-3-70b", "l40s")
        trace = trace_of([(0, 40, 10)])
        fleet = smallest_fleet(scene, presets.load_design("clo"), trace, parse_slo("ttft_p95<9s"), ServiceSettings())
        assert fleet.gpus is None
        assert "does not fit one GPU" in fleet.problem

    def test_the_front(self) -> None:
        points = [
            FleetPoint(str(number), "m", cost, late) for number, (cost, late) in enumerate([(3, 1), (1, 3), (2, 3)])
        ]
        assert [point.name for point in fleet_front(points)] == ["1", "0"]

    @pytest.mark.parametrize(("ends", "bars"), [(None, 0), ([2, 6], 1), ([2, None], 0)])
    def test_the_figure_has_the_span_of_gpus(self, ends: Any, bars: int) -> None:
        fleet = {"machine": "h200", "design": "clo", "gpus": 4, "values": {"ttft_p95": 1.0}, "gpus_interval": ends}
        figure = plot_fleets([fleet | {"cost_per_million_output_tokens": 2.0}])
        lines = [line for line in figure.axes[0].lines if line.get_label() == "needed with 90%"]
        assert [line.get_xdata().tolist() for line in lines] == [[1.0, 3.0]] * bars  # type: ignore[union-attr]

    def test_the_figure_says_who_prefills(self) -> None:
        fleet = {"machine": "h200", "design": "clo", "gpus": 4, "prefill_gpus": 3, "values": {"ttft_p95": 1.0}}
        figure = plot_fleets([fleet | {"cost_per_million_output_tokens": None}])
        assert [text.get_text() for text in figure.axes[0].texts] == ["(3 + 1) x h200, clo"]


class TestMap:
    def test_offloading_is_only_needed_where_memory_is_not_enough(self) -> None:
        scene = clo_sim.make_scene(machine="l40s")
        found = crossover_map(
            scene,
            [presets.load_design("resolve")],
            residents=[presets.load_design("resident")],
            contexts=(4096, 262144),
            output_tokens=32,
            rates_per_s=(0.001, 1000.0),
            num_requests=200,
            chunk_tokens=16384,
        )
        # 262,144 tokens of KV (34 GB) do not fit the 28 GB that weights leave
        assert found.e2e_s["resident"][0][1] is None
        assert found.ratio(0, 1) == 0.0
        assert found.ratio(0, 0) > 1.0
        assert math.isnan(found.ratio(1, 0))
        assert (found.best(0, 1), found.best(1, 1)) == ("resolve", "")
        saved = json.loads(json.dumps(found.as_dict()))
        plot_crossover(saved)
        plot_crossover({name: value for name, value in saved.items() if name != "gpus"})  # saved by an older version


class TestCommands:
    def test_serve_sim(self, tmp_path: Path) -> None:
        figure, out = tmp_path / "memory.png", tmp_path / "result.json"
        text = run("serve-sim", "--requests", MOONCAKE, "--design", "resident", "--gpus", 2, "--json", "--figure",
                   figure, "--out", out, "--slo", "ttft_p95<2s, tpot_p95<50ms")  # fmt: skip
        result = json.loads(text)
        assert json.loads(out.read_text()) == result
        assert (result["completed"], result["rejected"]) == (60, 0)
        for name in ("ttft_s_p95", "tpot_s_p95", "itl_s_p99", "e2e_s_p50", "requests_per_cpu_s", "goodput_per_s"):
            assert result[name] > 0, name
        assert 0 < result["measured_share"] < 1
        assert figure.stat().st_size > 10_000
        plot_service(result)

    def test_every_step_by_itself_gives_the_same_numbers(self) -> None:
        command = ["serve-sim", "--requests", AZURE, "--first", 20, "--design", "resident", "--json"]
        together, alone = (json.loads(run(*command, *more)) for more in ([], ["--no-coalesce"]))
        timing = {"requests_per_cpu_s": None}
        assert together | timing == alone | timing

    def test_an_unstable_service_says_so(self) -> None:
        load = ["--load", "poisson:50", "--num-requests", 400, "--input-tokens", 8192, "--output-tokens", 64]
        text = run("serve-sim", "--design", "resident", *load)
        assert "UNSTABLE" in text
        assert json.loads(run("serve-sim", "--design", "resident", *load, "--json"))["ttft_s_p95"] is None

    def test_fleets_of_gpus_that_share_the_model_name_their_replicas(self) -> None:
        load = ["--load", "fixed:2", "--num-requests", 20, "--input-tokens", 512, "--output-tokens", 4]
        sharing = [*load, "--model", "llama-3-70b", "--set", "machine.tensor_parallel=4"]
        plan = ["--slo", "ttft_p95<5s", "--machines", "h200", "--designs", "clo", "--no-map", "--workers", 1]
        assert "1 replica of 4: ttft_p95" in run("plan", *sharing, *plan)
        assert "clo on 8 x h200 (2 replicas of 4): llama-3-70b" in run("serve-sim", *sharing, "--gpus", 8)

    def test_plan(self, tmp_path: Path) -> None:
        text = run("plan", "--requests", MOONCAKE, "--slo", "ttft_p95<4s, tpot_p95<50ms", "--machines", "h200",
                   "--designs", "resident,resident-sparse", "--price", "h200=3.5", "--workers", 1, "--no-map",
                   "--out", tmp_path, "--json")  # fmt: skip
        found = json.loads(text)
        best = next(one for one in found["fleets"] if one["best"])
        assert best["cost_per_hour"] == pytest.approx(3.5 * best["gpus"])
        per_second = best["result"]["output_tokens_per_s"]
        assert best["cost_per_million_output_tokens"] == pytest.approx(best["cost_per_hour"] / 3600 / per_second * 1e6)
        assert best["head_room"] >= 1
        for name in ("load.png", "fleets.png", "plan.json"):
            assert (tmp_path / name).exists()
        plot_load(found["latency_against_load"], found["slo"], found["rate_per_s"], title="again")
        plot_fleets(found["fleets"])

    def test_of_what_is_never_served_there_is_no_fleet(self, tmp_path: Path) -> None:
        rows = [{"timestamp": 0, "input_length": 1000, "output_length": 0}] * 3
        (tmp_path / "empty.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        command = ("--requests", tmp_path / "empty.jsonl", "--slo", "ttft_p95<6s")
        text = run("plan", *command, "--machines", "h200", "--designs", "resident", "--price", "h200=3", "--no-map",
                   "--workers", 1)  # fmt: skip
        assert "no request can be served: empty output: 3" in " ".join(text.split())
        served = run("serve-sim", *command, "--design", "resident", "--intervals", "--figure", tmp_path / "none.png")
        assert "completed 0, rejected 3 (empty output: 3)" in served
        assert "nothing to hold against it" in served
        assert "holds" not in served

    def test_a_single_request_has_no_rate(self, tmp_path: Path) -> None:
        def no_constant(name: str) -> None:
            raise ValueError(f"{name} is not JSON")

        (tmp_path / "one.jsonl").write_text('{"timestamp": 5, "input_length": 1000, "output_length": 10}')
        command = ("--requests", tmp_path / "one.jsonl", "--slo", "ttft_p95<6s")
        served = json.loads(
            run("serve-sim", *command, "--json", "--figure", tmp_path / "one.png"), parse_constant=no_constant
        )
        assert served["rate_per_s"] is None
        assert "1 request of one" in run("serve-sim", *command)
        plan = ("plan", *command, "--machines", "h200", "--designs", "resident", "--no-map", "--workers", 1)
        found = json.loads(run(*plan, "--json", "--out", tmp_path), parse_constant=no_constant)
        assert [found["fleets"][0][name] for name in ("gpus", "head_room")] == [1, None]
        assert (tmp_path / "fleets.png").exists()
        assert "1 request of one, all at once" in run(*plan)

    def test_head_room_that_was_not_found_the_end_of(self) -> None:
        text = run("plan", "--load", "fixed:0.1", "--num-requests", 200, "--input-tokens", 100, "--output-tokens", 2,
                   "--slo", "tpot_max<9s", "--machines", "h200", "--designs", "resident", "--no-map",
                   "--workers", 1)  # fmt: skip
        assert "x or more" in " ".join(text.replace("│", " ").split())

    def test_a_model_too_large_for_a_map_still_has_a_table(self) -> None:
        text = run("plan", "--load", "poisson:2", "--num-requests", 20, "--input-tokens", 3000, "--output-tokens", 100,
                   "--slo", "ttft_p95<6s", "--machines", "h200", "--designs", "clo", "--model", "llama-3-70b",
                   "--workers", 1)  # fmt: skip
        assert "does not fit one" in " ".join(text.replace("│", " ").split())

    def test_of_few_requests_nobody_knows_whether_a_fleet_keeps_up(self) -> None:
        load = ("--load", "poisson:20", "--input-tokens", 30000, "--output-tokens", 10)
        command = ("plan", *load, "--slo", "tpot_p50<500ms", "--machines", "h200", "--designs", "resident", "--no-map")
        command = (*command, "--workers", 1)
        few = " ".join(run(*command, "--num-requests", 50).split())
        assert "Too few requests (200 are needed)" in few
        assert "not known" in few
        assert "Too few requests" not in run(*command, "--num-requests", 200)

    @pytest.mark.parametrize(("option", "kind"), [("--machines", "machines"), ("--designs", "designs")])
    def test_two_of_a_name_could_not_be_told_apart(self, tmp_path: Path, option: str, kind: str) -> None:
        preset = {"machines": "l40s", "designs": "resident"}[kind]
        own = tmp_path / "own.toml"
        own.write_text((Path(presets.__file__).parent / kind / f"{preset}.toml").read_text())
        with pytest.raises(SpecError, match=f"are both named '{preset}'"):
            run("plan", "--requests", AZURE, "--slo", "e2e_p95<9s", option, f"{preset},{own}")

    def test_what_a_fleet_rejects_is_told(self, tmp_path: Path) -> None:
        rows = [{"timestamp": 0, "input_length": 1000, "output_length": answer} for answer in (5, 0, 5)]
        (tmp_path / "some.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        text = run("plan", "--requests", tmp_path / "some.jsonl", "--slo", "ttft_p95<6s", "--machines", "h200",
                   "--designs", "resident", "--no-map", "--workers", 1)  # fmt: skip
        assert "rejects 1 request (empty output: 1)" in " ".join(text.replace("│", " ").split())

    def test_without_prices_no_costs(self) -> None:
        text = run("plan", "--requests", AZURE, "--first", 10, "--slo", "e2e_p95<60s", "--machines", "h200",
                   "--designs", "resident", "--workers", 1, "--no-map")  # fmt: skip
        assert "For costs give prices" in text
        assert "$/h" not in text

    def test_prices_of_fleets_that_cannot_be_are_not_asked_for_again(self) -> None:
        text = run("plan", "--requests", AZURE, "--first", 10, "--slo", "e2e_p95<1us", "--machines", "h200",
                   "--designs", "resident", "--price", "h200=3.5", "--workers", 1, "--no-map")  # fmt: skip
        assert re.search(r"\d (ms|us) even for requests alone on an idle", " ".join(text.split()))
        assert "For costs give prices" not in text
        assert "$/h" in text

    @pytest.mark.parametrize(
        ("arguments", "names"),
        [
            (["serve-sim"], "--requests"),
            (["serve-sim", "--requests", "no-such.jsonl"], "no-such.jsonl"),
            (["serve-sim", "--requests", str(AZURE), "--gpus", "0"], "gpus = 0"),
            (["serve-sim", "--requests", str(AZURE), "--max-batch", "5000"], "max_batch = 5000"),
            (["serve-sim", "--requests", str(AZURE), "--rate-scale", "0"], "rate multiplier = 0"),
            (["serve-sim", "--requests", str(AZURE), "--slo", "fast"], "fast"),
            (["serve-sim", "--requests", str(AZURE), "--input-tokens", "3"], "--load"),
            (["serve-sim", "--requests", str(AZURE), "--num-requests", "3"], "--first"),
            (["serve-sim", "--requests", str(AZURE), "--set", "workload.batch=3"], "workload.batch=3"),
            (["plan", "--requests", str(AZURE), "--slo", "e2e_p95<9s", "--set", "workload.batch=3"], "workload.batch"),
            (["serve-sim", "--load", "poisson:2"], "lengths"),
            (["serve-sim", "--load", "often:2", "--requests", str(AZURE)], "often"),
            (["serve-sim", "--load", "poisson", "--requests", str(AZURE)], "poisson:4"),
            (["serve-sim", "--requests", str(AZURE), "--model", "llama-3-70b"], "does not fit one GPU"),
            (["plan", "--requests", str(AZURE), "--slo", "e2e_p95<9s", "--price", "h20=3"], "h20=3"),
            (["plan", "--requests", str(AZURE), "--slo", "e2e_p95<9s", "--machines", ","], "--machines"),
            (["plan", "--requests", str(AZURE), "--slo", "e2e_p95<9s", "--machines", "tpu"], "tpu"),
        ],
    )
    def test_bad_input_is_one_line(self, arguments: list[str], names: str) -> None:
        from clo.errors import CloError

        done = CliRunner().invoke(clo, arguments, standalone_mode=False)
        assert isinstance(done.exception, CloError), done.output
        assert names in str(done.exception)
        assert "\n" not in str(done.exception)
