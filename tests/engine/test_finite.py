"""Logits that are not finite: the error names the first layer, and what of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import KV_HEADS, PAGE, design, prompt, small_model

from clo.engine.decoder import Decoder
from clo.engine.layers import DenseLayer, OffloadedLayer, StreamedLayer
from clo.errors import EngineError
from clo.specs import Design

NAN = float("nan")
TOKENS = 80


def whole(name: str) -> Design:
    """Everything is attended, and fetched anew in each step where the design has slots to spare."""
    chosen = design(name)
    if chosen.selects:
        chosen = chosen.with_fields(budget_pages=None, budget_fraction=1.0)
    return chosen


def spoil(weight: torch.Tensor, value: float = NAN) -> None:
    with torch.no_grad():
        weight.view(-1)[0] = value


def part_of(model: Any, layer: int, name: str) -> torch.Tensor:
    module = model.model.layers[layer]
    for step in name.split("."):
        module = getattr(module, step)
    weight: torch.Tensor = module.weight
    return weight


QKV = "its query, key and value, and so its input"
WEIGHTS = [
    ("self_attn.q_proj", "first in layer 2: its query of the newest token$"),
    ("self_attn.k_proj", "first in layer 2: its key of the newest token$"),
    ("self_attn.v_proj", "first in layer 2: its value of the newest token$"),
    ("input_layernorm", rf"first in layer 2: {QKV}: look at layer 1's weights behind its attention, or at its input"),
    ("self_attn.o_proj", rf"first in layer 3: {QKV}: look at layer 2's weights behind its attention"),
    ("mlp.down_proj", rf"first in layer 3: {QKV}: look at layer 2's weights behind its attention"),
]


class TestStep:
    @pytest.mark.parametrize("name", ["clo", "resident", "streamed", "recall"])
    @pytest.mark.parametrize(("weight", "message"), WEIGHTS)
    def test_a_weight_of_a_middle_layer(self, name: str, weight: str, message: str) -> None:
        model = small_model()
        with Decoder(model, whole(name), max_new_tokens=8) as decoder:
            decoder.prefill([prompt(TOKENS)])
            decoder.step(torch.tensor([1]))
            spoil(part_of(model, 2, weight))
            with pytest.raises(EngineError, match=rf"operation lm_head .*: the logits are not finite, {message}"):
                decoder.step(torch.tensor([1]))

    def test_infinity_counts(self) -> None:
        model = small_model()
        with Decoder(model, whole("clo"), max_new_tokens=8) as decoder:
            decoder.prefill([prompt(TOKENS)])
            spoil(part_of(model, 1, "self_attn.k_proj"), float("inf"))
            with pytest.raises(EngineError, match="first in layer 1: its key of the newest token"):
                decoder.step(torch.tensor([1]))

    def test_after_the_last_layer(self) -> None:
        model = small_model()
        with Decoder(model, whole("clo"), max_new_tokens=8) as decoder:
            decoder.prefill([prompt(TOKENS)])
            spoil(model.model.norm.weight)
            with pytest.raises(EngineError, match=r"look at layer 3's weights .* the final norm and the head"):
                decoder.step(torch.tensor([1]))

    @pytest.mark.parametrize(("part", "kind"), [(0, "key"), (1, "value")])
    @pytest.mark.parametrize("layer", [1, 3])
    def test_a_page_on_the_host(self, layer: int, part: int, kind: str) -> None:
        """Also in the last layer, behind which there is no query to show it."""
        with Decoder(small_model(), whole("staged"), max_new_tokens=8) as decoder:
            decoder.prefill([prompt(TOKENS), prompt(TOKENS, 1)])
            kv = decoder.layers[layer]
            assert isinstance(kv, OffloadedLayer)
            kv.host_pages[1, 7, KV_HEADS - 1, part, PAGE - 1, 2] = NAN
            message = rf"first in layer {layer}: a {kind} \(host page 7 of KV head {KV_HEADS - 1}, sequence 1\)"
            with pytest.raises(EngineError, match=message):
                decoder.step(torch.tensor([1, 2]))

    def test_a_page_that_is_not_attended_harms_nobody(self) -> None:
        with Decoder(small_model(), design("clo", budget_pages=2, tau=2.0), max_new_tokens=8) as decoder:
            decoder.prefill([prompt(TOKENS)])
            decoder.step(torch.tensor([1]))
            kv = decoder.layers[2]
            assert isinstance(kv, OffloadedLayer)
            kv.host_pages[0, 0] = NAN
            assert torch.isfinite(decoder.step(torch.tensor([1]))).all()

    @pytest.mark.parametrize("name", ["resident", "streamed"])
    def test_a_token_where_all_are_kept(self, name: str) -> None:
        with Decoder(small_model(), whole(name), max_new_tokens=8) as decoder:
            decoder.prefill([prompt(TOKENS)])
            kv = decoder.layers[2]
            assert isinstance(kv, DenseLayer)
            store = kv.host if isinstance(kv, StreamedLayer) else kv.kv
            store[0, 1, 1, 33] = NAN
            with pytest.raises(EngineError, match=r"first in layer 2: a value \(token 33 of KV head 1, sequence 0\)"):
                decoder.step(torch.tensor([1]))

    @pytest.mark.parametrize(
        # the page that leaves the window in this step takes it to the host
        ("place", "found"),
        [("window", "host page 17"), ("sinks", "token 0"), ("slots", "slot 0"), ("pinned", "token 0")],
    )
    def test_what_is_on_the_device(self, place: str, found: str) -> None:
        chosen = design("clo", budget_pages=2, pinned_head_fraction=0.5)
        with Decoder(small_model(), chosen, max_new_tokens=8) as decoder:
            decoder.prefill([prompt(TOKENS)])
            decoder.step(torch.tensor([1]))
            kv = decoder.layers[2]
            assert isinstance(kv, OffloadedLayer)
            getattr(kv.kv, place)[0] = NAN
            with pytest.raises(EngineError, match=rf"first in layer 2: a key \({found} of KV head"):
                decoder.step(torch.tensor([1]))


class TestPrompt:
    @pytest.mark.parametrize("name", ["clo", "resident", "streamed", "resident-sparse"])
    @pytest.mark.parametrize(
        ("weight", "message"),
        [
            ("self_attn.q_proj", rf"first in layer 3: {QKV}: look at layer 2's query, or weights behind its attention"),
            ("self_attn.k_proj", r"first in layer 2: a key \("),
            ("self_attn.v_proj", r"first in layer 2: a value \("),
            ("mlp.down_proj", rf"first in layer 3: {QKV}: look at layer 2's query, or weights"),
        ],
    )
    def test_a_weight_of_a_middle_layer(self, name: str, weight: str, message: str) -> None:
        model = small_model()
        spoilt = part_of(model, 2, weight)
        healthy = spoilt.view(-1)[0].item()
        with Decoder(model, whole(name), max_new_tokens=8) as decoder:
            spoil(spoilt)
            with pytest.raises(EngineError, match=rf"^prefill: the logits are not finite, {message}"):
                decoder.prefill([prompt(TOKENS)])
            with pytest.raises(EngineError, match="call prefill first"):
                decoder.step(torch.tensor([1]))
            spoil(spoilt, healthy)
            assert torch.isfinite(decoder.prefill([prompt(TOKENS)])).all()
            assert torch.isfinite(decoder.step(torch.tensor([1]))).all()

    @pytest.mark.parametrize(
        ("weight", "message"),
        [
            ("embed_tokens", "first in layer 0: .* the embedding or"),
            ("norm", "look at layer 3's query, or .* the head"),
        ],
    )
    def test_before_the_first_and_after_the_last_layer(self, weight: str, message: str) -> None:
        model = small_model()
        with torch.no_grad():
            getattr(model.model, weight).weight[:] = NAN
        with Decoder(model, whole("clo"), max_new_tokens=8) as decoder, pytest.raises(EngineError, match=message):
            decoder.prefill([prompt(TOKENS)])
