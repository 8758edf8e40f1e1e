"""Models some of whose layers have a sliding window: those are the library's own, the others follow the design."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from small import DIM, GROUP, KV_HEADS, design, small_model
from test_memory import held
from whole_models import Attention, assert_same, batch, everything, generated
from windowed import FULL, IMAGE, KINDS, LAYERS, SLIDES, WINDOW, seeing_model, windowed_config, windowed_model

from clo import presets
from clo.engine import hf, memory, offload
from clo.engine.decoder import Decoder
from clo.engine.models.library import as_cache
from clo.engine.models.network import Network
from clo.errors import EngineError, SpecError
from clo.specs import model_from_hf_config

SLIDING = [layer for layer, kind in enumerate(LAYERS) if kind == SLIDES]
OTHERS = [layer for layer, kind in enumerate(LAYERS) if kind == FULL]
DESIGNS = presets.names("designs")


def generate(model: Any, ids: torch.Tensor, cache: Any, tokens: int = 20, **options: Any) -> Any:
    return generated(model, ids, cache, tokens, **options)


class TestEverythingAttended:
    """Then a model generates what it does alone."""

    @pytest.mark.parametrize("tokens", [WINDOW - 5, WINDOW - 1, WINDOW, 45], ids="prompt{}".format)
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_kind_of_model(self, kind: str, tokens: int) -> None:
        """Prompts on both sides of the window's edge, decoding past it."""
        model, ids = windowed_model(kind), batch(tokens)
        wanted = generate(model, ids, None)
        with offload(model, everything("staged", recent_window_tokens=32), max_new_tokens=20) as cache:
            assert_same(generate(model, ids, cache), wanted)
            assert cache.decodes
        assert_same(generate(model, ids, None), wanted)

    @pytest.mark.parametrize("kind", ["Gemma3", "GptOss", "Qwen3"])
    @pytest.mark.parametrize("name", DESIGNS)
    def test_every_design(self, name: str, kind: str) -> None:
        model, ids = windowed_model(kind), batch(70)
        wanted = generate(model, ids, None)
        with offload(model, everything(name), max_new_tokens=20) as cache:
            assert_same(generate(model, ids, cache), wanted)

    @pytest.mark.parametrize("depth", [0, 1, 2])
    @pytest.mark.parametrize("layers", [(FULL, SLIDES), (SLIDES, FULL), (SLIDES, SLIDES, FULL, SLIDES)])
    def test_wherever_the_layers_are(self, layers: tuple[str, ...], depth: int) -> None:
        model, ids = windowed_model("Gemma3", layers=layers), batch(70)
        wanted = generate(model, ids, None)
        chosen = everything("clo", prefetch_depth=depth, dense_layers=0)
        with offload(model, chosen, max_new_tokens=20) as cache:
            assert_same(generate(model, ids, cache), wanted)

    @pytest.mark.parametrize("question", [1, 5, 30])
    @pytest.mark.parametrize("name", ["clo", "staged", "streamed", "resident"])
    @pytest.mark.parametrize("kind", ["Gemma3", "GptOss"])
    def test_a_chats_next_turns(self, kind: str, name: str, question: int) -> None:
        model, ids, own = windowed_model(kind), batch(70), transformers.DynamicCache(config=windowed_config(kind))
        with offload(model, everything(name, recent_window_tokens=70), max_new_tokens=100) as cache:
            for turn in range(3):
                wanted, found = generate(model, ids, own, 4), generate(model, ids, cache, 4)
                assert_same(found, wanted)
                ids = torch.cat([wanted.sequences, batch(question, 7 + turn)], dim=1)

    @pytest.mark.parametrize("kind", ["Gemma3", "GptOss"])
    def test_a_prompt_in_chunks(self, kind: str) -> None:
        model, ids = windowed_model(kind), batch(70)
        wanted = generate(model, ids, None)
        with offload(model, everything("resolve"), max_new_tokens=20) as cache:
            assert_same(generate(model, ids, cache, prefill_chunk_size=16), wanted)

    def test_a_window_longer_than_all_positions_is_none(self) -> None:
        model, ids = windowed_model("Qwen3", window=256), batch(70)
        assert Network(model).spec.windowed_layers == ()
        wanted = generate(model, ids, None)
        with Decoder(model, everything("clo"), max_new_tokens=20) as decoder:
            decoded = torch.stack(list(decoder.generate(list(ids))), dim=1)
            assert decoded.tolist() == wanted.sequences[:, 70:].tolist()
        with offload(model, everything("clo"), max_new_tokens=20) as cache:
            assert_same(generate(model, ids, cache), wanted)
            assert cache.plan.sparse_layers == tuple(range(1, len(LAYERS)))


