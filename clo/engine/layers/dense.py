"""The cache of a layer that is not offloaded: every token on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clo.engine.counts import LayerCounts
from clo.engine.layers.shape import LayerShape
from clo_kernels.layout import INT32, NO_SLOT, DeviceKV


class DenseLayer:
    """Keys and values of every token on the device."""

    def __init__(self, shape: LayerShape) -> None:
        self.shape = shape
        size = (shape.batch, shape.num_kv_heads, shape.rows_per_token, shape.max_tokens, shape.head_dim)
        self.kv = torch.zeros(size, dtype=shape.dtype, device=shape.device)
        # a kernel reads lengths on the device; torch's attention wants them, or a mask, from the host
        self.by_kernel = shape.apart
        self._kernels, self._pinned = shape.kernels, _as_pinned(self.kv, shape.value_dim)
        self._no_pages = self._pinned.slots.transpose(1, 2)
        self._no_slots = torch.full((shape.batch, shape.num_kv_heads, 1), NO_SLOT, dtype=INT32, device=shape.device)
        self._tokens: list[int] = []

    @property
    def counts(self) -> LayerCounts:
        """Nothing moves."""
        return LayerCounts()

    def begin(self, lengths: Sequence[int]) -> None:
        """A step begins in which each sequence has so many tokens, the new one included."""
        self._tokens = list(lengths)

    def load(self, sequence: int, keys: torch.Tensor, values: torch.Tensor, first: int = 0) -> None:
        """Take in what the library keeps of a prompt from token `first` on (see `LayerShape.rows_of`)."""
        for row, given in enumerate(self.shape.rows_of(keys, values)):
            self.kv[sequence, :, row, first : first + given.shape[1]] = given

    def append(self, key: torch.Tensor, value: torch.Tensor | None, lengths: torch.Tensor) -> None:
        """Store the new token of each sequence, `[batch, kv_heads, head_dim]`, as token `lengths - 1`.

        Without a `value` the key is both.
        """
        if self.by_kernel:
            self._kernels.append_kv(key, value, lengths, self._pinned, self._no_pages, None)
            return
        rows = torch.arange(len(lengths), device=self.kv.device)
        self.kv[rows, :, 0, lengths.long() - 1] = key
        if value is not None:
            self.kv[rows, :, 1, lengths.long() - 1] = value

    def attend(
        self, query: torch.Tensor, lengths: torch.Tensor, sink_logits: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Full attention of `query` `[batch, query_heads, head_dim]`, of the same shape; `[batch, query_heads,
        value_dim]` where keys are values, too.

        `sink_logits` `[query_heads]` take their share of the softmax, and have no value.
        """
        if self.by_kernel:
            return self._attend_by_kernel(query, lengths, sink_logits)
        longest = max(self._tokens)
        keys, values = self.kv[:, :, 0, :longest], self.kv[:, :, -1, :longest, : self.shape.value_dim]
        mask = torch.arange(longest, device=lengths.device)[None, :] < lengths[:, None]
        if sink_logits is not None:
            return _attend_beside(sink_logits, query, keys, values, mask, self.shape.scale)
        if self.shape.value_dim is not None:
            return _attend_shared(query, keys, values, mask, self.shape.scale)
        attended = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, None],
            keys,
            values,
            attn_mask=mask[:, None, None],
            scale=self.shape.scale,
            enable_gqa=self.shape.num_query_heads != self.shape.num_kv_heads,
        )
        return attended[:, :, 0]

    def _attend_by_kernel(
        self, query: torch.Tensor, lengths: torch.Tensor, sink_logits: torch.Tensor | None
    ) -> torch.Tensor:
        """The same, with every head a pinned one."""
        attended: torch.Tensor = self._kernels.sparse_decode_attention(
            query,
            self._pinned,
            self._no_slots,
            lengths,
            scale=self.shape.scale,
            sink_logits=sink_logits,
            out=query.new_empty((*query.shape[:2], self._pinned.value_width)),
        )
        return attended


def _attend_shared(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of all query heads to the one head there is, as if they were tokens: that copies nothing."""
    attended = torch.nn.functional.scaled_dot_product_attention(
        query[:, None], keys, values, attn_mask=mask[:, None, None], scale=scale
    )
    return attended[:, 0]


def _attend_beside(
    sink_logits: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of which the sinks take their share, which torch's own has no word for."""
    grouped = query.float().unflatten(1, (keys.shape[1], -1))
    logits = grouped @ keys.float().transpose(2, 3) * scale
    logits = logits.masked_fill(~mask[:, None, None], float("-inf"))
    sinks = sink_logits.float().view(1, *grouped.shape[1:3], 1).expand(len(query), -1, -1, -1)
    weights = torch.cat([logits, sinks], dim=-1).softmax(-1)[..., :-1]
    return (weights @ values.float()).flatten(1, 2).to(query.dtype)


def _as_pinned(kv: torch.Tensor, value_dim: int | None) -> DeviceKV:
    """Keys and values of every token, `[batch, kv_heads, 2, tokens, head_dim]`, as those of pinned heads only."""
    batch, heads, rows, _, head_dim = kv.shape
    none = {"dtype": kv.dtype, "device": kv.device}
    return DeviceKV(
        sinks=torch.zeros((batch, heads, rows, 0, head_dim), **none),
        window=torch.zeros((batch, heads, rows, 2, head_dim), **none),
        slots=torch.zeros((batch, heads, 0, rows, 1, head_dim), **none),
        pinned=kv,
        pinned_row=torch.arange(heads, dtype=INT32, device=kv.device),
        recent_tokens=1,
        value_dim=value_dim,
    )
