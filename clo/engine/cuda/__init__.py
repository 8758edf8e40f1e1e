"""The abstract machine on CUDA, and what it needs of the device: streams, events, flags, copies. Knows no tensors.

**Not yet run on a GPU.**
"""
