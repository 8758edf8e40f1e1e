"""Small random models of every kind that the decoder takes beyond Llama, Mistral and Qwen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import hybrid
import latent
import windowed
from hybrid import hybrid_model
from latent import latent_model
from small import EXPERTS, small_model
from windowed import windowed_model

Make = Callable[..., Any]

WITH_EXPERTS: dict[str, Make] = {kind: partial(small_model, kind) for kind in EXPERTS}
# Gemma 2 caps its logits where no operation of the schedule is
WITH_WINDOWS: dict[str, Make] = {kind: partial(windowed_model, kind) for kind in windowed.KINDS if kind != "Gemma2"}
HYBRID: dict[str, Make] = {kind: partial(hybrid_model, kind) for kind in hybrid.KINDS}
LATENT: dict[str, Make] = {kind: partial(latent_model, kind) for kind in latent.KINDS}
FUSED: dict[str, Make] = {"Phi3": partial(small_model, "Phi3")}
"""One projection for queries, keys and values, one for the MLP's gate and what it gates."""
EVERY: dict[str, Make] = FUSED | WITH_EXPERTS | WITH_WINDOWS | HYBRID | LATENT
ONE_OF_EACH = ("Qwen2Moe", "Gemma3", "GptOss", "Olmo3", "Qwen3Next", "Qwen3_5", "DeepseekV2", "DeepseekV3")
"""Experts with a shared one; norms before and behind; experts, windows and sinks; norms behind; states with experts and
without; vectors that are key and value in one, with queries from the hidden state and from a low rank."""
WITH_INDEXER: dict[str, Make] = {kind: partial(latent_model, kind) for kind in latent.WITH_INDEXER}
"""A model's own indexer chooses what is attended."""
THAT_SEE: dict[str, Make] = {"Gemma3": windowed.seeing_model, "Qwen3_5": hybrid.seeing_model}
