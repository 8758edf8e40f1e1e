"""What an indexer of blocks takes, fitted from attention blocks that were timed whole: known costs are found again."""

from __future__ import annotations

import numpy as np
import pytest
from fitted_costs import assert_same
from hypothesis import given
from hypothesis import strategies as st
from needs import needs_measurements

from clo import presets
from clo.kernel_tables import DecodeAttentionTable, GemmTable
from clo.profile import Profile
from clo_calibration.tables import measurements
from clo_calibration.tables.block_indexer import (
    KEY_BYTES,
    attention_cost,
    block_indexer_costs,
    decode_cost,
    score_cost,
)
from clo_calibration.tables.measurements import Samples

BANDWIDTH, RATE = 4e12, 1e15
H200 = presets.load_named_profile("h200")


def samples(points: list[tuple[float, ...]], seconds: list[float]) -> Samples:
    labels = {"kernels": ("fast",), "framework_version": "vllm 1"}
    return Samples(points=np.array(points), seconds=np.array(seconds), labels=labels)


def tables() -> tuple[GemmTable, DecodeAttentionTable]:
    assert H200.gemm is not None
    assert H200.decode_attention is not None
    return H200.gemm, H200.decode_attention


def projections_s(rows: float, heads: float) -> float:
    """Of a part with `heads` of 64 query heads: 4 KV heads and 4 of the indexer, and the key, dealt out."""
    gemm, _ = tables()
    width = (heads + 3 * heads / 16 + 1) * 128
    return float(gemm.seconds(rows, width, 6144) + gemm.seconds(rows, 6144, heads * 128))


@given(
    per_token_s=st.floats(1e-11, 1e-9),
    efficiency=st.floats(0.1, 1.0),
    latency_s=st.floats(1e-6, 1e-4),
)
def test_known_costs_of_a_decode_step_are_found_again(per_token_s: float, efficiency: float, latency_s: float) -> None:
    _, attention = tables()
    points, seconds = [], []
    for batch in (1.0, 8.0, 64.0):
        for heads in (16.0, 32.0, 64.0):
            for before in (255.0, 2049.0, 4095.0, 65535.0, 131071.0):
                others = projections_s(batch, heads) + float(attention.seconds(batch, heads, heads / 16, 128, 2048))
                scan = before * per_token_s + batch * before * KEY_BYTES / (efficiency * BANDWIDTH)
                points.append((batch, heads, 1.0, before))
                seconds.append(others + latency_s + scan)
    cost = decode_cost(samples(points, seconds), *tables(), BANDWIDTH)
    assert cost.efficiency == pytest.approx(efficiency, rel=2e-3)
    assert cost.per_token_s == pytest.approx(per_token_s, rel=1e-3)
    assert cost.latency_s == pytest.approx(latency_s, rel=1e-2)
    assert cost.spread == pytest.approx(0.0, abs=1e-3)


def pairs_before(batch: float, new: float, before: float) -> float:
    return batch * sum(before + token + 0.5 for token in range(int(new)))


def chosen_pairs(batch: float, new: float, before: float) -> float:
    return batch * sum(min(before + token + 0.5, 2048.0) for token in range(int(new)))


@given(scores=st.floats(0.05, 1.0), attended=st.floats(0.02, 1.0))
def test_known_shares_of_prefill_are_found_again(scores: float, attended: float) -> None:
    points, seconds = [], []
    for batch, new in ((1.0, 4096.0), (2.0, 8192.0)):
        for heads in (16.0, 64.0):
            for before in (0.0, 4096.0, 65536.0, 1e6):
                scored = 2 * 128 * heads / 16 * pairs_before(batch, new, before) / (scores * RATE)
                attention = 4 * 128 * heads * chosen_pairs(batch, new, before) / (attended * RATE)
                points.append((batch, heads, new, before))
                seconds.append(projections_s(batch * new, heads) + scored + attention)
    timed = samples(points, seconds)
    found = score_cost(timed, RATE)
    assert found.efficiency == pytest.approx(scores, rel=1e-3)
    assert attention_cost(timed, tables()[0], found, RATE).efficiency == pytest.approx(attended, rel=2e-2)


def test_heads_that_the_model_does_not_have_do_not_count() -> None:
    points = [(1.0, heads, 4096.0, before) for heads in (8.0, 64.0, 128.0) for before in (4096.0, 1e6)]
    assert score_cost(samples(points, [0.01, 0.02] * 3), RATE).samples == 1


@needs_measurements
@pytest.mark.parametrize("gpu", list(measurements.GPUS))
def test_shipped_costs_are_those_of_the_measurements(gpu: str) -> None:
    profile = presets.load_named_profile(gpu)
    assert profile.gemm is not None
    assert profile.decode_attention is not None
    found = block_indexer_costs(gpu, {"gemm": profile.gemm, "decode_attention": profile.decode_attention})
    for name in ("block_indexer", "prefill_block_indexer", "prefill_block_attention"):
        assert_same(getattr(profile, name), found.get(name, Profile.model_fields[name].default))
    assert len(found) == {"a100": 0, "l40s": 1, "rtx-pro-6000": 1}.get(gpu, 3)
