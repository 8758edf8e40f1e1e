"""`resolve_pages` against the reference, and both against the rules of a page table, over random histories."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clo_kernels import reference
from clo_kernels import resolve_pages as module
from clo_kernels.layout import NO_PAGE, NO_SLOT, PageTable, Resolved
from clo_kernels.resolve_pages import resolve_pages
from tests.kernels.helpers import DEVICE, cases

MARKER = -12345
# batch, heads, budget, slots, pages, repeats
LARGE = (4, 8, 3000, 4000, 16384, 100) if DEVICE == "cuda" else (1, 2, 300, 500, 1600, 1)
FEW = (64, 8, 5, 9, 17, 100) if DEVICE == "cuda" else (2, 2, 5, 9, 17, 1)


def in_blocks(monkeypatch, size):
    """Slots and pages in blocks of this size and none in registers; None: as usual."""
    if size is not None:
        monkeypatch.setattr(module, "SLOT_BLOCK", 0)
        for name in ("LOOK_BLOCK", "REPLACE_BLOCK", "BUDGET_BLOCK"):
            monkeypatch.setattr(module, name, size)


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def poisoned(selection):
    out = Resolved.like(selection)
    for field in fields(out):
        getattr(out, field.name).fill_(MARKER)
    return out


def tensors(record):
    return {field.name: getattr(record, field.name) for field in fields(record)}


def copied(table):
    return PageTable(**{name: tensor.clone() for name, tensor in tensors(table).items()})


def random_selection(batch, heads, budget, num_pages, padding):
    pages = torch.stack([torch.randperm(num_pages)[:budget] for _ in range(batch * heads)]).to(torch.int32)
    pages[torch.rand(pages.shape) < padding] = NO_PAGE
    return pages.view(batch, heads, budget).to(DEVICE)


def check_rules(selection, missed, before, after, out):
    """Nothing lost, no slot twice, residents unmoved, the oldest leave; the two directions of the table agree."""
    for row in ((b, h) for b in range(missed.shape[0]) for h in range(missed.shape[1])):
        pages, old, new = selection[row].tolist(), before.page_of_slot[row].tolist(), after.page_of_slot[row].tolist()
        slots, count = out.slots[row].tolist(), int(out.num_fetched[row])
        resident = [p for p in new if p != NO_PAGE]
        assert len(resident) == len(set(resident))
        assert {p: s for s, p in enumerate(new) if p != NO_PAGE} == {
            p: s for p, s in enumerate(after.slot_of_page[row].tolist()) if s != NO_SLOT
        }
        fetched = list(zip(out.fetch_pages[row].tolist(), out.fetch_slots[row].tolist(), strict=True))
        assert fetched[count:] == [(NO_PAGE, NO_SLOT)] * (len(fetched) - count)
        assert len(set(after.last_use[row].tolist())) == len(new)
        if not missed[row]:
            assert count == 0
            assert old == new
            assert torch.equal(before.last_use[row], after.last_use[row])
            assert slots == [old.index(p) if p != NO_PAGE and p in old else NO_SLOT for p in pages]
            continue
        assert all((s == NO_SLOT) if p == NO_PAGE else new[s] == p for p, s in zip(pages, slots, strict=True))
        assert [p for p, _ in fetched[:count]] == [p for p in pages if p != NO_PAGE and p not in old]
        assert all(new[s] == p for p, s in fetched[:count])
        assert all(slots[pages.index(p)] == s for s, p in enumerate(old) if p != NO_PAGE and p in pages)
        stamps, freed = before.last_use[row].tolist(), [s for _, s in fetched[:count]]
        spared = [s for s in range(len(old)) if s not in freed and old[s] not in pages]
        assert max((stamps[s] for s in freed), default=-(10**9)) < min((stamps[s] for s in spared), default=10**9)
        assert all(new[s] == old[s] for s in spared)


def run_and_check(selection, missed, table):
    before, expected_table = copied(table), copied(table)
    expected = reference.resolve_pages(selection, missed, expected_table, out=poisoned(selection))
    out = resolve_pages(selection, missed, table, out=poisoned(selection))
    for name, tensor in tensors(expected).items():
        assert torch.equal(getattr(out, name), tensor), name
    for name, tensor in tensors(expected_table).items():
        assert torch.equal(getattr(table, name), tensor), name
    check_rules(selection, missed, before, table, out)
    return out


@cases(
    "batch heads budget slots pages padding",
    (1, 1, 1, 1, 1, 0),
    (3, 2, 5, 5, 17, 0.3),
    (1, 3, 7, 20, 33, 0),
    (3, 1, 16, 17, 40, 0.1),
    (1, 2, 40, 100, 300, 0.5),
    (2, 2, 6, 9, 30, 1),
)
@pytest.mark.parametrize("block", [4, None], ids=["blocks-of-4", "registers"])
def test_histories(batch, heads, budget, slots, pages, padding, block, monkeypatch):
    in_blocks(monkeypatch, block)
    table = PageTable.empty(batch, heads, slots, pages, DEVICE)
    for step in range(8):
        missed = torch.rand(batch, heads, device=DEVICE) < (1.0 if step % 3 == 0 else 0.5)
        run_and_check(random_selection(batch, heads, budget, pages, padding), missed, table)


@cases(
    "batch heads budget slots pages padding",
    (1, 1, 1, 1, 1, 0),
    (3, 2, 5, 5, 17, 0.3),
    (1, 3, 7, 20, 33, 0),
    (2, 2, 6, 9, 30, 1),
)
@pytest.mark.parametrize("block", [4, None], ids=["blocks-of-4", "registers"])
@pytest.mark.parametrize("resolve", [resolve_pages, reference.resolve_pages], ids=["kernel", "reference"])
def test_replacing_whole_sets(resolve, batch, heads, budget, slots, pages, padding, block, monkeypatch):
    """Of a head that missed nothing is left but its selection, in slots 0, 1, 2, ..., all of it fetched."""
    in_blocks(monkeypatch, block)
    table = PageTable.empty(batch, heads, slots, pages, DEVICE)
    resolve_pages(
        random_selection(batch, heads, budget, pages, 0), torch.rand(batch, heads, device=DEVICE) < 0.8, table
    )
    for _ in range(4):
        selection, missed = random_selection(batch, heads, budget, pages, padding), torch.rand(batch, heads) < 0.6
        before, out = copied(table), poisoned(selection)
        resolve(selection, missed.to(DEVICE), table, replace=True, out=out)
        for row in ((b, h) for b in range(batch) for h in range(heads)):
            wanted, held = selection[row].tolist(), before.page_of_slot[row].tolist()
            fetched = [page for page in wanted if page != NO_PAGE] if missed[row] else []
            rest, none = budget - len(fetched), slots - len(fetched)
            assert out.num_fetched[row] == len(fetched)
            assert out.fetch_pages[row].tolist() == fetched + [NO_PAGE] * rest
            assert out.fetch_slots[row].tolist() == [*range(len(fetched)), *[NO_SLOT] * rest]
            now = fetched + [NO_PAGE] * none if missed[row] else held
            assert table.page_of_slot[row].tolist() == now
            assert out.slots[row].tolist() == [now.index(p) if p != NO_PAGE and p in now else NO_SLOT for p in wanted]
            places = {page: slot for slot, page in enumerate(now) if page != NO_PAGE}
            assert table.slot_of_page[row].tolist() == [places.get(page, NO_SLOT) for page in range(pages)]
            assert len(set(table.last_use[row].tolist())) == slots
            if not missed[row]:
                assert torch.equal(before.last_use[row], table.last_use[row])


@pytest.mark.parametrize("replace", [True, False])
def test_replaced_sets_are_those_of_the_reference(replace):
    table = PageTable.empty(2, 2, 9, 30, DEVICE)
    mirror = copied(table)
    for step in range(8):  # diffs and replacements of one table may follow each other
        selection, missed = random_selection(2, 2, 6, 30, 0.2), torch.rand(2, 2, device=DEVICE) < 0.6
        found, expected = poisoned(selection), poisoned(selection)
        resolve_pages(selection, missed, table, replace=(step % 2 == 0) == replace, out=found)
        reference.resolve_pages(selection, missed, mirror, replace=(step % 2 == 0) == replace, out=expected)
        for name, tensor in (tensors(expected) | tensors(mirror)).items():
            assert torch.equal((tensors(found) | tensors(table))[name], tensor), name


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_rules_hold_for_any_history(data):
    num_slots = data.draw(st.integers(1, 12))
    num_pages = data.draw(st.integers(num_slots, 30))
    budget = data.draw(st.integers(1, num_slots))
    table = PageTable.empty(1, 1, num_slots, num_pages, DEVICE)
    for _ in range(data.draw(st.integers(1, 4))):
        pages = data.draw(st.lists(st.integers(0, num_pages - 1), max_size=budget, unique=True))
        padded = data.draw(st.permutations(pages + [NO_PAGE] * (budget - len(pages))))
        run_and_check(int32([[padded]]), torch.tensor([[data.draw(st.booleans())]], device=DEVICE), table)


@pytest.mark.parametrize("sizes", [LARGE, FEW], ids=["large", "few"])
@pytest.mark.parametrize("block", [256, None], ids=["many-blocks", "registers"])
@pytest.mark.parametrize("replace", [False, True], ids=["differences", "whole-sets"])
def test_tables_come_out_the_same_again_and_again(replace, block, sizes, monkeypatch):
    """Threads exchange page tables through memory: a missing barrier shows only now and then, at many slots and few."""
    in_blocks(monkeypatch, block)
    batch, heads, budget, slots, pages, repeats = sizes
    table = PageTable.empty(batch, heads, slots, pages, DEVICE)
    for _ in range(4):
        selection = random_selection(batch, heads, budget, pages, 0.1)
        missed = torch.rand(batch, heads, device=DEVICE) < 0.9
        wanted = PageTable(**{name: tensor.cpu() for name, tensor in tensors(copied(table)).items()})
        expected = reference.resolve_pages(
            selection.cpu(), missed.cpu(), wanted, replace=replace, out=poisoned(selection.cpu())
        )
        wanted_there = {name: tensor.to(DEVICE) for name, tensor in (tensors(wanted) | tensors(expected)).items()}
        for _ in range(repeats):
            found, out = copied(table), poisoned(selection)
            resolve_pages(selection, missed, found, replace=replace, out=out)
            for name, tensor in (tensors(found) | tensors(out)).items():
                assert torch.equal(tensor, wanted_there[name]), name
        table = found


def test_least_recently_used_leaves_by_hand():
    table = PageTable.empty(1, 1, 3, 10, DEVICE)
    yes = torch.ones(1, 1, dtype=torch.bool, device=DEVICE)
    resolve_pages(int32([[[5, 6]]]), yes, table)
    resolve_pages(int32([[[7, 5]]]), yes, table)
    assert sorted(table.page_of_slot.flatten().tolist()) == [5, 6, 7]
    slot_of_6, slot_of_5 = table.slot_of_page[0, 0, 6].item(), table.slot_of_page[0, 0, 5].item()
    out = resolve_pages(int32([[[7, 9]]]), yes, table)
    assert out.fetch_pages.tolist() == [[[9, NO_PAGE]]]
    assert out.fetch_slots.tolist() == [[[slot_of_6, NO_SLOT]]]
    out = resolve_pages(int32([[[NO_PAGE, 1]]]), yes, table)
    assert out.slots.tolist() == [[[NO_SLOT, slot_of_5]]]


@pytest.mark.parametrize("block", [4, None], ids=["blocks-of-4", "registers"])
@pytest.mark.parametrize(
    "stamps",
    [
        [-(2**31), -(2**31) + 1, -(2**31) + 2, -7, 0, 2**31 - 9, 2**31 - 8, 2**31 - 7],
        [2**31 - 20, 2**31 - 19, 2**31 - 18, 2**31 - 17, 2**31 - 9, 2**31 - 8, 2**31 - 7, -(2**31)],
        [-1, 0, 1, 2, 3, 4, 5, 6],
        [-(2**30), 2**30, 3, -3, 2**29, -(2**29), 2**28, -(2**28)],
    ],
    ids=["both-ends", "one-far-off", "dense", "sparse"],
)
def test_the_oldest_are_found_whatever_the_stamps(stamps, block, monkeypatch):
    """Of a full table the oldest slots leave, as many as there are pages to fetch: every number of them."""
    in_blocks(monkeypatch, block)
    for new in range(1, 7):
        table = PageTable.empty(1, 1, 8, 30, DEVICE)
        table.page_of_slot[0, 0] = int32(range(8))
        table.slot_of_page[0, 0, :8] = int32(range(8))
        table.last_use[0, 0] = int32(stamps)
        selection = int32([[[*range(10, 10 + new)]]])
        out = run_and_check(selection, torch.ones(1, 1, dtype=torch.bool, device=DEVICE), table)
        oldest = sorted(range(8), key=lambda slot: stamps[slot])[:new]
        assert out.fetch_slots[0, 0].tolist() == sorted(oldest)


def test_everything_hit_changes_nothing():
    table = PageTable.empty(3, 2, 8, 20, DEVICE)
    selection = random_selection(3, 2, 4, 20, 0)
    first = resolve_pages(selection, torch.ones(3, 2, dtype=torch.bool, device=DEVICE), table)
    assert first.num_fetched.tolist() == [[4, 4]] * 3
    before = copied(table)
    out = resolve_pages(selection, torch.zeros(3, 2, dtype=torch.bool, device=DEVICE), table, out=poisoned(selection))
    assert torch.equal(out.slots, first.slots)
    assert not out.num_fetched.any()
    assert all(torch.equal(getattr(table, name), tensor) for name, tensor in tensors(before).items())


def test_pages_outside_the_table_count_as_padding():
    table = PageTable.empty(1, 1, 4, 6, DEVICE)
    out = resolve_pages(int32([[[6, 2, -7]]]), torch.ones(1, 1, dtype=torch.bool, device=DEVICE), table)
    assert out.num_fetched.item() == 1
    assert out.slots.tolist()[0][0][::2] == [NO_SLOT, NO_SLOT]


@pytest.mark.parametrize(
    ("selection", "missed", "message"),
    [
        (torch.zeros(1, 1, 5).int(), torch.ones(1, 1).bool(), "budget = 5 pages, expected 1 to the number of slots, 4"),
        (torch.zeros(1, 1, 0).int(), torch.ones(1, 1).bool(), "budget = 0 pages"),
        (torch.zeros(1, 1, 4), torch.ones(1, 1).bool(), "selection: dtype torch.float32, expected torch.int32"),
        (torch.zeros(1, 1, 4).int(), torch.ones(1, 1), "missed: dtype torch.float32, expected torch.bool"),
        (torch.zeros(1, 2, 4).int(), torch.ones(1, 2).bool(), "page_of_slot: shape"),
    ],
    ids=["budget-over-slots", "empty-budget", "float-pages", "float-mask", "heads"],
)
def test_refuses(selection, missed, message):
    with pytest.raises(ValueError, match=message):
        resolve_pages(selection, missed, PageTable.empty(1, 1, 4, 9))
