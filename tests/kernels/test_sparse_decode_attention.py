"""`sparse_decode_attention` against full attention in float64, restricted to the attended tokens."""

from dataclasses import replace

import pytest
import torch

from clo_kernels import reference
from clo_kernels import sparse_decode_attention as module
from clo_kernels.sparse_decode_attention import sparse_decode_attention
from tests.kernels.helpers import DEVICE, TOLERANCE, by_dtype, cases
from tests.kernels.sequences import choose, empty_kv, lay_out


def exact(query, full, tokens, scale, sink_logits=None, value_dim=None):
    """Attention of every query head over `tokens[sequence, KV head]` of `full`; `value_dim` of a key are its value."""
    width = query.shape[-1] if value_dim is None else value_dim
    out = torch.zeros(*query.shape[:2], width, dtype=torch.float64, device=query.device)
    group = query.shape[1] // full.shape[1]
    for (b, h), attended in tokens.items():
        for member in range(h * group, (h + 1) * group):
            keys, values = full[b, h, 0, attended].double(), full[b, h, -1, attended, :width].double()
            logits = keys @ query[b, member].double() * scale
            out[b, member] = torch.softmax(logits, 0) @ values
            if sink_logits is not None:
                out[b, member] *= torch.sigmoid(logits.logsumexp(0) - sink_logits[member].double())
    return out


def problem(
    lengths, heads, group, dim, page_size,
    *, budget, sinks=4, recent=20, pinned=(), dtype=torch.float32, share=1.0, value_dim=None,
):  # fmt: skip
    shape = (len(lengths), heads, 2 if value_dim is None else 1, max(lengths), dim)
    full = torch.randn(shape, dtype=torch.float32).to(DEVICE, dtype)
    query = (2 * torch.randn(len(lengths), heads * group, dim)).to(DEVICE, dtype)
    kv = empty_kv(
        len(lengths), heads, budget + 2, page_size, dim,
        sinks=min(sinks, page_size), recent=recent, max_tokens=max(lengths), pinned_heads=pinned, dtype=dtype,
        value_dim=value_dim,
    )  # fmt: skip
    lay_out(kv, full, lengths)
    selected, tokens = choose(kv, full, lengths, budget, share)
    return query, kv, selected, torch.tensor(lengths, dtype=torch.int32, device=DEVICE), full, tokens


def check(query, kv, selected, lengths, full, tokens, num_splits=None, scale=None):
    scale_given = query.shape[-1] ** -0.5 if scale is None else scale
    expected = exact(query, full, tokens, scale_given, value_dim=kv.value_dim)
    poisoned = query.new_full(expected.shape, float("nan"))
    out = sparse_decode_attention(query, kv, selected, lengths, scale=scale, num_splits=num_splits, out=poisoned)
    assert out is poisoned
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[query.dtype])


SHAPES = cases(
    "lengths heads group dim page_size budget splits",
    ((131,), 1, 1, 64, 16, 3, 1),
    ((97, 5, 300), 2, 3, 64, 16, 5, 3),
    ((150, 41, 77), 1, 7, 128, 1, 11, 2),
    ((401,), 2, 8, 128, 64, 3, 4),
    ((20, 21, 36), 1, 2, 64, 16, 2, 5),
    ((133, 90, 1), 2, 1, 64, 3, 7, 2),
    ((140, 30), 2, 3, 80, 16, 3, 2),
    ((90,), 1, 4, 96, 4, 5, 1),
)


@by_dtype
@SHAPES
def test_agrees_with_full_attention_over_the_attended_tokens(
    lengths, heads, group, dim, page_size, budget, splits, dtype
):
    check(*problem(lengths, heads, group, dim, page_size, budget=budget, dtype=dtype), num_splits=splits)


@pytest.mark.parametrize("share", [0.0, 0.4], ids=["empty-selection", "padded-selection"])
def test_selections_that_are_not_full(share):
    check(*problem((200, 64), 2, 2, 64, 16, budget=5, share=share), num_splits=2)


@pytest.mark.parametrize("sinks", [0, 4, 16])
def test_sinks(sinks):
    """None, some, a whole page; sequences that end before, in and after the first page's leaving."""
    check(*problem((15, 35, 36, 70), 1, 2, 64, 16, budget=2, sinks=sinks), num_splits=2)


def test_pinned_heads_attend_to_everything():
    problems = problem((130, 7), 3, 2, 64, 16, budget=3, pinned=(2, 0))
    assert problems[-1][0, 2] == list(range(130))
    check(*problems, num_splits=3)


def test_every_length_around_page_and_window_edges():
    check(*problem(tuple(range(28, 44)), 1, 1, 16, 8, budget=2, recent=13, sinks=3), num_splits=1)


def test_large_scores_and_another_scale():
    query, *rest = problem((90, 33), 1, 3, 64, 16, budget=3)
    check(query * 30, *rest, num_splits=2, scale=0.5)


def test_default_number_of_splits():
    check(*problem((300,), 1, 2, 64, 16, budget=4))


