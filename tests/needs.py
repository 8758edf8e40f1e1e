"""What some tests need that not every environment has."""

from __future__ import annotations

import importlib.util

import pytest

from clo_calibration.tables.measurements import PACKAGE

needs_measurements = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason="aiconfigurator-core is not installed (extra `tables`)"
)
