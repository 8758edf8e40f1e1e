"""Hybrid models: layers with linear attention are the library's own, the others follow the design."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hybrid import CONV, FULL, KEY_HEADS, KINDS, LAYERS, LINEAR, STATE_DIM, VALUE_HEADS, hybrid_config, hybrid_model
from hybrid import seeing_model as hybrid_that_sees
from small import DIM, GROUP, KV_HEADS, VOCABULARY, design
from test_memory import held
from whole_models import Attention, assert_same, batch, everything, generated

from clo import presets
from clo.engine import hf, memory, mount, offload
from clo.engine.decoder import Decoder
from clo.engine.models import hybrid as models_hybrid
from clo.engine.models.anatomy import project_query
from clo.engine.models.library import as_cache
from clo.engine.models.network import Network
from clo.errors import EngineError, SpecError
from clo.specs import model_from_hf_config

IN_STATES = [layer for layer, kind in enumerate(LAYERS) if kind == LINEAR]
OTHERS = [layer for layer, kind in enumerate(LAYERS) if kind == FULL]
DESIGNS = presets.names("designs")
ROOMY = {"min_budget_pages": 64}
"""As many as any conversation here has: the budget is one of the first prompt."""
ENDS = {"full-at-the-end": LAYERS, "linear-at-the-end": (FULL, LINEAR, FULL, LINEAR)}
CONV_WIDTH = (2 * KEY_HEADS + VALUE_HEADS) * STATE_DIM
STATE_BYTES = 4 * (VALUE_HEADS * STATE_DIM * STATE_DIM + CONV * CONV_WIDTH)


def generate(model: Any, ids: torch.Tensor, cache: Any, tokens: int = 12, **options: Any) -> Any:
    return generated(model, ids, cache, tokens, **options)


class TestEverythingAttended:
    """Then a model generates what it does alone."""

    @pytest.mark.parametrize("tokens", [1, 2, CONV - 1, CONV, 63, 64, 65], ids="prompt{}".format)
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_kind_of_model(self, kind: str, tokens: int) -> None:
        """Prompts on both sides of what the convolution spans, and of the chunks in which states are made."""
        model, ids = hybrid_model(kind), batch(tokens)
        wanted = generate(model, ids, None)
        with offload(model, everything("staged", **ROOMY), max_new_tokens=20) as cache:
            assert_same(generate(model, ids, cache), wanted)
            assert cache.decodes
        assert_same(generate(model, ids, None), wanted)

    @pytest.mark.parametrize("name", DESIGNS)
    def test_every_design(self, name: str) -> None:
        model, ids = hybrid_model("Qwen3Next"), batch(70)
        wanted = generate(model, ids, None)
        with offload(model, everything(name), max_new_tokens=20) as cache:
            assert_same(generate(model, ids, cache), wanted)

    @pytest.mark.parametrize("depth", [0, 1, 2])
    @pytest.mark.parametrize(
        "layers",
        [(LINEAR, FULL), (FULL, LINEAR), (LINEAR, LINEAR, FULL, LINEAR)],
        ids=lambda each: len(each),
    )
    def test_wherever_the_layers_are(self, layers: tuple[str, ...], depth: int) -> None:
        model, ids = hybrid_model("Qwen3_5", layers=layers), batch(70)
        wanted = generate(model, ids, None)
        chosen = everything("clo", prefetch_depth=depth, dense_layers=0)
        with offload(model, chosen, max_new_tokens=20) as cache:
            assert_same(generate(model, ids, cache), wanted)

    @pytest.mark.parametrize("question", [1, 5, 70])
    @pytest.mark.parametrize("name", ["clo", "staged", "streamed", "resident"])
    def test_a_chats_next_turns(self, name: str, question: int) -> None:
        kind = "Qwen3Next" if name == "clo" else "Qwen3_5"
        model, ids, own = hybrid_model(kind), batch(40), transformers.DynamicCache(config=hybrid_config(kind))
        with offload(model, everything(name, **ROOMY), max_new_tokens=160) as cache:
            for turn in range(3):
                wanted, found = generate(model, ids, own, 4), generate(model, ids, cache, 4)
                assert_same(found, wanted)
                ids = torch.cat([wanted.sequences, batch(question, 7 + turn)], dim=1)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_turn_is_what_its_tokens_are_one_by_one(self, kind: str) -> None:
        """With a budget too; states are made of all at once, or one after another."""
        model, ids, question = hybrid_model(kind), batch(70), batch(9, 5)
        logits = []
        for pieces in ([question], question.split(1, dim=1)):
            with (
                offload(model, design("clo", budget_pages=2, tau=2.0), max_new_tokens=20) as cache,
                torch.inference_mode(),
            ):
                model(ids, **as_cache(model, cache))
                model(ids[:, :1], **as_cache(model, cache))
                logits.append(torch.cat([model(piece, **as_cache(model, cache)).logits for piece in pieces], dim=1))
        torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("chunk", [1, 16, 69])
    def test_a_prompt_in_chunks(self, chunk: int) -> None:
        """A chunk of one token at its end is decoded already."""
        model, ids = hybrid_model("Qwen3Next"), batch(70)
        wanted = generate(model, ids, None)
        with offload(model, everything("resolve", **ROOMY), max_new_tokens=90) as cache:
            assert_same(generate(model, ids, cache, prefill_chunk_size=chunk), wanted)


class TestQwenThatSees:
    @pytest.mark.parametrize("kind", ["Qwen3_5", "Qwen3_5Moe"])
    def test_text_it_generates_as_it_does_alone(self, kind: str) -> None:
        model, ids = hybrid_that_sees(kind), batch(70).clamp(max=VOCABULARY - 5)
        wanted = generate(model, ids, None)
        with offload(model, everything("clo"), max_new_tokens=40) as cache:
            assert_same(generate(model, ids, cache), wanted)
            assert set(cache.plan.sparse_layers) <= set(OTHERS)
            told = generate(model, torch.cat([wanted.sequences, ids[:, :5]], dim=1), cache, 3)
        own = transformers.DynamicCache(config=model.config.text_config)
        generate(model, ids, own)
        assert_same(told, generate(model, torch.cat([wanted.sequences, ids[:, :5]], dim=1), own, 3))

    def test_padding_in_front_is_left_out_and_the_model_given_back(self) -> None:
        model, ids = hybrid_that_sees(), batch(70).clamp(max=VOCABULARY - 5)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        wanted = generate(model, ids, None, attention_mask=mask)
        with offload(model, everything("clo"), max_new_tokens=40) as cache:
            assert_same(generate(model, ids, cache, attention_mask=mask), wanted)
        configs = model.config, model.config.text_config, model.config.vision_config
        assert {config._attn_implementation for config in configs} == {"sdpa"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["resolve", "clo", "staged", "recall", "lru-cpu", "clo-v2"])
def test_with_a_budget_each_layer_attends_what_it_says(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = hybrid_model(kind, dtype=torch.float64), batch(70)
    wanted = generate(model, ids, None)
    with offload(model, design(name, budget_pages=2, dense_layers=0), max_new_tokens=20) as cache:
        attention = Attention(monkeypatch, cache)
        found = generate(model, ids, cache)
        assert len(attention.given) == 11 * len(OTHERS)
        for one in attention.given:
            for sequence in range(2):
                for head in range(KV_HEADS * GROUP):
                    exact = attention.in_float64(one, sequence, head)
                    torch.testing.assert_close(one.output[sequence, head], exact, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found.logits[-1], wanted.logits[-1], rtol=1e-2)


class TestPredictions:
    @pytest.mark.parametrize("kind", KINDS)
    def test_of_a_layers_own_input_they_are_its_query(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model, made = hybrid_model(kind), {}

        def attend(_own: Any, module: Any, query: torch.Tensor, *rest: Any, **options: Any) -> Any:
            made[module.layer_idx] = query
            return before(_own, module, query, *rest, **options)

        def look(module: Any, args: Any, kwargs: Any) -> None:
            if hasattr(module, "self_attn"):
                hidden, rotation = args[0] if args else kwargs["hidden_states"], kwargs["position_embeddings"]
                predicted[module.self_attn.layer_idx] = project_query(module, hidden, rotation)

        before, predicted = mount._attend_by, {}
        monkeypatch.setattr(mount, "_attend_by", attend)
        with offload(model, everything("staged")), torch.inference_mode():
            hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in model.model.layers]
            model(batch(40))
            for hook in hooks:
                hook.remove()
        assert sorted(made) == sorted(predicted) == OTHERS
        for layer, query in made.items():
            assert query.shape == (2, KV_HEADS * GROUP, 40, DIM)
            torch.testing.assert_close(predicted[layer], query, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("depth", [1, 2])
    @pytest.mark.parametrize("kind", KINDS)
    def test_are_exact_where_the_layers_between_do_nothing(
        self, kind: str, depth: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """They are made in linear layers, too."""
        model = hybrid_model(kind)
        with torch.no_grad():
            for layer in model.model.layers:
                last = layer.self_attn.o_proj if hasattr(layer, "self_attn") else layer.linear_attn.out_proj
                for weights in (last.weight, *layer.mlp.parameters()):
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

    @pytest.mark.parametrize("depth", [1, 2])
    def test_what_they_fetch_is_attended(self, depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a cache of pages nothing else is: then a wrong prediction is a wrong choice, and seen in it."""
        model, ids = hybrid_model("Qwen3_5", layers=(LINEAR, LINEAR, LINEAR, FULL)), batch(70)
        chosen = design("staged", budget_pages=2, dense_layers=0, prefetch_depth=depth, cache="none")
        pages = {}
        for wrong in (False, True):
            if wrong:
                monkeypatch.setattr(hf, "project_query", lambda *given: -project_query(*given))
            with offload(model, chosen) as cache:
                generate(model, ids, cache, 2)
                pages[wrong] = cache.layer(3).selection.pages.clone()
        assert not torch.equal(pages[False], pages[True])


