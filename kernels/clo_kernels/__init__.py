"""Triton kernels for decoding with the KV cache on the host. Not yet run on a GPU.

One file per operation: the kernel, then its wrapper, which checks its arguments and raises `ValueError`. A wrapper runs
the kernel on CUDA tensors (or all of it in Triton's interpreter) and else the function of the same name in `reference`,
plain torch and the specification. `layout` has the tensors they share. Nothing here knows designs, plans or models.
"""
