"""Selections that a model makes itself: by its own indexer, or in a layer that attends to what an earlier one chose."""

from __future__ import annotations

from collections.abc import Callable

import torch

from clo.engine.layers.selection import Selection
from clo.engine.layers.shape import LayerShape
from clo.schedule.ops import Stage
from clo.specs import Design
from clo_kernels.layout import NO_PAGE

Chooser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of keys `[batch, tokens, key_dim]` and lengths `[batch]` the chosen tokens, best first (`Indexer.choose`)."""


class IndexerSelection(Selection):
    """Pages of one token each. `index` `[batch, max_tokens, key_dim]`: the indexer's key of every token."""

    def __init__(
        self, design: Design, shape: LayerShape, *, num_pages: int, budget: int, always_attended: int, key_dim: int
    ) -> None:
        super().__init__(design, shape, num_pages=num_pages, budget=budget, always_attended=always_attended)
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

    def score(self, stage: Stage, query: torch.Tensor, lengths: torch.Tensor, missed: torch.Tensor) -> None:
        """What the indexer chooses, unless no head selects."""
        if not bool(missed.any()):
            return
        # made ahead of its layer, the choice may come before that layer's newest key
        known = lengths - int(stage is Stage.PREFETCH and not self._design.speculates_last_step)
        self._found[stage] = self._ask[stage](self.index[:, : int(lengths.max())], known)

    def select(self, stage: Stage, lengths: torch.Tensor, missed: torch.Tensor) -> None:
        """Of what was chosen the best pages that are not attended anyway."""
        candidates = self.candidates(lengths).tolist()
        for sequence in missed.any(1).nonzero()[:, 0].tolist():
            chosen = self._found[stage][sequence]
            pages = chosen[(chosen >= 1) & (chosen <= candidates[sequence])][: self.pages.shape[2]]
            for head in missed[sequence].nonzero()[:, 0].tolist():
                self.pages[sequence, head] = NO_PAGE
                self.pages[sequence, head, : len(pages)] = pages.sort().values.to(self.pages.dtype)
        self.chosen[stage].copy_(self.pages)


class SharedSelection(Selection):
    """What `source`, the selection of an earlier layer, chose last: this layer has no indexer."""

    def __init__(
        self, design: Design, shape: LayerShape, *, num_pages: int, budget: int, always_attended: int, source: Selection
    ) -> None:
        super().__init__(design, shape, num_pages=num_pages, budget=budget, always_attended=always_attended)
        self._source = source

    def score(self, stage: Stage, query: torch.Tensor, lengths: torch.Tensor, missed: torch.Tensor) -> None:
        """Done by the earlier layer."""

    def select(self, stage: Stage, lengths: torch.Tensor, missed: torch.Tensor) -> None:
        """The same pages, of the heads that chose anew."""
        self.pages[missed] = self._source.chosen[stage][missed]
        self.chosen[stage].copy_(self.pages)