class TestPlan:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_model_is_what_the_simulator_reads(self, kind: str, tmp_path: Path) -> None:
        file = tmp_path / "config.json"
        file.write_text(json.dumps(hybrid_config(kind).to_dict(), default=str))
        of_file, found = model_from_hf_config(file), Network(hybrid_model(kind), whole=True).spec
        single = {"weight_bytes_per_value": 4.0, "kv_bytes_per_value": 4.0}
        assert found == of_file.with_fields(name=found.name, source=found.source, **single)
        assert found.gated_attention
        assert found.linear is not None
        assert list(found.linear.layers) == IN_STATES
        assert (found.num_query_heads, found.num_kv_heads, found.head_dim) == (KV_HEADS * GROUP, KV_HEADS, DIM)

    @pytest.mark.parametrize("kind", KINDS)
    def test_its_weights_are_those_of_the_model(self, kind: str) -> None:
        model = hybrid_model(kind)
        spec = Network(model, whole=True).spec
        small = ("shared_expert_gate", "conv1d")
        matrices = ((name, weight) for name, weight in model.named_parameters() if weight.dim() > 1)
        values = sum(weight.numel() for name, weight in matrices if not any(part in name for part in small))
        assert spec.weight_bytes / spec.weight_bytes_per_value == values

    def test_gates_without_linear_attention(self) -> None:
        model = hybrid_model("Qwen3Next", layers=(FULL, FULL))
        spec = Network(model, whole=True).spec
        assert (spec.linear, spec.gated_attention, spec.num_query_heads) == (None, True, KV_HEADS * GROUP)


