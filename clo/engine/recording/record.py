"""Records an attention trace from a real model: prefill, then teacher-forced decoding of the text's own continuation.

Any decoder of `transformers` built like Llama or Qwen (separate query projection, optional query norm, grouped heads,
rotary positions) is observed through the library's own attention registry and through hooks on its layers; the
model's results are not changed. Of one with windows or linear attention the other layers are recorded. Knows nothing
about offloading, machines or time.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clo.engine.models.loading import check_packages, load_model
from clo.engine.models.smollm2 import MODEL_NAME
from clo.engine.recording.attention_recorder import AttentionRecorder, register_attention
from clo.engine.recording.settings import SELECTORS, RecordSettings
from clo.engine.versions import package_versions
from clo.errors import SpecError
from clo.progress import PhaseProgress, nobody
from clo.trace import AttentionTrace

if TYPE_CHECKING:
    from clo.engine.models.network import Network

PREFILL_CHUNK_TOKENS = 512


def record(
    model: str | Path,
    text: str,
    *,
    context_tokens: int,
    num_steps: int,
    page_size: int = 16,
    max_budget_pages: int = 64,
    selectors: tuple[str, ...] = SELECTORS,
    lookaheads: tuple[int, ...] = (1, 2),
    text_source: str = "given text",
    progress: PhaseProgress = nobody,
) -> AttentionTrace:
    """Run `model` over `text` and return the trace of `num_steps` decode steps at `context_tokens` and beyond.

    `model` is `smollm2-135m`, a Hugging Face folder, or a hub name; `progress(phase, done, total)` is called with
    tokens ("prefill") and steps ("decode"). Raises `SpecError` for a text that is too short, a context beyond the
    model's positions or a model built differently, and `NotFoundError` for an unknown model or missing packages.
    """
    settings = RecordSettings(
        context_tokens=context_tokens,
        num_steps=num_steps,
        page_size=page_size,
        max_budget_pages=max_budget_pages,
        selectors=tuple(selectors),
        lookaheads=tuple(lookaheads),
    )
    loaded, tokenizer = _load(model)
    recorder = AttentionRecorder(loaded, settings)
    settings = recorder.settings
    token_ids = _token_ids(recorder.network.spec.max_positions, tokenizer, text, settings)
    nll = _run(recorder, token_ids, settings, progress)
    about = {
        "model": model if str(model) == MODEL_NAME else Path(model).name,
        "text_source": text_source,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "nll_per_token": nll,
        "recorded_at": datetime.now(UTC).date().isoformat(),
        "versions": package_versions(),
    }
    return recorder.trace(about)


def _load(model: str | Path) -> tuple[Any, Any]:
    """With attention to choose from that shows decode steps to a recorder."""
    check_packages("recording")
    register_attention()
    return load_model(model)


def _token_ids(limit: int, tokenizer: Any, text: str, settings: RecordSettings) -> Any:
    needed = settings.context_tokens + settings.num_steps - 1
    if needed > limit:
        raise SpecError(
            f"record.context_tokens = {settings.context_tokens} and num_steps = {settings.num_steps} need {needed} "
            f"positions: the model has {limit}"
        )
    # the text is used from its start; more than this many characters a token does not occur in prose
    token_ids = tokenizer(text[: 40 * needed], return_tensors="pt", verbose=False).input_ids
    if token_ids.shape[1] < needed:
        raise SpecError(
            f"text: {token_ids.shape[1]} tokens, but record.context_tokens = {settings.context_tokens} and "
            f"num_steps = {settings.num_steps} need {needed}"
        )
    return token_ids[:, :needed]


def _run(recorder: AttentionRecorder, token_ids: Any, settings: RecordSettings, progress: PhaseProgress) -> float:
    """Prefill all but the first recorded token, then one token a step. Returns the mean NLL of the decoded text."""
    import torch

    network, length = recorder.network, token_ids.shape[1]
    with torch.inference_mode():
        cache = _prefill(network, token_ids[:, : settings.context_tokens - 1], length, progress)
        losses: list[float] = []
        with recorder.attached():
            for step in range(settings.num_steps):
                at = settings.context_tokens - 1 + step
                logits = network.read(token_ids[:, at : at + 1], cache, length)
                if step + 1 < settings.num_steps:
                    losses.append(-float(logits[0, -1].log_softmax(-1)[token_ids[0, at + 1]]))
                recorder.next_step()
                progress("decode", step + 1, settings.num_steps)
    return sum(losses) / max(1, len(losses))


def _prefill(network: Network, token_ids: Any, length: int, progress: PhaseProgress) -> Any:
    from clo.engine.layers.linear import empty_library_cache

    cache, total = empty_library_cache(network.spec.linear_flags), token_ids.shape[1]
    for start in range(0, total, PREFILL_CHUNK_TOKENS):
        chunk = token_ids[:, start : start + PREFILL_CHUNK_TOKENS]
        network.read(chunk, cache, length)
        progress("prefill", start + chunk.shape[1], total)
    return cache
