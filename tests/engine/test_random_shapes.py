"""Random models of the shapes of presets, and their first layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from latent import latent_model
from small import design

from clo import presets
from clo.engine.decoder import Decoder
from clo.engine.models.made_up import library_kind
from clo.engine.models.network import Network
from clo.engine.models.probe import check_taken_apart
from clo.engine.random_weights import checked, random_model, random_prompt
from clo.errors import SpecError
from clo.specs import ModelSpec
from clo.specs.cut import first_layers

LATENT_SIZES = {"kv_rank": 24, "rope_dim": 8, "nope_dim": 16, "value_dim": 12}
SMALL = {"vocab_size": 97, "max_positions": 512, "intermediate_size": 96, "head_dim": 16}
NO_DECODER = "minimax-m3"


def scaled_down(model: ModelSpec) -> ModelSpec:
    """As many layers of each kind and heads of each sort, narrow, with weights in single precision."""
    model = first_layers(model, min(8, model.num_layers))
    narrow: dict[str, Any] = {"num_experts": 16, "intermediate_size": 32, "weight_bytes_per_value": None}
    if model.experts is not None and model.experts.shared_intermediate_size:
        narrow["shared_intermediate_size"] = 24 if model.latent is None else 64
    latent = model.latent and model.latent.with_fields(**LATENT_SIZES)
    small_indexer = {"num_heads": 4, "head_dim": 16, "top_tokens": 12, "key_bytes": 64.0}
    return model.with_fields(
        **SMALL | ({} if latent is None else {"latent": latent.model_dump(), "head_dim": latent.vector_dim}),
        hidden_size=2 * model.num_query_heads,
        experts=model.experts and model.experts.with_fields(**narrow).model_dump(),
        indexer=model.indexer and model.indexer.with_fields(**small_indexer).model_dump(),
        window_tokens=48 if model.windowed_layers else None,
        weight_bytes_per_value=4.0,
        mlp_weight_bytes_per_value=None,
        kv_bytes_per_value=4.0,
    )


class TestRandomWeights:
    @pytest.mark.parametrize("name", [name for name in presets.names("models") if name != NO_DECODER])
    def test_every_preset_has_a_model_of_its_shape(self, name: str) -> None:
        wanted = scaled_down(presets.load_model(name))
        if wanted.latent is not None:
            latent_model("DeepseekV3" if wanted.indexer is None else "DeepseekV32")  # skips where there is none
        network = Network(random_model(wanted, likeness=0), wanted.name)
        # a kind of model all of whose layers have experts says nothing of an MLP
        same = {"source": "", "intermediate_size": 1}
        assert network.spec.with_fields(**same) == wanted.with_fields(**same)
        check_taken_apart(network)
        with Decoder(network, design("clo", budget_pages=2), max_new_tokens=3) as decoder:
            decoder.prefill([random_prompt(network, tokens, seed=tokens) for tokens in (70, 40)])
            logits = [decoder.step(torch.tensor([1, 2])).clone() for _ in range(3)]
        assert all(bool(torch.isfinite(each).all()) for each in logits)

    def test_what_the_decoder_has_not_is_said(self) -> None:
        model = first_layers(presets.load_model(NO_DECODER), 4)
        with pytest.raises(SpecError, match="minimax-m3: an indexer without latent attention is simulated only"):
            checked(model)

    @pytest.mark.parametrize(
        ("base", "changes", "message"),
        [
            ("qwen2.5-14b", {"window_tokens": 9, "windowed_layers": [0]}, ""),
            ("qwen3-30b-a3b", {"window_tokens": 9, "windowed_layers": [0]}, ""),
            ("qwen3.5-27b", {"gated_attention": False}, "linear attention without a gate"),
        ],
    )
    def test_shapes_that_are_put_together(self, base: str, changes: dict[str, Any], message: str) -> None:
        shape = first_layers(presets.load_model(base), 4).with_fields(**changes)
        if not message:
            assert library_kind(shape)[0] in ("Qwen3", "GptOss")
            return
        with pytest.raises(SpecError, match=message):
            library_kind(shape)

    @pytest.mark.parametrize("changes", [{"dense_layers": 1}, {"layers": [1, 5]}])
    def test_windows_beside_layers_without_experts(self, changes: dict[str, Any]) -> None:
        shape = presets.load_model("qwen3-30b-a3b").with_fields(window_tokens=9, windowed_layers=[0])
        assert shape.experts is not None
        with pytest.raises(SpecError, match="windows together with layers without experts, and no shared expert"):
            library_kind(shape.with_fields(experts=shape.experts.with_fields(**changes).model_dump()))

    def test_latent_attention_with_experts_here_and_there(self) -> None:
        shape = presets.load_model("deepseek-v3")
        assert shape.experts is not None
        some = shape.experts.with_fields(dense_layers=0, layers=[3, 5]).model_dump()
        with pytest.raises(SpecError, match="latent attention with experts in layers of your choice"):
            library_kind(shape.with_fields(experts=some))

    def test_windows_beside_gates(self) -> None:
        shape = presets.load_model("llama-3-8b").with_fields(gated_attention=True)
        with pytest.raises(SpecError, match="windows together with gated attention are simulated only"):
            library_kind(shape.with_fields(window_tokens=16, windowed_layers=[0]))

    def test_heads_that_cannot_be_rotated(self) -> None:
        with pytest.raises(SpecError, match="head_dim = 15: rotary positions need an even one"):
            checked(presets.load_model("smollm2-135m").with_fields(head_dim=15))

    def test_weights_of_four_bits_are_loaded_in_single_precision(self) -> None:
        with pytest.raises(SpecError, match="its weights take 467 GB in single precision"):
            checked(presets.load_model("gpt-oss-120b"))


class TestFirstLayers:
    @pytest.mark.parametrize("name", presets.names("models"))
    def test_what_is_left_is_as_it_was(self, name: str) -> None:
        model = presets.load_model(name)
        short = first_layers(model, 7)
        assert short.num_layers == 7
        for layer in range(7):
            assert short.attended_at_most(layer, 10**6) == model.attended_at_most(layer, 10**6)
            assert short.projections_in(layer) == model.projections_in(layer)
            assert short.indexer_in(layer) == (short.indexer if model.indexer_in(layer) else None)
        assert first_layers(model, model.num_layers) == model

    def test_layers_before_those_with_experts_have_none(self) -> None:
        model = presets.load_model("deepseek-v3")
        assert first_layers(model, 3).experts is None
        assert first_layers(model, 4).experts == model.experts
        with pytest.raises(SpecError, match=r"num_layers"):
            first_layers(model, 0)

    @pytest.mark.parametrize(
        ("name", "count", "message"),
        [("gemma-3-27b", 5, "layer 5: take at least 6"), ("qwen3.5-27b", 3, "layer 3: take at least 4")],
    )
    def test_at_least_one_keeps_the_whole_context(self, name: str, count: int, message: str) -> None:
        with pytest.raises(SpecError, match=f"the first that keeps the whole context is {message}"):
            first_layers(presets.load_model(name), count)
