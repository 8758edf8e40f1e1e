"""Attention traces of real models. Knows nothing about offloading, machines or time."""
