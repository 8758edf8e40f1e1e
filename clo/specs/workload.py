"""What is decoded: how many sequences of what length. Knows nothing about arrival times or text."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveInt

from clo.specs.base import Spec


class Workload(Spec):
    """A batch in steady decode: every sequence holds `context_tokens` and gets one token a step."""

    context_tokens: PositiveInt = Field(default=131072, description="tokens in each sequence's KV cache")
    batch: PositiveInt = Field(default=16, description="sequences decoded together")
    steps: PositiveInt = Field(default=96, description="decode steps to measure, after the warm-up")
    warmup_steps: NonNegativeInt = Field(default=32, description="steps replayed first, not measured")
    seed: NonNegativeInt = Field(default=0, lt=2**63, description="draws which recorded heads stand for which heads")

    @property
    def label(self) -> str:
        """How reports call its size."""
        return f"{self.batch} x {self.context_tokens} tokens"
