"""Small random models of every kind that the decoder takes beyond Llama, Mistral and Qwen: experts, windows, states."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import hybrid
import windowed
from hybrid import hybrid_model
from small import EXPERTS, small_model
from windowed import windowed_model

Make = Callable[..., Any]

WITH_EXPERTS: dict[str, Make] = {kind: partial(small_model, kind) for kind in EXPERTS}
# Gemma 2 caps its logits where no operation of the schedule is
WITH_WINDOWS: dict[str, Make] = {kind: partial(windowed_model, kind) for kind in windowed.KINDS if kind != "Gemma2"}
HYBRID: dict[str, Make] = {kind: partial(hybrid_model, kind) for kind in hybrid.KINDS}
EVERY: dict[str, Make] = WITH_EXPERTS | WITH_WINDOWS | HYBRID
ONE_OF_EACH = ("Qwen2Moe", "Gemma3", "GptOss", "Olmo3", "Qwen3Next", "Qwen3_5")
"""Experts with a shared one; norms before and behind; experts, windows and sinks; norms behind; states with experts and
without."""
THAT_SEE: dict[str, Make] = {"Gemma3": windowed.seeing_model, "Qwen3_5": hybrid.seeing_model}
