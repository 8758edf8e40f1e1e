"""Models that are almost built like Llama: decoded right or refused, never decoded wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from forced import forced_logits
from small import DIM, GROUP, KV_HEADS, LAYERS, VOCABULARY, dense_logits, design, prompt, small_model

from clo.engine import offload
from clo.engine.decoder import Decoder
from clo.engine.inline_decoder import InlineDecoder
from clo.engine.models.library import as_cache
from clo.engine.models.network import Network
from clo.engine.models.probe import check_taken_apart
from clo.engine.prompts import read_prompt
from clo.errors import SpecError

EVERYTHING: dict[str, Any] = {"budget_fraction": 1.0, "slot_budgets": 1.0, "tau": 2.0}
SAME = ["Gemma", "Glm", "Glm4", "Helium", "Phi3"]
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
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
        **{"initializer_range": 0.15} | changes,
    )
    return getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).eval()


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
        found = model.generate(tokens, **as_cache(model, cache), max_new_tokens=15, do_sample=False)
    assert torch.equal(found, wanted)


def test_attention_with_weights_of_its_own_is_refused() -> None:
    with pytest.raises(SpecError, match=r"DiffLlamaForCausalLM: attention has weights of its own \(lambda_q1, "):
        offload(model_of("DiffLlama"), design("clo"))


@pytest.mark.parametrize(
    ("kind", "changes", "problem"),
    [
        (
            "Laguna",
            {"num_attention_heads_per_layer": [6, 8, 6, 8], "layer_types": ["full_attention", "sliding_attention"] * 2},
            rf"the first is {6 * DIM}x{KV_HEADS * GROUP * DIM}, .* number 2 {8 * DIM}x",
        ),
        ("MiMoV2Flash", {}, "layers differ in their heads"),
    ],
)
def test_layers_that_differ_in_their_heads_are_refused(kind: str, changes: dict[str, Any], problem: str) -> None:
    model = model_of(kind, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, **changes)
    with pytest.raises(SpecError, match=problem):
        offload(model, design("clo"))


class TestChunks:
    """Layers of Llama 4 that attend within chunks."""

    def model(self, tokens: int) -> Any:
        more = {"intermediate_size_mlp": 64, "num_local_experts": 2}
        return model_of("Llama4Text", attention_chunk_size=tokens, **more)

    def test_of_a_part_of_the_positions_are_refused(self) -> None:
        with pytest.raises(SpecError, match=r"within chunks of 255 tokens .* simulated only \(clo simulate\)"):
            offload(self.model(255), design("clo"))

    def test_of_all_positions_are_none(self) -> None:
        model, tokens = self.model(256), prompt(80)[None]
        wanted = model.generate(tokens, max_new_tokens=15, do_sample=False)
        with offload(model, design("clo", **EVERYTHING), max_new_tokens=20) as cache:
            assert torch.equal(
                model.generate(tokens, **as_cache(model, cache), max_new_tokens=15, do_sample=False), wanted
            )


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALED = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
A_LITTLE_MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "residuals": ("Granite", {"residual_multiplier": 0.95}),
    "embeddings": ("Granite", {"embedding_multiplier": 1.05}),
    "logits": ("Granite", {"logits_scaling": 1.05}),
    "rotation": ("SmolLM3", {"no_rope_layers": [1, 1, 1, 0]}),
    "norms": ("Exaone4", {}),
    "far-queries": ("Ministral3", {"rope_parameters": SCALED | {"llama_4_scaling_beta": 0.1}}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [0.15, 0.02])
class TestInAnyPrecision:
    """A model that computes a little more is told from one that rounds."""

    @pytest.mark.parametrize("kind", A_LITTLE_MORE)
    def test_what_does_more_is_refused(self, kind: str, dtype: torch.dtype, weights: float) -> None:
        name, fields = A_LITTLE_MORE[kind]
        if not hasattr(transformers, f"{name}Config"):
            pytest.skip(f"this version of transformers has no {name}")
        model = model_of(name, **fields | {"initializer_range": weights}).to(dtype)
        with pytest.raises(SpecError, match="taken apart it computes something else"):
            check_taken_apart(Network(model))

    @pytest.mark.parametrize("kind", [*SAME, "Olmo2", "SeedOss"])
    def test_what_does_the_same_is_taken(self, kind: str, dtype: torch.dtype, weights: float) -> None:
        check_taken_apart(Network(model_of(kind, initializer_range=weights).to(dtype)))


def test_rotation_of_a_part_that_attention_cuts_out_itself() -> None:
    """The decoder says so; `offload` takes the model as long as nothing is predicted."""
    model, tokens = model_of("StableLm", partial_rotary_factor=0.25), prompt(60)[None]
    with pytest.raises(SpecError, match=r"taken apart it computes something else: .* \(RuntimeError: "):
        check_taken_apart(Network(model))
    with pytest.raises(SpecError, match="its queries cannot be predicted"):
        offload(model, design("clo", prefetch_depth=1))
    wanted = model.generate(tokens, max_new_tokens=15, do_sample=False)
    with offload(model, design("clo", **EVERYTHING, prefetch_depth=0), max_new_tokens=20) as cache:
        assert torch.equal(model.generate(tokens, **as_cache(model, cache), max_new_tokens=15, do_sample=False), wanted)


@pytest.mark.parametrize("changes", [{"decoder_sparse_step": 2}, {"mlp_only_layers": [1]}])
@pytest.mark.parametrize("kind", ["Qwen2Moe", "Qwen3Moe"])
def test_experts_in_some_layers(kind: str, changes: dict[str, Any]) -> None:
    model, tokens = small_model(kind, **changes), prompt(70)
    found = forced_logits(model, design("clo", **EVERYTHING), tokens, 60)
    torch.testing.assert_close(found, dense_logits(model, tokens)[59:], rtol=1e-4, atol=1e-4)


def test_experts_where_the_config_has_none() -> None:
    model = small_model("Qwen3Moe")
    model.config.mlp_only_layers = [1]
    with pytest.raises(
        SpecError, match=r"layer 1 has other MLPs or experts than its config .* use clo\.engine\.offload"
    ):
        Network(model)


def test_a_mixture_all_of_whose_layers_have_mlps_has_no_experts() -> None:
    model, tokens = small_model("Qwen3Moe", mlp_only_layers=list(range(LAYERS))), prompt(70)
    assert Network(model).spec.experts is None
    found = forced_logits(model, design("clo", **EVERYTHING), tokens, 60)
    torch.testing.assert_close(found, dense_logits(model, tokens)[59:], rtol=1e-4, atol=1e-4)
