"""Pages in 8 bits in plans, prices and services: bytes by hand, and everything else as without."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scenes import scene_of
from toy_service import trace_of

import clo_sim
from clo import presets
from clo.errors import SpecError
from clo.placement import CODED_BYTES_PER_VALUE, STEP_VALUES
from clo.schedule.ops import StepOps
from clo.schedule.work import DecodeAttention, LatentAttention
from clo.specs import Design, PageCoding, Workload
from clo.table_prices import TablePrices
from clo_kernels import coded_pages
from clo_sim.serving import worker_costs
from clo_sim.worth import worth_of_choices

SHARE = 1.125 / 2
SCENE = scene_of(workload=Workload(context_tokens=16384, batch=2, steps=12))


def pair(name: str = "clo", **changes: Any) -> tuple[Design, Design]:
    """A design with pages as computed, and coded."""
    chosen = presets.load_design(name).with_fields(**changes)
    return chosen, chosen.with_fields(page_coding="int8")


@given(st.integers(1, 40).map(lambda groups: groups * STEP_VALUES))
def test_planned_bytes_are_those_that_rows_have(head_dim: int) -> None:
    assert coded_pages.STEP_VALUES == STEP_VALUES
    assert coded_pages.coded_width(head_dim) == head_dim * CODED_BYTES_PER_VALUE[PageCoding.INT8]


class TestPlan:
    def test_bytes_by_hand(self) -> None:
        plain, coded = (SCENE.plan(each) for each in pair(slot_budgets=1.0))
        assert plain.page_bytes == 2 * 16 * 128 * 2
        assert coded.page_bytes == 2 * 16 * (128 + 8 * 2)
        assert coded.memory.slots == plain.memory.slots * SHARE
        assert coded.host_bytes == plain.host_bytes * SHARE
        for part in ("weights", "window", "dense_layers", "pinned_heads", "index"):
            assert getattr(coded.memory, part) == getattr(plain.memory, part)
        # 102 pages, four sinks, and the window: 64 tokens
        attended = 102 * 16 + 68
        assert coded.attended_tokens == plain.attended_tokens == attended
        assert coded.attended_bytes_per_value == pytest.approx((102 * 16 * 1.125 + 68 * 2) / attended)

    def test_more_of_them_fit_the_same_memory(self) -> None:
        crowded = scene_of(workload=Workload(context_tokens=131072, batch=16, steps=4))
        plain, coded = (crowded.plan(each).slot_pages for each in pair())
        assert coded == pytest.approx(plain / SHARE, abs=2)

    def test_latent_vectors_are_coded_once(self) -> None:
        scene = scene_of("deepseek-v2-lite", workload=Workload(context_tokens=16384, batch=2))
        plain, coded = (scene.plan(each) for each in pair(slot_budgets=1.0))
        assert plain.page_bytes == 16 * 576 * 2
        assert coded.page_bytes == 16 * (576 + 36 * 2)

    def test_a_cache_of_one_byte_has_nothing_to_gain(self) -> None:
        narrow = presets.load_model("llama-3-8b").with_fields(kv_bytes_per_value=1.0)
        with pytest.raises(SpecError, match=r"design\.page_coding = int8: coded pages take 1\.125 bytes a value"):
            scene_of(narrow).plan(pair()[1])

    def test_heads_that_do_not_group(self) -> None:
        odd = presets.load_model("llama-3-8b").with_fields(head_dim=120)
        with pytest.raises(SpecError, match=r"model\.head_dim = 120 is no multiple of the 16 values"):
            scene_of(odd).plan(pair()[1])

    @pytest.mark.parametrize("name", ["resident", "streamed"])
    def test_full_attention_has_no_slots(self, name: str) -> None:
        with pytest.raises((SpecError, ValidationError), match="page_coding must be none, not int8"):
            presets.load_design(name).with_fields(page_coding="int8")


class TestPrices:
    @pytest.mark.parametrize("model", ["llama-3-8b", "deepseek-v2-lite"])
    def test_attention_is_priced_by_bytes_of_fp8_caches(self, model: str) -> None:
        scene = scene_of(model, workload=Workload(context_tokens=65536, batch=4))
        plan = scene.plan(pair(slot_budgets=1.0)[1])
        work = StepOps(plan).attention(5).work
        assert isinstance(work, DecodeAttention | LatentAttention)
        assert work.kv_bytes_per_value == plan.attended_bytes_per_value
        prices = TablePrices(scene.profile, scene.machine)
        narrow = replace(work, kv_bytes_per_value=1.0)
        assert prices.table(work) == prices.table(narrow)
        assert prices.table(work).kv_bytes == 1.0
        assert not prices.measured_here(work)
        assert prices.measured_here(narrow)
        assert prices.seconds(work) > prices.seconds(narrow)

    @pytest.mark.parametrize("name", ["clo", "resolve", "clo-v1", "lru-cpu", "staged", "recall"])
    def test_the_same_pages_are_moved_in_fewer_bytes(self, name: str) -> None:
        changes = {"slot_budgets": None if name in ("staged",) else 1.5}
        plain, coded = (clo_sim.simulate(SCENE, each) for each in pair(name, **changes))
        assert coded.hit_rate == plain.hit_rate
        assert coded.overlap == plain.overlap
        assert coded.h2d_bytes_per_step == pytest.approx(plain.h2d_bytes_per_step * SHARE)
        assert coded.d2h_bytes_per_step == pytest.approx(plain.d2h_bytes_per_step * SHARE)
        assert coded.roofline.h2d_bytes == pytest.approx(plain.roofline.h2d_bytes * SHARE)
        assert coded.roofline.seconds <= coded.tpot_s
        assert [line for line in coded.assumptions if "int8 pages" in line]
        assert not [line for line in plain.assumptions if "int8 pages" in line]

    def test_where_the_link_rules_steps_are_as_much_faster(self) -> None:
        link = SCENE.machine.link.with_fields(h2d_bytes_per_s=1e9)
        slow = replace(SCENE, machine=SCENE.machine.with_fields(link=link))
        plain, coded = (clo_sim.simulate(slow, each).tpot_s for each in pair("resolve", slot_budgets=1.0))
        assert coded / plain == pytest.approx(SHARE, rel=0.05)

    def test_bytes_of_attention_in_the_roofline_by_hand(self) -> None:
        plain, coded = (clo_sim.simulate(SCENE, each).roofline for each in pair(slot_budgets=1.0))
        pages = 2 * 30 * 8 * (102 * 16)  # sequences, layers, KV heads, tokens in pages
        assert plain.hbm_bytes - coded.hbm_bytes == pytest.approx(pages * 2 * 128 * (2 - 1.125))

    def test_the_choice_is_priced_and_said_to_change_answers(self) -> None:
        found = worth_of_choices(SCENE, clo_sim.simulate(SCENE, "clo"), {"page_coding": ("none", "int8")})
        (row,) = found.alternatives
        assert (row.chosen, row.value) == ("none", "int8")
        assert row.tpot_s is not None
        assert row.note.startswith("changes the answers")
        assert row.note.endswith("attention to them was not timed")


class TestServices:
    def test_prompts_and_memory(self) -> None:
        scene, trace = scene_of(), trace_of([(0, 65536, 10)])
        plain, coded = (worker_costs(scene, each, trace, keeps_prefixes=True) for each in pair(slot_budgets=1.0))
        # two of 32 layers are dense: they are not paged
        whole = (2 + 30 * SHARE) / 32
        assert coded.prefill.in_ns == pytest.approx(plain.prefill.in_ns * SHARE)
        assert coded.prefill.out_ns == pytest.approx(plain.prefill.out_ns * whole)
        assert coded.prefill.cached_in_ns == pytest.approx(plain.prefill.cached_in_ns)
        assert coded.block_bytes == pytest.approx(plain.block_bytes * whole, abs=1)
        assert coded.need.host_per_token == pytest.approx(plain.need.host_per_token * SHARE, rel=1e-3)

    def test_without_prefixes_only_pages_leave(self) -> None:
        scene, trace = scene_of(), trace_of([(0, 65536, 10)])
        plain, coded = (worker_costs(scene, each, trace).prefill for each in pair(slot_budgets=1.0))
        assert coded.out_ns == pytest.approx(plain.out_ns * SHARE)
