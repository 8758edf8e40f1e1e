"""What is calibrated in these tests: a small shape, few designs, short contexts."""

from __future__ import annotations

from clo.engine.decoder import Decoder
from clo.engine.measure import MachineRun, run_steps
from clo.engine.models.network import Network
from clo.engine.random_weights import random_prompt
from clo.presets import load_model
from clo.specs import Design

DESIGNS = ("resident", "streamed", "staged", "lru-cpu", "recall", "resolve", "clo-v1", "clo")
SHAPE = load_model("smollm2-135m").with_fields(
    num_layers=3, hidden_size=48, intermediate_size=64, head_dim=16, num_query_heads=4, num_kv_heads=2, vocab_size=64
)
SIZE = CONTEXT, BATCH, BUDGET = (320, 2, 0.2)


def run_of(network: Network, design: Design, *, alone: bool = False, steps: int = 3) -> MachineRun:
    with Decoder(network, design, max_new_tokens=16, one_at_a_time=alone) as decoder:
        return run_steps(decoder, [random_prompt(network, CONTEXT, seed=b) for b in range(BATCH)], steps=steps)
