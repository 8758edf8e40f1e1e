"""Selections that a model makes itself: by its own indexer, or in a layer that attends to what an earlier one chose."""

from __future__ import annotations

from collections.abc import Callable

import torch

from clo.engine.layers.selection import Selection
from clo.engine.layers.shape import LayerShape
from clo.schedule.ops import Stage
from clo.specs import Design
from clo_kernels.layout import INT32, NO_PAGE

BEYOND = 2**31 - 1
"""Comes after every page."""
Chooser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of keys `[batch, tokens, key_dim]` and lengths `[batch]` the chosen tokens, best first (`Indexer.choose`)."""


class IndexerSelection(Selection):
    """Pages of one token each. `index` `[batch, max_tokens, key_dim]`: the indexer's key of every token."""

    def __init__(self, design: Design, shape: LayerShape, *, num_pages: int, budget: int, key_dim: int) -> None:
        super().__init__(design, shape, num_pages=num_pages, budget=budget)
        size = (shape.batch, shape.max_tokens, key_dim)
        self.index = torch.zeros(size, dtype=shape.dtype, device=shape.device)
        self._ask: dict[Stage, Chooser] = {}
        self._found: dict[Stage, torch.Tensor] = {}

    def load_keys(self, sequence: int, keys: torch.Tensor) -> None:
        """Those of a prompt, `[tokens, key_dim]`."""
        self.index[sequence, : len(keys)] = keys

    def append_key(self, key: torch.Tensor, lengths: torch.Tensor) -> None:
        """Those of the new tokens, `[batch, key_dim]`."""
        self.index[torch.arange(len(lengths), device=key.device), lengths.long() - 1] = key

    def ask(self, stage: Stage, chooser: Chooser) -> None:
        """Whom to ask when `stage` scores."""
        self._ask[stage] = chooser

    def score(
        self,
        stage: Stage,
        query: torch.Tensor,
        lengths: torch.Tensor,
        candidates: torch.Tensor,
        missed: torch.Tensor,
    ) -> None:
        """What the indexer chooses, unless no head selects."""
        longest = self._shape.max_tokens
        if not (self._shape.apart or self._shape.recorded):  # else the host would have to wait for what it asks
            if not bool(missed.any()):
                return
            longest = int(lengths.max())
        # made ahead of its layer, the choice may come before that layer's newest key
        known = lengths - int(stage is Stage.PREFETCH and not self._design.speculates_last_step)
        self._found[stage] = self._ask[stage](self.index[:, :longest], known)

    def select(self, stage: Stage, candidates: torch.Tensor, missed: torch.Tensor) -> None:
        """Of what was chosen the best pages that are not attended anyway."""
        if (found := self._found.get(stage)) is not None:
            best = best_pages(found, candidates, self.pages.shape[2])
            _take(self.pages, best[:, None], missed)
        self.chosen[stage].copy_(self.pages)


class SharedSelection(Selection):
    """What `source`, the selection of an earlier layer, chose last: this layer has no indexer."""

    def __init__(self, design: Design, shape: LayerShape, *, num_pages: int, budget: int, source: Selection) -> None:
        super().__init__(design, shape, num_pages=num_pages, budget=budget)
        self._source = source

    def score(
        self,
        stage: Stage,
        query: torch.Tensor,
        lengths: torch.Tensor,
        candidates: torch.Tensor,
        missed: torch.Tensor,
    ) -> None:
        """Done by the earlier layer."""

    def select(self, stage: Stage, candidates: torch.Tensor, missed: torch.Tensor) -> None:
        """The same pages, of the heads that chose anew."""
        _take(self.pages, self._source.chosen[stage], missed)
        self.chosen[stage].copy_(self.pages)


def best_pages(chosen: torch.Tensor, candidates: torch.Tensor, budget: int) -> torch.Tensor:
    """Of `chosen` `[batch, tokens]`, best first, the first `budget` of pages 1 to `candidates` `[batch]`.

    `[batch, budget]`, in order of their numbers, then `NO_PAGE`; worked out without a look at what they are.
    """
    usable = (chosen >= 1) & (chosen <= candidates[:, None])
    # those of no use to the end, the others as they were
    order = (~usable).to(torch.uint8).argsort(dim=1, stable=True)
    kept = torch.where(usable, chosen, BEYOND).gather(1, order)[:, :budget].sort(1).values
    pages = torch.full((len(chosen), budget), NO_PAGE, dtype=INT32, device=chosen.device)
    pages[:, : kept.shape[1]] = torch.where(kept == BEYOND, NO_PAGE, kept)
    return pages


def _take(pages: torch.Tensor, others: torch.Tensor, missed: torch.Tensor) -> None:
    """Into `pages` `[batch, kv_heads, budget]` the others, for heads that missed."""
    pages.copy_(torch.where(missed[..., None], others, pages))
