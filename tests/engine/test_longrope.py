"""LongRoPE: texts on either side of a length are rotated differently, whether read at once or in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from forced import CLOSE, forced_logits
from small import DIM, VOCABULARY, dense_logits, design, prompt, small_model

from clo.engine import Decoder, offload
from clo.engine.checks import check_recordable
from clo.engine.inline_decoder import InlineDecoder
from clo.engine.models.library import as_cache
from clo.engine.models.longrope import longest_alike, switches_of
from clo.engine.models.network import Network
from clo.engine.prompts import read_prompt
from clo.engine.recording.attention_recorder import AttentionRecorder, register_attention
from clo.engine.recording.record import _run
from clo.engine.recording.settings import RecordSettings
from clo.errors import EngineError, SpecError

SWITCH, MOST = 64, 256
LONGER: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * (DIM // 2),
    "long_factor": [1.0 + index for index in range(DIM // 2)],
    "original_max_position_embeddings": SWITCH,
}
KINDS = ["llama", "Phi3"]
EVERYTHING: dict[str, Any] = {"budget_fraction": 1.0, "slot_budgets": 1.0, "tau": 2.0}
LENGTHS = [(100, 10), (65, 4), (40, 10), (60, 4)]
"""Of prompts, and what follows: both on one side."""


def longrope_model(kind: str = "llama") -> Any:
    return small_model(
        kind, rope_parameters=LONGER | {}, original_max_position_embeddings=SWITCH, max_position_embeddings=MOST
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "more"), LENGTHS)
class TestOnOneSide:
    def test_a_prompt_in_chunks_is_decoded_as_if_it_were_read_at_once(self, kind: str, tokens: int, more: int) -> None:
        model, text = longrope_model(kind), prompt(tokens + more)
        found = forced_logits(model, design("clo", **EVERYTHING), text, tokens, prefill_chunk_tokens=16)
        torch.testing.assert_close(found, dense_logits(model, text)[tokens - 1 :], **CLOSE)

    def test_step_by_step_too(self, kind: str, tokens: int, more: int) -> None:
        model, text = longrope_model(kind), prompt(tokens + more)
        network = Network(model)
        decoder = InlineDecoder(network, design("clo", **EVERYTHING), max_new_tokens=more)
        rows = [decoder.prefill([read_prompt(network, text[:tokens], chunk_tokens=16)])[0]]
        rows += [decoder.step(token[None])[0].clone() for token in text[tokens:]]
        torch.testing.assert_close(torch.stack(rows), dense_logits(model, text)[tokens - 1 :], **CLOSE)

    @pytest.mark.parametrize("name", ["clo", "clo-v2"])
    def test_generate_is_the_librarys(self, kind: str, tokens: int, more: int, name: str) -> None:
        model, text = longrope_model(kind), prompt(tokens)[None]
        wanted = model.generate(text, max_new_tokens=more, do_sample=False)
        with offload(model, design(name, **EVERYTHING), max_new_tokens=more) as cache:
            found = model.generate(text, **as_cache(model, cache), max_new_tokens=more, do_sample=False)
            assert torch.equal(found, wanted)
            assert cache.get_seq_length() == tokens + more - 1

    def test_a_recorded_text_is_the_librarys(self, kind: str, tokens: int, more: int) -> None:
        model, text = longrope_model(kind), prompt(tokens + more - 1)
        settings = RecordSettings(
            context_tokens=tokens,
            num_steps=more,
            page_size=4,
            max_budget_pages=4,
            num_sink_tokens=2,
            recent_window_tokens=10,
        )
        register_attention()
        nll = _run(AttentionRecorder(model, settings), text[None], settings, lambda *_: None)
        wanted = dense_logits(model, text).log_softmax(-1)[tokens - 1 : -1]
        assert nll == pytest.approx(-wanted.gather(1, text[tokens:, None]).mean().item(), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_text_may_grow_beyond(kind: str) -> None:
    """All of it is known from the start."""
    TestOnOneSide().test_a_recorded_text_is_the_librarys(kind, SWITCH - 4, 10)


class TestFromOneSideToTheOther:
    def test_a_decoder_refuses(self) -> None:
        model = longrope_model()
        with Decoder(model, design("clo"), max_new_tokens=5) as decoder:
            decoder.prefill([prompt(SWITCH - 5)])
            with pytest.raises(SpecError, match=r"more than 64 tokens differently, .*: there is room for 4 new ones"):
                decoder.prefill([prompt(SWITCH - 4)])

    def test_no_batch_has_both(self) -> None:
        network = Network(longrope_model())
        prompts = [prompt(SWITCH), prompt(SWITCH + 1)]
        with Decoder(network, design("clo"), max_new_tokens=5) as decoder:
            with pytest.raises(SpecError, match=r"prompts of 64 to 65 tokens: .* more than 64 tokens differently"):
                decoder.prefill(prompts)
            assert decoder.prefill(prompts[1:]).shape == (1, VOCABULARY)
        inline = InlineDecoder(network, design("clo"), max_new_tokens=5)
        with pytest.raises(SpecError, match=r"prompts of 64 to 65 tokens"):
            inline.prefill([read_prompt(network, each) for each in prompts])

    @pytest.mark.parametrize(("known", "tokens"), [(40, 100), (80, 100), (40, 60)])
    def test_of_a_prompt_that_was_read_only_what_is_alike_is_taken(self, known: int, tokens: int) -> None:
        network, text = Network(longrope_model()), prompt(tokens)
        before = read_prompt(network, text[:known])
        found, wanted = read_prompt(network, text, known=before, shared=known - 5), read_prompt(network, text)
        torch.testing.assert_close(found.logits, wanted.logits, **CLOSE)

    def test_phis_generate_reads_all_of_it_anew_and_is_right(self) -> None:
        model, text = longrope_model("Phi3"), prompt(SWITCH - 4)[None]
        wanted = model.generate(text, max_new_tokens=10, do_sample=False)
        with offload(model, design("clo", **EVERYTHING), max_new_tokens=10) as cache:
            with pytest.warns(UserWarning, match="more than 64 tokens differently: it has room for 4 new ones"):
                found = model.generate(text, **as_cache(model, cache), max_new_tokens=10, do_sample=False)
            assert torch.equal(found, wanted)

    def test_where_the_caller_calls_the_model_it_is_refused(self) -> None:
        model, token = longrope_model("Phi3"), torch.tensor([[1]])
        with torch.no_grad(), offload(model, design("clo"), max_new_tokens=10) as cache:
            model(prompt(SWITCH - 1)[None], **as_cache(model, cache))
            with pytest.warns(UserWarning, match="has room for 1 new ones"):
                model(token, **as_cache(model, cache))
            with pytest.raises(
                EngineError, match="room for 64 tokens: Phi3ForCausalLM rotates longer texts differently"
            ):
                model(token, **as_cache(model, cache))


@pytest.mark.parametrize(("tokens", "wanted"), [(1, 64), (64, 64), (65, 100), (100, 100), (101, MOST), (MOST, MOST)])
def test_how_far_a_text_may_grow(tokens: int, wanted: int) -> None:
    assert longest_alike((64, 100), tokens, MOST) == wanted


def test_which_models_do_so() -> None:
    config = transformers.LlamaConfig(max_position_embeddings=MOST, rope_parameters=LONGER | {})
    assert switches_of(config) == (SWITCH,)
    config.rope_parameters = {"full_attention": LONGER, "sliding_attention": {"rope_type": "default"}}
    assert switches_of(config) == (SWITCH,)
    for other in (None, {"rope_type": "yarn"} | {"original_max_position_embeddings": 64}, LONGER):
        config.rope_parameters = other
        config.max_position_embeddings = MOST if other is not LONGER else SWITCH
        assert switches_of(config) == ()


def test_a_graph_of_a_version_whose_host_chooses_is_refused() -> None:
    chosen, cuda = design("clo"), torch.device("cuda")
    with pytest.raises(SpecError, match=r"before transformers 5.21 the host chooses LongRoPE's factors"):
        check_recordable(chosen, False, cuda, host_sees_positions=True)
    check_recordable(chosen.with_fields(sync="events"), False, cuda, host_sees_positions=True)
    check_recordable(chosen, False, torch.device("cpu"), host_sees_positions=True)
