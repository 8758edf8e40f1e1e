"""A budget of everything is the model's own attention."""

from __future__ import annotations

import pytest
import torch
from forced import CLOSE, forced_logits
from small import PAGE, SELECTORS, WINDOW, dense_logits, design, prompt, small_model

from clo import presets
from clo.engine.decoder import Decoder
from clo.specs import Selector

NAMES = presets.names("designs")


class TestFullAttention:
    @pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
    @pytest.mark.parametrize("name", NAMES)
    def test_a_budget_of_everything_is_full_attention(self, kind: str, name: str) -> None:
        model, tokens = small_model(kind), prompt(90)
        chosen = design(name)
        if chosen.selects:
            chosen = chosen.with_fields(budget_fraction=1.0, slot_budgets=1.0, slot_pages=None, tau=2.0)
        # the budget is that of the prompt: what leaves the window afterwards must still fit it
        found = forced_logits(model, chosen, tokens, 70)
        torch.testing.assert_close(found, dense_logits(model, tokens)[69:], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("selector", SELECTORS)
    @pytest.mark.parametrize("name", ["clo", "clo-v1", "resident-sparse"])
    def test_with_every_selector(self, name: str, selector: Selector) -> None:
        model, tokens = small_model(), prompt(90)
        chosen = design(name, selector=selector, budget_fraction=1.0, tau=2.0)
        if chosen.offloads:
            chosen = chosen.with_fields(slot_budgets=1.0, slot_pages=None)
        found = forced_logits(model, chosen, tokens, 70)
        torch.testing.assert_close(found, dense_logits(model, tokens)[69:], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_dtypes(self, dtype: torch.dtype) -> None:
        model, tokens = small_model(dtype=dtype), prompt(60)
        chosen = design("clo", budget_fraction=1.0, slot_budgets=1.0, tau=2.0)
        found = forced_logits(model, chosen, tokens, 50).float()
        exact = dense_logits(small_model(), tokens)[49:]
        own = dense_logits(model, tokens)[49:].float()
        # no further from the truth than the model's own attention in the same precision, give or take
        assert (found - exact).abs().max() <= 2.0 * (own - exact).abs().max()

    @pytest.mark.parametrize("tokens", [1, 3, WINDOW, WINDOW + 1, WINDOW + PAGE, WINDOW + 2 * PAGE + 1])
    @pytest.mark.parametrize("name", ["resolve", "clo", "streamed", "staged"])
    def test_contexts_shorter_than_the_window(self, name: str, tokens: int) -> None:
        model, text = small_model(), prompt(tokens + 8)
        chosen = design(name)
        if chosen.selects:
            chosen = chosen.with_fields(budget_pages=None, budget_fraction=1.0, slot_budgets=1.0, tau=2.0)
        with Decoder(model, chosen, max_new_tokens=8) as decoder:
            rows = [decoder.prefill([text[:tokens]])[0]]
            rows += [decoder.step(token[None])[0].clone() for token in text[tokens : tokens + 2]]
        torch.testing.assert_close(torch.stack(rows), dense_logits(model, text)[tokens - 1 : tokens + 2], **CLOSE)

    @pytest.mark.parametrize("name", ["resident", "streamed", "clo"])
    def test_up_to_the_last_position_of_the_model(self, name: str) -> None:
        model, text = small_model(), prompt(256)
        assert model.config.max_position_embeddings == len(text)
        chosen = design(name)
        if chosen.selects:
            chosen = chosen.with_fields(budget_fraction=1.0, slot_budgets=1.0, slot_pages=None, tau=2.0)
        found = forced_logits(model, chosen, text, 248)
        torch.testing.assert_close(found, dense_logits(model, text)[247:], **CLOSE)

    @pytest.mark.parametrize("tokens", range(50, 50 + PAGE))
    def test_a_window_that_is_no_whole_number_of_pages(self, tokens: int) -> None:
        """Prompts that fill the window's ring differently: none may lose its newest token."""
        model, text = small_model(), prompt(tokens + 2)
        chosen = design("clo", budget_fraction=1.0, slot_budgets=1.0, slot_pages=None, tau=2.0)
        found = forced_logits(model, chosen, text, tokens)
        torch.testing.assert_close(found, dense_logits(model, text)[tokens - 1 :], **CLOSE)
