"""Decodes as a recorded CUDA step does, on a CPU, with Triton's kernels; prints the largest error.

They are interpreted with TRITON_INTERPRET=1, run as compiled with TRITON_INTERPRET=0 and the architecture as argument:
`test_recorded_steps.py` does both.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernels.ptx import launches
from latent import indexer_design, latent_model
from small import design, prompt, small_model

from clo.engine import make_layers as make
from clo.engine.decoder import Decoder
from clo.engine.kernels import triton_kernels
from clo.engine.layers import DenseLayer, LayerShape, shape
from clo.engine.models import network as networks
from clo.engine.models.network import Network
from clo.specs import Design

TOKENS, STEPS = 44, 2


class Recorded(DenseLayer):
    """On CUDA dense layers attend by the kernel."""

    def __init__(self, of: LayerShape) -> None:
        super().__init__(of)
        self.by_kernel = True


def decoded(network: Network, chosen: Design) -> torch.Tensor:
    text = prompt(TOKENS)
    # one operation after another: the interpreter has no threads
    with Decoder(network, chosen, max_new_tokens=STEPS, one_at_a_time=True) as one:
        rows = [one.prefill([text[:-STEPS]])[0]]
        rows += [one.step(token[None])[0].clone() for token in text[-STEPS:]]
    return torch.stack(rows)


def runs() -> Iterator[tuple[Network, Design]]:
    """Keys and values apart, in one vector, and chosen by the model's own indexer."""
    network = Network(small_model())
    yield network, design("clo", budget_pages=3)
    yield network, design("resident")
    yield network, design("lru-cpu", budget_pages=3, sync="graph")
    yield network, design("resident-sparse", budget_pages=3)
    yield network, design("clo", budget_pages=3, page_coding="int8")
    try:
        network = Network(latent_model("DeepseekV3", kv_lora_rank=32, qk_rope_head_dim=16))
        yield network, design("resident")
        for selector in ("page_minmax", "key_4bit", "sign_hash"):
            yield network, design("clo", budget_pages=3, selector=selector)
        yield network, design("clo", budget_pages=3, page_coding="int8")
        network = Network(latent_model("DeepseekV32"))
        yield network, indexer_design("clo", network)
        yield network, indexer_design("resident-sparse", network)
    except pytest.skip.Exception:  # the library is too old for them
        return


def main() -> None:
    torch.set_num_threads(1)
    chosen = list(runs())
    expected = [decoded(*one) for one in chosen]
    for architecture in sys.argv[1:]:
        launches.install(int(architecture))
    networks.one_launch = lambda _: True  # type: ignore[assignment]
    chosen = list(runs())
    shape.kernels_for = lambda _: triton_kernels()  # type: ignore[assignment]
    plain: Any = LayerShape
    make.LayerShape = lambda **sizes: replace(plain(**sizes), recorded=True)  # type: ignore[assignment, misc]
    make.DenseLayer = Recorded  # type: ignore[misc]
    found = [decoded(*one) for one in chosen]
    print(max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True)))


main()
