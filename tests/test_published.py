"""The comparison with published figures: structure, and that the gain of head reuse grows with reuse."""

import re

import pytest

from clo_calibration import published


def test_gains_grow_with_reuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "CONTEXTS", (32768,))
    found = published.claims()
    assert len(found) == 5
    below_zero = []
    for claim in found[:3]:
        reused = [int(share) for share in re.findall(r"(\d+)% of sets kept", claim.ours)]
        gains = [int(gain) for gain in re.findall(r"over lru-cpu ([+-]\d+)%", claim.ours)]
        assert reused == sorted(reused)
        assert gains == sorted(gains)
        assert gains[1] > 0
        below_zero.append(gains[0] < 0)
    # on the slower link reusing half of the sets already pays, on the faster one it does not
    assert below_zero == [False, False, True]
    rates = [float(rate) for rate in re.findall(r"([\d.]+)%", found[3].ours)]
    assert rates == sorted(rates, reverse=True)
    assert published.table(found).count("\n") == 6
