"""`gather_pages`, bit for bit: every listed page arrives, nothing else moves."""

import pytest
import torch

from clo_kernels import gather_pages as module
from clo_kernels import reference
from clo_kernels.gather_pages import gather_pages
from clo_kernels.layout import NO_PAGE, NO_SLOT, Resolved
from tests.kernels.helpers import DEVICE, cases

MARKER = -7


def bit_patterns(*shape):
    host = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16)
    return host.pin_memory() if DEVICE == "cuda" else host


def fetch_list(counts, budget, num_pages, num_slots):
    """Random distinct pages and slots; what follows a row's count must never be read as one."""
    rows = (len(counts), len(counts[0]))
    fetch = Resolved.like(torch.zeros(*rows, budget, dtype=torch.int32))
    fetch.fetch_pages.fill_(NO_PAGE)
    fetch.fetch_slots.fill_(NO_SLOT)
    fetch.slots.fill_(NO_SLOT)
    for b, row in enumerate(counts):
        for h, count in enumerate(row):
            fetch.num_fetched[b, h] = count
            fetch.fetch_pages[b, h, :count] = torch.randperm(num_pages)[:count]
            fetch.fetch_slots[b, h, :count] = torch.randperm(num_slots)[:count]
    names = ("slots", "fetch_pages", "fetch_slots", "num_fetched")
    return Resolved(*(getattr(fetch, name).to(DEVICE) for name in names))


some_to_fetch = pytest.mark.parametrize(
    "counts",
    [[[4]], [[0, 7, 1]], [[0, 0], [3, 0], [0, 2]], [[0, 0], [0, 0]]],
    ids=["one-row", "three-heads", "three-sequences", "nothing-to-fetch"],
)


def pages_to_fetch(counts, page_size, head_dim):
    """Host pages, marked slots, and the list of what is to be fetched."""
    batch, heads, pages, slots_per_head = len(counts), len(counts[0]), 11, 9
    host = bit_patterns(batch, pages, heads, 2, page_size, head_dim)
    shape = (batch, heads, slots_per_head, 2, page_size, head_dim)
    slots = torch.full(shape, MARKER, dtype=torch.int16, device=DEVICE)
    return host, slots, fetch_list(counts, 8, pages, slots_per_head)


@cases(
    "page_size head_dim programs chunk",
    (1, 64, 1, 4096),
    (16, 128, 5, 4096),
    (16, 64, 100, 256),
    (64, 128, 3, 4096),
    (3, 80, 2, 128),
)
@some_to_fetch
def test_moves_bits_exactly(counts, page_size, head_dim, programs, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_WORDS", chunk)
    host, slots, fetch = pages_to_fetch(counts, page_size, head_dim)
    expected = slots.clone()
    for b, row in enumerate(counts):
        for h, count in enumerate(row):
            for i in range(count):
                expected[b, h, fetch.fetch_slots[b, h, i]] = host[b, fetch.fetch_pages[b, h, i], h].to(DEVICE)
    by_reference = reference.gather_pages(host, slots.clone(), fetch)
    assert gather_pages(host, slots, fetch, num_programs=programs) is slots
    assert torch.equal(slots, expected)
    assert torch.equal(by_reference, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_moves_any_dtype_and_nan(dtype):
    host = bit_patterns(1, 3, 1, 2, 4, 64).view(dtype)
    slots = torch.zeros(1, 1, 2, 2, 4, host.shape[-1], dtype=dtype, device=DEVICE)
    gather_pages(host, slots, fetch_list([[2]], 2, 2, 2))
    copied = {page.numpy().tobytes() for page in host.view(torch.uint8)[0, :2, 0].cpu()}
    assert {slot.numpy().tobytes() for slot in slots.view(torch.uint8)[0, 0].cpu()} == copied


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"host_pages": torch.zeros(1, 5, 2, 2, 8, 64)},
            r"host_pages: shape \[1, 5, 2, 2, 8, 64\], expected \[1, 'any'",
        ),
        ({"host_pages": torch.zeros(1, 5, 2, 2, 4, 64).half()}, "host_pages: dtype torch.float16"),
        ({"slots": torch.zeros(1, 2, 3, 2, 64, 4).transpose(4, 5)}, "slots: strides .* are not contiguous"),
        ({"num_programs": 0}, "num_programs = 0 must be positive"),
        ({"slots": torch.zeros(3073)[1:].view(1, 2, 3, 2, 4, 64)}, "slots: starts at 0x.*, expected a multiple of 16"),
    ],
    ids=["page-size", "dtype", "strides", "programs", "alignment"],
)
def test_refuses(change, message):
    arguments = {
        "host_pages": torch.zeros(1, 5, 2, 2, 4, 64),
        "slots": torch.zeros(1, 2, 3, 2, 4, 64),
        "fetch": Resolved.like(torch.zeros(1, 2, 2, dtype=torch.int32)),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        gather_pages(**arguments)
