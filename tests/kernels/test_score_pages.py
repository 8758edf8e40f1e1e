"""`score_pages` against the formula in float64, and the bound against the keys it must bound."""

import itertools

import numpy as np
import pytest
import torch

from clo_kernels import reference
from clo_kernels import score_pages as module
from clo_kernels.page_index import IndexKind, hash_planes
from clo_kernels.page_index import page_index as index_of
from clo_kernels.score_pages import score_pages
from tests.kernels import oracle
from tests.kernels.helpers import DEVICE, TOLERANCE, by_dtype, cases

MARKER = -12345.0


def page_index(keys, vectors):
    """`keys` [batch, heads, pages, page_size, head_dim] -> the index of each page."""
    if vectors == 1:
        return keys.float().mean(3, keepdim=True).to(keys.dtype)
    return torch.stack([keys.amin(3), keys.amax(3)], 3)


def exact(query, index, candidates, scale):
    scores = torch.full(index.shape[:3], -torch.inf, dtype=torch.float64, device=index.device)
    grouped = query.double().unflatten(1, (index.shape[1], -1))
    for b, count in enumerate(candidates):
        page = index[b, :, 1 : count + 1].double()
        for h in range(index.shape[1]):
            logits = grouped[b, h].clamp(min=0) @ page[h, :, -1].T + grouped[b, h].clamp(max=0) @ page[h, :, 0].T
            scores[b, h, 1 : count + 1] = (logits * scale).softmax(-1).mean(0)
    return scores


@by_dtype
@pytest.mark.parametrize("vectors", [2, 1], ids=["minmax", "mean"])
@cases(
    "candidates heads group dim pages",
    ((10,), 1, 1, 64, 12),
    ((60, 0, 33), 2, 3, 64, 70),
    ((1, 32, 31), 1, 7, 128, 33),
    ((130,), 2, 8, 128, 131),
    ((40, 7), 1, 3, 80, 42),
)
@pytest.mark.parametrize("fold_values", [8192, 2])
def test_agrees_with_float64(candidates, heads, group, dim, pages, vectors, dtype, fold_values, monkeypatch):
    monkeypatch.setattr(module, "FOLD_BLOCK", 64)
    monkeypatch.setattr(module, "FOLD_VALUES", fold_values)  # two: blocks are folded in parts, as very many are
    batch = len(candidates)
    query = torch.randn(batch, heads * group, dim).to(DEVICE, dtype)
    index = page_index(torch.randn(batch, heads, pages, 4, dim).to(DEVICE, dtype), vectors)
    for b, count in enumerate(candidates):
        index[b, :, count + 1 :] = float("nan")
    index[:, :, 0] = float("nan")
    missed = torch.rand(batch, heads, device=DEVICE) < 0.6
    missed[0, 0] = True
    counts = torch.tensor(candidates, dtype=torch.int32, device=DEVICE)
    expected = exact(query, index, candidates, dim**-0.5)
    expected[~missed] = MARKER
    for score in (score_pages, reference.score_pages):
        out = torch.full((batch, heads, pages), MARKER, device=DEVICE)
        assert score(query, index, counts, missed, scale=dim**-0.5, out=out) is out
        # all arithmetic is in float32 whatever the inputs are
        torch.testing.assert_close(out.double(), expected, **TOLERANCE[torch.float32])


@by_dtype
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_bound_without_bound_on_the_side_that_is_not_asked(sign, dtype):
    """One key that overflowed: where the query has the other sign the page's bound is the other extreme."""
    query = torch.randn(1, 2, 16).to(DEVICE, dtype)
    query[:, :, 3] = -sign
    index = page_index(torch.randn(1, 1, 9, 4, 16).to(DEVICE, dtype), 2)
    index[0, 0, 2, 1 if sign > 0 else 0, 3] = sign * float("inf")
    counts, missed = torch.tensor([8], dtype=torch.int32, device=DEVICE), torch.ones(1, 1, dtype=torch.bool).to(DEVICE)
    expected = reference.score_pages(
        query.cpu(), index.cpu(), counts.cpu(), missed.cpu(), scale=0.25, out=torch.empty(1, 1, 9)
    )
    assert expected[0, 0, 1:].isfinite().all()
    found = score_pages(query, index, counts, missed, scale=0.25).cpu()
    torch.testing.assert_close(found, expected, **TOLERANCE[torch.float32])


