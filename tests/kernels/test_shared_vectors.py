"""Vectors that are key and value in one (latent attention): every kernel that knows of them, and its reference."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clo_kernels import reference
from clo_kernels import score_pages as score_module
from clo_kernels import sparse_decode_attention as module
from clo_kernels.append_kv import append_kv
from clo_kernels.coded_pages import decode, encode
from clo_kernels.gather_pages import gather_pages
from clo_kernels.hit_test import FOLDS, hit_test
from clo_kernels.layout import Resolved, window_start
from clo_kernels.page_index import IndexKind, entry_shape, hash_planes, page_index
from clo_kernels.score_pages import score_pages
from clo_kernels.sparse_decode_attention import Tiles, sparse_decode_attention
from clo_kernels.token_logits import group_sizes
from tests.kernels import oracle
from tests.kernels.helpers import DEVICE, TOLERANCE, by_dtype, cases
from tests.kernels.sequences import empty_kv, lay_out
from tests.kernels.test_append_kv import same
from tests.kernels.test_coded_pages import as_stored, with_coded_slots
from tests.kernels.test_hit_test import mixed_tau
from tests.kernels.test_ring_doorbell import pinned, synchronize
from tests.kernels.test_sparse_decode_attention import check, exact, problem

WIDE = (576, 512)
"""Vectors and values of DeepSeek-V3."""
ATTENDED = cases(
    "lengths heads group dim value_dim page_size budget splits",
    ((131,), 1, 16, *WIDE, 16, 3, 2),
    ((97, 5, 300), 1, 37, 48, 32, 16, 5, 3),
    ((150, 41), 2, 3, 64, 64, 1, 11, 2),
    ((90,), 1, 70, 40, 32, 64, 1, 2),
    ((133, 90, 1), 2, 1, 256, 240, 3, 7, 2),
    ((60,), 1, 5, 24, 16, 4, 5, 1),
)


# ---- attention


@by_dtype
@ATTENDED
def test_attention_agrees_with_float64(lengths, heads, group, dim, value_dim, page_size, budget, splits, dtype):
    pins = (1,) if heads > 1 else ()
    given = problem(
        lengths, heads, group, dim, page_size, budget=budget, value_dim=value_dim, dtype=dtype, pinned=pins, share=0.7
    )
    check(*given, num_splits=splits)


@by_dtype
@ATTENDED
def test_the_reference_agrees_with_float64(lengths, heads, group, dim, value_dim, page_size, budget, splits, dtype):
    query, kv, selected, length, full, tokens = problem(
        lengths, heads, group, dim, page_size, budget=budget, value_dim=value_dim, dtype=dtype
    )
    out = query.new_full((*query.shape[:2], value_dim), float("nan"))
    reference.sparse_decode_attention(query, kv, selected, length, scale=0.1, out=out)
    expected = exact(query, full, tokens, 0.1, value_dim=value_dim)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[dtype])


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([(16, 16), (32, 16), (48, 40)]),
    st.sampled_from([1, 17, 33]),
    st.integers(0, 10**6),
    st.lists(st.integers(1, 120), min_size=1, max_size=3),
    st.integers(1, 9),
)
def test_any_lengths_and_splits(sizes, group, seed, lengths, splits):
    torch.manual_seed(seed)
    check(*problem(tuple(lengths), 1, group, sizes[0], 4, budget=6, value_dim=sizes[1], recent=7), num_splits=splits)


@by_dtype
@cases("group dim value_dim page_size splits", (20, 48, 32, 16, 3), (3, 32, 32, 4, 1), (16, *WIDE, 16, 2))
def test_attention_over_coded_slots(group, dim, value_dim, page_size, splits, dtype):
    query, kv, selected, lengths, full, tokens = problem(
        (150, 61), 1, group, dim, page_size, budget=4, value_dim=value_dim, dtype=dtype
    )
    attended = full.clone()
    for b, count in enumerate((150, 61)):
        start, first = window_start(count, kv.recent_tokens, page_size), kv.sinks.shape[3]
        attended[b, :, :, first:start] = as_stored(full, page_size)[b, :, :, first:start]
    check(query, with_coded_slots(kv), selected, lengths, attended, tokens, num_splits=splits)


@pytest.mark.parametrize("sinks", [(-3.0, 8.0), (0.0, 30.0)])
def test_sinks_take_their_share(sinks):
    query, kv, selected, lengths, full, tokens = problem((97, 5), 1, 19, 48, 16, budget=5, value_dim=32)
    logits = torch.linspace(*sinks, 19, device=DEVICE)
    out = sparse_decode_attention(query, kv, selected, lengths, num_splits=3, sink_logits=logits)
    torch.testing.assert_close(
        out.double(), exact(query, full, tokens, 48**-0.5, logits, value_dim=32), **TOLERANCE[query.dtype]
    )


def test_no_tokens_give_zeros():
    query, kv, selected, lengths, *_ = problem((40, 33), 1, 20, 48, 16, budget=2, value_dim=32)
    lengths[1] = 0
    out = sparse_decode_attention(query, kv, selected, lengths, out=query.new_full((2, 20, 32), float("nan")))
    assert out[0].isfinite().all()
    assert not out[1].any()


def test_programs_share_a_group_and_run_at_once(monkeypatch):
    query, kv, selected, *_ = problem((300,), 1, 70, 48, 16, budget=40, value_dim=32, dtype=torch.float16)
    assert (Tiles.of(query, kv).members, Tiles.of(query, kv).parts) == (32, 3)
    assert Tiles.of(query, with_coded_slots(kv)).parts == 5
    assert Tiles.of(query.float(), kv).parts == 5
    for programs, splits in ((1, 1), (6, 2), (13, 4), (10**6, 20 + 2 + 1)):
        monkeypatch.setattr(module, "resident_programs", lambda *_, programs=programs: programs)
        assert module.default_splits(query, kv, selected) == splits


@pytest.mark.parametrize(
    ("widths", "shared", "tiles"),
    [
        # an H200 lends 227 KiB to a program, an A100 163, an RTX 4090 99
        (WIDE, 232448, (3, 32, 32)),
        (WIDE, 166912, (3, 32, 32)),
        (WIDE, 101376, (2, 32, 32)),
        ((1024, 512), 232448, (3, 32, 32)),
        ((1024, 512), 166912, (2, 32, 32)),
        ((1024, 512), 101376, (2, 16, 32)),
        ((1024, 512), 80000, (2, 16, 16)),
    ],
)
def test_blocks_are_as_many_and_as_large_as_fit(widths, shared, tiles, monkeypatch):
    monkeypatch.setattr(module, "shared_memory", lambda *_, **__: shared)
    query, kv, *_ = problem((70,), 1, 40, widths[0], 16, budget=2, value_dim=widths[1], dtype=torch.float16)
    found = Tiles.of(query, kv)
    assert (found.num_stages, found.block, found.members) == tiles
    assert found.members * found.parts >= 40
    assert found.program_bytes <= max(shared, module.SHARED_PROGRAM_BYTES)


def test_a_device_on_which_nothing_fits(monkeypatch):
    monkeypatch.setattr(module, "shared_memory", lambda *_, **__: 65536)
    query, kv, *_ = problem((70,), 1, 40, 1024, 16, budget=2, value_dim=512, dtype=torch.float16)
    with pytest.raises(
        ValueError, match=r"head_dim = 1024, 512 of it the value, in torch\.float16 needs 67584 bytes .* has 65536"
    ):
        Tiles.of(query, kv)


# ---- the index path


@by_dtype
@pytest.mark.parametrize("fold", FOLDS)
@cases("batch kv_heads group dim", (2, 1, 128, 576), (3, 2, 70, 40), (2, 1, 5, 1024))
def test_hit_test(batch, kv_heads, group, dim, fold, dtype):
    anchor = torch.randn(batch, kv_heads * group, dim)
    query = anchor + torch.rand(batch, kv_heads, 1).repeat_interleave(group, 1) * torch.randn_like(anchor)
    anchor[0, :group, : dim - 1] = 0  # anchored by its last dimension alone
    weights = (torch.rand(kv_heads * group) + 0.1).to(DEVICE)
    query, anchor = query.to(DEVICE, dtype), anchor.to(DEVICE, dtype)
    importance = weights if fold == "importance" else None
    tau = mixed_tau(reference.folded_cosine(query, anchor, kv_heads, fold, importance))
    kept, expected = anchor.clone(), torch.empty(batch, kv_heads, dtype=torch.bool, device=DEVICE)
    reference.hit_test(query, kept, tau, fold=fold, importance=importance, out=expected)
    missed = hit_test(query, anchor, tau, fold=fold, importance=importance, out=~expected)
    assert torch.equal(missed, expected)
    assert torch.equal(anchor, kept)
    assert missed.any()
    assert not missed.all()


@by_dtype
@pytest.mark.parametrize("kind", IndexKind)
@cases(
    "candidates group dim pages page_size", ((40, 7), 37, 576, 43, 4), ((5,), 128, 40, 8, 16), ((20,), 3, 264, 22, 1)
)
def test_scores(kind, candidates, group, dim, pages, page_size, dtype, monkeypatch):
    monkeypatch.setattr(score_module, "FOLD_BLOCK", 16)
    monkeypatch.setattr(score_module, "FOLD_VALUES", 256)  # a group is folded in parts
    batch, scale = len(candidates), dim**-0.5
    keys = (torch.randn(batch, 1, pages, page_size, dim) + torch.randn(dim)).to(dtype)
    planes = hash_planes(dim, seed=3) if kind is IndexKind.SIGN_HASH else None
    index = page_index(keys, kind, planes)
    query = torch.randn(batch, group, dim).to(dtype)
    expected = torch.full((batch, 1, pages), -torch.inf, dtype=torch.float64)
    for b, count in enumerate(candidates):
        inside = slice(1, count + 1)
        if kind.of_tokens:
            normals = None if planes is None else planes.double().numpy()
            scores = oracle.page_scores(query[b].double().numpy(), index[b, 0, inside].numpy(), scale, normals)
            expected[b, 0, inside] = torch.from_numpy(scores)
        else:
            products = query[b, :, None, None].double() * index[b, 0, inside].double()
            expected[b, 0, inside] = (products.amax(2).sum(-1) * scale).softmax(-1).mean(0)
        index[b, 0, count + 1 :] = index[b, 0, :1] = 0x7E007E00 if kind.of_tokens else float("nan")
    counts = torch.tensor(candidates, dtype=torch.int32, device=DEVICE)
    given = (query.to(DEVICE), index.to(DEVICE), counts, torch.ones(batch, 1, dtype=torch.bool, device=DEVICE))
    for score in (score_pages, reference.score_pages):
        out = torch.full((batch, 1, pages), float("nan"), device=DEVICE)
        score(*given, scale=scale, planes=None if planes is None else planes.to(DEVICE), out=out)
        torch.testing.assert_close(out.double().cpu(), expected, rtol=3e-4, atol=1e-6)


@cases(
    "dim group dtype part",
    (576, 128, torch.bfloat16, 64),
    (128, 8, torch.bfloat16, 128),
    (80, 8, torch.half, 128),
    (256, 8, torch.half, 64),
    (128, 20, torch.half, 64),
    (32, 3, torch.half, 32),
    (128, 8, torch.float32, 32),
)
def test_what_is_multiplied_at_once(dim, group, dtype, part):
    """As much as registers hold (see `test_ptx.py`)."""
    assert group_sizes(torch.zeros(1, 2 * group, dim, dtype=dtype), 2)["PART"] == part


# ---- a new token


@pytest.mark.parametrize("append", [append_kv, reference.append_kv], ids=["kernel", "reference"])
@pytest.mark.parametrize("coded", [False, True], ids=["plain", "coded"])
@cases("kind page_size dim", *[(kind, 16, dim) for kind in (*IndexKind, None) for dim in (48, 576)], (None, 1, 48))
def test_growing_equals_laying_out_at_once(kind, page_size, dim, coded, append):
    batch, heads, tokens, value_dim = 2, 2, 2 * page_size + 20, dim - 16
    shape = {
        "sinks": min(3, page_size),
        "recent": 10,
        "max_tokens": tokens,
        "pinned_heads": (1,),
        "value_dim": value_dim,
    }
    full = torch.randn(batch, heads, 1, tokens, dim).to(DEVICE, torch.float16)
    kv, expected = (empty_kv(batch, heads, 1, page_size, dim, **shape, dtype=full.dtype) for _ in range(2))
    kv = with_coded_slots(kv) if coded else kv
    host = torch.full((batch, tokens // page_size + 1, heads, 1, page_size, dim), float("nan"), dtype=full.dtype)
    host = pinned(encode(host) if coded else host)
    untouched = host.clone()
    planes = hash_planes(dim).to(DEVICE) if kind is IndexKind.SIGN_HASH else None
    index = None
    if kind is not None:
        entries = (batch, heads, host.shape[1], *entry_shape(kind, page_size, dim))
        index = torch.full(entries, 77, dtype=torch.int32 if kind.of_tokens else full.dtype, device=DEVICE)
    for token in range(tokens):
        lengths = torch.tensor([token + 1, 0], dtype=torch.int32, device=DEVICE)
        append(full[:, :, 0, token].contiguous(), None, lengths, kv, host, index, planes=planes)
    synchronize()

    lay_out(expected, full, [tokens, 0])
    assert same(kv.sinks[:, :1], expected.sinks[:, :1])
    assert same(kv.pinned, expected.pinned)
    start = window_start(tokens, 10, page_size)
    live = [token % kv.ring_tokens for token in range(start, tokens)]
    assert torch.equal(kv.window[0, 0][:, live], expected.window[0, 0][:, live])
    gone = start // page_size
    assert gone == (2 if page_size > 1 else 12)
    pages = full[0, 0, 0, :start].unflatten(0, (gone, page_size)).cpu()
    stored = decode(host, full.dtype) if coded else host
    wanted = decode(encode(pages), full.dtype) if coded else pages
    assert torch.equal(stored[0, :gone, 0, 0], wanted)
    for rest, before in ((host[0, gone:], untouched[0, gone:]), (host[1], untouched[1]), (host[:, :, 1],) * 2):
        assert same(rest.float(), before.float())
    assert same(host[:, :, 1].float(), untouched[:, :, 1].float())
    if index is None:
        return
    _check_index(index[0, 0, :gone].cpu(), pages, kind, planes)
    assert (index[0, 0, gone:] == 77).all()
    assert (index[1] == 77).all()
    assert (index[:, 1] == 77).all()


def _check_index(entries, pages, kind, planes):
    """Of pages [pages, page_size, dim] of keys."""
    keys = pages.double()
    if kind is IndexKind.PAGE_MINMAX:
        assert torch.equal(entries.double(), torch.stack([keys.amin(1), keys.amax(1)], 1))
    elif kind is IndexKind.PAGE_MEAN:
        torch.testing.assert_close(entries.double(), keys.mean(1, keepdim=True), **TOLERANCE[pages.dtype])
    elif kind is IndexKind.KEY_4BIT:
        found, step = oracle.keys_of(entries.numpy())
        assert (np.abs(found - keys.numpy()) <= 0.52 * step + 1e-3 * np.abs(keys.numpy()).max()).all()
    else:
        sides = (keys @ planes.double().cpu().T).numpy()
        assert (oracle.bits_of(entries.numpy()) == (sides > 0))[np.abs(sides) > 1e-3].all()


@pytest.mark.parametrize("dim", [24, 576])
def test_pages_of_one_row_are_gathered(dim):
    host = pinned(torch.randn(1, 6, 2, 1, 4, dim))
    slots = torch.zeros(1, 2, 5, 1, 4, dim, device=DEVICE)
    fetch = Resolved(
        slots=torch.zeros(1, 2, 2, dtype=torch.int32, device=DEVICE),
        fetch_pages=torch.tensor([[[5, 1], [2, -1]]], dtype=torch.int32, device=DEVICE),
        fetch_slots=torch.tensor([[[0, 4], [3, -1]]], dtype=torch.int32, device=DEVICE),
        num_fetched=torch.tensor([[2, 1]], dtype=torch.int32, device=DEVICE),
    )
    gather_pages(host, slots, fetch)
    synchronize()
    for head, page, slot in ((0, 5, 0), (0, 1, 4), (1, 2, 3)):
        assert torch.equal(slots[0, head, slot].cpu(), host[0, page, head])
    assert int((slots != 0).flatten(3).any(-1).sum()) == 3


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value_dim": 20}, "value_dim = 20, expected a multiple of 8 from 16 to head_dim = 48"),
        ({"value_dim": 56}, "value_dim = 56, expected a multiple of 8 from 16 to head_dim = 48"),
        ({"value_dim": 8}, "value_dim = 8, expected a multiple of 8 from 16 to"),
        ({"value_dim": 0}, "value_dim = 0, expected a multiple of 8 from 16 to"),
        ({"value_dim": -8}, "value_dim = -8, expected a multiple of 8 from 16 to"),
        ({"value_dim": None}, r"window: shape \[2, 2, 1, 12, 48\], expected \['any', 'any', 2, 'any', 'any'\]"),
    ],
)
def test_what_does_not_go_together(changes, message):
    kv = empty_kv(2, 2, 5, 4, 48, sinks=3, recent=6, max_tokens=40, dtype=torch.float32, value_dim=32)
    with pytest.raises(ValueError, match=message):
        replace(kv, **changes).check(kv.window.device, torch.float32)


def test_coded_values_end_where_a_step_does():
    kv = with_coded_slots(empty_kv(1, 1, 5, 4, 48, sinks=3, recent=6, max_tokens=40, dtype=torch.float32, value_dim=40))
    with pytest.raises(
        ValueError, match="value_dim = 40, expected a multiple of 16, values of a coded page that share"
    ):
        kv.check(kv.window.device, torch.float32)


def test_a_value_beside_vectors_that_are_values():
    kv = empty_kv(2, 2, 5, 4, 48, sinks=3, recent=6, max_tokens=40, dtype=torch.float32, value_dim=32)
    key, lengths = torch.zeros(2, 2, 48, device=DEVICE), torch.ones(2, dtype=torch.int32, device=DEVICE)
    host, index = pinned(torch.zeros(2, 10, 2, 1, 4, 48)), torch.zeros(2, 2, 10, 1, 48, device=DEVICE)
    with pytest.raises(ValueError, match=r"value: goes with keys that are no values, kv\.value_dim none"):
        append_kv(key, key, lengths, kv, host, index)
