"""The comparison with published figures: structure, and that the gain of head reuse grows with reuse."""

import re

import pytest

from clo_calibration import published


def test_gains_grow_with_reuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "CONTEXTS", (32768,))
    found = published.claims()
    assert len(found) == 11
    below_zero = []
    for claim in found[:3]:
        reused = [int(share) for share in re.findall(r"(\d+)% of sets kept", claim.ours)]
        gains = [int(gain) for gain in re.findall(r"over lru-cpu ([+-]\d+)%", claim.ours)]
        assert reused == sorted(reused)
        assert gains == sorted(gains)
        assert gains[1] > 0
        below_zero.append(gains[0] < 0)
    # at this context reusing half of the sets already pays
    assert not any(below_zero)
    for at_context in found[3].ours.split("; "):
        rates = [float(rate) for rate in re.findall(r"([\d.]+)%", at_context)]
        assert len(rates) == 3
        assert rates == sorted(rates, reverse=True)
    # keeping everything is faster while it fits, and fewer sequences fit
    few, many = (float(gain) for gain in re.findall(r"([\d.]+) times with", found[4].ours))
    assert few < 1 < many
    # a sum of kernels that were timed alone is no more than the step of an engine that launches others, too
    theirs, ours = ([float(ms) for ms in re.findall(r"([\d.]+) ms", text)] for text in (found[5].theirs, found[5].ours))
    assert all(0.5 * real < simulated < real for simulated, real in zip(ours, theirs, strict=True))
    # a model that chooses blocks: its step on H200, and a prompt of 131,072 tokens, to which nothing was fitted
    first = [[float(re.findall(r"[\d.]+", text)[0]) for text in (each.theirs, each.ours)] for each in found[6:8]]
    assert all(simulated == pytest.approx(real, rel=0.1) for real, simulated in first)
    # steps of hybrid models, to which nothing was fitted either
    for claim in found[8:10]:
        theirs, ours = ([float(ms) for ms in re.findall(r"([\d.]+) ms", text)] for text in (claim.theirs, claim.ours))
        assert len(ours) == len(theirs) > 2
        assert all(0.7 * real < simulated < 1.3 * real for simulated, real in zip(ours, theirs, strict=True))
    assert published.table(found).count("\n") == 12
