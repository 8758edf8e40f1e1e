"""Which pages the KV heads attend: an index of what each page holds, scores by it, and the best of them.

Knows nothing about where pages are.
"""

from __future__ import annotations

import torch

from clo.engine.layers.shape import NEVER, LayerShape
from clo.engine.words import Words
from clo.schedule.ops import Stage
from clo.specs import Design, Selector
from clo_kernels.layout import INT32, NO_PAGE
from clo_kernels.page_index import IndexKind, entry_shape, hash_planes, page_index


def candidates(design: Design, lengths: torch.Tensor) -> torch.Tensor:
    """Pages 1 to this number may be selected, int32 `[batch]`, of sequences of `lengths` tokens, the new one included.

    The same in every layer, so once a step. The page that left the window in this step is still attended there.
    """
    start = (lengths - design.recent_window_tokens - 1).clamp(min=0) // design.page_size
    return (start - 1).clamp(min=0).to(INT32)


class Selection:
    """The selected pages of one layer, `pages` `[batch, kv_heads, budget]`, and what they are selected by.

    `keys` is there for the exact selector alone, `[batch, kv_heads, max_tokens, head_dim]`.
    """

    def __init__(self, design: Design, shape: LayerShape, *, num_pages: int, budget: int) -> None:
        self._design, self._shape = design, shape
        self._kernels, self._device = shape.kernels, shape.device
        self.index = self._empty_index(num_pages)
        hashed = self.kind is IndexKind.SIGN_HASH
        self.planes = hash_planes(shape.head_dim).to(shape.device) if hashed else None
        self.pages = torch.full((*shape.rows, budget), NO_PAGE, dtype=INT32, device=shape.device)
        # what each stage chose: it is looked up and fetched while the other stage may already be choosing anew
        listed = {"chosen": (*shape.rows, budget), "missed": shape.rows}
        self.letters = {stage: Words(listed, shape.device) for stage in Stage}
        self.chosen = {stage: letter.device["chosen"].fill_(NO_PAGE) for stage, letter in self.letters.items()}
        self.scores = {stage: self._no_scores(num_pages) for stage in Stage}

    def _empty_index(self, num_pages: int) -> torch.Tensor:
        shape = self._shape
        if self.kind is None:
            return torch.empty(0, dtype=shape.dtype, device=shape.device)
        entry = entry_shape(self.kind, self._design.page_size, shape.head_dim)
        dtype = INT32 if self.kind.of_tokens else shape.dtype
        return torch.zeros((*shape.rows, num_pages, *entry), dtype=dtype, device=shape.device)

    @property
    def of_pages(self) -> torch.Tensor | None:
        """The index, if it is one of pages."""
        return None if self.kind is None else self.index

    def _no_scores(self, num_pages: int) -> torch.Tensor:
        return torch.full((*self._shape.rows, num_pages), NEVER, dtype=torch.float32, device=self._device)

    @property
    def kind(self) -> IndexKind | None:
        """What the index holds of a page; the exact selector does not read it. None: a model's own indexer chooses."""
        selector = self._design.selector
        if selector is Selector.INDEXER:
            return None
        return IndexKind.PAGE_MEAN if selector is Selector.EXACT else IndexKind(selector.value)

    def index_pages(self, sequence: int, first: int, keys: torch.Tensor) -> None:
        """Index whole pages from page `first` on, `[kv_heads, pages, page_size, head_dim]`."""
        if self.kind is not None:
            self.index[sequence, :, first : first + keys.shape[1]] = page_index(keys, self.kind, self.planes)

    def remember_prompt(self, sequence: int, first: int, keys: torch.Tensor) -> None:
        """What the exact selector reads of a prompt's tokens from `first` on, `[kv_heads, tokens, head_dim]`."""
        if self._design.selector is not Selector.EXACT:
            return
        if not hasattr(self, "keys"):
            size = (*self._shape.rows, self._shape.max_tokens, self._shape.head_dim)
            self.keys = torch.zeros(size, dtype=self._shape.dtype, device=self._device)
        self.keys[sequence, :, first : first + keys.shape[1]] = keys

    def remember_token(self, key: torch.Tensor, lengths: torch.Tensor) -> None:
        """What the exact selector reads of the new token of each sequence, `[batch, kv_heads, head_dim]`."""
        if self._design.selector is Selector.EXACT:
            rows = torch.arange(len(lengths), device=key.device)
            self.keys[rows, :, lengths.long() - 1] = key

    def score(
        self,
        stage: Stage,
        query: torch.Tensor,
        lengths: torch.Tensor,
        candidates: torch.Tensor,
        missed: torch.Tensor,
    ) -> None:
        """Scores of the candidate pages of heads that missed, by `query` `[batch, query_heads, head_dim]`."""
        if self._design.selector is Selector.EXACT:
            # a query made ahead of its layer is scored while that layer may be storing its newest key
            ahead = stage is Stage.PREFETCH and not self._design.speculates_last_step
            self._score_exactly(self.scores[stage], query, lengths - int(ahead), candidates, missed)
            return
        scale, out = self._shape.scale, self.scores[stage]
        self._kernels.score_pages(query, self.index, candidates, missed, scale=scale, planes=self.planes, out=out)

    def _score_exactly(
        self,
        out: torch.Tensor,
        query: torch.Tensor,
        lengths: torch.Tensor,
        candidates: torch.Tensor,
        missed: torch.Tensor,
    ) -> None:
        """Attention mass of each page, mean over the group, among the first `lengths` tokens: what an oracle would
        fetch."""
        grouped, size = query.float().unflatten(1, (self._shape.num_kv_heads, -1)), self._design.page_size
        for b, length in enumerate(lengths.tolist()):
            logits = grouped[b] @ self.keys[b, :, :length].float().transpose(1, 2) * self._shape.scale
            mass, count = logits.softmax(-1).mean(1), int(candidates[b])
            scores = torch.full_like(out[b], NEVER)
            scores[:, 1 : count + 1] = mass[:, size : (count + 1) * size].unflatten(1, (count, size)).sum(-1)
            out[b, missed[b]] = scores[missed[b]]

    def select(self, stage: Stage, candidates: torch.Tensor, missed: torch.Tensor) -> None:
        """The budget's best pages of heads that missed."""
        self._kernels.select_pages(self.scores[stage], candidates, missed, self.pages)
        self.chosen[stage].copy_(self.pages)
