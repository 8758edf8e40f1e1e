"""`hit_test` against the reference, and the reference against cosines worked out by hand."""

import pytest
import torch

from clo_kernels import reference
from clo_kernels.hit_test import FOLDS, hit_test
from tests.kernels.helpers import DEVICE, by_dtype, cases


def problem(batch, kv_heads, group, dim, dtype):
    anchor = torch.randn(batch, kv_heads * group, dim)
    query = anchor + torch.rand(batch, kv_heads * group, 1) * torch.randn_like(anchor)
    weights = torch.rand(kv_heads * group) + 0.1
    return query.to(DEVICE, dtype), anchor.to(DEVICE, dtype), weights.to(DEVICE)


def mixed_tau(cosine):
    """Halfway between two of each head's cosines (or below a single one), so that rounding decides nothing."""
    ordered = cosine.sort(0).values
    middle = len(ordered) // 2
    return ((ordered[middle - 1] + ordered[middle]) / 2 if len(ordered) > 1 else ordered[0] - 0.01).contiguous()


@by_dtype
@pytest.mark.parametrize("fold", FOLDS)
@cases(
    "batch kv_heads group dim",
    (1, 2, 1, 64),
    (3, 2, 3, 128),
    (3, 1, 7, 64),
    (1, 5, 8, 128),
    (2, 3, 4, 80),
)
def test_agrees_with_reference(batch, kv_heads, group, dim, fold, dtype):
    query, anchor, weights = problem(batch, kv_heads, group, dim, dtype)
    importance = weights if fold == "importance" else None
    tau = mixed_tau(reference.folded_cosine(query, anchor, kv_heads, fold, importance))
    expected_anchor, expected = anchor.clone(), torch.empty(batch, kv_heads, dtype=torch.bool, device=DEVICE)
    reference.hit_test(query, expected_anchor, tau, fold=fold, importance=importance, out=expected)
    poisoned = ~expected
    missed = hit_test(query, anchor, tau, fold=fold, importance=importance, out=poisoned)
    assert missed is poisoned
    assert torch.equal(missed, expected)
    assert torch.equal(anchor, expected_anchor)
    if batch > 1:
        assert missed.any()
        assert not missed.all()


@pytest.mark.parametrize(("tau", "missing"), [(2.0, True), (-1.1, False)], ids=["everything-missed", "everything-hit"])
def test_extremes(tau, missing):
    query, anchor, _ = problem(3, 2, 3, 64, torch.float32)
    before = anchor.clone()
    missed = hit_test(query, anchor, torch.full((2,), tau, device=DEVICE))
    assert torch.equal(missed, torch.full((3, 2), missing, device=DEVICE))
    assert torch.equal(anchor, query if missing else before)


@pytest.mark.parametrize(
    ("fold", "angle_tau", "missed"),
    [
        ("mean", 0.54, False),
        ("mean", 0.56, True),
        ("min", 0.09, False),
        ("min", 0.11, True),
        ("importance", 0.30, False),
        ("importance", 0.34, True),
    ],
)
def test_cosines_by_hand(fold, angle_tau, missed):
    """Two query heads with cosines 1 and 0.1: mean 0.55, minimum 0.1; weights 1 and 3 give 0.325."""
    anchor = torch.zeros(1, 2, 16, device=DEVICE)
    anchor[..., 0] = 1
    query = torch.zeros_like(anchor)
    query[0, 0, 0] = 5
    query[0, 1, 0], query[0, 1, 1] = 0.1, (1 - 0.01) ** 0.5
    importance = torch.tensor([1.0, 3.0], device=DEVICE) if fold == "importance" else None
    tau = torch.tensor([angle_tau], device=DEVICE)
    assert hit_test(query, anchor, tau, fold=fold, importance=importance).item() is missed


@pytest.mark.parametrize("fold", ["mean", "min"])
def test_a_head_without_anchor_or_with_nan_misses(fold):
    query, anchor, _ = problem(1, 3, 2, 64, torch.float32)
    anchor[0, 0:2] = 0
    query[0, 2, 5] = float("nan")
    missed = hit_test(query, anchor, torch.full((3,), -1.0, device=DEVICE), fold=fold)
    assert missed.tolist() == [[True, True, False]]
    assert torch.equal(anchor[0, :2], query[0, :2])


def test_minus_infinity_marks_heads_that_never_select():
    query = torch.randn(2, 2, 64, device=DEVICE)
    assert not hit_test(query, torch.zeros_like(query), torch.full((2,), -torch.inf, device=DEVICE)).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anchor": torch.zeros(1, 4, 32)}, r"anchor: shape \[1, 4, 32\], expected \[1, 4, 64\]"),
        ({"anchor": torch.zeros(1, 4, 64).half()}, "anchor: dtype torch.float16, expected torch.float32"),
        ({"query": torch.zeros(1, 64, 4).transpose(1, 2)}, r"query: strides \[256, 1, 4\] are not contiguous"),
        ({"tau": torch.zeros(3)}, "num_query_heads = 4 must be a multiple of num_kv_heads = 3"),
        ({"fold": "median"}, "fold = 'median', expected one of"),
        ({"fold": "importance"}, "importance goes with fold = importance"),
        ({"out": torch.zeros(1, 2)}, "out: dtype torch.float32, expected torch.bool"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refuses(change, message):
    arguments = {"query": torch.zeros(1, 4, 64), "anchor": torch.zeros(1, 4, 64), "tau": torch.zeros(2), **change}
    with pytest.raises(ValueError, match=message):
        hit_test(**arguments)
