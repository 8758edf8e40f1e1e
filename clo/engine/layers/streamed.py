"""The cache of a layer that is copied to the device whole, in every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clo.engine.counts import LayerCounts
from clo.engine.layers.dense import DenseLayer
from clo.engine.layers.shape import LayerShape
from clo.engine.words import wait_for_device
from clo.schedule.ops import Stage


class StreamedLayer(DenseLayer):
    """Everything on the host, and a device buffer into which all of it is copied in every step.

    A new token is staged in host memory by the step that computed it, and takes its place when the next one begins.
    """

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.host = torch.zeros(self.kv.shape, dtype=shape.dtype, pin_memory=shape.apart)
        newest = (shape.rows_per_token, shape.batch, shape.num_kv_heads, shape.head_dim)
        self._newest = torch.zeros(newest, dtype=shape.dtype, pin_memory=shape.apart)
        self._new: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._copied: Stage | None = None

    @property
    def counts(self) -> LayerCounts:
        """Everything is asked for and moved."""
        if self._copied is None:
            return LayerCounts()
        pages = self._copied_pages * self.shape.num_kv_heads
        written_back = self.shape.batch * self.shape.num_kv_heads / self._page_size
        fetched = dict.fromkeys(Stage, 0) | {self._copied: pages}
        return LayerCounts(fetched=fetched, requested=pages, written_back=written_back)

    @property
    def copied_tokens(self) -> int:
        """Tokens that a step brings, summed over the batch."""
        return self.shape.batch * self.shape.max_tokens if self.shape.recorded else sum(self._tokens) - self.shape.batch

    def begin(self, lengths: Sequence[int]) -> None:
        wait_for_device(self.shape.device)
        for sequence, tokens in enumerate(self._tokens):
            self.host[sequence, :, :, tokens - 1] = self._newest[:, sequence].transpose(0, 1)
        super().begin(lengths)

    def load(self, sequence: int, keys: torch.Tensor, values: torch.Tensor, first: int = 0) -> None:
        for row, given in enumerate(self.shape.rows_of(keys, values)):
            self.host[sequence, :, row, first : first + given.shape[1]] = given

    def fetch(self, sequence: int, out: torch.Tensor) -> None:
        """The first tokens of the host's copy, as many as `out` `[rows_per_token, kv_heads, tokens, head_dim]` has room
        for."""
        # head by head, where the host's copy is contiguous: a copy engine moves it as it is
        for head in range(self.shape.num_kv_heads):
            for part in range(len(out)):
                out[part, head].copy_(self.host[sequence, head, part, : out.shape[2]], non_blocking=True)

    def append(
        self, key: torch.Tensor, value: torch.Tensor | None, lengths: torch.Tensor, *, store: bool = True
    ) -> None:
        """The new token goes into the buffer now, and with `store` to the host, for the next step."""
        self._new = key, value
        super().append(key, value, lengths)
        if store:
            self.write_back()

    def write_back(self) -> None:
        """The new token of each sequence, to the host."""
        assert self._new is not None
        new = [each for each in self._new if each is not None]
        for staged, each in zip(self._newest, new, strict=True):
            staged.copy_(each, non_blocking=True)

    def copy(self, stage: Stage, page_size: int) -> None:
        """Bring all tokens but the newest, which is only now being computed; a recorded step the whole buffer."""
        self._copied, self._page_size = stage, page_size
        if self.shape.recorded:
            self.kv.copy_(self.host, non_blocking=True)
            return
        for sequence, tokens in enumerate(self._tokens):
            for head in range(self.shape.num_kv_heads):
                for part in range(self.shape.rows_per_token):  # contiguous runs: a copy engine takes them as they are
                    target = self.kv[sequence, head, part, : tokens - 1]
                    target.copy_(self.host[sequence, head, part, : tokens - 1], non_blocking=True)

    @property
    def _copied_pages(self) -> int:
        return sum(-(-(tokens - 1) // self._page_size) for tokens in self._tokens)

    def attend(
        self, query: torch.Tensor, lengths: torch.Tensor, sink_logits: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.shape.recorded:
            assert self._new is not None
            DenseLayer.append(self, *self._new, lengths)  # the copy went over it
        return super().attend(query, lengths, sink_logits)
