"""Decode steps and prompts as engines served them, with everything on the GPUs and without speculation, beside ours.

Published by others, a mean over many steps each. No cost is fitted to them. Knows nothing about how they are printed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import clo_sim
from clo.presets import load_design, load_machine, load_model
from clo.specs import ModelSpec
from clo.specs.hf_weights import NVFP4
from clo_sim.scene import Scene
from clo_sim.serving.prefill import prefill_prices


@dataclass(frozen=True, slots=True)
class Step:
    """`batch` sequences of `context` tokens in the mean on `gpus` GPUs, and how long a step of theirs took."""

    model: str
    machine: str
    gpus: int
    batch: int
    context: int
    tpot_s: float
    attention_by: str = "heads"
    weight_bytes: float | None = None

    @property
    def scene(self) -> Scene:
        """As simulated."""
        model = load_model(self.model)
        if self.weight_bytes is not None:
            model = model.with_fields(weight_bytes_per_value=self.weight_bytes)
        return _scene(model, self.machine, self.gpus, self.context, self.batch, self.attention_by)

    def simulated_s(self) -> float:
        """Our time of it: what a model with an indexer attends to is its own choice, others attend to everything."""
        scene = self.scene
        name = "resident" if scene.model.indexer is None else "resident-sparse"
        return clo_sim.simulate(scene, load_design(name, scene.model)).tpot_s


@dataclass(frozen=True, slots=True)
class Steps:
    """Steps of one source, what they are of, and why theirs and ours differ."""

    what: str
    source: str
    why: str
    steps: tuple[Step, ...]


def _each(model: str, machine: str, gpus: int, context: int, tpots_ms: dict[int, float], **more: Any) -> list[Step]:
    return [Step(model, machine, gpus, batch, context, ms / 1e3, **more) for batch, ms in tpots_ms.items()]


KERNELS = (
    "kernels timed alone are of other versions; what an engine launches beside them, hides behind others or fuses is "
    "in no table"
)
WHOLE_RUNS = f"theirs: whole runs, prefill included; {KERNELS}"

SERVED = (
    Steps(
        what="gpt-oss-120b, experts in 4 bits, under vLLM on H100: 4, 8, 16, 32, 64 sequences of 1,500 tokens on 8 "
        "GPUs, 64 on 4, 64 on 2",
        source="InferenceX issue 828, March 2026",
        why=KERNELS,
        steps=(
            *_each("gpt-oss-120b", "h100", 8, 1536, {4: 3.72, 8: 4.05, 16: 4.83, 32: 5.82, 64: 7.36}),
            *_each("gpt-oss-120b", "h100", 4, 1536, {64: 9.9}),
            *_each("gpt-oss-120b", "h100", 2, 1536, {64: 15.2}),
        ),
    ),
    Steps(
        what="DeepSeek-R1 in 8 bits, under SGLang on 8 H200: 8, 16, 32, 64 sequences of 1,500 tokens",
        source="InferenceX issue 870, March 2026",
        why=KERNELS,
        steps=tuple(_each("deepseek-v3", "h200", 8, 1536, {8: 12.8, 16: 17.2, 32: 25.6, 64: 34.6})),
    ),
    Steps(
        what="MiniMax-M3 in 8 bits, under vLLM: 4 sequences of 1,500 tokens on 8 H200, 8 B200",
        source="InferenceX-app pull request 454, June 2026",
        why="theirs say that on B200 a kernel of experts ran that is slow with few tokens",
        steps=(
            *_each("minimax-m3", "h200", 8, 1536, {4: 8.4}),
            *_each("minimax-m3", "b200", 8, 1536, {4: 16.2}),
        ),
    ),
    Steps(
        what="GLM-5 in 8 bits, under SGLang: one sequence of 1,500 tokens on 8 B200; 8 and 16 of 36,864, dealt out, on "
        "8 H200",
        source="a gist of B. Hamm, February 2026; SGLang issue 30985",
        why=f"{WHOLE_RUNS}; some 90 us a layer, whatever the batch",
        steps=(
            *_each("glm-5.1", "b200", 8, 1536, {1: 20.2}),
            *_each("glm-5.1", "h200", 8, 36864, {8: 8e3 / 252.33, 16: 16e3 / 439.91}, attention_by="sequences"),
        ),
    ),
    Steps(
        what="Qwen3.5 under SGLang, one sequence of 8,700 tokens on B200: 27B, 35B-A3B, 122B-A10B, 397B-A17B in bf16 "
        "on 1, 1, 2, 8 GPUs; in fp8 on 1, 1, 1, 4",
        source="SGLang 0.5.15, pull request 32323 as first measured; GPUs are told by tokens/s of each",
        why=KERNELS,
        steps=(
            *_each("qwen3.5-27b", "b200", 1, 8704, {1: 10.45}, weight_bytes=2.0),
            *_each("qwen3.5-35b-a3b", "b200", 1, 8704, {1: 3.0}, weight_bytes=2.0),
            *_each("qwen3.5-122b-a10b", "b200", 2, 8704, {1: 4.1}, weight_bytes=2.0),
            *_each("qwen3.5-397b-a17b", "b200", 8, 8704, {1: 4.6}, weight_bytes=2.0),
            *_each("qwen3.5-27b", "b200", 1, 8704, {1: 7.54}, weight_bytes=1.0),
            *_each("qwen3.5-35b-a3b", "b200", 1, 8704, {1: 2.91}, weight_bytes=1.0),
            *_each("qwen3.5-122b-a10b", "b200", 1, 8704, {1: 4.75}, weight_bytes=1.0),
            *_each("qwen3.5-397b-a17b", "b200", 4, 8704, {1: 5.31}, weight_bytes=1.0),
        ),
    ),
    Steps(
        what="Qwen3-Next-80B-A3B under SGLang, 8 sequences of 2,000 tokens on 2, 4, 8 H200",
        source="SGLang pull request 10404, September 2025",
        why=WHOLE_RUNS,
        steps=tuple(
            step
            for gpus, rate in ((2, 937.94), (4, 1137.94), (8, 1239.43))
            for step in _each("qwen3-next-80b-a3b", "h200", gpus, 2000, {8: 8e3 / rate}, weight_bytes=2.0)
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of `tokens` alone on eight GPUs, and the time to its first token."""

    tokens: int
    ttft_s: float

    def simulated_s(self) -> float:
        """Our time of it."""
        model = load_model("minimax-m3")
        assert model.experts is not None
        experts = model.experts.with_fields(weight_bytes_per_value=NVFP4).model_dump()
        scene = _scene(model.with_fields(experts=experts), "b200", 8, self.tokens, 1, "heads")
        prices = prefill_prices(scene, load_design("resident-sparse", scene.model), chunk_tokens=PROMPT_CHUNK)
        return prices.alone_ns(self.tokens) / 1e9


PROMPTS = (Prompt(131072, 2.63), Prompt(1011492, 43.2))
"""MiniMax-M3-NVFP4 under vLLM on eight B200 (vLLM issue 51494, August 2026)."""
PROMPT_CHUNK = 8192


def _scene(model: ModelSpec, machine: str, gpus: int, context: int, batch: int, attention_by: str) -> Scene:
    shared = load_machine(machine).with_fields(tensor_parallel=gpus, attention_by=attention_by)
    return clo_sim.make_scene(model, shared, context_tokens=context, batch=batch)
