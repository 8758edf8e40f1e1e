"""`offload`: the library's own forward pass and `generate` give what the decoder on its lanes gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small import EXPERTS, VOCABULARY, dense_logits, design, prompt, small_model

from clo import presets
from clo.engine import offload
from clo.engine.decoder import Decoder
from clo.engine.heads import HeadProfile
from clo.engine.models.library import as_cache
from clo.engine.models.network import Network
from clo.errors import EngineError, NotFoundError, SpecError


def sizes(name: str) -> dict[str, Any]:
    return {"budget_pages": 3} if presets.load_design(name).selects else {}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("name", presets.names("designs"))
def test_generate_gives_the_decoders_tokens(name: str, kind: str) -> None:
    model, chosen, text = small_model(kind), design(name, **sizes(name)), prompt(80)
    with Decoder(model, chosen, max_new_tokens=25) as decoder:
        wanted = [int(token) for token in decoder.generate([text])]
    cache = offload(model, chosen, max_new_tokens=40)
    found = model.generate(text[None], **as_cache(model, cache), max_new_tokens=25, do_sample=False)
    assert found[0, 80:].tolist() == wanted
    assert cache.traffic.page_bytes > 0
    cache.close()


@pytest.mark.parametrize("kind", list(EXPERTS))
class TestExperts:
    """Whatever follows attention is the model's own."""

    # staged predicts a later layer's query, also where heads are normed together
    @pytest.mark.parametrize("name", ["clo", "staged", "streamed"])
    def test_with_everything_attended_a_model_generates_what_it_does_alone(self, kind: str, name: str) -> None:
        model, text = small_model(kind), prompt(70)[None]
        wanted = model.generate(text, max_new_tokens=20, do_sample=False)
        whole = {"budget_fraction": 1.0, "slot_budgets": 1.0, "tau": 2.0}
        chosen = design(name, **(whole if presets.load_design(name).selects else {}))
        with offload(model, chosen, max_new_tokens=40) as cache:
            found = model.generate(text, **as_cache(model, cache), max_new_tokens=20, do_sample=False)
            assert cache.decodes
        assert found.tolist() == wanted.tolist()

    def test_its_experts_weigh_what_they_do(self, kind: str) -> None:
        model = small_model(kind)
        spec = Network(model, whole=True).spec
        assert spec.experts is not None
        matrices = ((name, weight) for name, weight in model.named_parameters() if weight.dim() > 1)
        values = sum(weight.numel() for name, weight in matrices if "shared_expert_gate" not in name)
        assert spec.weight_bytes / spec.weight_bytes_per_value == pytest.approx(values, rel=1e-3)


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
    found = model.generate(batch, **as_cache(model, cache), max_new_tokens=10, do_sample=True, top_k=5)
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
    found = model.generate(text[None], **as_cache(model, cache), max_new_tokens=6, do_sample=False, streamer=streamer)
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
        told = model.generate(first[None], **as_cache(model, cache), max_new_tokens=6, do_sample=False)
        assert told[0].tolist() == talk[:86]
        asked = torch.tensor(talk)[None]
        answer = model.generate(
            asked,
            **as_cache(model, cache),
            max_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert answer.sequences[0, : len(talk)].tolist() == talk
        torch.testing.assert_close(answer.logits[0], logits, rtol=1e-4, atol=1e-4)
        assert cache.get_seq_length() == len(talk) + 2


def test_designs_that_need_a_head_profile_find_the_shipped_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = small_model(), prompt(80)
    needy = presets.load_design("clo-v1")
    with pytest.raises(SpecError, match=r"head profile: the trace of .* heads_for"):
        offload(model, needy)
    asked: list[str] = []

    def found(chosen: Any, spec: Any) -> HeadProfile:
        asked.append(chosen.name)
        return HeadProfile(importance=torch.ones(spec.num_layers, spec.num_query_heads))

    monkeypatch.setattr("clo.engine.hf.heads_for", found)
    with offload(model, needy, max_new_tokens=4) as cache:
        model.generate(text[None], **as_cache(model, cache), max_new_tokens=3, do_sample=False)
        assert cache.decodes
    offload(model, "clo").close()
    pins = presets.load_design("resolve").with_fields(name="pins", pinned_head_fraction=0.5)
    offload(model, pins).close()
    assert asked == ["clo-v1", "pins"]


def test_what_it_cannot_do_is_refused() -> None:
    model, text = small_model(), prompt(70)
    cache = offload(model, design("clo", budget_pages=3), max_new_tokens=3)
    with torch.inference_mode():
        logits = model(text[None], **as_cache(model, cache)).logits
        for _ in range(3):
            logits = model(logits[:, -1:].argmax(-1), **as_cache(model, cache)).logits
        with pytest.raises(EngineError, match="room for 73 tokens"):
            model(logits[:, -1:].argmax(-1), **as_cache(model, cache))
        with pytest.raises(EngineError, match="room for 73 tokens"):
            model(text[None], **as_cache(model, cache))
    cache.close()
    cache = offload(model, design("clo", budget_pages=3))
    with pytest.raises(SpecError, match="beam search"):
        model.generate(text[None], **as_cache(model, cache), num_beams=2, max_new_tokens=3, do_sample=False)
    cache.close()


def greedy(model: Any, ids: torch.Tensor, cache: Any, tokens: int = 3, **options: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(
        ids, **as_cache(model, cache), max_new_tokens=tokens, do_sample=False, **options
    )
    return found


class TestWhatAMaskHides:
    def test_of_an_answer_it_is_refused(self) -> None:
        model = small_model()
        with offload(model, design("streamed"), max_new_tokens=40) as cache:
            told = greedy(model, prompt(70)[None], cache)
            asked = torch.cat([told, prompt(9, 2)[None]], dim=1)
            mask = torch.ones_like(asked)
            mask[0, 74:76] = 0
            with pytest.raises(SpecError, match="it hides tokens behind others"):
                greedy(model, asked, cache, attention_mask=mask)
            assert greedy(model, asked, cache, attention_mask=torch.ones_like(asked)).shape == (1, 85)

    @pytest.mark.parametrize("made", ["of tokens", "of pairs"])
    def test_of_an_answer_it_is_refused_with_one_new_token_too(self, made: str) -> None:
        model = small_model()
        with offload(model, design("streamed"), max_new_tokens=40) as cache:
            told = greedy(model, prompt(70)[None], cache)  # the last token is not in the cache yet
            seen = torch.ones(1, 73, dtype=torch.bool)
            seen[0, 10:20] = False
            mask = seen if made == "of tokens" else seen[:, None, None]
            with torch.no_grad(), pytest.raises(SpecError, match="it hides tokens behind others"):
                model(told[:, -1:], **as_cache(model, cache), attention_mask=mask)
            assert greedy(model, told, cache, attention_mask=torch.ones_like(told)).shape == (1, 76)

    def test_an_answer_that_ended_early_is_not_gone_on_from(self) -> None:
        """Its padding lies behind its text: the library hides it in the next turn."""
        model = small_model()
        batch = torch.stack([prompt(70, 1), prompt(70, 2)])
        with offload(model, design("clo", budget_pages=3), max_new_tokens=40) as cache:
            told = greedy(model, batch, cache, 5)
            mask = torch.ones_like(told)
            mask[0, 72:] = 0
            with pytest.raises(SpecError, match="it hides tokens behind others"):
                greedy(model, told, cache, attention_mask=mask)

    def test_the_librarys_own_cache_still_takes_it(self) -> None:
        model, batch = small_model(), torch.stack([prompt(70, 1), prompt(70, 2)])
        mask = torch.ones(2, 70, dtype=torch.long)
        mask[0, :5] = 0
        wanted = greedy(model, batch, None, attention_mask=mask)
        with offload(model, design("clo", budget_pages=3), max_new_tokens=40):
            assert torch.equal(greedy(model, batch, None, attention_mask=mask), wanted)


class TestAnotherConversation:
    @pytest.mark.parametrize("length", [20, 40, 69])
    def test_a_shorter_one_is_refused_and_the_first_goes_on(self, length: int) -> None:
        model = small_model()
        with offload(model, design("clo", budget_pages=3), max_new_tokens=40) as cache:
            told = greedy(model, prompt(70)[None], cache)
            with pytest.raises(SpecError, match=r"the cache holds 72: give generate\(\) the whole conversation"):
                greedy(model, prompt(length, 2)[None], cache)
            assert greedy(model, told, cache).shape == (1, 76)

    def test_an_empty_prompt_is_refused(self) -> None:
        cache = offload(small_model(), design("clo", budget_pages=3), max_new_tokens=40)
        with pytest.raises(SpecError, match="input_ids: 0 new tokens from position 0"):
            cache.arrive(torch.zeros(1, 0, 48), None, None)

    @pytest.mark.parametrize("tokens", [1, 3], ids=["before-decoding", "while-decoding"])
    def test_a_batch_of_another_size_is_refused_and_the_first_goes_on(self, tokens: int) -> None:
        model = small_model()
        with offload(model, design("clo", budget_pages=3), max_new_tokens=40) as cache:
            told = greedy(model, prompt(70).expand(2, -1), cache, tokens)
            asked = torch.cat([told, prompt(9, 2).expand(2, -1)], dim=1)
            for other in (1, 3):
                with pytest.raises(SpecError, match=f"a batch of {other}, the cache holds one of 2"):
                    greedy(model, asked[:1].expand(other, -1), cache)
            assert len(greedy(model, asked, cache)) == 2

    @pytest.mark.parametrize("tokens", [0, 3], ids=["in-the-prompt", "while-decoding"])
    def test_after_an_interrupt_the_cache_is_refused(self, tokens: int) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        model, text = small_model(), prompt(70)[None]
        with offload(model, design("clo", budget_pages=3), max_new_tokens=40) as cache:
            if tokens:
                text = greedy(model, text, cache, tokens)
            hook = model.model.layers[2].register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                greedy(model, text, cache)
            hook.remove()
            with pytest.raises(EngineError, match="broken off half-way"):
                greedy(model, torch.cat([text, text[:, :1]], dim=1), cache)
        with offload(model, design("clo", budget_pages=3), max_new_tokens=40) as cache:
            assert greedy(model, text, cache).shape[1] == text.shape[1] + 3


def test_a_layer_may_ask_how_many_tokens_came_before() -> None:
    """Llama 4 scales its queries by that."""
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=48,
        intermediate_size_mlp=64,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        layer_types=["full_attention"] * 4,
        floor_scale=8,
        attn_scale=1.0,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        initializer_range=0.15,
    )
    model = transformers.Llama4ForCausalLM(config).eval()
    own = transformers.DynamicCache()
    with offload(model, design("streamed"), max_new_tokens=60) as cache, torch.no_grad():
        for count, seed in ((62, 1), (1, 2), (1, 3), (20, 4)):
            tokens = prompt(count, seed)[None]
            wanted, found = (model(tokens, **as_cache(model, each)).logits for each in (own, cache))
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 3, 10, 11, 14])
def test_a_budget_may_hold_more_than_a_short_prompt(tokens: int) -> None:
    """What is generated has room in it: else a prompt within a page would be attended by a page for ever."""
    model, text = small_model(), prompt(tokens)[None]
    wanted = model.generate(text, max_new_tokens=60, do_sample=False)
    for fields in ({"min_budget_pages": 99}, {"budget_pages": 18 if tokens > 8 else 15, "slot_budgets": 1.0}):
        with offload(model, design("clo", tau=2.0, **fields), max_new_tokens=60) as cache:
            assert torch.equal(greedy(model, text, cache, 60), wanted)
    with (
        offload(model, design("clo", budget_pages=99), max_new_tokens=60) as cache,
        pytest.raises(SpecError, match=r"holds only 1\d pages of 4 tokens .* and what is generated"),
    ):
        greedy(model, text, cache, 60)


