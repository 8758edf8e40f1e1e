"""Caches in fp8: half the bytes, and attention by kernels that were timed over such caches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import clo_sim
from clo import presets
from clo.kernel_tables import DecodeAttentionTable, LatentAttentionTable
from clo.schedule.work import DecodeAttention, LatentAttention
from clo.table_prices import TablePrices
from clo_sim.run import simulate

RATES = {"hbm_bytes_per_s": 1e12, "flops_per_s": 1e15}
ATTENTION = DecodeAttention(16, 8192, 32, 8, 128, 1.0)
VECTORS = LatentAttention(16, 8192, 128, 512, 64, 1.0)


def prices(name: str = "h200", **tables: Any) -> TablePrices:
    profile = presets.load_named_profile(name).model_copy(update=tables)
    return TablePrices(profile, presets.load_machine(name))


def scene_of(model: str, machine: str = "h200", width: float = 1.0) -> Any:
    spec = presets.load_model(model).with_fields(kv_bytes_per_value=width)
    return clo_sim.make_scene(spec, machine, context_tokens=16384, batch=4)


@pytest.mark.parametrize("work", [ATTENTION, VECTORS], ids=["heads", "latent"])
class TestPrices:
    @staticmethod
    def tables(work: Any) -> tuple[str, str]:
        kind = "decode_attention" if isinstance(work, DecodeAttention) else "latent_attention"
        return kind, f"{kind}_fp8"

    def test_times_are_those_of_fp8_caches(self, work: Any) -> None:
        wide, narrow = (getattr(prices().profile, name) for name in self.tables(work))
        assert prices().table(work) == narrow
        assert prices().table(replace(work, kv_bytes_per_value=2.0)) == wide
        assert (wide.kv_bytes, narrow.kv_bytes) == (2.0, 1.0)
        sizes = {name: getattr(work, name) for name in narrow.ARGUMENTS}
        assert prices().seconds(work) == narrow.seconds(**sizes)
        assert prices().seconds(work) < prices().seconds(replace(work, kv_bytes_per_value=2.0))

    def test_without_them_those_of_bf16_for_as_many_bytes(self, work: Any) -> None:
        without = prices(**{self.tables(work)[1]: None})
        half = replace(work, kv_tokens=work.kv_tokens // 2, kv_bytes_per_value=2.0)
        assert without.seconds(work) == without.seconds(half)

    @given(st.sampled_from([1.125, 1.5]))
    def test_widths_between_take_those_of_fp8(self, work: Any, width: float) -> None:
        as_many = replace(work, kv_tokens=int(work.kv_tokens * width), kv_bytes_per_value=1.0)
        assert prices().seconds(replace(work, kv_bytes_per_value=width)) == pytest.approx(prices().seconds(as_many))

    @given(st.sampled_from([0.5, 0.75, 4.0]))
    def test_other_widths_take_those_of_bf16(self, work: Any, width: float) -> None:
        as_many = replace(work, kv_tokens=int(work.kv_tokens * width / 2), kv_bytes_per_value=2.0)
        assert prices().seconds(replace(work, kv_bytes_per_value=width)) == pytest.approx(prices().seconds(as_many))


class TestRoofline:
    def test_keys_and_values_take_a_byte_each_and_the_rest_two(self) -> None:
        axes = dict.fromkeys(DecodeAttentionTable.ARGUMENTS, (1.0,))
        table = DecodeAttentionTable.from_latencies([[[[[1.0]]]]], **axes, **RATES, kv_bytes=1.0)
        num_bytes = 2 * 3 * 128 * 8 * 1000 + 2 * 2 * 3 * 128 * 32
        assert table.roofline_seconds(3, 32, 8, 128, 1000) == pytest.approx(num_bytes / 1e12)

    def test_vectors_take_a_byte_a_value(self) -> None:
        axes = dict.fromkeys(LatentAttentionTable.ARGUMENTS, (1.0,))
        table = LatentAttentionTable.from_latencies([[[1.0]]], **axes, **RATES, kv_bytes=1.0)
        num_bytes = 3 * (576 * 1000 + 2 * 16 * (576 + 512))
        assert table.roofline_seconds(3, 16, 1000) == pytest.approx(num_bytes / 1e12)


class TestStep:
    @pytest.mark.parametrize("model", ["llama-3-8b", "deepseek-v2-lite"])
    def test_attention_is_measured_and_nothing_needs_saying(self, model: str) -> None:
        result = simulate(scene_of(model), "resident")
        assert result.ops["attention"].source == "aiconfigurator"
        assert not any("a cache of" in note for note in result.assumptions)

    @pytest.mark.parametrize(
        ("model", "machine", "width", "timed"),
        [
            ("llama-3-8b", "a100", 1.0, "bf16"),
            ("deepseek-v2-lite", "l40s", 1.0, "bf16"),
            ("llama-3-8b", "h200", 0.5, "bf16"),
            ("llama-3-8b", "h200", 1.5, "fp8"),
            ("deepseek-v2-lite", "h200", 1.5, "fp8"),
        ],
    )
    def test_what_was_not_timed_is_said(self, model: str, machine: str, width: float, timed: str) -> None:
        result = simulate(scene_of(model, machine, width), "resident")
        expected = f"attention over a cache of {width:g} bytes a value takes as long as over as many bytes of {timed}"
        assert expected in result.assumptions
        assert result.ops["attention"].source == "assumed"
        assert result.ops["out_proj"].source == "aiconfigurator"

    def test_a_bf16_cache_is_what_tables_hold(self) -> None:
        assert not any("a cache of" in note for note in simulate(scene_of("llama-3-8b", width=2.0), "clo").assumptions)