def states(layer: Any) -> list[torch.Tensor]:
    """What a layer with linear attention keeps."""
    kept = layer.conv_states, layer.recurrent_states
    return [each[0] if isinstance(each, dict) else each for each in kept]


class TestMemory:
    @pytest.mark.parametrize("tokens", [2, 200])
    def test_states_are_as_large_after_every_token(self, tokens: int) -> None:
        model, ids = hybrid_model("Qwen3Next"), batch(tokens)
        with offload(model, design("clo", min_budget_pages=2), max_new_tokens=60) as cache:
            for _ in range(2):
                ids = generate(model, ids, cache, 5).sequences
                for layer in IN_STATES:
                    sizes = [each.untyped_storage().nbytes() for each in states(cache.layers[layer])]
                    assert sum(sizes) == 2 * STATE_BYTES
                ids = torch.cat([ids, batch(9, 5)], dim=1)
            kept = [weakref.ref(each) for layer in IN_STATES for each in states(cache.layers[layer])]
        gc.collect()
        assert {each() for each in kept} == {None}

    @pytest.mark.parametrize("name", DESIGNS)
    def test_the_need_is_what_is_taken(self, name: str) -> None:
        model = hybrid_model("Qwen3_5")
        with offload(model, everything(name), max_new_tokens=20) as cache:
            generate(model, batch(70), cache, 15)
            needed = memory.cache_bytes(cache.plan, 90)
            device, host = held(SimpleNamespace(layers=cache._kv.values()))  # type: ignore[arg-type]
            in_states = sum(each.nbytes for layer in IN_STATES for each in states(cache.layers[layer]))
        assert in_states == len(IN_STATES) * 2 * STATE_BYTES
        assert (needed.device, needed.host) == (device + in_states, host)

    def test_of_a_narrow_model_no_less(self) -> None:
        """Some versions of the library keep its states in float32, some do not."""
        model = hybrid_model("Qwen3_5", dtype=torch.bfloat16)
        with offload(model, everything("resident"), max_new_tokens=20) as cache:
            generate(model, batch(70), cache, 15)
            device = held(SimpleNamespace(layers=cache._kv.values()))[0]  # type: ignore[arg-type]
            in_states = sum(each.nbytes for layer in IN_STATES for each in states(cache.layers[layer]))
            wide = len(IN_STATES) * 2 * VALUE_HEADS * STATE_DIM * STATE_DIM * 2
            assert memory.cache_bytes(cache.plan, 90).device - device - in_states in (0, wide)


