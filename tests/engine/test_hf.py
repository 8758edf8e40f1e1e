"""`offload`: the library's own forward pass and `generate` give what the decoder on its lanes gives."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from small import VOCABULARY, dense_logits, design, prompt, small_model

from clo import presets
from clo.engine import offload
from clo.engine.decoder import Decoder
from clo.errors import EngineError, SpecError


def sizes(name: str) -> dict[str, Any]:
    return {"budget_pages": 3} if presets.load_design(name).selects else {}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("name", presets.names("designs"))
def test_generate_gives_the_decoders_tokens(name: str, kind: str) -> None:
    model, chosen, text = small_model(kind), design(name, **sizes(name)), prompt(80)
    with Decoder(model, chosen, max_new_tokens=25) as decoder:
        wanted = [int(token) for token in decoder.generate([text])]
    cache = offload(model, chosen, max_new_tokens=40)
    found = model.generate(text[None], past_key_values=cache, max_new_tokens=25, do_sample=False)
    assert found[0, 80:].tolist() == wanted
    assert cache.traffic.page_bytes > 0
    cache.close()


def test_without_the_cache_the_model_is_as_before() -> None:
    model, text = small_model(), prompt(60)
    before = dense_logits(model, text)
    cache = offload(model, design("clo", budget_pages=2))
    assert torch.equal(dense_logits(model, text), before)
    cache.close()
    assert torch.equal(dense_logits(model, text), before)
    assert model.config._attn_implementation != "clo"
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)


def test_sampling_and_a_batch_and_a_streamer() -> None:
    model, batch = small_model(), torch.stack([prompt(70, 1), prompt(70, 2)])
    cache = offload(model, design("resolve", budget_pages=3), max_new_tokens=20)
    torch.manual_seed(3)
    found = model.generate(batch, past_key_values=cache, max_new_tokens=10, do_sample=True, top_k=5)
    assert found.shape == (2, 80)
    assert int(found.max()) < VOCABULARY
    cache.close()

    class Streamer:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append(-1)

    streamer, cache = Streamer(), offload(model, design("clo", budget_pages=3), max_new_tokens=20)
    text = prompt(70, 1)
    found = model.generate(text[None], past_key_values=cache, max_new_tokens=6, do_sample=False, streamer=streamer)
    assert streamer.seen == [*found[0].tolist(), -1]
    cache.close()


@pytest.mark.parametrize("name", presets.names("designs"))
def test_a_chats_next_turn_is_decoded_as_if_its_tokens_came_one_by_one(name: str) -> None:
    model, chosen = small_model(), design(name, **sizes(name))
    first, question = prompt(80, 1), prompt(9, 2)
    with Decoder(model, chosen, max_new_tokens=40) as decoder:
        logits, talk = decoder.prefill([first]), first.tolist()
        for number in range(15):
            talk.append(int(logits.argmax()) if number < 6 else int(question[number - 6]))
            logits = decoder.step(torch.tensor(talk[-1:]))
    with offload(model, chosen, max_new_tokens=40) as cache:
        told = model.generate(first[None], past_key_values=cache, max_new_tokens=6, do_sample=False)
        assert told[0].tolist() == talk[:86]
        asked = torch.tensor(talk)[None]
        answer = model.generate(
            asked,
            past_key_values=cache,
            max_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert answer.sequences[0, : len(talk)].tolist() == talk
        torch.testing.assert_close(answer.logits[0], logits, rtol=1e-4, atol=1e-4)
        assert cache.get_seq_length() == len(talk) + 2


def test_what_it_cannot_do_is_refused() -> None:
    model, text = small_model(), prompt(70)
    cache = offload(model, design("clo", budget_pages=3), max_new_tokens=3)
    with torch.inference_mode():
        logits = model(text[None], past_key_values=cache).logits
        for _ in range(3):
            logits = model(logits[:, -1:].argmax(-1), past_key_values=cache).logits
        with pytest.raises(EngineError, match="room for 73 tokens"):
            model(logits[:, -1:].argmax(-1), past_key_values=cache)
        with pytest.raises(EngineError, match="room for 73 tokens"):
            model(text[None], past_key_values=cache)
    cache.close()
    cache = offload(model, design("clo", budget_pages=3))
    with pytest.raises(SpecError, match="beam search"):
        model.generate(text[None], past_key_values=cache, num_beams=2, max_new_tokens=3, do_sample=False)
    cache.close()
    cache = offload(model, design("clo", budget_pages=3))
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[0, :5] = 0
    with pytest.raises(SpecError, match="padded prompts"):
        model.generate(
            torch.stack([text, text]), attention_mask=mask, past_key_values=cache, max_new_tokens=3, do_sample=False
        )
    cache.close()


def generated(model: Any, cache: Any, tokens: int = 8) -> list[int]:
    found = model.generate(prompt(70)[None], past_key_values=cache, max_new_tokens=tokens, do_sample=False)
    return list(found[0, 70:].tolist())


class TestSeveralCaches:
    def test_one_that_is_closed_leaves_the_others_alone(self) -> None:
        model, chosen = small_model(), design("clo", budget_pages=3)
        with offload(model, chosen, max_new_tokens=20) as cache:
            wanted = generated(model, cache)
        first, second, third = (offload(model, chosen, max_new_tokens=20) for _ in range(3))
        first.close()
        assert generated(model, second) == wanted
        second.close()
        second.close()
        assert generated(model, third) == wanted
        third.close()
        assert model.config._attn_implementation != "clo"
        assert not any(layer._forward_pre_hooks for layer in model.model.layers)

    @pytest.mark.parametrize("decoded", [False, True])
    def test_a_closed_one_says_so(self, decoded: bool) -> None:
        model = small_model()
        with offload(model, design("clo", budget_pages=3), max_new_tokens=20) as other:
            cache = offload(model, design("clo", budget_pages=3), max_new_tokens=20)
            if decoded:
                generated(model, cache)
            cache.close()
            with pytest.raises(EngineError, match="cache: closed"):
                generated(model, cache)
            assert len(generated(model, other)) == 8

    def test_one_that_is_dropped_is_gone_and_the_model_as_before(self) -> None:
        model = small_model()
        gc.collect()
        gc.disable()
        try:
            cache = offload(model, design("clo", budget_pages=3), max_new_tokens=20)
            generated(model, cache)
            held = weakref.ref(cache.layer(2))
            del cache
            assert held() is None
            assert model.config._attn_implementation != "clo"
        finally:
            gc.enable()
