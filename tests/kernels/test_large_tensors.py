"""Tensors of more than 2**31 elements: addresses must be 64 bits wide. On a GPU only, where so much fits."""

import pytest
import torch

from clo_kernels import reference
from clo_kernels.gather_pages import gather_pages
from clo_kernels.layout import DeviceKV, Resolved, ring_rows
from clo_kernels.sparse_decode_attention import sparse_decode_attention
from tests.kernels.helpers import DEVICE, TOLERANCE, needs_gpu


def needs_bytes(count):
    if torch.cuda.mem_get_info()[0] < 1.1 * count:
        pytest.skip(f"needs {count / 1e9:.0f} GB of free device memory")


@needs_gpu
def test_gather_beyond_two_billion_words():
    """The kernel counts 4-byte words: 9.2 GB of pages on each side have more than 2**31 of them."""
    words, pages = 2 * 64 * 128, 140_000
    assert pages * words > 2**31
    needs_bytes(2 * pages * words * 4)
    source = torch.empty(1, pages, 1, 2, 64, 128, dtype=torch.int32, device=DEVICE)
    slots = torch.empty(1, 1, pages, 2, 64, 128, dtype=torch.int32, device=DEVICE)
    moves = {0: pages - 1, pages - 1: 0, 70_000: pages - 2, pages - 3: 131_071}
    for page, slot in moves.items():
        source[0, page] = torch.randint_like(source[0, page], 2**30)
        slots[0, 0, slot] = -1
    listed = torch.tensor([list(moves), list(moves.values())], dtype=torch.int32, device=DEVICE)
    fetch = Resolved(
        slots=listed[1].view(1, 1, -1).clone(),
        fetch_pages=listed[0].view(1, 1, -1).clone(),
        fetch_slots=listed[1].view(1, 1, -1).clone(),
        num_fetched=torch.full((1, 1), len(moves), dtype=torch.int32, device=DEVICE),
    )
    gather_pages(source, slots, fetch)
    for page, slot in moves.items():
        assert torch.equal(slots[0, 0, slot], source[0, page, 0])


@needs_gpu
def test_attention_over_slots_beyond_two_billion_elements():
    heads, page_size, dim, num_slots = 2, 16, 128, 300_000
    assert heads * num_slots * 2 * page_size * dim > 2**31
    needs_bytes(heads * num_slots * 2 * page_size * dim * 2)
    shape = {"dtype": torch.bfloat16, "device": DEVICE}
    kv = DeviceKV(
        sinks=torch.randn(1, heads, 2, 4, dim, **shape),
        window=torch.randn(1, heads, 2, ring_rows(32, page_size), dim, **shape),
        slots=torch.empty(1, heads, num_slots, 2, page_size, dim, **shape),
        pinned=torch.empty(1, 0, 2, 1, dim, **shape),
        pinned_row=torch.full((heads,), -1, dtype=torch.int32, device=DEVICE),
        recent_tokens=32,
    )
    chosen = torch.tensor([0, 299_999, 270_001, 5], dtype=torch.int32, device=DEVICE)
    for slot in chosen.tolist():
        kv.slots[:, :, slot] = torch.randn_like(kv.slots[:, :, slot])
    query = torch.randn(1, 4, dim, **shape)
    lengths = torch.full((1,), 300, dtype=torch.int32, device=DEVICE)
    selected = chosen.expand(1, heads, -1).contiguous()
    expected = reference.sparse_decode_attention(
        query, kv, selected, lengths, scale=dim**-0.5, out=torch.empty_like(query)
    )
    found = sparse_decode_attention(query, kv, selected, lengths)
    torch.testing.assert_close(found, expected, **TOLERANCE[torch.bfloat16])