def test_the_room_ends_where_the_models_positions_do() -> None:
    """The room that is the default is no reason to refuse a long prompt."""
    model, text = small_model(), prompt(250)[None]
    assert model.config.max_position_embeddings == 256
    wanted = model.generate(text, max_new_tokens=7, do_sample=False)
    with offload(model, design("clo", budget_fraction=1.0, slot_budgets=1.0, tau=2.0)) as cache:
        told = greedy(model, text, cache, 7)
        assert torch.equal(told, wanted)
        assert cache.get_seq_length() == 256
        with pytest.raises(EngineError, match="cache: there is room for 256 tokens: LlamaForCausalLM has no more"):
            greedy(model, told, cache)
    with offload(model, design("clo")) as cache, pytest.raises(SpecError, match=r"need 257 positions: .* has 256"):
        greedy(model, prompt(256)[None], cache)


def test_guesses_that_are_taken_back_are_refused() -> None:
    model = small_model()
    with (
        offload(model, design("clo", budget_pages=3), max_new_tokens=40) as cache,
        # of the library itself since 5.24, which asks beforehand
        pytest.raises(ValueError, match=r"tokens cannot be taken back|requires a cache that can be cropped"),
    ):
        greedy(model, prompt(70)[None], cache, 9, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("self_attn.q_proj", "attention of layer 3: its output is not finite, first in layer 2: its query of the"),
        ("mlp.down_proj", r"not finite, first in layer 3: its query, key and value, .* layer 2's weights behind its"),
    ],
)
def test_a_query_that_is_not_finite_is_an_error_and_a_sound_model_goes_on(weight: str, message: str) -> None:
    model, text = small_model(), prompt(70)[None]
    spoilt = model.model.layers[2].get_submodule(weight).weight
    sound = spoilt.detach().clone()
    with offload(model, design("clo", budget_pages=3), max_new_tokens=20) as cache:
        wanted = greedy(model, text, cache)
    with offload(model, design("clo", budget_pages=3), max_new_tokens=20) as cache:
        with torch.no_grad():
            spoilt[0, 0] = float("nan")
        with pytest.raises(EngineError, match=message):
            greedy(model, text, cache)
        with torch.no_grad():
            spoilt.copy_(sound)
        with pytest.raises(EngineError, match="broken off half-way"):
            greedy(model, text, cache)
    with offload(model, design("clo", budget_pages=3), max_new_tokens=20) as cache:
        assert torch.equal(greedy(model, text, cache), wanted)


@pytest.mark.parametrize("tokens", [0, -1, 1.5, float("nan"), "a", None])
def test_room_is_a_whole_number(tokens: Any) -> None:
    with pytest.raises(SpecError, match=f"max_new_tokens = {tokens}: must be at least 1, a whole number"):
        offload(small_model(), design("clo"), max_new_tokens=tokens)


@pytest.mark.parametrize("memory", [0, -1.0, float("nan"), "a"])
def test_memory_is_a_number_of_bytes(memory: Any) -> None:
    with pytest.raises(SpecError, match=f"kv_memory_bytes = {memory}: must be a positive number of bytes"):
        offload(small_model(), design("clo"), kv_memory_bytes=memory)


def test_a_design_is_a_record_a_name_or_a_file(tmp_path: Path) -> None:
    model, file = small_model(), tmp_path / "mine.toml"
    file.write_text('cache = "none"\nprefetch_depth = 0\n')
    for given in ("resolve", file, str(file), design("resolve")):
        offload(model, given).close()
    for wrong in (None, 5, b"clo"):
        with pytest.raises(NotFoundError, match=r"is unknown.*choose from clo"):
            offload(model, wrong)  # type: ignore[arg-type]
