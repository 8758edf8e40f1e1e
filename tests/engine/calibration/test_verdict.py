"""What a verdict says of known pairs of real and simulated runs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from clo.errors import SpecError
from clo_calibration.fingerprint import differences, fingerprint
from clo_calibration.verdict import Point, Verdict, markdown


def point(real: float, simulated: float, *, design: str = "a", fitted: bool = False, half: float = 0.1) -> Point:
    return Point(
        design=design,
        context_tokens=100,
        batch=1,
        budget_fraction=0.1,
        fitted=fitted,
        real_s=real,
        disturbed_s=real,
        simulated_s=simulated,
        low_s=simulated * (1 - half),
        high_s=simulated * (1 + half),
        hit_rate=0.5,
        differences=(),
        without={"nothing": simulated, "interference": simulated / 2},
        operations={},
        lanes={},
        stalls={},
    )


def verdict(*points: Point) -> Verdict:
    return Verdict(
        profile="p",
        machine="m",
        model="x",
        date="2026-01-01",
        fingerprint={"cores": "2"},
        drift=0.01,
        rounds=2,
        calibrated_rounds=3,
        points=points,
    )


class TestVerdict:
    def test_by_hand(self) -> None:
        found = verdict(
            point(1.0, 1.05, design="a"),
            point(2.0, 1.8, design="b"),
            point(0.9, 1.2, design="c"),
            point(5.0, 50.0, design="d", fitted=True),
        )
        summary = found.summary()
        assert summary["tpot_error_median"] == pytest.approx(0.1)
        assert summary["tpot_error_worst"] == pytest.approx(1 / 3)
        assert summary["tpot_error_bias"] == pytest.approx((0.05 - 0.1 + 1 / 3) / 3)
        # a is chosen for its 1.05, c would have taken 0.9
        assert summary["regret"] == pytest.approx(1 / 0.9 - 1)
        # ranks: real c a b, simulated a c b
        assert summary["rank_correlation"] == pytest.approx(0.5)
        # 1.0 in 0.945 to 1.155, 2.0 beyond 1.98, 0.9 below 1.08
        assert summary["interval_coverage"] == pytest.approx(1 / 3)
        assert found.ablation()["interference"] == pytest.approx(0.475)

    def test_a_machine_at_half_its_speed_is_told_from_a_wrong_model(self) -> None:
        """Fitted runs take twice as long as when costs were fitted; the model says half of what others take now."""
        again = point(2.0, 1.0, design="f", fitted=True).model_copy(update={"calibrated_s": 1.0})
        summary = verdict(point(4.0, 2.0), point(6.0, 3.3, design="b"), again).summary()
        assert summary["slower_than_calibrated"] == pytest.approx(1.0)
        assert summary["tpot_error_median"] == pytest.approx(0.475)
        assert summary["tpot_error_median_at_this_speed"] == pytest.approx(0.05)

    def test_what_the_machine_does_not_repeat_is_a_yardstick(self) -> None:
        """Steps of 1 s that took 0.8, 1.0 and 1.3 s when costs were fitted; what was held out has no part in it."""
        again = [
            point(1.0, 1.0, design=name, fitted=True).model_copy(update={"calibrated_s": seconds})
            for name, seconds in (("a", 0.8), ("b", 1.0), ("c", 1.3))
        ]
        found = verdict(point(4.0, 2.0), *again)
        assert found.summary()["repeat_error_median"] == pytest.approx(0.2)
        assert found.summary()["repeat_error_p90"] == pytest.approx(0.28)
        assert "foretold by themselves, median; 90th percentile | 20.0%; 28.0% |" in markdown(found)
        alone = verdict(point(1.0, 1.1))
        assert math.isnan(alone.summary()["repeat_error_median"])
        assert "foretold" not in markdown(alone)

    def test_one_design_has_no_order_and_no_regret(self) -> None:
        summary = verdict(point(1.0, 1.1)).summary()
        assert np.isnan(summary["regret"])
        assert np.isnan(summary["rank_correlation"])
        assert summary["tpot_error_worst"] == pytest.approx(0.1)

    def test_a_size_at_which_all_are_equal_says_nothing_of_the_order(self) -> None:
        equal = [point(1.0, 1.1), point(1.0, 1.2, design="b")]
        other = [point(real, real, design=name) for name, real in (("a", 1.0), ("b", 2.0), ("c", 3.0))]
        larger = [one.model_copy(update={"batch": 2}) for one in other]
        assert verdict(*equal, *larger).summary()["rank_correlation"] == pytest.approx(1.0)

    def test_regret_is_that_of_the_worst_size(self) -> None:
        right = [point(1.0, 1.0), point(2.0, 2.0, design="b")]
        wrong = [point(1.0, 1.5, design="a"), point(1.2, 1.1, design="b")]
        for worse, better in ((wrong, right), (right, wrong)):
            other = [one.model_copy(update={"context_tokens": 200}) for one in better]
            assert verdict(*worse, *other).summary()["regret"] == pytest.approx(0.2)

    def test_text_names_every_run_and_json_loses_nothing(self) -> None:
        found = verdict(point(1.0, 1.05), point(2.0, 4.0, design="b"))
        assert "| b | 100 | 1 |" in markdown(found)
        assert "(outside)" in markdown(found)
        assert "the fastest of 2 rounds" in markdown(found)
        assert "fitted to the fastest of 3" in markdown(found)
        data = json.loads(found.model_dump_json())
        assert Verdict.parse(data) == found
        with pytest.raises(SpecError, match="schema_version"):
            Verdict.parse(data | {"schema_version": 9})

    def test_machines_differ_by_what_they_are_not_by_versions(self) -> None:
        here = fingerprint(torch.device("cpu"))
        assert differences(here, here | {"torch": "0"}) == []
        assert "processor is" in differences(here, here | {"processor": "abacus"})[0]
