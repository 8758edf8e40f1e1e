"""Coded pages: how close they are, and that kernels write and read them as plain torch does."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from clo_kernels import reference
from clo_kernels.append_kv import append_kv
from clo_kernels.coded_pages import SMALLEST_STEP, STEP_VALUES, coded_width, decode, encode, values_of
from clo_kernels.gather_pages import gather_pages
from clo_kernels.layout import Resolved, window_start
from clo_kernels.sparse_decode_attention import sparse_decode_attention
from tests.kernels.helpers import DEVICE, TOLERANCE, by_dtype, cases
from tests.kernels.sequences import empty_kv
from tests.kernels.test_append_kv import grow, pinned
from tests.kernels.test_sparse_decode_attention import SHAPES, check, problem


def with_coded_slots(kv):
    return replace(kv, slots=encode(kv.slots))


def as_stored(full, page_size):
    """Every whole page of `full` [batch, heads, 2, tokens, dim] as it comes back from coded pages."""
    whole = full.shape[3] // page_size * page_size
    return torch.cat([decode(encode(full[:, :, :, :whole]), full.dtype), full[:, :, :, whole:]], 3)


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=STEP_VALUES, max_size=STEP_VALUES),
    st.sampled_from([1.0, 1e-30, 1e20]),
)
@example([1.2e-7] + [0.0] * 15, 1e-30)
@example([1e-9] + [0.0] * 15, 1e-30)
@example([127 * (1 + 2**-8 + 2**-12), 0.5 * (1 + 2**-7) - 2**-20] + [0.0] * 14, 1.0)
def test_a_value_is_known_to_half_a_step(values, scale):
    row = torch.tensor(values, dtype=torch.float64) * scale
    step = row.abs().max() / 127
    error = (decode(encode(row.float()), torch.float64) - row.float().double()).abs()
    if step < SMALLEST_STEP * (1 - 2**-8):
        assert torch.equal(error, row.float().double().abs())
    else:
        # the step is rounded to bfloat16, by 2**-8 of itself at most: the largest code is about 127
        assert (error <= 0.5 * step * (1 + 2**-8)).all()


def test_outliers_cost_only_their_neighbours():
    row = torch.ones(64)
    row[20] = 1000.0
    error = (decode(encode(row), torch.float32) - row).abs()
    assert error[16:32].max() > 0.5
    assert torch.cat([error[:16], error[32:]]).max() < 1e-3


def test_coding_again_changes_nothing():
    rows = encode(torch.randn(50, 128))
    again = encode(decode(rows, torch.float32))
    assert torch.equal(decode(again, torch.float32), decode(rows, torch.float32))


def test_zeros_stay_zeros():
    assert not decode(encode(torch.zeros(3, 32)), torch.float32).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(bad):
    row = torch.ones(2, 48)
    row[0, 17] = bad
    back = decode(encode(row), torch.float32)
    assert not torch.isfinite(back[0, 17])
    assert torch.isfinite(back[0, :16]).all()
    assert torch.isfinite(back[1]).all()


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_widths(head_dim):
    assert coded_width(head_dim) == head_dim * 9 // 8
    assert values_of(coded_width(head_dim)) == head_dim


@pytest.mark.parametrize("call", [lambda: coded_width(72), lambda: values_of(64), lambda: coded_width(0)])
def test_rows_that_cannot_be(call):
    with pytest.raises(ValueError, match=r"expected|must be a multiple"):
        call()


@by_dtype
@SHAPES
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_attention_over_coded_slots(lengths, heads, group, dim, page_size, budget, splits, share, dtype):
    query, kv, selected, length, full, tokens = problem(
        lengths, heads, group, dim, page_size, budget=budget, share=share, pinned=(1,) if heads > 1 else (), dtype=dtype
    )
    # what is in slots comes back as stored; sinks, window and pinned heads are as computed
    attended = full.clone()
    for b, count in enumerate(lengths):
        start = window_start(count, kv.recent_tokens, page_size)
        for h in range(heads):
            if kv.pinned_row[h] < 0:
                first = kv.sinks.shape[3]
                attended[b, h, :, first:start] = as_stored(full, page_size)[b, h, :, first:start]
    check(query, with_coded_slots(kv), selected, length, attended, tokens, num_splits=splits)


def test_programs_without_a_block_of_slots():
    """More splits than blocks: some programs begin behind the slots, some have nothing at all."""
    query, kv, selected, lengths, *_ = problem((133, 90, 1), 2, 1, 64, 3, budget=7)
    few, many = (
        sparse_decode_attention(query, with_coded_slots(kv), selected, lengths, num_splits=splits) for splits in (1, 20)
    )
    torch.testing.assert_close(many, few, **TOLERANCE[query.dtype])


def test_kernel_and_reference_agree_on_coded_slots():
    query, kv, selected, lengths, *_ = problem((300, 90), 2, 4, 128, 16, budget=6)
    coded = with_coded_slots(kv)
    out, expected = torch.full_like(query, float("nan")), torch.full_like(query, float("nan"))
    sparse_decode_attention(query, coded, selected, lengths, num_splits=3, out=out)
    reference.sparse_decode_attention(query, coded, selected, lengths, scale=128**-0.5, out=expected)
    torch.testing.assert_close(out, expected, **TOLERANCE[query.dtype])


@cases("page_size recent dim", (4, 5, 64), (16, 20, 128), (1, 2, 32), (64, 70, 16), (3, 7, 80))
@pytest.mark.parametrize("append", [append_kv, reference.append_kv], ids=["kernel", "reference"])
def test_pages_that_leave_the_window_are_coded(page_size, recent, dim, append):
    batch, heads, tokens = 2, 2, 3 * page_size + recent + 5
    full = (3 * torch.randn(batch, heads, 2, tokens, dim)).to(DEVICE, torch.float16)
    kv = with_coded_slots(
        empty_kv(batch, heads, 1, page_size, dim, sinks=1, recent=recent, max_tokens=tokens, dtype=full.dtype)
    )
    pages = tokens // page_size + 1
    host = pinned(torch.full((batch, pages, heads, 2, page_size, coded_width(dim)), 77, dtype=torch.int8))
    index = torch.zeros(batch, heads, pages, 1, dim, dtype=full.dtype, device=DEVICE)
    grow(append, full, range(tokens), kv, host, index)
    gone = window_start(tokens, recent, page_size) // page_size
    assert gone > 0
    source = full[:, :, :, : gone * page_size].unflatten(3, (gone, page_size)).permute(0, 3, 1, 2, 4, 5)
    assert torch.equal(host[:, :gone].to(DEVICE), encode(source))
    assert (host[:, gone:] == 77).all()
    # the index is of the keys as computed
    mean = source[:, :, :, 0].double().mean(3).permute(0, 2, 1, 3)[:, :, :, None].to(index.dtype)
    torch.testing.assert_close(index[:, :, :gone], mean, **TOLERANCE[index.dtype])


@pytest.mark.parametrize("dim", [16, 48, 80, 144, 256])
@by_dtype
def test_pages_are_coded_alike_at_any_magnitude(dim, dtype):
    """Magnitudes whose steps are subnormal, ties between codes, zeros and outliers, bit for bit."""
    full = torch.randn(1, 1, 2, 28, dim, dtype=torch.float64)
    full[:, :, :, :20] *= torch.logspace(-40, 34, 20, dtype=torch.float64)[:, None]
    full[:, :, :, 3, ::2] = 0.0
    full[:, :, :, 9:12] = full[:, :, :, 9:12].sign() * torch.arange(dim) * 0.5
    full[:, :, :, 12, 5] *= 1e4
    full = full.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(DEVICE, dtype)
    hosts = []
    for append in (append_kv, reference.append_kv):
        kv = with_coded_slots(empty_kv(1, 1, 1, 4, dim, sinks=1, recent=5, max_tokens=28, dtype=dtype))
        hosts.append(pinned(torch.zeros(1, 8, 1, 2, 4, coded_width(dim), dtype=torch.int8)))
        grow(append, full, range(28), kv, hosts[-1], torch.zeros(1, 1, 8, 1, dim, dtype=dtype, device=DEVICE))
    assert torch.equal(*hosts)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_kernel_keeps_what_is_not_finite(bad):
    full = torch.randn(1, 1, 2, 40, 32).to(DEVICE)
    full[0, 0, 1, 3, 20] = bad
    kv = with_coded_slots(empty_kv(1, 1, 1, 4, 32, sinks=1, recent=5, max_tokens=40, dtype=full.dtype))
    host = pinned(torch.zeros(1, 11, 1, 2, 4, coded_width(32), dtype=torch.int8))
    index = torch.zeros(1, 1, 11, 1, 32, device=DEVICE)
    grow(append_kv, full, range(40), kv, host, index)
    back = decode(host, torch.float32)
    assert not torch.isfinite(back[0, 0, 0, 1, 3, 20])
    assert torch.isfinite(back[0, 0, 0, 1, 3, :16]).all()
    assert torch.isfinite(back[0, 1:]).all()


@cases("page_size dim", (16, 64), (16, 128), (4, 16), (8, 80), (1, 16), (3, 80))
def test_gathered_pages_are_the_hosts_bit_for_bit(page_size, dim):
    host = pinned(torch.randint(-128, 128, (1, 9, 2, 2, page_size, coded_width(dim)), dtype=torch.int8))
    slots = torch.zeros(1, 2, 4, 2, page_size, coded_width(dim), dtype=torch.int8, device=DEVICE)
    selection = torch.tensor([[[5, 2], [7, -1]]], dtype=torch.int32, device=DEVICE)
    fetch = Resolved.like(selection)
    fetch.fetch_pages.copy_(selection)
    fetch.fetch_slots.copy_(torch.tensor([[[3, 0], [1, -1]]]))
    fetch.num_fetched.copy_(torch.tensor([[2, 1]]))
    gather_pages(host, slots, fetch, num_programs=3)
    assert torch.equal(slots[0, 0, 3].cpu(), host[0, 5, 0])
    assert torch.equal(slots[0, 0, 0].cpu(), host[0, 2, 0])
    assert torch.equal(slots[0, 1, 1].cpu(), host[0, 7, 1])
    assert not slots[0, :, 2].any()


def test_slots_of_a_width_that_does_not_fit_the_window_are_refused():
    query, kv, selected, lengths, *_ = problem((100,), 1, 2, 64, 16, budget=2)
    wrong = replace(kv, slots=torch.zeros(1, 1, 4, 2, 16, 64, dtype=torch.int8, device=DEVICE))
    with pytest.raises(ValueError, match=r"slots: shape .*72"):
        check(query, wrong, selected, lengths, torch.zeros(1, 1, 2, 100, 64), {})


def test_vectors_that_no_whole_number_of_steps_fits_are_refused():
    wrong = empty_kv(1, 1, 5, 4, 24, sinks=3, recent=6, max_tokens=40, dtype=torch.float32)
    wrong = replace(wrong, slots=torch.zeros(1, 1, 5, 2, 4, 27, dtype=torch.int8, device=DEVICE))
    with pytest.raises(ValueError, match="head_dim = 24 must be a multiple of 16"):
        wrong.check(wrong.window.device, torch.float32)
