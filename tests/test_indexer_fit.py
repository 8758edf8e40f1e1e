"""What an indexer takes, fitted from blocks that were timed whole: known costs are found again."""

from __future__ import annotations

import numpy as np
import pytest
from fitted_costs import assert_same
from hypothesis import given
from hypothesis import strategies as st
from needs import needs_measurements

from clo import presets
from clo.profile import INDEXER, Source
from clo_calibration.tables import measurements
from clo_calibration.tables.indexer import KEY_BYTES, decode_cost, indexer_costs, prefill_cost
from clo_calibration.tables.measurements import Samples

LABELS = {"kernels": ("fast",), "framework_version": "vllm 1"}
BANDWIDTH = 4e12


def samples(points: list[tuple[float, ...]], seconds: list[float]) -> Samples:
    return Samples(points=np.array(points), seconds=np.array(seconds), labels=LABELS)


def scan_s(batch: float, tokens: float, per_token_s: float, efficiency: float) -> float:
    return tokens * per_token_s + batch * tokens * KEY_BYTES / (efficiency * BANDWIDTH)


@given(
    per_token_s=st.floats(1e-11, 1e-9),
    efficiency=st.floats(0.1, 1.0),
    latency_s=st.floats(1e-6, 1e-3),
    ranking_s=st.floats(0.0, 1e-5),
)
def test_known_costs_are_found_again(per_token_s: float, efficiency: float, latency_s: float, ranking_s: float) -> None:
    more = [(batch, tokens) for batch in (1.0, 8.0, 64.0) for tokens in (4096.0, 32768.0, 131072.0)]
    scans = samples(more, [ranking_s + scan_s(*point, per_token_s, efficiency) for point in more])
    blocks = [(batch, 64.0, tokens) for batch, tokens in more]
    beside = samples(blocks, [latency_s + scan_s(*point, per_token_s, efficiency) for point in more])
    cost = decode_cost(scans, beside, BANDWIDTH)
    assert cost.efficiency == pytest.approx(efficiency, rel=2e-3)
    assert cost.per_token_s == pytest.approx(per_token_s, rel=1e-3)
    assert cost.latency_s == pytest.approx(latency_s, rel=1e-3)
    assert (cost.samples, cost.spread) == (18, pytest.approx(0.0, abs=1e-3))


@pytest.mark.parametrize(
    ("most", "pairs"),
    # each of 8,192 new tokens scores all before it and half of itself, or attends to 2,048
    [(None, 8192 * (16384 + 4096)), (2048, 8192 * 2048)],
)
def test_the_median_share_of_prefill(most: int | None, pairs: int) -> None:
    shares = [0.3, 0.5, 0.6]
    timed = samples([(1.0, 8192.0, 16384.0)] * 3, [pairs * 1e6 / (share * 1e15) for share in shares])
    cost = prefill_cost(timed, 1e6, most, 1e15)
    assert (cost.efficiency, cost.samples, cost.source) == (0.5, 3, Source.AICONFIGURATOR)


def test_small_work_does_not_count() -> None:
    timed = samples([(1.0, 8192.0, 4096.0), (1.0, 64.0, 4096.0), (1.0, 8192.0, 0.0)], [1.0, 1.0, 1.0])
    assert prefill_cost(timed, 1e7, 2048, 1e15).samples == 1


@needs_measurements
@pytest.mark.parametrize("gpu", list(measurements.GPUS))
def test_shipped_costs_are_those_of_the_measurements(gpu: str) -> None:
    profile, found = presets.load_named_profile(gpu), indexer_costs(gpu)
    assert_same(profile.indexer, found.get("indexer", INDEXER))
    for name in ("prefill_indexer", "prefill_chosen_attention"):
        assert_same(getattr(profile, name), found.get(name, getattr(profile, name)))
    assert bool(found) == (gpu in ("gb200", "b200", "h200", "h100"))
