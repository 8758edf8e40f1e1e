"""A model's own indexer (DeepSeek Sparse Attention), taken apart: a token's key, and what a token attends to.

Both run the model's own module, which asks a cache for all keys so far. Knows nothing about where keys are kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers

from clo.engine.models.library import as_cache
from clo.engine.versions import release_of
from clo.errors import SpecError
from clo.specs import IndexerSpec

OLDEST = (5, 18)
"""The first version of `transformers` that was tried whose indexers choose among earlier tokens only."""


class Seen(NamedTuple):
    """What an indexer reads of the newest token: its normed hidden state `[batch, 1, hidden_size]`, the normed low rank
    of its queries `[batch, 1, query_rank]`, and its position's rotation."""

    normed: torch.Tensor
    low: torch.Tensor
    rotation: Any


class Indexer:
    """The indexer of one layer."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def key(self, seen: Seen) -> torch.Tensor:
        """What is kept of the token, `[batch, head_dim]`."""
        kept = _Keys()
        self._run(seen, seen.normed.new_zeros((len(seen.normed), 1, 1)), kept)
        assert kept.new is not None
        return kept.new[:, 0]

    def choose(self, seen: Seen, keys: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The best of the first `lengths` `[batch]` of all tokens, whose `keys` are `[batch, tokens, head_dim]`.

        `[batch, top_tokens]`, best first; of fewer tokens all, and numbers beyond `lengths` for the rest.
        """
        later = torch.arange(keys.shape[1], device=keys.device) >= lengths[:, None]
        mask = torch.zeros(later.shape, dtype=torch.float32, device=keys.device).masked_fill(later, float("-inf"))
        return self._run(seen, mask[:, None], _Keys(keys))[:, 0].long()

    def _run(self, seen: Seen, mask: torch.Tensor, keys: _Keys) -> torch.Tensor:
        chosen: torch.Tensor = self._module(*seen, mask, None, **as_cache(self._module, keys))
        return chosen


def indexer_of(attentions: list[Any]) -> dict[str, Any]:
    """The fields of an `IndexerSpec`, if some of these layers' attentions have an indexer and the others share it."""
    own = [getattr(attention, "indexer", None) for attention in attentions]
    first = next((module for module in own if module is not None), None)
    if first is None:
        return {}
    if release_of(transformers.__version__) < OLDEST:
        needed, found = ".".join(map(str, OLDEST)), transformers.__version__
        raise SpecError(
            f"{type(first).__name__}: a model's own indexer needs transformers {needed} or newer, this is {found}: "
            "before, it is not always told which tokens come later"
        )
    width, weight = int(first.head_dim), first.wk.weight
    shape = IndexerSpec(
        num_heads=first.n_heads,
        head_dim=width,
        top_tokens=first.index_topk,
        key_bytes=float(width * weight.element_size()),
        shared_layers=tuple(layer for layer, module in enumerate(own) if module is None),
    )
    return {"indexer": shape}


class _Keys:
    """What the module takes for its cache."""

    def __init__(self, held: torch.Tensor | None = None) -> None:
        self._held = held
        self.new: torch.Tensor | None = None

    def update_indexer(self, new: torch.Tensor, _layer: int) -> torch.Tensor:
        """All keys, of which those of the newest token are `new` `[batch, 1, head_dim]`."""
        self.new = new
        return new if self._held is None else self._held
