"""Measuring machines, fitting costs to what was measured, and holding the simulation against it."""
