"""Vectors that are key and value in one (latent attention), against the same keys with values of their own."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clo_kernels import reference
from clo_kernels.append_kv import append_kv
from clo_kernels.gather_pages import gather_pages
from clo_kernels.layout import DeviceKV, Resolved, check_shared_vectors, ring_rows
from clo_kernels.page_index import IndexKind, entry_shape
from clo_kernels.sparse_decode_attention import sparse_decode_attention

PAGE, RECENT, SLOTS, HEADS = 4, 6, 5, 2


def shared_kv(dim, value_dim, *, batch=2, pinned=0, seed=0, dtype=torch.float32):
    """Filled with numbers: attention reads what lengths and slots say."""
    source = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=source).to(dtype)

    return DeviceKV(
        sinks=draw(batch, HEADS, 1, 3, dim),
        window=draw(batch, HEADS, 1, ring_rows(RECENT, PAGE), dim),
        slots=draw(batch, HEADS, SLOTS, 1, PAGE, dim),
        pinned=draw(batch, pinned, 1, 40, dim),
        pinned_row=torch.tensor([0 if head < pinned else -1 for head in range(HEADS)], dtype=torch.int32),
        recent_tokens=RECENT,
        value_dim=value_dim,
    )


def as_pairs(kv):
    """Values of their own: the same numbers, with zeros behind."""

    def pair(vectors, at):
        values = vectors.clone()
        values[..., kv.value_dim :] = 0
        return torch.cat([vectors, values], at)

    return DeviceKV(
        sinks=pair(kv.sinks, 2),
        window=pair(kv.window, 2),
        slots=pair(kv.slots, 3),
        pinned=pair(kv.pinned, 2),
        pinned_row=kv.pinned_row,
        recent_tokens=kv.recent_tokens,
    )


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(16, 8), (48, 32), (64, 64), (256, 240)]),
    st.integers(0, 1),
    st.integers(0, 99),
    st.integers(0, 40),
)
def test_attention_is_that_of_keys_and_values(sizes, pinned, seed, length):
    kv = shared_kv(*sizes, pinned=pinned, seed=seed)
    source = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 3 * HEADS, sizes[0], generator=source)
    selected = torch.stack([torch.randperm(SLOTS, generator=source)[:3] for _ in range(4)]).view(2, HEADS, 3).int()
    lengths = torch.tensor([length, 40 - length], dtype=torch.int32)
    found = sparse_decode_attention(query, kv, selected, lengths, scale=0.3)
    wanted = sparse_decode_attention(query, as_pairs(kv), selected, lengths, scale=0.3)
    assert found.shape == (2, 3 * HEADS, sizes[1])
    torch.testing.assert_close(found, wanted[..., : sizes[1]])


@pytest.mark.parametrize("kind", IndexKind)
@pytest.mark.parametrize("length", [1, 6, 7, 11, 39])
def test_a_token_and_the_page_that_leaves(kind, length):
    kv = shared_kv(48, 32, pinned=1)
    pairs = as_pairs(kv)
    planes = torch.randn(128, 48) if kind is IndexKind.SIGN_HASH else None
    dtype = torch.int32 if kind.of_tokens else torch.float32
    key, lengths = torch.randn(2, HEADS, 48), torch.tensor([length, 0], dtype=torch.int32)
    value = key.clone()
    value[..., 32:] = 0
    kept = []
    for cache, new, rows in ((kv, None, 1), (pairs, value, 2)):
        host = torch.full((2, 10, HEADS, rows, PAGE, 48), -7.0)
        index = torch.full((2, HEADS, 10, *entry_shape(kind, PAGE, 48)), 3, dtype=dtype)
        append_kv(key, new, lengths, cache, host, index, planes=planes)
        kept.append((host, index))
    (host, index), (host_pairs, index_pairs) = kept
    assert torch.equal(index, index_pairs)
    assert torch.equal(host[:, :, :, 0], host_pairs[:, :, :, 0])
    for name in ("sinks", "window", "pinned"):
        assert torch.equal(getattr(kv, name)[:, :, 0], getattr(pairs, name)[:, :, 0]), name
    for name, tensor in (("window", kv.window), ("pinned", kv.pinned)):
        assert torch.isfinite(tensor).all(), name


def test_pages_of_one_row_are_gathered():
    host, slots = torch.randn(1, 6, HEADS, 1, PAGE, 24), torch.zeros(1, HEADS, SLOTS, 1, PAGE, 24)
    fetch = Resolved(
        slots=torch.zeros(1, HEADS, 2, dtype=torch.int32),
        fetch_pages=torch.tensor([[[5, 1], [2, -1]]], dtype=torch.int32),
        fetch_slots=torch.tensor([[[0, 4], [3, -1]]], dtype=torch.int32),
        num_fetched=torch.tensor([[2, 1]], dtype=torch.int32),
    )
    gather_pages(host, slots, fetch)
    for head, page, slot in ((0, 5, 0), (0, 1, 4), (1, 2, 3)):
        assert torch.equal(slots[0, head, slot], host[0, page, head])
    assert int((slots != 0).flatten(3).any(-1).sum()) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value_dim": 20}, "value_dim = 20, expected a multiple of 8 up to head_dim = 48"),
        ({"value_dim": 56}, "value_dim = 56, expected a multiple of 8 up to head_dim = 48"),
        ({"value_dim": None}, r"window: shape \[2, 2, 1, 12, 48\], expected \['any', 'any', 2, 'any', 'any'\]"),
    ],
)
def test_what_does_not_go_together(changes, message):
    kv = shared_kv(48, 32)
    wrong = DeviceKV(**{name: getattr(kv, name) for name in kv.__slots__} | changes)
    with pytest.raises(ValueError, match=message):
        wrong.check(torch.device("cpu"), torch.float32)


def test_a_value_beside_vectors_that_are_values():
    kv, key, lengths = shared_kv(48, 32), torch.zeros(2, HEADS, 48), torch.ones(2, dtype=torch.int32)
    host, index = torch.zeros(2, 10, HEADS, 1, PAGE, 48), torch.zeros(2, HEADS, 10, 1, 48)
    with pytest.raises(ValueError, match=r"value: goes with keys that are no values, kv\.value_dim none"):
        append_kv(key, key, lengths, kv, host, index)


def test_no_kernel_reads_them():
    kv = shared_kv(48, 32)
    with pytest.raises(ValueError, match="value_dim = 32: vectors that are key and value in one have a reference only"):
        check_shared_vectors(kv, SimpleNamespace(device=torch.device("cuda")))
    check_shared_vectors(as_pairs(kv), SimpleNamespace(device=torch.device("cuda")))


def test_wide_vectors():
    """As wide as those of DeepSeek-V3; in float64 by hand."""
    kv = shared_kv(576, 512, batch=1)
    query, length = torch.randn(1, 2 * HEADS, 576), 9
    selected = torch.tensor([[[2], [0]]], dtype=torch.int32)
    found = reference.sparse_decode_attention(
        query, kv, selected, torch.tensor([length]), scale=0.05, out=torch.empty(1, 2 * HEADS, 512)
    )
    for head in range(2 * HEADS):
        own = head // 2
        rows = [kv.slots[0, own, int(selected[0, own, 0]), 0], kv.window[0, own, 0, :length]]
        vectors = torch.cat(rows).double()
        weights = (vectors @ query[0, head].double() * 0.05).softmax(0)
        torch.testing.assert_close(found[0, head], (weights @ vectors[:, :512]).float())
