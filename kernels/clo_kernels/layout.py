"""The tensors that the operations of one layer share, and how tokens map to them. Computes nothing on a device.

All are contiguous; keys are rotated. Shapes: B sequences, H KV heads, S slots, P pages, K selected pages at most.

A sequence of `length` tokens (the newest included) is in four places. Page p holds tokens [p * page_size, (p + 1) *
page_size). Tokens from `window_start(length)` on are in the window, a ring: token t at row t % W. The first tokens are
also in the sinks. Pages that left the window are on the host, `host_pages` [B, P, H, 2, page_size, head_dim]. Pages 1
to `window_start / page_size - 1` are the candidates of selection, and slots hold copies of some of those. A pinned head
has all of its tokens on the device instead. Pages on the host and in slots are both as computed, or both coded
(`coded_pages`): then their rows are int8 and `coded_width(head_dim)` wide.

Where one vector a token is key and value in one (latent attention), there is one row where shapes here say two, and its
first `value_dim` values are the value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clo_kernels.checks import (
    FLOATS,
    LARGEST_HEAD_DIM,
    LARGEST_VECTOR_DIM,
    check_head_dim,
    check_tensor,
    require,
)
from clo_kernels.coded_pages import CODE_DTYPE, STEP_VALUES, coded_width

NO_PAGE = -1
"""Pads lists of pages."""
NO_SLOT = -1
"""Pads lists of slots; the slot of a page that is not resident."""
INT32 = torch.int32


@dataclass(frozen=True, slots=True)
class PageTable:
    """Which page is in which slot, both ways, and when a slot was last used. int32.

    Stamps grow by the budget with every miss of a head. They are all different: empty slots have distinct negative
    ones. They suffice for 2**31 / budget misses of a head.
    """

    page_of_slot: torch.Tensor
    """[B, H, S]; NO_PAGE where empty."""
    last_use: torch.Tensor
    """[B, H, S]; larger is later."""
    slot_of_page: torch.Tensor
    """[B, H, P]; NO_SLOT where not resident."""

    @classmethod
    def empty(cls, batch: int, num_kv_heads: int, num_slots: int, num_pages: int, device: str = "cpu") -> PageTable:
        """A table without a resident page."""
        rows = (batch, num_kv_heads)
        order = torch.arange(-num_slots, 0, dtype=INT32, device=device)
        return cls(
            page_of_slot=torch.full((*rows, num_slots), NO_PAGE, dtype=INT32, device=device),
            last_use=order.expand(*rows, num_slots).contiguous(),
            slot_of_page=torch.full((*rows, num_pages), NO_SLOT, dtype=INT32, device=device),
        )

    def check(self, batch: int, num_kv_heads: int, device: torch.device) -> None:
        """Raise `ValueError` unless the tensors agree with each other."""
        rows = (batch, num_kv_heads)
        check_tensor("page_of_slot", self.page_of_slot, (*rows, -1), INT32, device)
        check_tensor("last_use", self.last_use, (*rows, self.page_of_slot.shape[2]), INT32, device)
        check_tensor("slot_of_page", self.slot_of_page, (*rows, -1), INT32, device)


@dataclass(frozen=True, slots=True)
class Resolved:
    """Where the selected pages are to be, and which of them to fetch. int32."""

    slots: torch.Tensor
    """[B, H, K]: the slot of each selected page; NO_SLOT where the selection is padded."""
    fetch_pages: torch.Tensor
    """[B, H, K]: pages to fetch, first `num_fetched`, then NO_PAGE."""
    fetch_slots: torch.Tensor
    """[B, H, K]: their slots, then NO_SLOT."""
    num_fetched: torch.Tensor
    """[B, H]."""

    @classmethod
    def like(cls, selection: torch.Tensor) -> Resolved:
        """Uninitialised outputs for `selection` [B, H, K]."""
        return cls(
            slots=torch.empty_like(selection),
            fetch_pages=torch.empty_like(selection),
            fetch_slots=torch.empty_like(selection),
            num_fetched=torch.empty(selection.shape[:2], dtype=INT32, device=selection.device),
        )

    def check(self, rows: tuple[int, int], device: torch.device) -> None:
        """Raise `ValueError` unless the tensors agree with each other."""
        check_tensor("slots", self.slots, (*rows, -1), INT32, device)
        check_tensor("fetch_pages", self.fetch_pages, (*rows, self.slots.shape[2]), INT32, device)
        check_tensor("fetch_slots", self.fetch_slots, (*rows, self.slots.shape[2]), INT32, device)
        check_tensor("num_fetched", self.num_fetched, rows, INT32, device)


@dataclass(frozen=True, slots=True)
class DeviceKV:
    """Keys (0) and values (1) of one layer on the device, or what is both. One float dtype, but for coded slots."""

    sinks: torch.Tensor
    """[B, H, 2, num_sinks, head_dim]: the first tokens."""
    window: torch.Tensor
    """[B, H, 2, W, head_dim]: ring of the latest tokens."""
    slots: torch.Tensor
    """[B, H, S, 2, page_size, head_dim]: fetched pages; coded ones are int8 and [..., coded_width(head_dim)]."""
    pinned: torch.Tensor
    """[B, pinned heads, 2, max_tokens, head_dim]: all tokens of the pinned heads."""
    pinned_row: torch.Tensor
    """[H] int32: which of `pinned` a KV head is; -1: not pinned."""
    recent_tokens: int
    """Tokens that never leave the window."""
    value_dim: int | None = None
    """Of vectors that are key and value in one, the values' share; none: each has a row of its own."""

    @property
    def rows_per_token(self) -> int:
        """Key and value, or one vector that is both."""
        return 2 if self.value_dim is None else 1

    @property
    def value_width(self) -> int:
        """Values of a value."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return int(self.slots.shape[4])

    @property
    def head_dim(self) -> int:
        """Values of a key."""
        return int(self.window.shape[4])

    @property
    def coded(self) -> bool:
        """Whether slots hold coded pages."""
        return bool(self.slots.dtype == CODE_DTYPE)

    @property
    def row_width(self) -> int:
        """Elements of a row of a page: of the cache's dtype, or bytes of a coded one."""
        return int(self.slots.shape[5])

    @property
    def ring_tokens(self) -> int:
        """Rows of the window ring, W."""
        return int(self.window.shape[3])

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raise `ValueError` unless the tensors agree with each other and with `device` and `dtype`."""
        require(dtype in FLOATS, f"dtype {dtype}, expected one of {FLOATS}")
        rows = self.rows_per_token
        check_tensor("window", self.window, (-1, -1, rows, -1, -1), dtype, device)
        batch, heads, _, _, head_dim = self.window.shape
        check_head_dim("window", head_dim, LARGEST_HEAD_DIM if rows == 2 else LARGEST_VECTOR_DIM)
        require(
            16 <= self.value_width <= head_dim and self.value_width % 8 == 0,
            f"value_dim = {self.value_dim}, expected a multiple of 8 from 16 to head_dim = {head_dim}",
        )
        require(
            not self.coded or self.value_dim is None or self.value_dim % STEP_VALUES == 0,
            f"value_dim = {self.value_dim}, expected a multiple of {STEP_VALUES}, values of a coded page that share a "
            "step",
        )
        width = coded_width(head_dim) if self.coded else head_dim
        check_tensor(
            "slots", self.slots, (batch, heads, -1, rows, -1, width), CODE_DTYPE if self.coded else dtype, device
        )
        page_size = self.page_size
        check_tensor("sinks", self.sinks, (batch, heads, rows, -1, head_dim), dtype, device)
        check_tensor("pinned", self.pinned, (batch, -1, rows, -1, head_dim), dtype, device)
        check_tensor("pinned_row", self.pinned_row, (heads,), INT32, device)
        require(self.recent_tokens > 0, f"recent_tokens = {self.recent_tokens} must be positive")
        require(
            self.sinks.shape[3] <= page_size,
            f"num_sinks = {self.sinks.shape[3]} must fit the first page of {page_size} tokens",
        )
        require(
            self.ring_tokens % page_size == 0 and self.ring_tokens >= self.recent_tokens + page_size,
            f"window: {self.ring_tokens} rows, expected a multiple of page_size = {page_size} that is at least "
            f"recent_tokens + page_size = {self.recent_tokens + page_size}",
        )


def window_start(length: int, recent_tokens: int, page_size: int) -> int:
    """First token in the window: that of the first page that reaches into the last `recent_tokens`."""
    return max(0, length - recent_tokens) // page_size * page_size


def ring_rows(recent_tokens: int, page_size: int) -> int:
    """Smallest window ring."""
    return -(-recent_tokens // page_size) * page_size + page_size
