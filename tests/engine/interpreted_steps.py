"""Decodes as a recorded CUDA step does, on a CPU, with Triton's kernels interpreted; prints the largest error.

Run with TRITON_INTERPRET=1: `test_recorded_steps.py` does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from small import design, prompt, small_model

from clo.engine import make_layers as make
from clo.engine.decoder import Decoder
from clo.engine.kernels import triton_kernels
from clo.engine.layers import DenseLayer, LayerShape, shape
from clo.specs import Design

TOKENS, STEPS = 44, 2


class Recorded(DenseLayer):
    """On CUDA dense layers attend by the kernel."""

    def __init__(self, of: LayerShape) -> None:
        super().__init__(of)
        self.by_kernel = True


def decoded(chosen: Design) -> torch.Tensor:
    text = prompt(TOKENS)
    # one operation after another: the interpreter has no threads
    with Decoder(small_model(), chosen, max_new_tokens=STEPS, one_at_a_time=True) as one:
        rows = [one.prefill([text[:-STEPS]])[0]]
        rows += [one.step(token[None])[0].clone() for token in text[-STEPS:]]
    return torch.stack(rows)


def main() -> None:
    torch.set_num_threads(1)
    designs = [
        design("clo", budget_pages=3),
        design("resident"),
        design("lru-cpu", budget_pages=3, sync="graph"),
        design("resident-sparse", budget_pages=3),
        design("clo", budget_pages=3, page_coding="int8"),
    ]
    expected = [decoded(chosen) for chosen in designs]
    shape.kernels_for = lambda _: triton_kernels()  # type: ignore[assignment]
    plain: Any = LayerShape
    make.LayerShape = lambda **sizes: replace(plain(**sizes), recorded=True)  # type: ignore[assignment, misc]
    make.DenseLayer = Recorded  # type: ignore[misc]
    found = [decoded(chosen) for chosen in designs]
    print(max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True)))


main()
