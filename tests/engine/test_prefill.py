"""Prefill in chunks against a prompt read at once and taken in at the end: the same bits, in the same places."""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from small import DIM, KV_HEADS, LAYERS, PAGE, SELECTORS, WINDOW, design, prompt, small_model

from clo import presets
from clo.engine.decoder import Decoder
from clo.engine.heads import HeadProfile
from clo.engine.layers import DenseLayer, Layer, LayerShape, OffloadedLayer
from clo.engine.make_layers import make_layers
from clo.engine.models.network import Network
from clo.engine.prefill import PREFILL_CHUNK_TOKENS, _DensePrompt, prefill_bytes, read_into
from clo.engine.prompts import Prompt, read_prompt
from clo.errors import EngineError
from clo.specs import Design, Selector

NAMES = presets.names("designs")
CHUNK = 24
LENGTHS = [
    *(1, PAGE - 1, PAGE, WINDOW, WINDOW + 1),
    *(CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, CHUNK + WINDOW, CHUNK + WINDOW + PAGE - 1, CHUNK + WINDOW + PAGE),
    *(3 * CHUNK + 17, 4 * CHUNK + 1),
]


def sparse(name: str, **changes: Any) -> Design:
    """A design whose budget fits a prompt of any length."""
    chosen = design(name)
    if chosen.selects:
        chosen = chosen.with_fields(budget_pages=None, budget_fraction=0.3)
    return chosen.with_fields(**changes)


def empty_layers(network: Network, chosen: Design, lengths: list[int], heads: HeadProfile | None = None) -> list[Layer]:
    """What a decoder has before it reads prompts of these lengths."""
    with Decoder(network, chosen, max_new_tokens=8, heads=heads) as decoder:
        plan = decoder.make_plan(lengths)
        return make_layers(network, plan, decoder.heads, max(lengths) + 8)


def tensors(layer: Layer) -> dict[str, torch.Tensor]:
    """Everything that a layer holds, by name."""
    found: dict[str, torch.Tensor] = {}
    for name, value in vars(layer).items():
        for inner, tensor in {"": value, **getattr(value, "__dict__", {})}.items():
            if isinstance(tensor, torch.Tensor):
                found[f"{name}.{inner}"] = tensor
    if isinstance(layer, OffloadedLayer):
        for part in (layer.kv, layer.residency.table):
            found |= {f"{type(part).__name__}.{n}": t for n in part.__slots__ if torch.is_tensor(t := getattr(part, n))}
    return found


def assert_same(found: list[Layer], wanted: list[Layer]) -> None:
    for layer, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        ours, others = tensors(mine), tensors(theirs)
        assert ours.keys() == others.keys()
        for name, tensor in ours.items():
            same = torch.equal(tensor.view(torch.uint8), others[name].view(torch.uint8))
            assert same, f"layer {layer}: {name} differs"


def taken_in(layers: list[Layer], prompts: list[Prompt]) -> list[Layer]:
    """`layers` after prompts that were read at once."""
    for sequence, read in enumerate(prompts):
        for layer, (keys, values) in zip(layers, read.kv, strict=True):
            layer.load(sequence, keys, values)
    return layers


def assert_prefill_is_load(model: Any, chosen: Design, lengths: list[int], heads: HeadProfile | None = None) -> None:
    network = Network(model)
    texts = [prompt(length, seed) for seed, length in enumerate(lengths)]
    read = [read_prompt(network, text, chunk_tokens=CHUNK) for text in texts]
    found, wanted = (empty_layers(network, chosen, lengths, heads) for _ in range(2))
    taken_in(wanted, read)
    for sequence, text in enumerate(texts):
        logits = read_into(found, sequence, network, text, patience_s=10, chunk_tokens=CHUNK)
        assert torch.equal(logits, read[sequence].logits)
    assert_same(found, wanted)


