"""Sequences as one tensor of all keys and values, and the same laid out as the kernels expect. NaN fills the rest."""

import torch

from clo_kernels.layout import NO_SLOT, DeviceKV, ring_rows, window_start
from tests.kernels.helpers import DEVICE


def empty_kv(
    batch, heads, num_slots, page_size, head_dim, *, sinks, recent, max_tokens, pinned_heads=(), dtype, value_dim=None
):
    nan = {"fill_value": float("nan"), "dtype": dtype, "device": DEVICE}
    rows = 2 if value_dim is None else 1
    pinned_row = torch.full((heads,), -1, dtype=torch.int32, device=DEVICE)
    for row, head in enumerate(pinned_heads):
        pinned_row[head] = row
    return DeviceKV(
        sinks=torch.full((batch, heads, rows, sinks, head_dim), **nan),
        window=torch.full((batch, heads, rows, ring_rows(recent, page_size), head_dim), **nan),
        slots=torch.full((batch, heads, num_slots, rows, page_size, head_dim), **nan),
        pinned=torch.full((batch, len(pinned_heads), rows, max_tokens, head_dim), **nan),
        pinned_row=pinned_row,
        recent_tokens=recent,
        value_dim=value_dim,
    )


def lay_out(kv, full, lengths):
    """Fill sinks, window and pinned heads from `full` [batch, heads, 2 or 1, max_tokens, head_dim]."""
    for b, length in enumerate(lengths):
        num_sinks = min(kv.sinks.shape[3], length)
        kv.sinks[b, :, :, :num_sinks] = full[b, :, :, :num_sinks]
        for token in range(window_start(length, kv.recent_tokens, kv.page_size), length):
            kv.window[b, :, :, token % kv.ring_tokens] = full[b, :, :, token]
        for head, row in enumerate(kv.pinned_row.tolist()):
            if row >= 0:
                kv.pinned[b, row, :, :length] = full[b, head, :, :length]


def choose(kv, full, lengths, budget, share=1.0):
    """Random candidate pages in random slots: `selected` and, per sequence and head, the attended tokens."""
    batch, heads = full.shape[:2]
    selected = torch.full((batch, heads, budget), NO_SLOT, dtype=torch.int32, device=DEVICE)
    tokens = {}
    for b, length in enumerate(lengths):
        start = window_start(length, kv.recent_tokens, kv.page_size)
        candidates = torch.arange(1, max(1, start // kv.page_size))
        for h in range(heads):
            pages = candidates[torch.randperm(len(candidates))[: int(share * budget)]].tolist()
            slots = torch.randperm(kv.slots.shape[2])[: len(pages)].tolist()
            places = torch.randperm(budget)[: len(pages)].tolist()
            attended = list(range(min(kv.sinks.shape[3], start))) + list(range(start, length))
            for page, slot, place in zip(pages, slots, places, strict=True):
                inside = slice(page * kv.page_size, (page + 1) * kv.page_size)
                kv.slots[b, h, slot] = full[b, h, :, inside]
                selected[b, h, place] = slot
                attended += range(inside.start, inside.stop)
            tokens[b, h] = attended if kv.pinned_row[h] < 0 else list(range(length))
    return selected, tokens
