"""Answer quality against computations by hand, and head statistics against a plain loop."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import GROUP, KV_HEADS, LAYERS, PAGE, VOCABULARY, WINDOW, dense_logits, design, prompt, small_model

from clo import presets
from clo.engine.answers.controls import Contender, controls_of
from clo.engine.answers.evaluate import BASELINE, _agreement, _answers, evaluate
from clo.engine.answers.fidelity import Fidelity, against_full, whole_cache
from clo.engine.answers.quality import Quality
from clo.engine.answers.tasks import EvaluationSettings, Passkey
from clo.engine.decoder import Decoder
from clo.engine.heads import HeadProfile, head_profile, heads_for, measure_heads
from clo.engine.inline_decoder import InlineDecoder, Observed
from clo.engine.models.network import Network
from clo.engine.prompts import read_prompt
from clo.engine.texts import TEXTS, Split, docstrings
from clo.errors import EngineError, SpecError
from clo.specs import GqaFold
from clo_kernels.layout import window_start

SETTINGS = EvaluationSettings(
    context_tokens=70, num_texts=2, decoded_tokens=20, num_passkeys=2, split=Split.ALL, batch_texts=1, seed=1
)


class Characters:
    """A tokenizer of one token a character."""

    def __call__(self, text: str, **_options: Any) -> Any:
        class Encoded:
            input_ids = torch.tensor([[ord(letter) % VOCABULARY for letter in text]])

        return Encoded()


def text(length: int = 600) -> str:
    return "".join(chr(97 + int(token) % 26) for token in prompt(length, 5))


def judge(contenders: list[Contender], settings: EvaluationSettings = SETTINGS, words: str = "") -> list[Quality]:
    return evaluate(Network(small_model()), Characters(), words or text(), contenders, settings)


def named(name: str, **changes: Any) -> Contender:
    return Contender(name=name, design=design(name, **changes))


class TestEvaluate:
    def test_full_attention_differs_from_itself_in_nothing(self) -> None:
        resident, streamed, resolve = judge([BASELINE, named("streamed"), named("resolve", budget_pages=1)])
        assert (resident.delta_nll, resident.agreement, resident.h2d_bytes_per_step) == (0.0, 1.0, 0.0)
        assert streamed.delta_nll == pytest.approx(0.0, abs=1e-5)
        assert streamed.agreement == streamed.top1_agreement == 1.0
        assert streamed.h2d_bytes_per_step == streamed.refetch_bytes_per_step > 0
        assert abs(resolve.delta_nll) > 1e-4
        assert resolve.delta_nll == pytest.approx(resolve.nll - resident.nll)
        assert resolve.agreement < 1.0
        assert resolve.delta_nll_se > 0

    def test_the_loss_is_that_of_the_models_own_logits(self) -> None:
        model = small_model()
        words = text(90)
        settings = EvaluationSettings(
            context_tokens=70, num_texts=1, decoded_tokens=20, num_passkeys=0, split=Split.ALL, seed=1
        )
        (found,) = evaluate(Network(model), Characters(), words, [named("streamed")], settings)
        # the text has exactly the tokens that are needed: one place to read
        tokens = Characters()(words).input_ids[0]
        logits = dense_logits(model, tokens).double().log_softmax(-1)
        losses = [-float(logits[at - 1, tokens[at]]) for at in range(71, 90)]
        assert found.nll == pytest.approx(float(np.mean(losses)), rel=1e-5)
        assert found.passkey_rate is None
        assert math.isnan(found.delta_nll_se)
        assert found.as_record()["delta_nll_se"] is None

    @pytest.mark.parametrize("depth", [0, 1])
    def test_what_is_fetched_ahead_counts_as_fetched(self, depth: int) -> None:
        """All pages are of one size: the share that was moved is that of the bytes."""
        (found,) = judge([named("clo", budget_pages=2, tau=0.6, prefetch_depth=depth)])
        assert 0.0 < found.hit_rate < 1.0
        assert 1.0 - found.hit_rate == pytest.approx(found.h2d_bytes_per_step / found.refetch_bytes_per_step)

    def test_how_many_texts_are_decoded_together_changes_nothing(self) -> None:
        chosen = [named("clo", budget_pages=2), named("recall", budget_pages=2)]
        apart, together = (
            judge(chosen, dataclasses.replace(SETTINGS, num_texts=3, batch_texts=batch)) for batch in (1, 3)
        )
        for one, other in zip(apart, together, strict=True):
            assert one.delta_nll_by_text == pytest.approx(other.delta_nll_by_text, abs=1e-5)
            assert one.h2d_bytes_per_step == other.h2d_bytes_per_step
            assert (one.agreement, one.passkeys_found) == (other.agreement, other.passkeys_found)

    @pytest.mark.parametrize("tokens", [2, 3])
    def test_of_an_answer_of_few_tokens_the_last_step_counts(self, tokens: int) -> None:
        """The first token follows from the prompt: two tokens are one step, and that must not be warm-up alone."""
        (found,) = judge([named("staged", budget_pages=2)], dataclasses.replace(SETTINGS, decoded_tokens=tokens))
        texts, fed_and_generated = SETTINGS.num_texts, 2
        assert found.steps == texts * fed_and_generated
        assert found.h2d_bytes_per_step == found.refetch_bytes_per_step > 0

    def test_a_short_text_is_refused(self) -> None:
        with pytest.raises(SpecError, match=r"text: its part 'all' has 100 tokens, but .*need 180"):
            judge([], words=text(100))

    def test_two_of_one_name_are_refused(self) -> None:
        with pytest.raises(SpecError, match="two designs are called 'clo'"):
            judge([named("clo"), named("clo")])

    def test_same_seed_same_answer(self) -> None:
        chosen = [named("clo", budget_pages=2)]
        once, again = (judge(chosen)[0] for _ in range(2))
        assert once.as_record() == again.as_record()
        assert not math.isnan(once.nll)

    def test_an_answer_counts_only_if_greedy_decoding_says_it(self) -> None:
        network, tokens = Network(small_model()), prompt(60)
        known, question = read_prompt(network, tokens), prompt(4, 3)
        decoder = InlineDecoder(network, BASELINE.design, max_new_tokens=16)
        decoder.prefill([known])
        logits = [decoder.step(token[None]) for token in question][-1]
        said = []
        for _ in range(5):
            said.append(int(logits.argmax()))
            logits = decoder.step(torch.tensor(said[-1:]))
        right, wrong = torch.tensor(said), torch.tensor([*said[:3], (said[3] + 1) % VOCABULARY, said[4]])
        asked = [Passkey(known, question, right), Passkey(known, question, wrong), Passkey(known, question, right[:2])]
        assert _answers(network, BASELINE, asked) == [True, False, True]

    def test_agreement_ends_at_the_first_other_token(self) -> None:
        """What follows it may be the same by chance: the two have different contexts."""
        full = [np.array([1, 2, 3, 4]), np.array([5, 6, 7, 8])]
        mine = [np.array([1, 9, 3, 4]), np.array([5, 6, 7, 8])]
        assert _agreement(mine, full) == pytest.approx((0.25 + 1.0) / 2)


class TestControls:
    def test_the_clock_selects_as_often_as_the_gate(self) -> None:
        clo = named("clo", budget_pages=2, tau=0.3, prefetch_depth=0)
        found = judge([clo, *controls_of(clo, Network(small_model()).spec)])
        gate, clock, window = found
        assert 0.1 < gate.selections_per_head < 0.9
        assert clock.selections_per_head == pytest.approx(gate.selections_per_head, abs=0.1)
        assert window.selections_per_head == window.h2d_bytes_per_step == window.refetch_bytes_per_step == 0
        assert window.output_error > gate.output_error > 0
        assert window.mass_recalled < gate.mass_recalled < 1

    @pytest.mark.parametrize(("rate", "every"), [(1.0, 1), (0.5, 2), (0.25, 4)])
    def test_each_head_selects_every_so_many_steps(self, rate: float, every: int) -> None:
        network = Network(small_model())
        heads = HeadProfile(refresh_rate=rate)
        decoder = InlineDecoder(network, design("clo", budget_pages=2), max_new_tokens=20, heads=heads)
        decoder.prefill([read_prompt(network, prompt(60))] * 2)
        chose = []
        for token in prompt(17, 2):
            decoder.step(token.repeat(2))
            chose.append(sum(decoder.layers[2].counts.missed.values()))
        assert chose[0] == 2 * KV_HEADS
        for start in range(1, 17 - every, every):
            assert sum(chose[start : start + every]) == 2 * KV_HEADS

    def test_only_gated_designs_have_controls(self) -> None:
        assert controls_of(named("resolve"), Network(small_model()).spec) == []


class TestFidelity:
    def test_a_budget_of_everything_has_no_error(self) -> None:
        (found,) = judge([named("resolve", budget_fraction=1.0)])
        assert found.output_error == pytest.approx(0.0, abs=1e-5)
        assert found.mass_recalled == pytest.approx(1.0)

    @pytest.mark.parametrize("name", ["clo", "clo-v1", "resolve", "recall", "staged", "resident-sparse"])
    def test_error_and_mass_are_those_of_a_plain_loop(self, name: str) -> None:
        network, tokens = Network(small_model()), prompt(90)
        seen: list[int] = []

        def check(observed: Observed) -> None:
            seen.append(observed.number)
            layer, query, length = observed.layer, observed.query, int(observed.lengths[0])
            error, mass = against_full(observed, 0)
            keys, values = whole_cache(layer, 0, length).double().unbind(1)
            start = window_start(length, WINDOW + 1, PAGE)
            for head in range(KV_HEADS * GROUP):
                kv_head = head // GROUP
                pages = set(layer.selection.pages[0, kv_head].tolist()) | {0}
                where = [t for t in range(length) if t // PAGE in pages or t >= start]
                scores = [float(query[0, head].double() @ key) * layer.shape.scale for key in keys[kv_head]]
                weights = np.exp(np.array(scores) - max(scores))
                assert float(mass[head]) == pytest.approx(weights[where].sum() / weights.sum())
                full = weights @ values[kv_head].numpy() / weights.sum()
                sparse = weights[where] @ values[kv_head][where].numpy() / weights[where].sum()
                wanted = np.linalg.norm(sparse - full) / np.linalg.norm(full)
                assert float(error[head]) == pytest.approx(wanted, rel=1e-3, abs=1e-5)

        decoder = InlineDecoder(network, design(name, budget_pages=3), max_new_tokens=12, observer=check)
        decoder.prefill([read_prompt(network, tokens)])
        for token in prompt(12, 4):
            decoder.step(token[None])
        assert set(seen) == set(range(LAYERS)) - set(range(decoder.plan.dense_layers))

    def test_every_layer_is_observed_equally_often(self) -> None:
        seen: list[int] = []

        class Counting(Fidelity):
            def __call__(self, observed: Observed) -> None:
                before = self._heads
                super().__call__(observed)
                seen.extend([observed.number] * (self._heads > before))

        network = Network(small_model())
        decoder = InlineDecoder(
            network, design("clo", budget_pages=2), max_new_tokens=12, observer=Counting(every=LAYERS)
        )
        decoder.prefill([read_prompt(network, prompt(60))])
        for token in prompt(12, 4):
            decoder.step(token[None])
        assert [seen.count(layer) for layer in range(1, LAYERS)] == [3] * (LAYERS - 1)


@pytest.mark.parametrize("name", presets.names("designs"))
def test_one_thread_says_what_the_machine_says(name: str) -> None:
    network = Network(small_model())
    chosen = design(name) if name in ("streamed", "resident") else design(name, budget_pages=2)
    ready = [read_prompt(network, prompt(60)), read_prompt(network, prompt(37, 1))]
    inline = InlineDecoder(network, chosen, max_new_tokens=16)
    with Decoder(network, chosen, max_new_tokens=16) as machine:
        assert torch.equal(inline.prefill(ready), machine.prefill(ready))
        for token in prompt(14, 2):
            assert torch.allclose(inline.step(token.repeat(2)), machine.step(token.repeat(2)), atol=1e-5)
            mine, theirs = inline.traffic, machine.traffic
            assert (mine.h2d_bytes, mine.requested_pages) == (theirs.h2d_bytes, theirs.requested_pages)
            assert mine.written_back_pages == theirs.written_back_pages
    for _ in range(2):
        inline.step(prompt(2))
    with pytest.raises(EngineError, match="max_new_tokens = 16"):
        inline.step(prompt(2))


@given(st.integers(1, 59))
@settings(max_examples=15, deadline=None)
def test_a_shared_beginning_is_not_read_again(shared: int) -> None:
    network = Network(small_model())
    one, other = prompt(60), prompt(50, 2)
    tokens = torch.cat([one[:shared], other])
    known = read_prompt(network, one)
    whole, continued = read_prompt(network, tokens), read_prompt(network, tokens, known=known, shared=shared)
    assert torch.allclose(whole.logits, continued.logits, atol=1e-4)
    assert torch.allclose(whole.kv[-1][0], continued.kv[-1][0], atol=1e-4)


def test_more_than_was_read_cannot_be_shared() -> None:
    network = Network(small_model())
    known = read_prompt(network, prompt(10))
    for count in (11, 20):
        with pytest.raises(SpecError, match=f"{count} of them cannot be shared"):
            read_prompt(network, prompt(20), known=known, shared=count)


class TestTexts:
    @pytest.mark.parametrize("tokens", [0, 1, 9, 1000])
    def test_tuning_and_reporting_never_read_the_same(self, tokens: int) -> None:
        (start, cut), (begin, end) = Split.TUNE.bounds(tokens), Split.REPORT.bounds(tokens)
        assert (start, cut, end) == (0, begin, tokens)

    def test_every_python_carries_long_texts(self) -> None:
        assert all(len(read()) > 300_000 for read in TEXTS.values())
        assert "Pathname" in docstrings() or "path" in docstrings()


def test_a_prompt_read_once_serves_many_decoders() -> None:
    model, tokens = small_model(), prompt(60)
    from clo.engine.models.network import Network

    network = Network(model)
    ready = read_prompt(network, tokens)
    for _ in range(2):
        with Decoder(network, design("clo", budget_pages=2), max_new_tokens=4) as decoder:
            from_ready = [int(token) for token in decoder.generate([ready])]
            from_tokens = [int(token) for token in decoder.generate([tokens])]
            assert from_ready == from_tokens


class TestHeads:
    @pytest.mark.parametrize("fold", GqaFold)
    def test_thresholds_reach_the_target_and_hardly_exceed_it(self, fold: GqaFold) -> None:
        trace = presets.load_trace()
        chosen = design("clo", target_hit_rate=0.6, gqa_fold=fold)
        tau = head_profile(trace, chosen, presets.load_model("smollm2-135m")).tau
        assert tau is not None
        unit = np.asarray(trace.queries, dtype=np.float64)
        unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
        for layer, head in ((0, 0), (7, 2), (24, 2), (29, 1)):
            group = slice(head * 3, head * 3 + 3)
            weights = np.asarray(trace.head_importance, dtype=np.float64)[layer, group]
            queries = unit[:, layer, group]
            anchor, hits = queries[0], 0
            for query in queries[1:]:
                cosines = (query * anchor).sum(-1)
                folded = {
                    GqaFold.MEAN: cosines.mean(),
                    GqaFold.MIN: cosines.min(),
                    GqaFold.IMPORTANCE: np.average(cosines, weights=weights),
                }[fold]
                if folded >= tau[layer, head]:
                    hits += 1
                else:
                    anchor = query
            assert 0.6 <= hits / (len(queries) - 1) < 0.75

    def test_thresholds_grow_with_importance_as_in_the_simulator(self) -> None:
        trace = presets.load_trace()
        chosen = design("clo", tau=0.7, tau_importance_power=0.5)
        found = head_profile(trace, chosen, presets.load_model("smollm2-135m")).tau
        assert found is not None
        of_group = np.asarray(trace.head_importance, dtype=np.float64).reshape(30, 3, 3).mean(-1)
        np.testing.assert_allclose(found, 1 - 0.3 / np.sqrt(of_group), rtol=1e-6)
        assert heads_for(chosen.with_fields(tau_importance_power=0), presets.load_model("smollm2-135m")) is None

    def test_pinned_are_the_heads_whose_queries_change_most(self) -> None:
        trace = presets.load_trace()
        found = head_profile(trace, design("resolve"), presets.load_model("smollm2-135m"))
        queries = np.asarray(trace.queries, dtype=np.float64)
        unit = queries / np.linalg.norm(queries, axis=-1, keepdims=True)
        change = ((unit[1:] - unit[:-1]) ** 2).sum(-1).mean(0).reshape(30, 3, 3).sum(-1)
        for layer, order in enumerate(found.pinned):
            assert list(change[layer, list(order)]) == sorted(change[layer], reverse=True)

    def test_statistics_are_means_over_the_recorded_steps(self) -> None:
        trace = presets.load_trace()
        found = measure_heads(trace)
        queries = np.asarray(trace.queries, dtype=np.float64)[:, 5, 3:6]
        cosines = [
            float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            for now, then in zip(queries[1:], queries[:-1], strict=True)
            for a, b in zip(now, then, strict=True)
        ]
        assert found.similarity[5, 1] == pytest.approx(np.mean(cosines))
        assert found.importance.shape == (30, 9)
        assert np.isnan(found.prefetchability[0]).all()
        assert ((found.prefetchability[1:] > 0) & (found.prefetchability[1:] <= 1)).all()

    def test_only_designs_that_need_a_profile_get_one(self) -> None:
        smollm2 = presets.load_model("smollm2-135m")
        assert heads_for(design("clo"), smollm2) is None
        assert heads_for(design("resolve", pinned_head_fraction=0.5), smollm2) is not None
        weighted = heads_for(design("clo", gqa_fold=GqaFold.IMPORTANCE), smollm2)
        assert weighted is not None
        assert weighted.tau is None
        with pytest.raises(SpecError, match="trace of smollm2-135m has 30 layers, 3 KV and 9 query heads, llama-3-8b"):
            head_profile(presets.load_trace(), design("clo"), presets.load_model("llama-3-8b"))
