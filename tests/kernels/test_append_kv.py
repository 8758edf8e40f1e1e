"""`append_kv`: sequences grown token by token are laid out as if they had been there at once."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from clo_kernels import reference
from clo_kernels.append_kv import append_kv
from clo_kernels.layout import window_start
from clo_kernels.page_index import IndexKind, entry_shape, hash_planes
from tests.kernels import oracle
from tests.kernels.helpers import DEVICE, TOLERANCE, cases
from tests.kernels.sequences import empty_kv, lay_out
from tests.kernels.test_ring_doorbell import pinned, synchronize

CASES = cases(
    "page_size recent sinks dim vectors",
    (4, 5, 3, 64, 2),
    (16, 20, 4, 64, 1),
    (1, 2, 1, 128, 2),
    (64, 10, 0, 16, 2),
    (3, 7, 3, 32, 1),
    (8, 9, 2, 80, 2),
)


def grow(append, full, tokens, kv, host, index, idle=()):
    """Append `tokens` of every sequence and wait: pages are in host memory then. Those in `idle` have length 0."""
    for token in tokens:
        lengths = torch.full((full.shape[0],), token + 1, dtype=torch.int32, device=DEVICE)
        lengths[list(idle)] = 0
        append(full[:, :, 0, token].contiguous(), full[:, :, 1, token].contiguous(), lengths, kv, host, index)
    synchronize()


def same(first, second):
    return torch.equal(first.nan_to_num(nan=-7.0), second.nan_to_num(nan=-7.0))


def setup(page_size, recent, sinks, dim, vectors, *, batch=2, heads=3, tokens=90, dtype=torch.float16):
    full = torch.randn(batch, heads, 2, tokens, dim).to(DEVICE, dtype)
    kv = empty_kv(
        batch, heads, 1, page_size, dim, sinks=sinks, recent=recent, max_tokens=tokens, pinned_heads=(1,), dtype=dtype
    )
    pages = tokens // page_size + 1
    host = torch.full((batch, pages, heads, 2, page_size, dim), float("nan"), dtype=dtype)
    index = torch.full((batch, heads, pages, vectors, dim), float("nan"), dtype=dtype, device=DEVICE)
    return full, kv, pinned(host), index


@CASES
@pytest.mark.parametrize("append", [append_kv, reference.append_kv], ids=["kernel", "reference"])
def test_growing_equals_laying_out_at_once(page_size, recent, sinks, dim, vectors, append):
    full, kv, host, index = setup(page_size, recent, sinks, dim, vectors)
    num_tokens = full.shape[3]
    grow(append, full, range(num_tokens), kv, host, index, idle=[1])
    lengths = [num_tokens, 0]
    expected = empty_kv(
        2, 3, 1, page_size, dim, sinks=sinks, recent=recent, max_tokens=num_tokens, pinned_heads=(1,), dtype=full.dtype
    )
    lay_out(expected, full, lengths)
    assert same(kv.sinks[:, ::2], expected.sinks[:, ::2])
    assert same(kv.pinned, expected.pinned)
    start = window_start(num_tokens, recent, page_size)
    live = [token % kv.ring_tokens for token in range(start, num_tokens)]
    assert torch.equal(kv.window[0, ::2][:, :, live], expected.window[0, ::2][:, :, live])
    gone = start // page_size
    assert gone > 0
    pages = full[0, :, :, :start].unflatten(2, (gone, page_size))  # [heads, 2, pages, page_size, dim]
    assert torch.equal(host[0, :gone, ::2].to(DEVICE), pages[::2].permute(2, 0, 1, 3, 4))
    assert host[0, gone:].isnan().all()
    keys = pages[::2, 0]
    if vectors == 2:
        assert torch.equal(index[0, ::2, :gone], torch.stack([keys.amin(2), keys.amax(2)], 2))
    else:
        mean = keys.double().mean(2, keepdim=True).to(index.dtype)
        torch.testing.assert_close(index[0, ::2, :gone], mean, **TOLERANCE[index.dtype])
    assert index[0, :, gone:].isnan().all()
    # a pinned head has only its own place, a sequence of length 0 none
    assert host[0, :, 1].isnan().all()
    assert kv.window[0, 1].isnan().all()
    assert all(rest[1].isnan().all() for rest in (kv.window, kv.sinks, kv.pinned, host, index))


@pytest.mark.parametrize("append", [append_kv, reference.append_kv], ids=["kernel", "reference"])
@cases("page_size dim", (16, 64), (1, 128), (3, 80), (64, 16))
@pytest.mark.parametrize("kind", [IndexKind.KEY_4BIT, IndexKind.SIGN_HASH])
def test_index_of_single_tokens(kind, page_size, dim, append):
    """A page that leaves is known to half a step, or by the side of each plane that its keys lie on."""
    full, kv, host, _ = setup(page_size, 10, 1, dim, 1, tokens=2 * page_size + 15)
    planes = hash_planes(dim).to(DEVICE) if kind is IndexKind.SIGN_HASH else None
    index = torch.full((2, 3, host.shape[1], *entry_shape(kind, page_size, dim)), 77, dtype=torch.int32, device=DEVICE)
    for token in range(full.shape[3]):
        lengths = torch.full((2,), token + 1, dtype=torch.int32, device=DEVICE)
        new = (full[:, :, side, token].contiguous() for side in (0, 1))
        append(*new, lengths, kv, host, index, planes=planes)
    gone = window_start(full.shape[3], 10, page_size) // page_size
    keys = full[:, ::2, 0, : gone * page_size].unflatten(2, (gone, page_size)).double().cpu().numpy()
    entries = index[:, ::2, :gone].cpu().numpy()
    if kind is IndexKind.KEY_4BIT:
        found, step = oracle.keys_of(entries)
        assert (np.abs(found - keys) <= 0.52 * step + 1e-3 * np.abs(keys).max()).all()
    else:
        sides = keys @ planes.double().cpu().numpy().T
        assert (oracle.bits_of(entries) == (sides > 0))[np.abs(sides) > 1e-4].all()
    assert (index[:, :, gone:] == 77).all()
    assert (index[:, 1] == 77).all()


@pytest.mark.parametrize("append", [append_kv, reference.append_kv], ids=["kernel", "reference"])
@cases("page_size heads", (16, 3), (4, 2), (3, 3))
def test_pages_may_lie_head_by_head_as_slots_do(page_size, heads, append):
    full, kv, host, index = setup(page_size, 10, 1, 64, 2, heads=heads, tokens=60)
    slots = torch.full_like(host.transpose(1, 2), float("nan"), device=DEVICE, memory_format=torch.contiguous_format)
    found = []
    for pages in (host, slots.transpose(1, 2)):
        grow(append, full, range(60), kv, pages, index)
        found.append(pages.to(DEVICE))
    assert same(*found)
    assert not found[0][:, 0, 0].isnan().any()


def test_only_the_new_token_is_written_while_no_page_leaves():
    full, kv, host, index = setup(16, 20, 4, 64, 2)
    grow(append_kv, full, range(50), kv, host, index)
    before = {field.name: getattr(kv, field.name) for field in fields(kv) if field.type == "torch.Tensor"}
    before = {name: tensor.clone() for name, tensor in before.items()}
    host_before, index_before = host.clone(), index.clone()
    grow(append_kv, full, [50], kv, host, index)
    before["window"][:, ::2, :, 50 % kv.ring_tokens] = full[:, ::2, :, 50]
    before["pinned"][:, 0, :, 50] = full[:, 1, :, 50]
    assert all(same(getattr(kv, name), tensor) for name, tensor in before.items())
    assert same(host, host_before)
    assert same(index, index_before)


def test_what_does_not_fit_is_dropped():
    full, kv, host, index = setup(4, 5, 3, 64, 2, tokens=30)
    short_host, short_index = pinned(host[:, :2].contiguous()), index[:, :, :2].contiguous()
    guard = short_host.clone(), short_index.clone()
    grow(append_kv, full, range(17), kv, short_host, short_index)
    assert torch.equal(short_host[:, :, 0, 0], full[:, 0, 0, :8].unflatten(1, (2, 4)).to(short_host.device))
    assert guard[0].shape == short_host.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": torch.zeros(1, 2, 32)}, r"value: shape \[1, 2, 32\], expected \[1, 2, 64\]"),
        ({"host_pages": torch.zeros(1, 5, 2, 2, 8, 64)}, "host_pages: shape"),
        (
            {"index": torch.zeros(1, 2, 4, 2, 64)},
            r"index: .* expected \[1, 2, 5, 'any', 'any'\]",
        ),
        (
            {"index": torch.zeros(1, 2, 5, 4, 9).int()},
            r"index: .* expected \[1, 2, 5, 16, 'any'\]",
        ),
        ({"index": torch.zeros(1, 2, 5, 3, 64)}, "index: 3 vectors a page"),
        ({"lengths": torch.zeros(1)}, "lengths: dtype torch.float32, expected torch.int32"),
    ],
    ids=["value", "page-size", "index-pages", "index-tokens", "vectors", "lengths"],
)
def test_refuses(change, message):
    arguments = {
        "key": torch.zeros(1, 2, 64),
        "value": torch.zeros(1, 2, 64),
        "lengths": torch.zeros(1).int(),
        "host_pages": torch.zeros(1, 5, 2, 2, 16, 64),
        "index": torch.zeros(1, 2, 5, 2, 64),
        **change,
    }
    arguments = {name: tensor.to(DEVICE) for name, tensor in arguments.items()}
    kv = empty_kv(1, 2, 3, 16, 64, sinks=4, recent=16, max_tokens=1, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        append_kv(kv=kv, **arguments)