class TestGemmaThatSees:
    @pytest.mark.parametrize("name", ["clo", "staged", "streamed", "resident"])
    def test_it_generates_what_it_does_alone(self, name: str) -> None:
        model, ids = seeing_model(), batch(70).clamp(max=IMAGE - 3)
        wanted = generate(model, ids, None)
        with offload(model, everything(name), max_new_tokens=20) as cache:
            assert_same(generate(model, ids, cache), wanted)
            assert set(cache.plan.sparse_layers) <= set(OTHERS)

    def test_of_a_picture_too(self) -> None:
        model, ids = seeing_model(), batch(70).clamp(max=IMAGE - 3)
        ids[:, 20] = IMAGE
        picture = {"pixel_values": torch.rand(2, 3, 8, 8), "token_type_ids": (ids == IMAGE).long()}
        wanted = generate(model, ids, None, **picture)
        with offload(model, everything("clo"), max_new_tokens=20) as cache:
            assert_same(generate(model, ids, cache, **picture), wanted)

    def test_padding_in_front_is_left_out_and_the_model_given_back(self) -> None:
        model, ids = seeing_model(), batch(70).clamp(max=IMAGE - 3)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        wanted = generate(model, ids, None, attention_mask=mask)
        with offload(model, everything("clo"), max_new_tokens=40) as cache:
            assert_same(generate(model, ids, cache, attention_mask=mask), wanted)
        configs = model.config, model.config.text_config, model.config.vision_config
        assert {config._attn_implementation for config in configs} == {"sdpa"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["resolve", "clo", "staged"])
