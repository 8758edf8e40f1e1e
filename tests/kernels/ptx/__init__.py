"""Runs compiled kernels without a GPU: their PTX, instruction by instruction, on tensors in ordinary memory."""
