"""What a design needs of either memory: worked out by hand, and refused where there is too little."""

from __future__ import annotations

import pytest
from scenes import scene_of
from tiny import random_trace, tiny_design, tiny_scene

from clo import presets
from clo.errors import SpecError


class TestPlan:
    """Rules that need more than one record."""

    def test_a_budget_larger_than_the_context(self) -> None:
        scene = tiny_scene(random_trace(0))
        with pytest.raises(SpecError, match=r"design\.budget_pages = 99: the context holds only 16 pages"):
            scene.plan(tiny_design(99, slot_pages=None))

    def test_slots_below_the_budget(self) -> None:
        scene = tiny_scene(random_trace(0))
        with pytest.raises(SpecError, match=r"design\.slot_pages = 3: must hold at least the budget of 4 pages"):
            scene.plan(tiny_design(4, slot_pages=3))

    def test_a_context_beyond_the_models_positions(self) -> None:
        scene = scene_of("smollm2-135m", context_tokens=10_000)
        with pytest.raises(SpecError, match=r"workload\.context_tokens = 10000: smollm2-135m accepts at most 8192"):
            scene.plan(presets.load_design("clo"))

    def test_a_model_that_fits_no_memory(self) -> None:
        scene = scene_of("llama-3-70b", context_tokens=4096, batch=1)
        with pytest.raises(SpecError, match=r"weights take 141 GB .*machine\.gpu\.memory_bytes"):
            scene.plan(presets.load_design("clo"))

    def test_kv_that_does_not_fit_says_how_much_is_missing_and_what_to_change(self) -> None:
        scene = scene_of(context_tokens=131072, batch=16)
        with pytest.raises(SpecError, match=r"needs 275 GB of device memory, h200 has 121 GB left for KV: offload"):
            scene.plan(presets.load_design("resident"))
        with pytest.raises(SpecError, match=r"lower design\.budget_fraction"):
            scene.plan(presets.load_design("clo").with_fields(dense_layers=16))

    def test_host_memory_runs_out_too(self) -> None:
        scene = scene_of(context_tokens=600_000, batch=16)
        with pytest.raises(SpecError, match=r"machine\.host\.memory_bytes"):
            scene.plan(presets.load_design("streamed"))

    @pytest.mark.parametrize(("context", "pages"), [(100, 7), (1024, 16), (2560, 16), (2720, 17), (131072, 819)])
    def test_a_budget_by_share_has_a_least_that_a_short_context_may_not_hold(self, context: int, pages: int) -> None:
        design = presets.load_design("clo").with_fields(min_budget_pages=16)
        assert scene_of(context_tokens=context, batch=1).plan(design).budget_pages == pages
        fixed = design.with_fields(budget_pages=3)
        assert scene_of(context_tokens=context, batch=1).plan(fixed).budget_pages == 3

    def test_memory_of_the_main_job_by_hand(self) -> None:
        plan = scene_of(context_tokens=131072, batch=16).plan(presets.load_design("clo"))
        sequence = 131072 * 32 * 8 * 2 * 128 * 2
        assert plan.model.kv_bytes_per_token == 131072
        assert plan.memory.dense_layers == 16 * sequence * 2 / 32
        # 4-bit keys: 64 bytes and a step and an offset of two bytes each, for every token of 512 bytes
        assert plan.memory.index == 16 * sequence * 30 / 32 * 68 / 512
        assert plan.budget_pages == 819
        assert plan.page_bytes == 16 * 512
        assert plan.memory.weights == pytest.approx(16.06e9, rel=0.001)
        assert plan.host_bytes == 16 * sequence * 30 / 32
        # attention reads budget, sinks and window
        assert plan.attended_tokens == 819 * 16 + 4 + 64

    @pytest.mark.parametrize(
        ("selector", "share"),
        [
            # of the 512 bytes a token takes: its key (256), two vectors a page, one vector a page, 128 codes of half
            # a byte with a step and an offset, 128 bits
            ("exact", 1 / 2),
            ("page_minmax", 1 / 16),
            ("page_mean", 1 / 32),
            ("key_4bit", 68 / 512),
            ("sign_hash", 1 / 32),
        ],
    )
    def test_the_index_by_hand(self, selector: str, share: float) -> None:
        scene = scene_of(context_tokens=16384, batch=1)
        design = presets.load_design("clo").with_fields(selector=selector, dense_layers=0, slot_budgets=1)
        plan = scene.plan(design)
        assert plan.memory.index == pytest.approx(16384 * 131072 * share)
        assert plan.index_bytes_per_head == pytest.approx(16384 * 512 * share)

    def test_pinned_heads_window_and_slots_by_hand(self) -> None:
        scene = scene_of(context_tokens=16384, batch=2)
        design = presets.load_design("clo").with_fields(pinned_head_fraction=0.25, slot_budgets=2)
        memory = scene.plan(design).memory
        # two of eight heads of 30 layers are pinned: their 16384 tokens of 512 bytes, two sequences
        assert memory.pinned_heads == 30 * 2 * 2 * 16384 * 512
        # the other six keep sinks, window and the page between them, an index, and 2 x 102 slots of 16 tokens
        heads = 30 * 6 * 2
        assert memory.window == heads * (4 + 64 + 16) * 512
        assert memory.index == heads * 16384 * (64 + 4)
        assert memory.slots == heads * 204 * 16 * 512
        assert memory.kv == memory.dense_layers + memory.pinned_heads + memory.window + memory.index + memory.slots
        assert memory.total == memory.kv + memory.weights + 4e9

    def test_without_a_cache_layers_share_their_buffers(self) -> None:
        scene = scene_of(context_tokens=16384, batch=1)
        one, two, three = (
            scene.plan(presets.load_design("staged").with_fields(prefetch_depth=depth)).memory.slots
            for depth in (0, 1, 2)
        )
        assert one == 8 * 102 * 16 * 512
        assert (two, three) == (2 * one, 3 * one)

    @pytest.mark.parametrize("name", [name for name in presets.names("designs") if "resident" not in name])
    def test_designs_compete_for_equal_memory(self, name: str) -> None:
        scene = scene_of(context_tokens=131072, batch=16)
        plan = scene.plan(presets.load_design(name))
        free = scene.machine.gpu.memory_bytes - scene.machine.reserve_bytes - scene.model.weight_bytes
        assert plan.memory.kv <= free
        if plan.design.cache in ("lru", "head_reuse") and plan.design.on_miss == "diff":
            one_more_row = 30 * 8 * 16 * plan.page_bytes
            assert plan.memory.kv + one_more_row > free

    def test_a_cap_on_kv_memory(self) -> None:
        full, capped = (scene_of(kv_memory_bytes=cap) for cap in (None, 80e9))
        design = presets.load_design("clo")
        assert capped.plan(design).memory.kv <= 80e9
        assert capped.plan(design).slot_pages < full.plan(design).slot_pages
