"""Costs that are fitted anew: another processor adds up in another order."""

from __future__ import annotations

import pytest

from clo.profile import Cost


def assert_same(found: Cost, wanted: Cost) -> None:
    """Field by field; numbers but for rounding."""
    kept, fresh = found.model_dump(), wanted.model_dump()
    assert kept.keys() == fresh.keys()
    for name, value in kept.items():
        expected = pytest.approx(fresh[name], rel=1e-9) if isinstance(value, float) else fresh[name]
        assert value == expected, name
