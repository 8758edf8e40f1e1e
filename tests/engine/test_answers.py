"""The findings of docs/answers.md, measured again in a reduced form on the real model, with generous bounds."""

from __future__ import annotations

import math

import pytest

from clo import presets
from clo.engine.answers.controls import Contender, controls_of
from clo.engine.answers.evaluate import evaluate
from clo.engine.answers.quality import Quality, paired
from clo.engine.answers.tasks import EvaluationSettings
from clo.engine.models.loading import load_model
from clo.engine.models.network import Network
from clo.engine.texts import TEXTS

pytestmark = [pytest.mark.long, pytest.mark.model]
SETTINGS = EvaluationSettings(context_tokens=2048, num_texts=4, decoded_tokens=32, num_passkeys=0, seed=3)


def contender(name: str, base: str, **changes: object) -> Contender:
    return Contender(name=name, design=presets.load_design(base).with_fields(slot_budgets=1.0, **changes))


@pytest.fixture(scope="module")
def found() -> dict[str, Quality]:
    model, tokenizer = load_model("smollm2-135m")
    network = Network(model)
    clo = contender("clo", "clo")
    chosen = [
        clo,
        *controls_of(clo, network.spec),
        contender("exact", "resolve", selector="exact"),
        contender("resolve", "resolve"),
        contender("page min/max", "resolve", selector="page_minmax"),
        contender("page min/max of 8", "resolve", selector="page_minmax", page_size=8),
    ]
    qualities = evaluate(network, tokenizer, TEXTS["topics"](), chosen, SETTINGS)
    return {quality.design: quality for quality in qualities}


def worse_by(one: Quality, other: Quality) -> tuple[float, float]:
    return paired([a - b for a, b in zip(one.delta_nll_by_text, other.delta_nll_by_text, strict=True)])


def test_an_exact_selection_of_a_tenth_costs_almost_nothing(found: dict[str, Quality]) -> None:
    exact = found["exact"]
    assert abs(exact.delta_nll) < 0.03 + 3 * exact.delta_nll_se
    assert exact.mass_recalled > found["page min/max"].mass_recalled


def test_four_bits_select_almost_as_exact_keys_do_and_better_than_page_bounds(found: dict[str, Quality]) -> None:
    assert found["resolve"].output_error < 1.1 * found["exact"].output_error
    assert found["resolve"].output_error < found["page min/max of 8"].output_error < found["page min/max"].output_error


def test_the_gate_beats_a_clock_that_selects_as_often(found: dict[str, Quality]) -> None:
    gate, clock = found["clo"], found["clo, by clock"]
    assert math.isclose(gate.selections_per_head, clock.selections_per_head, rel_tol=0.1)
    assert gate.output_error < clock.output_error


def test_sinks_and_window_alone_are_much_worse(found: dict[str, Quality]) -> None:
    alone, clo = found["sinks and window only"], found["clo"]
    mean, error = worse_by(alone, clo)
    # four texts, and every Python has others: some need little of what is far
    assert mean > error
    assert alone.output_error is not None
    assert clo.output_error is not None
    assert alone.output_error > 3 * clo.output_error
    assert alone.mass_recalled < clo.mass_recalled


def test_reuse_moves_much_less_at_a_bounded_loss(found: dict[str, Quality]) -> None:
    clo, same_selector = found["clo"], found["resolve"]
    assert clo.h2d_bytes_per_step < 0.25 * clo.refetch_bytes_per_step
    assert clo.h2d_bytes_per_step < 0.75 * same_selector.h2d_bytes_per_step
    mean, error = worse_by(clo, same_selector)
    assert mean < 0.1 + 3 * error