class TestRefused:
    @pytest.mark.parametrize(
        ("layers", "changes", "message"),
        [
            ((LINEAR, LINEAR), {}, "Qwen3_5ForCausalLM: no layer has keys and values"),
            ((LINEAR, FULL), {"layer_types": [FULL, FULL]}, r"not what its config says \(layer_types = \[\]\)"),
            ((LINEAR, FULL), {"attn_output_gate": False}, "attn_output_gate = False"),
        ],
        ids=["no-keys", "types", "gate"],
    )
    def test_models(self, layers: tuple[str, ...], changes: dict[str, Any], message: str) -> None:
        model = hybrid_model("Qwen3_5", layers=layers)
        for field, value in changes.items():
            setattr(model.config, field, value)
        with pytest.raises(SpecError, match=message):
            offload(model, design("clo"))

    def test_another_kind_of_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = hybrid_model("Qwen3_5")
        monkeypatch.setattr(type(model.config), "model_type", "qwen9")
        with pytest.raises(SpecError, match=rf"Qwen3_5ForCausalLM: .*{LINEAR} of model_type = 'qwen9' is not known"):
            offload(model, design("clo"))
        with pytest.raises(SpecError, match=rf"Qwen3_5ForCausalLM: .*{LINEAR} of model_type = 'qwen9' is not known"):
            Decoder(model, design("clo"))

    def test_a_library_that_is_too_old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = hybrid_model("Qwen3Next")
        for old in ("5.3.0", "5.6.2"):
            monkeypatch.setattr(models_hybrid.transformers, "__version__", old)
            with pytest.raises(SpecError, match=rf"needs transformers 5\.7 or newer, this is {old}, where it forgets"):
                offload(model, design("clo"))
        for new in ("5.7.0", "5.10.0.dev0", "6.0.0rc1"):
            monkeypatch.setattr(models_hybrid.transformers, "__version__", new)
            offload(model, design("clo")).close()

    def test_states_cannot_take_back_tokens(self) -> None:
        model = hybrid_model("Qwen3Next")
        with offload(model, design("clo", budget_pages=2), max_new_tokens=40) as cache:
            generate(model, batch(70), cache, 4)
            with pytest.raises(SpecError, match="cannot be taken back"):
                cache.layers[0].activate_past_recording()
            assert not any(layer.is_croppable for layer in cache.layers)

    def test_beams_and_guesses(self) -> None:
        model, ids = hybrid_model("Qwen3Next"), batch(70)
        with offload(model, design("clo", budget_pages=2)) as cache, pytest.raises(SpecError, match="beam search"):
            generate(model, ids, cache, num_beams=2)
        with (
            offload(model, design("clo", budget_pages=2)) as cache,
            pytest.raises((SpecError, ValueError), match=r"cannot be taken back|assisted generation is not supported"),
        ):
            generate(model, ids[:1], cache, prompt_lookup_num_tokens=3)


LAST_IS_FULL, LAST_IS_LINEAR = (LINEAR, FULL, LINEAR, FULL), (LINEAR, FULL, LINEAR, LINEAR)


