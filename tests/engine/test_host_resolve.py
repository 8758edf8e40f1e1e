"""The page table that CPU threads keep: the same as the reference's, over random histories."""

from dataclasses import fields

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clo.engine.layers import host_resolve
from clo_kernels import reference
from clo_kernels.layout import NO_PAGE, PageTable, Resolved

MARKER = -12345


def copied(table):
    return PageTable(**{field.name: getattr(table, field.name).clone() for field in fields(table)})


def same(one, other):
    return all(torch.equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))


def poisoned(selection):
    out = Resolved.like(selection)
    for field in fields(out):
        getattr(out, field.name).fill_(MARKER)
    return out


@st.composite
def sizes(draw):
    slots = draw(st.integers(1, 40))
    budget = draw(st.integers(1, slots))
    return draw(st.integers(1, 3)), draw(st.integers(1, 3)), budget, slots, draw(st.integers(budget, 90))


@given(sizes(), st.integers(0, 2**31), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0.2, 0.7, 1.0]))
@settings(max_examples=120, deadline=None)
def test_is_the_reference(shape, seed, padding, missing):
    batch, heads, budget, slots, pages = shape
    chance = torch.Generator().manual_seed(seed)
    table = PageTable.empty(batch, heads, slots, pages, "cpu")
    expected_table = copied(table)
    for _ in range(6):
        chosen = [torch.randperm(pages, generator=chance)[:budget] for _ in range(batch * heads)]
        selection = torch.stack(chosen).to(torch.int32)
        selection[torch.rand(selection.shape, generator=chance) < padding] = NO_PAGE
        selection = selection.view(batch, heads, budget)
        missed = torch.rand(batch, heads, generator=chance) < missing
        out, expected = poisoned(selection), poisoned(selection)
        assert host_resolve.resolve_pages(selection, missed.to(torch.int32), table, out=out) is out
        reference.resolve_pages(selection, missed, expected_table, out=expected)
        assert same(out, expected)
        assert same(table, expected_table)
