"""Inputs of the operations, of the sizes that a layer of a model has. Random, never zeros: zeros hide what is wrong."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clo_kernels.coded_pages import encode
from clo_kernels.layout import INT32, NO_PAGE, DeviceKV, PageTable, Resolved, ring_rows

SINKS, RECENT = 4, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """One layer's attention: by default that of Llama-3-8B, with 131,072 tokens in pages of 16."""

    device: torch.device
    batch: int = 1
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    page_size: int = 16
    num_pages: int = 8192
    budget: int = 819
    slots: int = 1638
    dtype: torch.dtype = torch.bfloat16
    coded: bool = False
    value_dim: int | None = None
    """Of vectors that are key and value in one the first so many values are the value."""

    @property
    def rows(self) -> tuple[int, int]:
        """Sequences and KV heads."""
        return self.batch, self.kv_heads

    @property
    def rows_per_token(self) -> int:
        """Key and value, or one vector that is both."""
        return 2 if self.value_dim is None else 1

    @property
    def page_bytes(self) -> int:
        """Keys and values of a page of one KV head."""
        return self.rows_per_token * self.page_size * self.head_dim * int(self.dtype.itemsize)


def random_query(sizes: Sizes) -> torch.Tensor:
    """[batch, num_query_heads, head_dim]"""
    shape = (sizes.batch, sizes.kv_heads * sizes.group, sizes.head_dim)
    return torch.randn(shape, device=sizes.device).to(sizes.dtype)


def no_attention(sizes: Sizes) -> torch.Tensor:
    """Room for attention's outputs [batch, num_query_heads, value width], poisoned."""
    shape = (sizes.batch, sizes.kv_heads * sizes.group, sizes.value_dim or sizes.head_dim)
    return torch.full(shape, float("nan"), dtype=sizes.dtype, device=sizes.device)


def candidates(sizes: Sizes) -> torch.Tensor:
    """All pages but those of the sinks and the window are candidates, int32 [batch]."""
    window_pages = -(-RECENT // sizes.page_size) + 1
    return torch.full((sizes.batch,), sizes.num_pages - 1 - window_pages, dtype=INT32, device=sizes.device)


def everyone(sizes: Sizes, missed: bool = True) -> torch.Tensor:
    """A miss mask, bool [batch, num_kv_heads]."""
    return torch.full(sizes.rows, missed, dtype=torch.bool, device=sizes.device)


def selections(sizes: Sizes, steps: int, changed: float = 0.4) -> list[torch.Tensor]:
    """Selections of consecutive steps, int32 [batch, num_kv_heads, budget]: a share of the pages is new in each.

    Adjacent steps of a real model have about 0.6 of their pages in common.
    """
    count = sizes.batch * sizes.kv_heads
    new = round(changed * sizes.budget)
    order = torch.rand(count, sizes.num_pages - 1).argsort(1).to(INT32) + 1
    chosen, others = order[:, : sizes.budget], order[:, sizes.budget :]
    result = []
    for _ in range(steps):
        result.append(chosen.sort(1).values.view(*sizes.rows, -1).to(sizes.device).contiguous())
        leaving, arriving = chosen[:, :new], others[:, :new]
        chosen = torch.cat([chosen[:, new:], arriving], 1)
        others = torch.cat([others[:, new:], leaving], 1)
    return result


def selection_cycle(sizes: Sizes, changed: float = 0.4) -> list[torch.Tensor]:
    """Selections to be gone through again and again, each as far from the last as `selections` makes them.

    An even number of them. Together they have more pages than there are slots: in the steady state every step fetches
    and evicts.
    """
    new = round(changed * sizes.budget)
    steps = 2 * (max(sizes.slots, sizes.budget) // (2 * new) + 1)
    assert sizes.slots < steps * new < sizes.num_pages, f"{steps} steps of {new} new pages, {sizes.slots} slots"
    order = torch.rand(sizes.batch * sizes.kv_heads, sizes.num_pages - 1, device=sizes.device).argsort(1)
    order = order.to(INT32)[:, : steps * new] + 1
    shifts = (order.roll(-step * new, 1)[:, : sizes.budget] for step in range(steps))
    return [pages.sort(1).values.view(*sizes.rows, -1).contiguous() for pages in shifts]


def page_table(sizes: Sizes) -> PageTable:
    """Empty, on the device."""
    return PageTable.empty(*sizes.rows, sizes.slots, sizes.num_pages, str(sizes.device))


def device_kv(sizes: Sizes) -> DeviceKV:
    """Filled with random keys and values; no pinned heads."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn((*sizes.rows, *shape), device=sizes.device, dtype=sizes.dtype)

    rows = sizes.rows_per_token
    slots = random(sizes.slots, rows, sizes.page_size, sizes.head_dim)
    return DeviceKV(
        sinks=random(rows, SINKS, sizes.head_dim),
        window=random(rows, ring_rows(RECENT, sizes.page_size), sizes.head_dim),
        slots=encode(slots) if sizes.coded else slots,
        pinned=torch.empty((sizes.batch, 0, rows, 1, sizes.head_dim), device=sizes.device, dtype=sizes.dtype),
        pinned_row=torch.full((sizes.kv_heads,), -1, dtype=INT32, device=sizes.device),
        recent_tokens=RECENT,
        value_dim=sizes.value_dim,
    )


def random_slots(sizes: Sizes) -> torch.Tensor:
    """Slots of the attended pages, in no order: int32 [batch, num_kv_heads, budget]."""
    count = sizes.batch * sizes.kv_heads
    order = torch.rand(count, sizes.slots, device=sizes.device).argsort(1).to(INT32)
    return order[:, : sizes.budget].view(*sizes.rows, -1).contiguous()


def lengths(sizes: Sizes) -> torch.Tensor:
    """Every sequence fills its pages, int32 [batch]."""
    return torch.full((sizes.batch,), sizes.num_pages * sizes.page_size, dtype=INT32, device=sizes.device)


def fetch_list(sizes: Sizes, per_head: int) -> Resolved:
    """`per_head` random pages of every KV head, into as many slots from the first on."""
    count = sizes.batch * sizes.kv_heads
    pages = torch.rand(count, sizes.num_pages, device=sizes.device).argsort(1)[:, :per_head].to(INT32)
    slots = torch.arange(per_head, dtype=INT32, device=sizes.device).expand(*sizes.rows, per_head).contiguous()
    return Resolved(
        slots=slots,
        fetch_pages=pages.view(*sizes.rows, per_head).contiguous(),
        fetch_slots=slots.clone(),
        num_fetched=torch.full(sizes.rows, per_head, dtype=INT32, device=sizes.device),
    )


def host_pages(sizes: Sizes) -> torch.Tensor:
    """Random pages [batch, num_pages, num_kv_heads, 2 or 1, page_size, row width], pinned where there is a GPU."""
    shape = (sizes.batch, sizes.num_pages, sizes.kv_heads, sizes.rows_per_token, sizes.page_size, sizes.head_dim)
    pages = torch.randn(shape).to(sizes.dtype)
    pages = encode(pages) if sizes.coded else pages
    return pages.pin_memory() if sizes.device.type == "cuda" else pages


def empty_selection(sizes: Sizes) -> torch.Tensor:
    """Nothing selected yet."""
    return torch.full((*sizes.rows, sizes.budget), NO_PAGE, dtype=INT32, device=sizes.device)
