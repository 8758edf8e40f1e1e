"""An independent attention over given pages."""

from __future__ import annotations

from typing import Any

import torch
from small import PAGE, WINDOW

from clo.engine.models.library import as_cache


class Sparse:
    """Attention in float64 of one step over the pages that the decoder says it attends, from the prompt's own keys."""

    def __init__(self, model: Any, tokens: torch.Tensor) -> None:
        self.model = model.double()
        from transformers import DynamicCache

        self.cache = DynamicCache()
        with torch.inference_mode():
            model(tokens[None], **as_cache(model, self.cache), use_cache=True)

    def attend(self, layer: int, head: int, query: torch.Tensor, pages: list[int], length: int) -> torch.Tensor:
        keys, values = self.cache.layers[layer].keys[0, head], self.cache.layers[layer].values[0, head]
        start = max(0, length - WINDOW - 1) // PAGE * PAGE
        held = sorted({*range(min(PAGE, start)), *range(start, length)})
        held += [token for page in pages for token in range(page * PAGE, (page + 1) * PAGE)]
        assert len(set(held)) == len(held)
        weights = (query.double() @ keys[held].T * keys.shape[-1] ** -0.5).softmax(-1)
        return weights @ values[held]