class TestSameBits:
    @pytest.mark.parametrize("tokens", LENGTHS)
    @pytest.mark.parametrize("name", NAMES)
    def test_every_design_and_length(self, name: str, tokens: int) -> None:
        assert_prefill_is_load(small_model(), sparse(name), [tokens])

    @pytest.mark.parametrize("name", NAMES)
    def test_a_batch_of_different_lengths(self, name: str) -> None:
        assert_prefill_is_load(small_model(), sparse(name), [CHUNK * 3 + 5, 3, CHUNK * 2, CHUNK + WINDOW + 1])

    @pytest.mark.parametrize("selector", SELECTORS)
    @pytest.mark.parametrize("name", ["clo", "resident-sparse", "staged"])
    def test_every_selector(self, name: str, selector: Selector) -> None:
        assert_prefill_is_load(small_model(), sparse(name, selector=selector), [CHUNK * 4 + 7, CHUNK])

    @pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_other_models_and_dtypes(self, kind: str, dtype: torch.dtype) -> None:
        assert_prefill_is_load(small_model(kind, dtype=dtype), sparse("clo"), [CHUNK * 3 + 1])

    def test_a_head_each(self) -> None:
        """Without groups the attention takes the keys as they are given to it, strides and all."""
        model = small_model(num_attention_heads=KV_HEADS)
        for name in ("clo", "resident", "streamed"):
            assert_prefill_is_load(model, sparse(name), [CHUNK * 3 + 1])

    @pytest.mark.parametrize("fraction", [0.5, 1.0])
    def test_pinned_heads(self, fraction: float) -> None:
        heads = HeadProfile(pinned=((1, 0), (0, 1), (1, 0), (0, 1)))
        assert_prefill_is_load(small_model(), sparse("clo", pinned_head_fraction=fraction), [CHUNK * 3 + 1], heads)

    @pytest.mark.parametrize("dense", [0, LAYERS - 1, LAYERS])
    def test_one_layer_on_the_host_or_none_or_all(self, dense: int) -> None:
        assert_prefill_is_load(small_model(), sparse("clo", dense_layers=dense), [CHUNK * 3 + 1, CHUNK * 2])

    def test_pages_longer_than_a_chunk(self) -> None:
        assert_prefill_is_load(small_model(), sparse("clo", page_size=32), [CHUNK * 6 + 1, 20])

    def test_each_token_is_where_it_belongs(self) -> None:
        """Against the prompt itself, token by token, and not against `load`."""
        network, tokens = Network(small_model()), CHUNK * 3 + 17
        layers = empty_layers(network, sparse("clo"), [tokens])
        read_into(layers, 0, network, prompt(tokens), patience_s=10, chunk_tokens=CHUNK)
        layer, read = layers[2], read_prompt(network, prompt(tokens), chunk_tokens=CHUNK)
        assert isinstance(layer, OffloadedLayer)
        start = (tokens - WINDOW) // PAGE * PAGE
        for part in range(2):
            for token in range(tokens):
                wanted, page, row = read.kv[2][part][:, token], token // PAGE, token % PAGE
                if token < start:
                    assert torch.equal(layer.host_pages[0, page, :, part, row], wanted)
                else:
                    assert not layer.host_pages[0, page].any()
                    assert torch.equal(layer.kv.window[0, :, part, token % layer.kv.ring_tokens], wanted)
                if token < PAGE:
                    assert torch.equal(layer.kv.sinks[0, :, part, token], wanted)

    @pytest.mark.parametrize("name", ["clo", "streamed", "resident"])
    def test_the_decoder_answers_alike_given_text_or_what_was_read(self, name: str) -> None:
        model = small_model(max_position_embeddings=2048)
        tokens = prompt(2 * PREFILL_CHUNK_TOKENS + 37)
        said = []
        for given in (tokens, read_prompt(Network(model), tokens)):
            with Decoder(model, sparse(name), max_new_tokens=4) as decoder:
                rows = [decoder.prefill([given, given])]
                rows += [decoder.step(torch.tensor([7, 9])).clone() for _ in range(3)]
                said.append(torch.stack(rows))
        assert torch.equal(*said)


def decoder_layer(model: Any, layer: int) -> Any:
    return model.model.layers[layer]


@contextmanager
def before(module: Any, do: Callable[[], None]) -> Iterator[None]:
    """`do` before `module` computes."""
    hook = module.register_forward_pre_hook(lambda *_: do())
    try:
        yield
    finally:
        hook.remove()


