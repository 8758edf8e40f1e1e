"""A model while a cache of `offload` is open: what may be done with it meanwhile, and what is refused by name."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hybrid import hybrid_model
from small import design, prompt, small_model
from windowed import windowed_model

from clo.engine import offload
from clo.engine.hf import OffloadedCache
from clo.engine.models.library import as_cache
from clo.errors import EngineError, SpecError

MODELS: dict[str, Callable[[], Any]] = {
    "llama": small_model,
    "windows": lambda: windowed_model("Gemma3"),
    "linear attention": lambda: hybrid_model("Qwen3Next"),
}
OF_COPIES: dict[str, Callable[[Any], Any]] = {
    "copy.deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "torch.save": lambda model: torch.save(model, io.BytesIO()),
}


def generated(model: Any, cache: Any, tokens: int = 8) -> list[int]:
    found = model.generate(prompt(70)[None], **as_cache(model, cache), max_new_tokens=tokens, do_sample=False)
    return list(found[0, 70:].tolist())


@torch.no_grad()
def step_by_step(model: Any, cache: Any, tokens: int = 8) -> list[int]:
    """The same, where the caller calls the model."""
    named = as_cache(getattr(model, "_orig_mod", model), cache)
    given, told = prompt(70)[None], []
    for _ in range(tokens):
        given = model(given, **named).logits[:, -1].argmax(-1, keepdim=True)
        told.append(int(given))
    return told


def opened(model: Any) -> OffloadedCache:
    return offload(model, design("clo", budget_pages=3), max_new_tokens=60)


def test_attention_that_is_changed_while_the_cache_is_open_is_noticed() -> None:
    model = small_model()
    with offload(model, design("streamed"), max_new_tokens=40) as cache:
        model.set_attn_implementation("sdpa")
        with pytest.raises(EngineError, match="layer 0 did not attend to its new tokens"):
            generated(model, cache)


class TestCompiled:
    """What the design does runs as written, between compiled parts; how they are compiled is torch's affair."""

    @pytest.fixture(autouse=True)
    def _forgotten(self) -> Iterator[None]:
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize(
        "kind", [pytest.param(kind, marks=() if kind == "llama" else pytest.mark.long) for kind in MODELS]
    )
    def test_a_compiled_model_gives_the_same_tokens(self, kind: str) -> None:
        model = MODELS[kind]()
        with opened(model) as cache:
            wanted = step_by_step(model, cache)
        compiled = torch.compile(model, backend="eager")
        with opened(model) as cache:
            assert step_by_step(compiled, cache) == wanted
            assert cache.decodes

    def test_one_compiled_in_place_generates_the_same_tokens(self) -> None:
        model = small_model()
        with opened(model) as cache:
            wanted = generated(model, cache)
        model.compile(backend="eager")
        with opened(model) as cache:
            assert generated(model, cache) == wanted
            assert cache.decodes


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)])
def test_turns_in_and_out_of_inference_mode(kind: str, modes: tuple[Callable[[], Any], ...]) -> None:
    """What one leaves is changed in the next."""
    model, turns = MODELS[kind](), [prompt(tokens, seed)[None] for seed, tokens in enumerate((70, 1, 1, 30, 1))]
    with opened(model) as cache, torch.no_grad():
        wanted = [model(turn, **as_cache(model, cache)).logits for turn in turns]
    found = []
    with opened(model) as cache:
        for index, turn in enumerate(turns):
            with modes[index % 2]():
                found.append(model(turn, **as_cache(model, cache)).logits.clone())
    assert all(torch.equal(*each) for each in zip(found, wanted, strict=True))


class TestOtherNumbers:
    """Keys and values of another type than there is room for."""

    @pytest.mark.parametrize("kind", list(MODELS))
    def test_of_a_model_that_is_converted_half_way(self, kind: str) -> None:
        model = MODELS[kind]()
        with opened(model) as cache:
            told = model.generate(prompt(70)[None], **as_cache(model, cache), max_new_tokens=3, do_sample=False)
            model.to(torch.bfloat16)
            with pytest.raises(SpecError, match=r"keys or values in bfloat16, the model was in float32: convert it"):
                model.generate(told, **as_cache(model, cache), max_new_tokens=3, do_sample=False)
        with opened(model) as cache:
            assert len(generated(model, cache)) == 8

    def test_under_autocast(self) -> None:
        model = small_model()
        with (
            opened(model) as cache,
            torch.autocast("cpu", dtype=torch.bfloat16),
            pytest.raises(SpecError, match=r"keys or values in bfloat16, .* leave out torch.autocast"),
        ):
            generated(model, cache)


class TestTraining:
    def test_gradients_are_refused(self) -> None:
        model = small_model()
        with opened(model) as cache:
            with pytest.raises(SpecError, match=r"gradients do not go through this cache: .* torch.no_grad\(\)"):
                model(prompt(70)[None], **as_cache(model, cache))
            assert len(generated(model, cache)) == 8

    def test_of_weights_that_have_none_there_are_none_to_refuse(self) -> None:
        model = small_model().requires_grad_(False)
        with opened(model) as cache:
            assert model(prompt(70)[None], **as_cache(model, cache)).logits.shape[1] == 70

    def test_gradient_checkpointing_is_refused_in_training_only(self) -> None:
        model = small_model()
        # the second is the first one's name in older versions of the library
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        with opened(model) as cache:
            wanted = generated(model, cache)
            model.train()
            with pytest.raises(SpecError, match=r"gradient checkpointing uses no cache: call model.eval\(\)"):
                model.generate(prompt(90)[None], **as_cache(model, cache), max_new_tokens=3, do_sample=False)
        with opened(model.eval()) as cache:
            assert generated(model, cache) == wanted


class TestCopies:
    @pytest.mark.parametrize("way", list(OF_COPIES))
    def test_of_the_model_are_refused_while_a_cache_is_open(self, way: str) -> None:
        model = small_model()
        with opened(model) as cache:
            with pytest.raises(SpecError, match="model: it cannot be copied while a cache of offload"):
                OF_COPIES[way](model)
            wanted = generated(model, cache)
        OF_COPIES[way](model)
        other = copy.deepcopy(model)
        with opened(other) as cache:
            assert generated(other, cache) == wanted

    @pytest.mark.parametrize("decoded", [False, True])
    @pytest.mark.parametrize("way", [copy.copy, *OF_COPIES.values()], ids=["copy.copy", *OF_COPIES])
    def test_of_a_cache_are_refused(self, way: Callable[[Any], Any], decoded: bool) -> None:
        model, text = small_model(), prompt(70)[None]
        with opened(model) as cache:
            if decoded:
                generated(model, cache, 3)
            with pytest.raises(SpecError, match=r"cache: it cannot be copied: offload\(\) the model anew"):
                way(cache)
            given = prompt(80)[None] if decoded else text
            told = model.generate(given, **as_cache(model, cache), max_new_tokens=3, do_sample=False)
            assert told.shape[1] == given.shape[1] + 3


def test_a_cache_is_true_while_it_is_open_and_holds_tokens() -> None:
    model = small_model()
    with opened(model) as cache:
        assert not cache
        with torch.no_grad():
            model(prompt(20)[None], **as_cache(model, cache))
        assert cache
        generated(model, cache)
        assert cache
    assert not cache
    with opened(model) as other:
        pass
    assert not other


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
