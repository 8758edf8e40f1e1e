"""`score_pages` against the formula in float64, and the bound against the keys it must bound."""

import pytest
import torch

from clo_kernels import reference
from clo_kernels import score_pages as module
from clo_kernels.score_pages import score_pages
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
)
def test_agrees_with_float64(candidates, heads, group, dim, pages, vectors, dtype, monkeypatch):
    monkeypatch.setattr(module, "FOLD_BLOCK", 64)
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
        ({"index": torch.zeros(1, 3, 5, 2, 64)}, "num_query_heads = 4 must be a multiple of num_kv_heads = 3"),
        ({"missed": torch.zeros(1, 2)}, "missed: dtype torch.float32, expected torch.bool"),
        ({"out": torch.zeros(1, 2, 4)}, r"out: shape \[1, 2, 4\], expected \[1, 2, 5\]"),
    ],
    ids=["vectors", "heads", "mask", "out"],
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