def test_default_splits_run_at_once_and_have_a_block_each(monkeypatch):
    query, kv, selected, *_ = problem((300,), 2, 2, 64, 16, budget=40)
    for programs, splits in ((1, 1), (7, 3), (8, 4), (10**6, 10 + 1 + 1)):
        monkeypatch.setattr(module, "resident_programs", lambda *_, programs=programs: programs)
        monkeypatch.setattr(module, "block_tokens", lambda _: 64)
        assert module.default_splits(query, kv, selected) == splits


@by_dtype
@cases("splits sinks", (1, (-3.0, 8.0)), (3, (0.0, 30.0)), (5, (-200.0, 1.0)))
def test_sinks_take_their_share(dtype, splits, sinks):
    problem_of = problem((97, 5, 300), 2, 3, 64, 16, budget=5, pinned=(1,), dtype=dtype)
    query, kv, selected, lengths, full, tokens = problem_of
    sink_logits = torch.linspace(*sinks, query.shape[1], device=DEVICE).to(dtype)
    out = torch.full_like(query, float("nan"))
    sparse_decode_attention(query, kv, selected, lengths, num_splits=splits, sink_logits=sink_logits, out=out)
    expected = exact(query, full, tokens, query.shape[-1] ** -0.5, sink_logits)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[dtype])


def test_no_tokens_give_zeros_beside_a_sink():
    query, kv, selected, lengths, _, _ = problem((40, 33), 1, 2, 64, 16, budget=2, share=0.0)
    lengths[1] = 0
    sink_logits = torch.zeros(query.shape[1], device=DEVICE)
    out = sparse_decode_attention(query, kv, selected, lengths, sink_logits=sink_logits)
    assert out[0].isfinite().all()
    assert not out[1].any()


def test_no_tokens_give_zeros():
    query, kv, selected, lengths, _, _ = problem((40, 33), 1, 2, 64, 16, budget=2, share=0.0)
    lengths[1] = 0
    out = sparse_decode_attention(query, kv, selected, lengths, out=torch.full_like(query, float("nan")))
    assert out[0].isfinite().all()
    assert not out[1].any()


@pytest.mark.parametrize("splits", [1, 5])
def test_slots_of_pinned_heads_are_of_no_use(splits):
    """They are read, since whether a head is pinned is known later, and lead nowhere whatever they are."""
    query, kv, selected, lengths, *_ = problem((150, 7), 3, 2, 64, 16, budget=3, pinned=(1,))
    expected = sparse_decode_attention(query, kv, selected, lengths, num_splits=splits)
    selected[:, 1] = torch.tensor([2**31 - 1, -(2**31), 2**30], dtype=torch.int32)
    assert torch.equal(sparse_decode_attention(query, kv, selected, lengths, num_splits=splits), expected)


def test_reference_agrees_with_float64():
    query, kv, selected, lengths, full, tokens = problem((150, 7), 3, 2, 64, 16, budget=3, pinned=(1,))
    out = reference.sparse_decode_attention(query, kv, selected, lengths, scale=0.125, out=torch.empty_like(query))
    torch.testing.assert_close(out.double(), exact(query, full, tokens, 0.125), **TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(1, 5, 64)}, "num_query_heads = 5 must be a multiple of num_kv_heads = 2"),
        ({"query": torch.zeros(1, 4, 32)}, r"query: shape \[1, 4, 32\], expected \[1, 'any', 64\]"),
        ({"selected": torch.zeros(1, 2, 3)}, "selected: dtype torch.float32, expected torch.int32"),
        ({"lengths": torch.zeros(2).int()}, r"lengths: shape \[2\], expected \[1\]"),
        ({"sink_logits": torch.zeros(3)}, r"sink_logits: shape \[3\], expected \[4\]"),
        ({"num_splits": 0}, f"num_splits = 0, expected 1 to {module.MAX_SPLITS}"),
        ({"recent_tokens": 17}, "window: 32 rows, expected a multiple of page_size = 16 that is at least .* = 33"),
        ({"sinks": torch.zeros(1, 2, 2, 17, 64)}, "num_sinks = 17 must fit the first page of 16 tokens"),
        ({"window": torch.zeros(1, 2, 2, 32, 50)}, "window: head_dim = 50, expected a multiple of 8 from 16 to 256"),
    ],
    ids=["group", "head-dim", "dtype", "lengths", "sink-logits", "splits", "ring", "sinks", "multiple-of-8"],
)
def test_refuses(change, message):
    kv = empty_kv(1, 2, 3, 16, 64, sinks=4, recent=16, max_tokens=1, dtype=torch.float32)
    change = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    kv = replace(kv, **{k: v for k, v in change.items() if hasattr(kv, k)})
    arguments = {
        "query": torch.zeros(1, 4, 64, device=DEVICE),
        "selected": torch.zeros(1, 2, 3, dtype=torch.int32, device=DEVICE),
        "lengths": torch.zeros(1, dtype=torch.int32, device=DEVICE),
        **{k: v for k, v in change.items() if not hasattr(kv, k)},
    }
    with pytest.raises(ValueError, match=message):
        sparse_decode_attention(kv=kv, **arguments)
