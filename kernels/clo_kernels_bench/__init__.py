"""The bench of `clo_kernels`: correctness of every operation first, then its time beside the limit. Run `../bench.py`.

Not part of the installed package. Knows nothing about designs, plans or models.
"""
