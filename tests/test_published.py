"""The comparison with published figures: structure, and that the gain of head reuse grows with reuse."""

import re

import pytest

from clo_calibration import published, served_steps


def test_gains_grow_with_reuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "CONTEXTS", (32768,))
    found = published.claims()
    assert len(found) == 13
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
    steps = found[5 : 5 + len(served_steps.SERVED)]
    assert all(re.search(r"theirs are [\d.]+ to [\d.]+ times as long", claim.ours) for claim in steps)
    assert published.table(found).count("\n") == 14


@pytest.mark.parametrize(
    ("what", "least", "most"),
    [
        ("gpt-oss-120b", 0.9, 1.15),
        ("DeepSeek-R1", 0.9, 1.2),
        ("MiniMax-M3", 0.95, 2.2),  # on B200 theirs ran a slow kernel, and say so
        ("GLM-5", 1.3, 1.6),
        ("Qwen3.5", 0.75, 1.1),
        ("Qwen3-Next", 1.05, 1.35),
    ],
)
def test_steps_of_engines_are_about_as_long_as_simulated(what: str, least: float, most: float) -> None:
    """To none of which anything was fitted."""
    run = next(run for run in served_steps.SERVED if run.what.startswith(what))
    ratios = [step.tpot_s / step.simulated_s() for step in run.steps]
    assert all(least < ratio < most for ratio in ratios)


def test_a_long_prompt_of_theirs_is_about_as_long_as_simulated() -> None:
    first, _ = served_steps.PROMPTS
    assert first.simulated_s() == pytest.approx(first.ttft_s, rel=0.1)
