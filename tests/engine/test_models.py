"""Models that are almost built like Llama: decoded right or refused, never decoded wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from small import DIM, GROUP, KV_HEADS, LAYERS, VOCABULARY, dense_logits, design, prompt

from clo.engine import offload
from clo.engine.decoder import Decoder
from clo.engine.inline_decoder import InlineDecoder
from clo.engine.models.network import Network
from clo.engine.prompts import read_prompt
from clo.errors import SpecError

EVERYTHING: dict[str, Any] = {"budget_fraction": 1.0, "slot_budgets": 1.0, "tau": 2.0}
SAME = ["Gemma", "Helium"]
MORE: dict[str, dict[str, Any]] = {
    "Granite": {"residual_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "SmolLM3": {"no_rope_layers": [1, 1, 1, 0]},
    "HunYuanDenseV1": {},
}


def model_of(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY,
        hidden_size=KV_HEADS * GROUP * DIM,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=KV_HEADS * GROUP,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        max_position_embeddings=256,
        initializer_range=0.15,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
        **changes,
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize("kind", SAME)
def test_a_model_whose_layers_do_the_same_decodes(kind: str) -> None:
    model, tokens = model_of(kind), prompt(70)
    with Decoder(model, design("clo", **EVERYTHING), max_new_tokens=10) as decoder:
        rows = [decoder.prefill([tokens[:60]])[0]]
        rows += [decoder.step(token[None])[0].clone() for token in tokens[60:]]
    torch.testing.assert_close(torch.stack(rows), dense_logits(model, tokens)[59:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MORE)
def test_a_model_whose_layers_do_more_is_refused(kind: str) -> None:
    model, tokens = model_of(kind, **MORE[kind]), prompt(60)
    with (
        Decoder(model, design("clo"), max_new_tokens=10) as decoder,
        pytest.raises(SpecError, match=rf"model {kind}ForCausalLM: taken apart it computes something else"),
    ):
        decoder.prefill([tokens])
    network = Network(model)
    inline = InlineDecoder(network, design("clo"), max_new_tokens=10)
    with pytest.raises(SpecError, match=r"use clo\.engine\.offload"):
        inline.prefill([read_prompt(network, tokens)])


@pytest.mark.parametrize("kind", MORE)
def test_but_offloaded_it_stays_whole_and_is_right(kind: str) -> None:
    model, tokens = model_of(kind, **MORE[kind]), prompt(80)[None]
    wanted = model.generate(tokens, max_new_tokens=15, do_sample=False)
    with offload(model, design("clo", **EVERYTHING), max_new_tokens=20) as cache:
        found = model.generate(tokens, past_key_values=cache, max_new_tokens=15, do_sample=False)
    assert torch.equal(found, wanted)


def test_attention_with_weights_of_its_own_is_refused() -> None:
    with pytest.raises(SpecError, match=r"DiffLlamaForCausalLM: attention has weights of its own \(lambda_q1, "):
        offload(model_of("DiffLlama"), design("clo"))
