"""`select_pages`: compared by the scores that were chosen, since which of two equal pages wins is a convention."""

import pytest
import torch

from clo_kernels import reference
from clo_kernels import select_pages as module
from clo_kernels.layout import NO_PAGE
from clo_kernels.select_pages import select_pages
from tests.kernels.helpers import DEVICE, cases

MARKER = -12345


def run(scores, candidates, missed, budget, select=select_pages):
    selection = torch.full((*scores.shape[:2], budget), MARKER, dtype=torch.int32, device=DEVICE)
    counts = torch.tensor(candidates, dtype=torch.int32, device=DEVICE)
    assert select(scores, counts, missed, selection) is selection
    return selection


def check(scores, candidates, missed, budget):
    selection = run(scores, candidates, missed, budget)
    for b in range(scores.shape[0]):
        for h in range(scores.shape[1]):
            pages = selection[b, h].tolist()
            if not missed[b, h]:
                assert pages == [MARKER] * budget
                continue
            take = min(budget, candidates[b])
            assert pages[take:] == [NO_PAGE] * (budget - take)
            chosen = pages[:take]
            assert chosen == sorted(set(chosen))
            assert all(1 <= page <= candidates[b] for page in chosen)
            best = scores[b, h, 1 : candidates[b] + 1].sort(descending=True).values[:take]
            assert torch.equal(scores[b, h, chosen].sort(descending=True).values, best)
    assert torch.equal(run(scores, candidates, missed, budget, reference.select_pages), selection)


@cases(
    "candidates heads pages budget",
    ((16,), 1, 17, 5),
    ((200, 0, 77), 2, 333, 20),
    ((9, 1, 5), 3, 10, 9),
    ((40,), 2, 50, 64),
    ((1,), 1, 2, 1),
)
@pytest.mark.parametrize("block", [16, 4096], ids=["blocks-of-16", "one-block"])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.0], ids=["everything-missed", "half", "everything-hit"])
def test_best_candidates(candidates, heads, pages, budget, block, share, monkeypatch):
    monkeypatch.setattr(module, "PAGE_BLOCK", block)
    scores = torch.randn(len(candidates), heads, pages, device=DEVICE)
    scores[..., 0] = 1e9  # neither the page of the sinks nor what is no candidate
    for b, count in enumerate(candidates):
        scores[b, :, count + 1 :] = float("inf")
    check(scores, candidates, torch.rand(len(candidates), heads, device=DEVICE) < share, budget)


@pytest.mark.parametrize("levels", [None, 3, 1000], ids=["all-different", "few-values", "some-ties"])
@pytest.mark.parametrize("pages", [30_000, 40_000], ids=["in-registers", "beyond-registers"])
def test_many_pages(pages, levels):
    scores = torch.randn(1, 2, pages, device=DEVICE)
    if levels:
        scores = (scores * levels).round() / levels
    check(scores, [pages - 9], torch.ones(1, 2, dtype=torch.bool, device=DEVICE), pages // 10)


@pytest.mark.parametrize(
    "values",
    [[0.5] * 12, [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0], [-3.0, -1.0, -2.0, -1.0, -5e-45, 0.0, 5e-45, 1e38, -1e38]],
    ids=["all-equal", "ties-at-the-edge", "negative-and-tiny"],
)
@pytest.mark.parametrize("budget", [1, 3, 6])
def test_ties_and_signs(values, budget):
    scores = torch.tensor([[[9.0, *values]]], device=DEVICE)
    check(scores, [len(values)], torch.ones(1, 1, dtype=torch.bool, device=DEVICE), budget)


def test_infinite_scores_and_nan():
    inf, nan = float("inf"), float("nan")
    scores = torch.tensor([[[0.0, -inf, nan, 1.0, inf, -inf, 2.0]]], device=DEVICE)
    yes = torch.ones(1, 1, dtype=torch.bool, device=DEVICE)
    assert run(scores, [6], yes, 3).tolist() == [[[3, 4, 6]]]
    assert sorted(run(scores, [6], yes, 6).flatten().tolist()) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(1, 2, 9).half()}, "scores: dtype torch.float16, expected torch.float32"),
        ({"missed": torch.zeros(2, 1).bool()}, r"missed: shape \[2, 1\], expected \[1, 2\]"),
        ({"num_candidates": torch.zeros(1)}, "num_candidates: dtype torch.float32"),
        ({"selection": torch.zeros(1, 2, 0).int()}, "budget = 0 pages must be positive"),
    ],
    ids=["dtype", "shape", "candidates", "budget"],
)
def test_refuses(change, message):
    arguments = {
        "scores": torch.zeros(1, 2, 9),
        "num_candidates": torch.zeros(1).int(),
        "missed": torch.zeros(1, 2).bool(),
        "selection": torch.zeros(1, 2, 3).int(),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        select_pages(**arguments)
