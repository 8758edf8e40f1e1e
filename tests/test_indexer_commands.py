"""What commands say of models with an indexer."""

from __future__ import annotations

import json

import pytest
from commands import run
from test_indexer import GLM, design_for, scene_of

from clo.errors import SpecError
from clo_sim.variation import scene_with, vary


class TestCommands:
    def test_explore_leaves_full_attention_out_and_says_why(self) -> None:
        args = ["explore", "--model", "glm-5.1", "--set", "machine.tensor_parallel=8", "--context", "32768"]
        args += ["--set", "machine.attention_by=sequences", "--no-sweep", "--no-figures", "--workers", "1", "--json"]
        assert "attends to the 2048 tokens that its indexer chooses" in run(*args, "--designs", "resident,resolve")

    def test_a_service_of_short_requests(self) -> None:
        args = ["serve-sim", "--model", "glm-5.1", "--set", "machine.tensor_parallel=8", "--gpus", "8", "--json"]
        args += ["--set", "machine.attention_by=sequences", "--set", "design.slot_pages=4096", "--load", "fixed:1"]
        args += ["--input-tokens", "3000", "--output-tokens", "20", "--num-requests", "4", "--design", "resolve"]
        assert json.loads(run(*args))["completed"] == 4

    @pytest.mark.parametrize(
        ("settings", "pages"),
        [
            (["design.budget_fraction=0.03125"], 1024),
            (["design.selector=page_mean", "design.page_size=64"], 32),
            (["design.budget_pages=100", "design.budget_fraction=0.5"], 100),
        ],
    )
    def test_what_is_set_counts(self, settings: list[str], pages: int) -> None:
        args = ["simulate", "--model", "glm-5.1", "--context", "32768", "--design", "resolve", "--steps", "4", "--json"]
        dealt = ["machine.tensor_parallel=8", "machine.attention_by=sequences"]
        found = json.loads(run(*args, *(part for each in [*dealt, *settings] for part in ("--set", each))))
        assert found["budget_pages"] == pages

    def test_a_share_that_is_varied_counts(self) -> None:
        varied = vary(design_for("resolve"), {"budget_fraction": 0.0625})
        assert varied.name == "resolve budget_fraction=0.0625"
        assert scene_of().plan(varied).budget_pages == 2048
        assert scene_of(context_tokens=65536).plan(varied).budget_pages == 4096

    def test_designs_are_made_for_as_many_tokens(self) -> None:
        with pytest.raises(
            SpecError, match=r"top_tokens = 1024: designs are made for the 2048 tokens of deepseek-v3.2"
        ):
            scene_with(scene_of(), [("model.indexer.top_tokens", 1024)])
        assert scene_with(scene_of(), [("model", "glm-5.2")]).model == GLM

    def test_a_map_compares_with_the_resident_design_that_can_run(self) -> None:
        args = ["plan", "--model", "glm-5.2", "--set", "machine.tensor_parallel=8", "--machines", "h200", "--workers"]
        args += [
            1,
            "--set",
            "machine.attention_by=sequences",
            "--set",
            "model.max_positions=9000",
            "--designs",
            "resolve",
        ]
        args += ["--slo", "ttft_p95<60s", "--load", "fixed:1", "--input-tokens", 4096, "--output-tokens", 8]
        text = " ".join(run(*args, "--num-requests", 4).split())
        assert "mean E2E of the best of resolve over that of resident-sparse" in text
        assert "only: resident-sparse does not keep up" in text
        assert "*" not in text

    def test_models_of_both_kinds_are_not_explored_together(self) -> None:
        with pytest.raises(SpecError, match="model = llama-3-8b: with an indexer, or without"):
            scene_with(scene_of(), [("model", "llama-3-8b")])
