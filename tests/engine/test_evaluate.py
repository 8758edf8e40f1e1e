"""Answer quality against computations by hand, and head statistics against a plain loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from small import VOCABULARY, dense_logits, design, prompt, small_model

from clo import presets
from clo.engine.decoder import Decoder, read_prompt
from clo.engine.evaluate import EvaluationSettings, evaluate
from clo.engine.heads import head_profile, heads_for, measure_heads, tau_for_hit_rate
from clo.errors import SpecError
from clo.specs import Design, GqaFold

SETTINGS = EvaluationSettings(
    context_tokens=70, num_texts=2, decoded_tokens=20, num_passkeys=2, skipped_tokens=30, seed=1
)


class Characters:
    """A tokenizer of one token a character."""

    def __call__(self, text: str, **_options: Any) -> Any:
        class Encoded:
            input_ids = torch.tensor([[ord(letter) % VOCABULARY for letter in text]])

        return Encoded()


def text(length: int = 600) -> str:
    return "".join(chr(97 + int(token) % 26) for token in prompt(length, 5))


class TestEvaluate:
    def test_full_attention_differs_from_itself_in_nothing(self) -> None:
        model = small_model()
        chosen = [
            (Design(name="resident", attend="full", cache="resident"), None),
            (design("streamed"), None),
            (design("resolve", budget_pages=1), None),
        ]
        resident, streamed, resolve = evaluate(model, Characters(), text(), chosen, SETTINGS)
        assert (resident.delta_nll, resident.agreement, resident.h2d_bytes_per_step) == (0.0, 1.0, 0.0)
        assert streamed.delta_nll == pytest.approx(0.0, abs=1e-5)
        assert streamed.agreement == 1.0
        assert streamed.h2d_bytes_per_step > 0
        assert abs(resolve.delta_nll) > 1e-4
        assert resolve.agreement < 1.0
        assert resolve.delta_nll_se > 0

    def test_the_loss_is_that_of_the_models_own_logits(self) -> None:
        model = small_model()
        words = text(120)
        settings = EvaluationSettings(
            context_tokens=70, num_texts=1, decoded_tokens=20, num_passkeys=0, skipped_tokens=30, seed=1
        )
        (found,) = evaluate(model, Characters(), words, [(design("streamed"), None)], settings)
        # the text has exactly the tokens that are needed: one place to read
        tokens = Characters()(words).input_ids[0][30:120]
        logits = dense_logits(model, tokens).double().log_softmax(-1)
        losses = [-float(logits[at - 1, tokens[at]]) for at in range(71, 90)]
        assert found.nll == pytest.approx(float(np.mean(losses)), rel=1e-5)
        assert found.passkey_rate is None

    def test_a_short_text_is_refused(self) -> None:
        with pytest.raises(SpecError, match=r"text: 100 tokens, but .*context_tokens = 70 .* need 120"):
            evaluate(small_model(), Characters(), text(100), [], SETTINGS)

    def test_same_seed_same_answer(self) -> None:
        chosen = [(design("clo", budget_pages=2), None)]
        once, again = (evaluate(small_model(), Characters(), text(), chosen, SETTINGS)[0] for _ in range(2))
        assert once.as_record() == again.as_record()
        assert not math.isnan(once.nll)


def test_a_prompt_read_once_serves_many_decoders() -> None:
    model, tokens = small_model(), prompt(60)
    from clo.engine.network import Network

    network = Network(model)
    ready = read_prompt(network, tokens)
    for _ in range(2):
        with Decoder(network, design("clo", budget_pages=2), max_new_tokens=4) as decoder:
            from_ready = [int(token) for token in decoder.generate([ready])]
            from_tokens = [int(token) for token in decoder.generate([tokens])]
            assert from_ready == from_tokens


class TestHeads:
    def test_thresholds_reach_the_target_and_hardly_exceed_it(self) -> None:
        trace = presets.load_trace()
        chosen = design("clo", target_hit_rate=0.6, gqa_fold="min")
        tau = tau_for_hit_rate(trace, chosen, 0.6)
        unit = np.asarray(trace.queries, dtype=np.float64)
        unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
        for layer, head in ((0, 0), (7, 2), (29, 1)):
            queries = unit[:, layer, head * 3 : head * 3 + 3]
            anchor, hits = queries[0], 0
            for query in queries[1:]:
                if (query * anchor).sum(-1).min() >= tau[layer, head]:
                    hits += 1
                else:
                    anchor = query
            assert 0.6 <= hits / (len(queries) - 1) < 0.75

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