@by_dtype
@pytest.mark.parametrize("kind", [IndexKind.KEY_4BIT, IndexKind.SIGN_HASH])
@cases(
    "candidates heads group dim pages page_size",
    ((20,), 1, 1, 64, 22, 16),
    ((60, 0, 33), 2, 3, 64, 70, 1),
    ((1, 9, 8), 1, 7, 128, 10, 3),
    ((9,), 2, 8, 80, 11, 64),
    ((5,), 1, 20, 16, 7, 100),
)
def test_index_of_single_tokens_agrees_with_numpy(candidates, heads, group, dim, pages, page_size, kind, dtype):
    batch, scale = len(candidates), 2 * dim**-0.5
    keys = torch.randn(batch, heads, pages, page_size, dim) + torch.randn(dim)
    planes = hash_planes(dim, seed=3) if kind is IndexKind.SIGN_HASH else None
    index = index_of(keys, kind, planes)
    query = torch.randn(batch, heads * group, dim).to(dtype)
    missed = torch.rand(batch, heads) < 0.6
    missed[0, 0] = True
    expected = np.full((batch, heads, pages), -np.inf)
    for b, h in itertools.product(range(batch), range(heads)):
        if not missed[b, h]:
            expected[b, h] = MARKER
        elif candidates[b]:
            theirs = query[b, h * group : (h + 1) * group].double().numpy()
            inside = slice(1, candidates[b] + 1)
            normals = None if planes is None else planes.double().numpy()
            expected[b, h, inside] = oracle.page_scores(theirs, index[b, h, inside].numpy(), scale, normals)
        index[b, h, 0] = index[b, h, candidates[b] + 1 :] = 0x7E007E00  # NaN where scales are
    counts = torch.tensor(candidates, dtype=torch.int32, device=DEVICE)
    given = (query.to(DEVICE), index.to(DEVICE), counts, missed.to(DEVICE))
    for score in (score_pages, reference.score_pages):
        out = torch.full((batch, heads, pages), MARKER, device=DEVICE)
        score(*given, scale=scale, planes=None if planes is None else planes.to(DEVICE), out=out)
        torch.testing.assert_close(out.double().cpu(), torch.from_numpy(expected), rtol=2e-4, atol=1e-6)


def test_an_index_of_single_tokens_finds_the_pages_that_attention_falls_on():
    keys, query = torch.randn(1, 1, 501, 1, 64), 2 * torch.randn(1, 2, 64)
    yes, counts = torch.ones(1, 1, dtype=torch.bool), torch.tensor([500], dtype=torch.int32)
    exact = (query[0] @ keys[0, 0, 1:].flatten(0, 1).T / 8).softmax(-1).mean(0)
    best, found = set(exact.topk(50).indices.tolist()), {}
    for kind in (IndexKind.KEY_4BIT, IndexKind.SIGN_HASH):
        planes = hash_planes(64) if kind is IndexKind.SIGN_HASH else None
        given = (query.to(DEVICE), index_of(keys, kind, planes).to(DEVICE), counts.to(DEVICE), yes.to(DEVICE))
        scores = score_pages(*given, planes=None if planes is None else planes.to(DEVICE))[0, 0, 1:]
        found[kind] = len(best & set(scores.topk(50).indices.tolist()))
    assert found[IndexKind.KEY_4BIT] >= 45
    assert found[IndexKind.SIGN_HASH] >= 15  # by chance it would be 5


def test_minmax_bounds_every_key_of_the_page():
    """With one query head the scores order pages as the bounds do: a page whose best key is far above wins."""
    keys = 0.01 * torch.randn(1, 1, 20, 16, 64, device=DEVICE)
    query = torch.randn(1, 1, 64, device=DEVICE)
    keys[0, 0, 7, 11] = query[0, 0]
    yes = torch.ones(1, 1, dtype=torch.bool, device=DEVICE)
    scores = score_pages(query, page_index(keys, 2), torch.tensor([19], dtype=torch.int32, device=DEVICE), yes)
    assert scores[0, 0].argmax() == 7
    assert scores[0, 0, 1:].sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": torch.zeros(1, 2, 5, 3, 64)}, "index: 3 vectors a page, expected 2"),
        (
            {"index": torch.zeros(1, 2, 5, 2, 64).half()},
            r"index: dtype torch\.float16, expected that of the query, torch\.float32",
        ),
        ({"index": torch.zeros(1, 2, 5, 4, 8).int()}, "index: 8 a row, expected 9 of key_4bit with head_dim = 64"),
        (
            {"index": torch.zeros(1, 2, 5, 4, 4).int(), "planes": torch.zeros(128, 32)},
            r"planes: shape \[128, 32\], expected \[128, 64\]",
        ),
        ({"planes": torch.zeros(128, 64)}, "planes go with an int32 index"),
        ({"index": torch.zeros(1, 3, 5, 2, 64)}, "num_query_heads = 4 must be a multiple of num_kv_heads = 3"),
        ({"missed": torch.zeros(1, 2)}, "missed: dtype torch.float32, expected torch.bool"),
        ({"out": torch.zeros(1, 2, 4)}, r"out: shape \[1, 2, 4\], expected \[1, 2, 5\]"),
    ],
    ids=["vectors", "dtype", "words", "planes", "planes-of-floats", "heads", "mask", "out"],
)
def test_refuses(change, message):
    arguments = {
        "query": torch.zeros(1, 4, 64),
        "index": torch.zeros(1, 2, 5, 2, 64),
        "num_candidates": torch.zeros(1).int(),
        "missed": torch.zeros(1, 2).bool(),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        score_pages(**arguments)
