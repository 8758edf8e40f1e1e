"""Kernel tables fitted to the measurements that `aiconfigurator-core` carries. Needs no GPU."""