class TestOverlap:
    """By what waits for what, not by the clock: each of these would wait in vain if things came one after the other."""

    @pytest.mark.parametrize("name", ["clo", "streamed"])
    def test_pages_go_to_the_host_while_the_next_layer_computes(
        self, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        model, computes, waited = small_model(), threading.Event(), []
        network = Network(model)
        layers = empty_layers(network, sparse(name), [CHUNK * 2])
        slow_store(monkeypatch, layers[1], lambda: waited.append(computes.wait(10)))
        with before(decoder_layer(model, 2), computes.set):
            read_into(layers, 0, network, prompt(CHUNK * 2), patience_s=20, chunk_tokens=CHUNK)
        assert waited[0]

    def test_pages_go_to_the_host_while_the_next_chunk_computes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, computes, waited, chunks = small_model(), threading.Event(), [], []
        network = Network(model)
        layers = empty_layers(network, sparse("clo"), [CHUNK * 3])
        slow_store(monkeypatch, layers[LAYERS - 1], lambda: waited.append(computes.wait(10)))

        def begins() -> None:
            chunks.append(1)
            if len(chunks) == 2:
                computes.set()

        with before(decoder_layer(model, 0), begins):
            read_into(layers, 0, network, prompt(CHUNK * 3), patience_s=20, chunk_tokens=CHUNK)
        assert waited[0]

    @pytest.mark.parametrize("name", ["clo", "streamed"])
    def test_a_layer_is_fetched_while_the_one_before_it_computes(
        self, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        model, fetched, waited, chunks = small_model(), threading.Event(), [], []
        network = Network(model)
        layers = empty_layers(network, sparse(name), [CHUNK * 2])
        method = "fetch_pages" if isinstance(layers[2], OffloadedLayer) else "fetch"
        healthy = getattr(layers[2], method)

        def fetch(*given: Any) -> None:
            healthy(*given)
            fetched.set()

        monkeypatch.setattr(layers[2], method, fetch)

        def attended() -> None:
            chunks.append(1)
            if len(chunks) == 2:
                waited.append(fetched.wait(10))

        with before(decoder_layer(model, 1).self_attn.o_proj, attended):
            read_into(layers, 0, network, prompt(CHUNK * 2), patience_s=20, chunk_tokens=CHUNK)
        assert waited == [True]

    def test_the_device_holds_two_layers_of_the_prompt(self) -> None:
        """What the model attends lies in two buffers, whatever the number of layers."""
        model, tokens = small_model(num_hidden_layers=9), CHUNK * 3
        network, seen = Network(model), set()
        layers = empty_layers(network, sparse("clo", dense_layers=1), [tokens])
        from transformers import AttentionInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
            if module.layer_idx:
                seen.add(key.untyped_storage().data_ptr())
                assert key.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
                assert key.untyped_storage().nbytes() == tokens * 2 * KV_HEADS * DIM * 4
            return sdpa_attention_forward(module, query, key, value, mask, **options)

        AttentionInterface.register("clo_watch", attend)
        model.set_attn_implementation("clo_watch")
        read_into(layers, 0, network, prompt(tokens), patience_s=20, chunk_tokens=CHUNK)
        assert len(seen) == 2
        with Decoder(network, sparse("clo"), max_new_tokens=8) as decoder:
            plan = decoder.make_plan([tokens])
        assert prefill_bytes(plan, tokens) == 2 * tokens * 2 * KV_HEADS * DIM * 4


def slow_store(monkeypatch: pytest.MonkeyPatch, layer: Layer, first: Callable[[], object]) -> None:
    """`first` happens before the layer's part of a prompt is stored."""
    method = "load" if isinstance(layer, DenseLayer) else "load_pages"
    healthy = getattr(layer, method)

    def store(*given: Any, **named: Any) -> None:
        first()
        healthy(*given, **named)

    monkeypatch.setattr(layer, method, store)


def fail() -> None:
    raise OSError("no space left on device")


def die() -> None:
    raise SystemExit("killed")


LONG = PREFILL_CHUNK_TOKENS + 100


@contextmanager
def faulty(name: str, fault: Callable[[], object], **options: Any) -> Iterator[tuple[Any, Decoder]]:
    """A decoder of which layer 2 does `fault` before it stores pages of the second chunk.

    Afterwards there is nothing to decode, the next prefill works, and no thread is left.
    """
    threads, model = threading.active_count(), small_model(max_position_embeddings=2048)

    def make(*given: Any) -> list[Layer]:
        layers, chunks = make_layers(*given), []

        def second() -> None:
            chunks.append(1)
            if len(chunks) == 2:
                fault()

        slow_store(patch, layers[2], second)
        return layers

    with pytest.MonkeyPatch.context() as patch, Decoder(model, sparse(name), max_new_tokens=8, **options) as decoder:
        patch.setattr("clo.engine.decoder.make_layers", make)
        yield model, decoder
        patch.undo()
        with pytest.raises(EngineError, match="call prefill first"):
            decoder.step(torch.tensor([1]))
        assert torch.isfinite(decoder.prefill([prompt(LONG)])).all()
        assert torch.isfinite(decoder.step(torch.tensor([1]))).all()
    assert threading.active_count() == threads


class TestFaults:
    @pytest.mark.parametrize(
        ("name", "where"),
        [
            ("clo", rf"storing pages {PREFILL_CHUNK_TOKENS // PAGE} to {(LONG - 1) // PAGE} of layer 2"),
            ("resident-sparse", rf"storing pages {PREFILL_CHUNK_TOKENS // PAGE} to {(LONG - 1) // PAGE} of layer 2"),
            ("streamed", rf"storing tokens {PREFILL_CHUNK_TOKENS} to {LONG - 1} of layer 2"),
        ],
    )
    @pytest.mark.parametrize(("fault", "reason"), [(fail, "no space left on device"), (die, "killed")])
    def test_a_store_that_fails_names_layer_and_pages(
        self, name: str, where: str, fault: Callable[[], None], reason: str
    ) -> None:
        with faulty(name, fault) as (_, decoder), pytest.raises(EngineError, match=rf"^prefill: {where}: {reason}$"):
            decoder.prefill([prompt(LONG)])

    def test_a_store_that_hangs_is_not_waited_for_without_end(self) -> None:
        release, began = threading.Event(), time.perf_counter()
        with faulty("clo", lambda: release.wait(20), patience_s=0.5) as (_, decoder):
            with pytest.raises(EngineError, match=r"^prefill: .* of layer \d: not done in 0\.5 s$"):
                decoder.prefill([prompt(LONG)])
            release.set()
        assert time.perf_counter() - began < 15

    def test_what_is_fetched_is_named_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        network = Network(small_model())
        layers = empty_layers(network, sparse("clo"), [CHUNK * 2])
        monkeypatch.setattr(layers[3], "fetch_pages", lambda *_: fail())
        with pytest.raises(EngineError, match=rf"fetching pages 0 to {CHUNK // PAGE - 1} of layer 3: no space"):
            read_into(layers, 0, network, prompt(CHUNK * 2), patience_s=20, chunk_tokens=CHUNK)

    @pytest.mark.parametrize("where", ["model", "store"])
    def test_a_prefill_that_is_interrupted(self, where: str) -> None:
        """Ctrl-C while the model computes, and while it waits for a copy."""
        chunks: list[int] = []

        def interrupt() -> None:
            chunks.append(1)
            if len(chunks) == 2:
                raise KeyboardInterrupt

        def slowly() -> None:
            _thread.interrupt_main()
            time.sleep(0.2)

        with faulty("clo", slowly if where == "store" else lambda: None) as (model, decoder):
            hooked = before(decoder_layer(model, 1), interrupt if where == "model" else lambda: None)
            with hooked, pytest.raises(KeyboardInterrupt):
                decoder.prefill([prompt(LONG)])

    def test_a_model_that_fails(self) -> None:
        with (
            faulty("clo", lambda: None) as (model, decoder),
            before(decoder_layer(model, 3), fail),
            pytest.raises(OSError, match="no space"),
        ):
            decoder.prefill([prompt(LONG)])


def test_a_layer_answers_what_any_version_of_the_library_asks() -> None:
    """New tokens by their number or by their positions; the longest cache under either name."""
    shape = LayerShape(
        batch=1, num_query_heads=6, num_kv_heads=2, head_dim=16, max_tokens=8, scale=1.0,
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    layer = _DensePrompt(DenseLayer(shape), 0)
    layer.lazy_initialization(torch.zeros(1))
    layer.seen = 4
    assert layer.get_mask_sizes(3) == layer.get_mask_sizes(torch.arange(4, 7)) == (7, 0)
    assert layer.get_max_length() == layer.get_max_cache_shape() == -1