@pytest.mark.parametrize("layers", [LAST_IS_FULL, LAST_IS_LINEAR], ids=["full-at-the-end", "linear-at-the-end"])
@pytest.mark.parametrize(
    ("layer", "weight", "row", "message"),
    [
        (0, "linear_attn.in_proj_qkv", 0, "first in layer 0: its projections of the newest token"),
        (0, "linear_attn.A_log", 0, "first in layer 0: its states"),
        (0, "linear_attn.in_proj_z", 0, "first in layer 1: its query, key and value, .*: look at layer 0's gate, or w"),
        (0, "linear_attn.out_proj", 0, "first in layer 1: its query, key and value, .*: look at layer 0's gate, or w"),
        (1, "self_attn.q_proj", 0, "first in layer 1: its query of the newest token"),
        (1, "self_attn.k_proj", 0, "first in layer 1: its key of the newest token"),
        (1, "self_attn.q_proj", DIM, "first in layer 2: its projections, .*: look at layer 1's gate, or weights beh"),
        (1, "mlp.down_proj", 0, "first in layer 2: its projections, and so its input: look at layer 1's gate, or w"),
        (2, "linear_attn.in_proj_qkv", 0, "first in layer 2: its projections of the newest token"),
    ],
)
def test_numbers_that_are_none_are_found(
    layers: tuple[str, ...], layer: int, weight: str, row: int, message: str
) -> None:
    model, ids = hybrid_model("Qwen3_5", layers=layers), batch(40)
    spoilt = model.get_parameter(f"model.layers.{layer}.{weight}" + (".weight" if "proj" in weight else ""))
    what = "output is" if layers is LAST_IS_FULL else "states are"
    with offload(model, design("clo", budget_pages=2), max_new_tokens=20) as cache, torch.inference_mode():
        model(ids, **as_cache(model, cache))
        spoilt.data[row] = float("nan")
        with pytest.raises(EngineError, match=f"attention of layer 3: its {what} not finite, {message}"):
            model(ids[:, :1], **as_cache(model, cache))


class TestSeveralCaches:
    def test_they_keep_their_own_states(self) -> None:
        model, ids, others = hybrid_model("Qwen3Next"), batch(40), batch(50, 8)
        wanted = [generate(model, each, None) for each in (ids, others)]
        first, second = (offload(model, everything("clo"), max_new_tokens=40) for _ in range(2))
        told, asked = (generate(model, each, cache, 5) for each, cache in ((ids, first), (others, second)))
        assert_same(generate(model, told.sequences, first, 7), SimpleNamespace(**tail_of(wanted[0])))
        first.close()
        assert_same(generate(model, asked.sequences, second, 7), SimpleNamespace(**tail_of(wanted[1])))
        second.close()
        assert_same(generate(model, ids, None), wanted[0])

    def test_one_that_is_dropped_is_gone_and_the_model_as_before(self) -> None:
        model = hybrid_model("Qwen3Next")
        before = model.config._attn_implementation
        gc.collect()
        gc.disable()
        try:
            cache = offload(model, design("clo", budget_pages=3), max_new_tokens=20)
            generate(model, batch(40), cache, 3)
            kept = [weakref.ref(cache.layer(2)), weakref.ref(states(cache.layers[0])[1])]
            del cache
            assert [each() for each in kept] == [None, None]
            assert model.config._attn_implementation == before
            assert not any(module._forward_pre_hooks for module in model.modules())
        finally:
            gc.enable()

    def test_a_closed_one_says_so_before_and_after_decoding(self) -> None:
        model, ids = hybrid_model("Qwen3Next"), batch(40)
        for tokens in (0, 1, 4):
            cache = offload(model, design("clo", budget_pages=3), max_new_tokens=20)
            if tokens:
                generate(model, ids, cache, tokens)
            cache.close()
            with pytest.raises(EngineError, match="cache: closed"), torch.inference_mode():
                model(ids, **as_cache(model, cache))
            assert not any(isinstance(each, torch.Tensor) for each in states(cache.layers[0]))


def tail_of(whole: Any) -> dict[str, Any]:
    """The end of a generation, as if it had gone on after its fifth token."""
    return {"sequences": whole.sequences, "logits": whole.logits[5:]}
