"""Prompts of different lengths in one batch, padded in front as `transformers` does, are answered as each alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import latent
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import design, prompt, small_model
from test_whole_models import whole_model
from whole_models import assert_same, everything, generated

from clo import presets
from clo.engine import offload
from clo.engine.models.library import as_cache
from clo.engine.turns import Turns, padding_in_front
from clo.errors import SpecError

LENGTHS = 80, 57, 3
NEW = 20


def padded(texts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """In front, by ids of text."""
    longest = max(len(text) for text in texts)
    rows = [torch.cat([torch.full((longest - len(text),), 7), text]) for text in texts]
    mask = [torch.arange(longest) >= longest - len(text) for text in texts]
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(mask).long()}


def texts_of(lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    return [prompt(tokens, seed) for seed, tokens in enumerate(lengths)]


def answer(model: Any, cache: Any, tokens: int = NEW, *, input_ids: torch.Tensor, **options: Any) -> Any:
    return generated(model, input_ids, cache, tokens, **options)


def logits_of(found: Any, sequence: int) -> torch.Tensor:
    return torch.stack(found.logits)[:, sequence]


def assert_each_as_alone(model: Any, chosen: Any, texts: list[torch.Tensor], found: Any) -> None:
    for sequence, text in enumerate(texts):
        with offload(model, chosen, max_new_tokens=NEW) as cache:
            alone = answer(model, cache, input_ids=text[None])
        assert found.sequences[sequence, -NEW:].tolist() == alone.sequences[0, -NEW:].tolist()
        torch.testing.assert_close(logits_of(found, sequence), logits_of(alone, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", presets.names("designs"))
def test_each_of_a_batch_is_answered_as_alone(name: str) -> None:
    model, texts = small_model(), texts_of()
    # of a short prompt and of a long one a budget in pages is the same
    chosen = design(name, **({"budget_pages": 3} if presets.load_design(name).selects else {}))
    with offload(model, chosen, max_new_tokens=NEW) as cache:
        found = answer(model, cache, **padded(texts))
        assert cache.get_seq_length() == max(LENGTHS) + NEW - 1
        assert cache.traffic.page_bytes > 0
    assert_each_as_alone(model, chosen, texts, found)


KINDS: dict[str, Callable[[], Any]] = {
    kind: (lambda kind=kind: whole_model(kind)) for kind in ("Gemma3", "GptOss", "Qwen3", "Qwen3Next", "Qwen3_5")
} | {"latent": lambda: latent.latent_model("DeepseekV3")}


@pytest.mark.parametrize("kind", KINDS)
class TestKinds:
    @pytest.mark.parametrize("name", ["clo", "streamed", "staged"])
    def test_with_everything_attended_a_model_generates_what_it_does_alone(self, kind: str, name: str) -> None:
        model, batch = KINDS[kind](), padded(texts_of((70, 41)))
        wanted = answer(model, None, **batch)
        with offload(model, everything(name), max_new_tokens=NEW) as cache:
            assert_same(answer(model, cache, **batch), wanted)
            assert cache.decodes

    def test_with_a_budget_each_is_answered_as_alone(self, kind: str) -> None:
        model, texts = KINDS[kind](), texts_of((60, 41))
        chosen = design("clo", budget_pages=2)
        with offload(model, chosen, max_new_tokens=NEW) as cache:
            found = answer(model, cache, **padded(texts))
        assert_each_as_alone(model, chosen, texts, found)


@pytest.mark.parametrize("chunk", [2, 16, 79])
def test_a_prompt_may_come_in_chunks_the_first_of_which_are_padding(chunk: int) -> None:
    model, batch = small_model(), padded(texts_of())
    wanted = answer(model, None, **batch)
    with offload(model, design("streamed"), max_new_tokens=NEW) as cache:
        assert_same(answer(model, cache, prefill_chunk_size=chunk, **batch), wanted)


def test_positions_may_count_padding() -> None:
    """Rotary positions only say how far tokens are from each other."""
    model, batch = small_model(), padded(texts_of((40, 33)))
    with torch.inference_mode():
        wanted = model(**batch).logits[:, -1]
        with offload(model, everything("clo"), max_new_tokens=8) as cache:
            logits = model(**batch, **as_cache(model, cache)).logits[:, -1]
            torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
            for _ in range(4):
                new, seen = logits.argmax(-1)[:, None], torch.ones(2, 1, dtype=torch.long)
                batch = {
                    "input_ids": torch.cat([batch["input_ids"], new], 1),
                    "attention_mask": torch.cat([batch["attention_mask"], seen], 1),
                }
                logits = model(new, attention_mask=batch["attention_mask"], **as_cache(model, cache)).logits[:, -1]
                torch.testing.assert_close(logits, model(**batch).logits[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "Gemma3"])
def test_a_next_turn_goes_on_behind_the_padding(kind: str) -> None:
    model = small_model() if kind == "llama" else whole_model(kind)
    texts, question = texts_of((60, 41)), prompt(9, 5).expand(2, -1)
    with offload(model, design("streamed"), max_new_tokens=60) as cache:
        batch = padded(texts)
        told = answer(model, cache, 6, **batch).sequences
        asked = torch.cat([told, question], 1)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 15, dtype=torch.long)], 1)
        found = answer(model, cache, 5, input_ids=asked, attention_mask=mask)
        assert_same(found, answer(model, None, 5, input_ids=asked, attention_mask=mask))


class TestRefused:
    def refused(self, mask: torch.Tensor, match: str, tokens: int = 70) -> None:
        model, ids = small_model(), prompt(tokens).expand(len(mask), -1)
        with offload(model, design("streamed"), max_new_tokens=40) as cache, pytest.raises(SpecError, match=match):
            answer(model, cache, 3, input_ids=ids, attention_mask=mask)

    def test_padding_behind_a_prompt(self) -> None:
        mask = torch.ones(2, 70, dtype=torch.long)
        mask[1, -5:] = 0
        self.refused(mask, r"it hides tokens behind others: pad prompts in front \(padding_side='left'\)")

    def test_a_gap(self) -> None:
        mask = torch.ones(2, 70, dtype=torch.long)
        mask[0, 30:32] = 0
        self.refused(mask, "it hides tokens behind others")

    def test_nothing_but_padding(self) -> None:
        mask = torch.ones(2, 70, dtype=torch.long)
        mask[1] = 0
        self.refused(mask, r"prompts: lengths \[70, 0\]: each needs at least one token")

    def test_what_the_cache_holds_already(self) -> None:
        model = small_model()
        with offload(model, design("clo", budget_pages=3), max_new_tokens=40) as cache:
            told = answer(model, cache, 3, **padded(texts_of((60, 41)))).sequences
            asked = torch.cat([told, prompt(9, 2).expand(2, -1)], dim=1)
            for hidden in (18, 20, 0):
                mask = torch.ones_like(asked)
                mask[1, :hidden] = 0
                with pytest.raises(SpecError, match=r"(it hides \d+ tokens in front|from position .* the cache holds)"):
                    answer(model, cache, 3, input_ids=asked, attention_mask=mask)
            mask[1, :19] = 0
            assert answer(model, cache, 3, input_ids=asked, attention_mask=mask).sequences.shape == (2, 75)


lengths = st.lists(st.integers(0, 12), min_size=1, max_size=4)


class TestTurns:
    @given(lengths, st.sampled_from(["numbers", "truth", "pairs", "pairs, truth", "by kind"]))
    def test_padding_is_found_in_every_kind_of_mask(self, hidden: list[int], kind: str) -> None:
        tokens = 12
        seen = torch.stack([torch.arange(tokens) >= each for each in hidden])
        pairs = seen[:, None, None] & torch.ones(tokens, tokens).tril().bool()
        masks = {
            "numbers": seen.long(),
            "truth": seen,
            "pairs": torch.where(pairs, 0.0, float("-inf")),
            "pairs, truth": pairs,
            "by kind": {"full_attention": pairs, "sliding_attention": None},
        }
        assert padding_in_front(masks[kind], len(hidden), tokens) == tuple(hidden)

    @given(st.lists(st.booleans(), min_size=3, max_size=12))
    def test_anything_else_is_refused(self, seen: list[bool]) -> None:
        mask = torch.tensor([seen])
        if seen == sorted(seen):
            assert padding_in_front(mask, 1, len(seen)) == (seen.count(False),)
        else:
            with pytest.raises(SpecError, match="it hides tokens behind others"):
                padding_in_front(mask, 1, len(seen))

    def test_a_mask_of_other_tokens(self) -> None:
        mask = torch.tensor([[False, True, True]])
        with pytest.raises(SpecError, match="attention_mask: 3 tokens, expected 5"):
            padding_in_front(mask, 1, 5)
        assert padding_in_front(mask | True, 1, 5) == (0,)

    def test_every_sequence_goes_on_where_it_ended(self) -> None:
        mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
        after = Turns().then(0, 2, 4, mask, torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]]))
        assert after.padding == (2, 0)
        longer = torch.cat([mask, torch.ones(2, 2, dtype=torch.long)], 1)
        assert after.then(4, 2, 2, longer, torch.tensor([[2, 3], [4, 5]])).padding == (2, 0)
        with pytest.raises(SpecError, match="2 new tokens from position 3 on, the cache holds 4"):
            after.then(4, 2, 2, longer, torch.tensor([[2, 3], [3, 4]]))
        with pytest.raises(SpecError, match="it hides 0 tokens in front of sequence 0, before it hid 2"):
            after.then(4, 2, 2, None, torch.tensor([[2, 3], [4, 5]]))