def test_with_a_budget_each_layer_attends_what_it_says(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = windowed_model(kind), batch(70)
    wanted = generate(model, ids, None)
    with offload(model, design(name, budget_pages=2, dense_layers=0), max_new_tokens=20) as cache:
        attention = Attention(monkeypatch, cache)
        found = generate(model, ids, cache)
        assert len(attention.given) == 19 * len(LAYERS)
        for one in attention.given:
            for sequence in range(2):
                for head in range(KV_HEADS * GROUP):
                    exact = attention.in_float64(one, sequence, head)
                    torch.testing.assert_close(one.output[sequence, head].double(), exact, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found.logits[-1], wanted.logits[-1], rtol=1e-2)


class TestPredictions:
    @pytest.mark.parametrize("depth", [1, 2])
    @pytest.mark.parametrize("kind", KINDS)
    def test_are_exact_where_the_layers_between_do_nothing(
        self, kind: str, depth: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever kind of layer they are made in, the target's own rotation is in them."""
        model = windowed_model(kind)
        with torch.no_grad():
            for layer in model.model.layers:
                for weights in (*layer.self_attn.o_proj.parameters(), *layer.mlp.parameters()):
                    weights.zero_()
        seen: dict[int, bool] = {}

        def attend(cache: Any, arrived: Any, query: torch.Tensor, sinks: Any) -> Any:
            if arrived.layer in cache._predicted:
                seen[arrived.layer] = torch.allclose(cache._predicted[arrived.layer], query, rtol=1e-5, atol=1e-5)
            return before(cache, arrived, query, sinks)

        before = hf.OffloadedCache.attend
        monkeypatch.setattr(hf.OffloadedCache, "attend", attend)
        with offload(model, design("staged", budget_pages=2, dense_layers=0, prefetch_depth=depth)) as cache:
            generate(model, batch(40), cache, 4)
        assert seen == {layer: True for layer in OTHERS if layer >= depth}


class TestPlan:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_model_is_what_the_simulator_reads(self, kind: str, tmp_path: Path) -> None:
        file = tmp_path / "config.json"
        file.write_text(json.dumps(windowed_config(kind).to_dict(), default=str))
        of_file, found = model_from_hf_config(file), Network(windowed_model(kind), whole=True).spec
        single = {"weight_bytes_per_value": 4.0, "kv_bytes_per_value": 4.0}
        assert found == of_file.with_fields(name=found.name, source=found.source, **single)
        assert (found.window_tokens, list(found.windowed_layers)) == (WINDOW, SLIDING)


class TestMemory:
    @pytest.mark.parametrize("turns", [1, 2])
    @pytest.mark.parametrize("tokens", [WINDOW - 5, 200])
    def test_what_a_window_keeps_is_bounded(self, tokens: int, turns: int) -> None:
        model, ids = windowed_model("Qwen3"), batch(tokens)
        most = 2 * KV_HEADS * WINDOW * DIM * 4
        with offload(model, design("clo", budget_pages=2), max_new_tokens=60) as cache:
            for _ in range(turns):
                ids = generate(model, ids, cache, 20).sequences
                for layer in SLIDING:
                    kept = cache.layers[layer]
                    assert all(kv.untyped_storage().nbytes() <= most for kv in (kept.keys, kept.values))
                ids = torch.cat([ids, batch(9, 5)], dim=1)
        assert all(layer.keys is None for layer in cache.layers)

    def test_also_while_other_layers_read_the_prompt(self) -> None:
        model, most = windowed_model("Qwen3"), []

        def look(*_: Any) -> None:
            most.extend(cache.layers[layer].keys.untyped_storage().nbytes() for layer in SLIDING)

        with offload(model, design("clo", budget_pages=2)) as cache:
            hook = model.model.norm.register_forward_pre_hook(look)
            generate(model, batch(200), cache, 1)
            hook.remove()
        assert most
        assert max(most) <= 2 * KV_HEADS * WINDOW * DIM * 4

    @pytest.mark.parametrize("name", DESIGNS)
    def test_the_need_is_what_is_taken(self, name: str) -> None:
        model = windowed_model("Gemma3")
        with offload(model, everything(name), max_new_tokens=20) as cache:
            generate(model, batch(70), cache, 15)
            needed = memory.cache_bytes(cache.plan, 90)
            device, host = held(SimpleNamespace(layers=cache._kv.values()))  # type: ignore[arg-type]
            in_windows = len(SLIDING) * 2 * 2 * KV_HEADS * WINDOW * DIM * 4
        assert (needed.device, needed.host) == (device + in_windows, host)


class TestRefused:
    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (lambda: small_model("Mixtral", sliding_window=9), "every layer has a sliding window, of 9 tokens: such"),
            (lambda: windowed_model("Qwen3", layers=(SLIDES, SLIDES)), "every layer has a sliding window, of 12"),
            (lambda: windowed_model("Qwen3", layers=("chunked_attention", FULL)), "chunked_attention of layers is not"),
            (lambda: windowed_model("Gemma2", attn_logit_softcapping=50.0), r"caps its logits.*softcapping = 50\.0"),
            (
                lambda: small_model(
                    "SmolLM3", use_sliding_window=True, sliding_window=9, layer_types=[SLIDES, FULL] * 2
                ),
                "a sliding window of 9 tokens in layers 0, ...: windows of this kind of model are not known",
            ),
        ],
        ids=["all-of-mixtral", "all-of-qwen", "chunks", "softcap", "another-kind"],
    )
    def test_models(self, model: Any, message: str) -> None:
        with pytest.raises(SpecError, match=message):
            offload(model(), design("clo"))

    def test_layers_that_scale_differently(self) -> None:
        model = windowed_model("Qwen3")
        model.model.layers[2].self_attn.scaling = 0.125
        with pytest.raises(SpecError, match=r"layers scale attention differently \(\[0\.125, 0\.25\]\)"):
            offload(model, design("clo"))


@pytest.mark.parametrize("layers", [LAYERS, LAYERS[::-1]], ids=["full-at-the-end", "window-at-the-end"])
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (
            "self_attn.q_proj",
            "attention of layer 5: its output is not finite, first in layer 2: its query of the",
        ),
        ("mlp.down_proj", "first in layer 3: its query, key and value, and so its input: look at layer 2's"),
    ],
)
def test_numbers_that_are_none_are_found(layers: tuple[str, ...], weight: str, message: str) -> None:
    model, ids = windowed_model("Qwen3", layers=layers), batch(40)
    spoilt = model.model.layers[2].get_submodule(weight).weight
    with offload(model, design("clo", budget_pages=2), max_new_tokens=20) as cache, torch.inference_mode():
        model(ids, **as_cache(model, cache))
        spoilt.data[0, 0] = float("nan")
        with pytest.raises(EngineError, match=message):
            model(ids[:, :1], **as_cache(model, cache))


@pytest.mark.parametrize("kind", ["Gemma3", "GptOss"])
def test_the_model_is_given_back(kind: str) -> None:
    model, ids = windowed_model(kind), batch(40)
    before, wanted = model.config._attn_implementation, generate(model, ids, None)
    offload(model, design("clo", budget_pages=2)).close()
    assert model.config._attn_implementation == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert_same(generate(model, ids, None), wanted)
