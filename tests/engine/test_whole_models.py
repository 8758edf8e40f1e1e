"""What `offload` refuses of models that it leaves whole, whichever of their layers are not offloaded."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import windowed
from hybrid import FULL, LINEAR, hybrid_model
from small import design
from whole_models import assert_same, batch, generated
from windowed import windowed_model

from clo.engine import hf, offload
from clo.engine.layers import OffloadedLayer
from clo.errors import EngineError, SpecError

INTERRUPTED = {
    "windowed": partial(windowed_model, "Gemma3"),
    "hybrid": partial(hybrid_model, "Qwen3_5"),
    "linear-at-the-end": partial(hybrid_model, "Qwen3_5", layers=(FULL, LINEAR, FULL, LINEAR)),
}


def whole_model(kind: str) -> Any:
    return windowed_model(kind) if kind in windowed.KINDS else hybrid_model(kind)


@pytest.mark.parametrize("kind", ["Gemma3", "GptOss", "Qwen3Next", "Qwen3_5", "Qwen3_5Moe"])
@pytest.mark.parametrize("padding", [slice(0, 3), slice(66, 68)], ids=["at-the-front", "in-the-window"])
def test_padding_wherever_it_is(kind: str, padding: slice) -> None:
    """A first layer with a window has a mask that says nothing of what came before it, a linear one has none."""
    model, ids = whole_model(kind), batch(70)
    mask = torch.ones_like(ids)
    mask[0, padding] = 0
    with offload(model, design("clo", budget_pages=2), max_new_tokens=40) as cache:
        with pytest.raises(SpecError, match="padded prompts"):
            generated(model, ids, cache, 20, attention_mask=mask)
        told = generated(model, ids, cache, 4).sequences
        asked = torch.cat([told, batch(5, 9)], dim=1)
        hidden = torch.ones_like(asked)
        hidden[1, padding] = 0
        with pytest.raises(SpecError, match="padded prompts"):
            generated(model, asked, cache, 4, attention_mask=hidden)
        assert generated(model, asked, cache, 4, attention_mask=torch.ones_like(asked)).sequences.shape == (2, 83)
    wanted = generated(model, ids, None, 20, attention_mask=mask)
    with offload(model, design("clo", budget_pages=2)):
        assert_same(generated(model, ids, None, 20, attention_mask=mask), wanted)


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        ("Gemma3", r"layer 0 has a sliding window: what it keeps is in layers\[0\]"),
        ("Qwen3Next", r"layer 0 has linear attention: its states are in layers\[0\]"),
    ],
)
def test_what_the_cache_cannot_take_back(kind: str, first: str) -> None:
    model, ids = whole_model(kind), batch(70)
    with offload(model, design("clo", budget_pages=2), max_new_tokens=40) as cache:
        told = generated(model, ids, cache, 4).sequences
        with pytest.raises(SpecError, match="cannot be copied"):
            copy.deepcopy(cache)
        for layer in cache.layers:
            with pytest.raises(SpecError, match="cannot be taken back"):
                layer.crop(-1)
            with pytest.raises(SpecError, match="beam search"):
                layer.reorder_cache(torch.zeros(2, dtype=torch.long))
            with pytest.raises(EngineError, match="it has decoded already"):
                layer.reset()
        with pytest.raises(EngineError, match=first):
            cache.layer(0)
        assert isinstance(cache.layer(cache.plan.model.whole_layers[-1]), OffloadedLayer)  # type: ignore[union-attr]
        with pytest.raises(SpecError, match="the cache holds one of 2"):
            generated(model, told[:1], cache, 4)
        with pytest.raises(SpecError, match="give it the whole conversation"):
            generated(model, ids, cache, 4)
    with pytest.raises(EngineError, match="cache: closed"):
        generated(model, told, cache, 4)
    assert model.config._attn_implementation != hf.ATTENTION_NAME


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("make", INTERRUPTED.values(), ids=INTERRUPTED)
def test_an_interrupt_between_layers(make: Any, at: int) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    model = make()
    with offload(model, design("clo", budget_pages=2), max_new_tokens=40) as cache:
        told = generated(model, batch(70), cache, 4).sequences
        hook = model.model.layers[at].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            generated(model, told, cache, 4)
        hook.remove()
        with pytest.raises(EngineError, match="broken off half-way"):
            generated(model, told, cache, 4)
