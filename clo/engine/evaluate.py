"""How good the answers stay under a design: perplexity, passkey retrieval and agreement with full attention.

Every token after the prompt goes through the design, fed or generated. Knows nothing about time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from clo.engine.decoder import Decoder, HeadProfile, Prompt, read_prompt
from clo.engine.network import Network
from clo.errors import SpecError
from clo.specs import Design

BLOCK_TOKENS = 16
"""Losses of neighbouring tokens are not independent: standard errors are taken over blocks."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """What is asked. Tokens; `seed` chooses places in the text, keys and depths."""

    context_tokens: int = 1024
    num_texts: int = 4
    decoded_tokens: int = 64
    num_passkeys: int = 10
    skipped_tokens: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("context_tokens", "num_texts", "decoded_tokens"):
            if getattr(self, name) < 1:
                raise SpecError(f"evaluate.{name} = {getattr(self, name)}: must be at least 1")
        if self.num_passkeys < 0:
            raise SpecError(f"evaluate.num_passkeys = {self.num_passkeys}: must not be negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What a design's answers are worth. `delta_nll` is nats per token above full attention, `_se` its standard error.

    `agreement` is the share of greedily generated tokens that equal full attention's, until the first that does not;
    `passkey_rate` is `None` where none was asked for.
    """

    design: str
    tau: float | None
    nll: float
    delta_nll: float
    delta_nll_se: float
    passkey_rate: float | None
    passkeys: int
    agreement: float
    hit_rate: float
    demand_miss_rate: float
    h2d_bytes_per_step: float
    context_tokens: int
    budget_pages: int
    slot_pages: int
    steps: int

    def as_record(self) -> dict[str, Any]:
        """For JSON and tables."""
        return asdict(self)


@dataclass(slots=True)
class _Moved:
    """Sums over decode steps."""

    steps: int = 0
    h2d_bytes: float = 0.0
    fetched: int = 0
    requested: int = 0
    misses: int = 0
    heads: int = 0

    def add(self, decoder: Decoder) -> None:
        traffic = decoder.traffic
        self.steps += 1
        self.h2d_bytes += traffic.h2d_bytes
        self.fetched += traffic.fetched_pages + traffic.prefetched_pages
        self.requested += traffic.requested_pages
        self.misses += traffic.demand_misses
        self.heads += traffic.offloaded_heads


@dataclass(frozen=True, slots=True)
class _Passkey:
    prompt: Prompt
    question: torch.Tensor
    answer: list[int]


@dataclass(frozen=True, slots=True)
class _Tasks:
    """Prompts that have been read once, for all designs."""

    texts: list[tuple[Prompt, torch.Tensor]]
    passkeys: list[_Passkey]


def evaluate(
    model: Any,
    tokenizer: Any,
    text: str,
    designs: Iterable[tuple[Design, HeadProfile | None]],
    settings: EvaluationSettings,
    progress: Progress | None = None,
) -> list[Quality]:
    """One `Quality` per design. The baseline is full attention, decoded here too.

    The places read are drawn from `text` after its first `skipped_tokens`: the shipped trace, from which thresholds
    come, was recorded on those. Raises `SpecError` for a text that is too short.
    """
    network, tell = Network(model), progress or (lambda *_: None)
    tasks = _read_tasks(network, tokenizer, text, settings, tell)
    baseline = _run(network, Design(name="resident", attend="full", cache="resident"), None, tasks, settings, tell)
    chosen = list(designs)
    found = []
    for design, heads in chosen:
        is_baseline = design.attend == "full" and not design.offloads
        outcome = baseline if is_baseline else _run(network, design, heads, tasks, settings, tell)
        found.append(_quality(design, outcome, baseline, settings))
    return found


@dataclass(frozen=True, slots=True)
class _Outcome:
    losses: list[list[float]]
    generated: list[list[int]]
    correct: list[bool]
    moved: _Moved
    budget_pages: int
    slot_pages: int


def _run(
    network: Network,
    design: Design,
    heads: HeadProfile | None,
    tasks: _Tasks,
    settings: EvaluationSettings,
    tell: Progress,
) -> _Outcome:
    moved, losses, generated, correct = _Moved(), [], [], []
    total = 2 * len(tasks.texts) + len(tasks.passkeys)
    room = max(settings.decoded_tokens, *(len(k.question) + len(k.answer) for k in tasks.passkeys), 1)
    with Decoder(network, design, max_new_tokens=room, heads=heads) as decoder:
        for number, (prompt, continuation) in enumerate(tasks.texts):
            losses.append(_losses(decoder, prompt, continuation, moved))
            generated.append(_continued(decoder, prompt, settings.decoded_tokens))
            tell(design.name, 2 * (number + 1), total)
        for number, key in enumerate(tasks.passkeys):
            correct.append(_answers(decoder, key))
            tell(design.name, 2 * len(tasks.texts) + number + 1, total)
        assert decoder.plan is not None
        return _Outcome(losses, generated, correct, moved, decoder.plan.budget_pages, decoder.plan.slot_pages)


def _losses(decoder: Decoder, prompt: Prompt, continuation: torch.Tensor, moved: _Moved) -> list[float]:
    """Negative log-likelihoods of the text's own continuation, in nats; all but the first depend on the design."""
    logits, losses = decoder.prefill([prompt]), []
    for token in continuation:
        losses.append(-float(logits[0].double().log_softmax(-1)[token]))
        logits = decoder.step(token[None])
        moved.add(decoder)
    return losses[1:]


def _continued(decoder: Decoder, prompt: Prompt, count: int) -> list[int]:
    """Greedy continuation."""
    logits, tokens = decoder.prefill([prompt]), []
    for _ in range(count):
        tokens.append(int(logits[0].argmax()))
        if len(tokens) < count:
            logits = decoder.step(torch.tensor(tokens[-1:]))
    return tokens


def _answers(decoder: Decoder, key: _Passkey) -> bool:
    """Whether the key is found when the question itself is decoded under the design."""
    logits = decoder.prefill([key.prompt])
    for token in key.question:
        logits = decoder.step(token[None])
    said = []
    for _ in key.answer:
        said.append(int(logits[0].argmax()))
        if len(said) < len(key.answer):
            logits = decoder.step(torch.tensor(said[-1:]))
    return said == key.answer


def _quality(design: Design, found: _Outcome, baseline: _Outcome, settings: EvaluationSettings) -> Quality:
    pairs = zip(found.losses, baseline.losses, strict=True)
    differences = [np.subtract(mine, theirs) for mine, theirs in pairs]
    blocks = [block.mean() for row in differences for block in np.array_split(row, max(1, len(row) // BLOCK_TOKENS))]
    moved = found.moved
    return Quality(
        design=design.name,
        tau=design.tau if design.gated and design.target_hit_rate is None else None,
        nll=float(np.mean(np.concatenate(found.losses))),
        delta_nll=float(np.mean(np.concatenate(differences))),
        delta_nll_se=float(np.std(blocks, ddof=1) / math.sqrt(len(blocks))) if len(blocks) > 1 else math.nan,
        passkey_rate=float(np.mean(found.correct)) if found.correct else None,
        passkeys=len(found.correct),
        agreement=_agreement(found.generated, baseline.generated),
        hit_rate=1.0 - min(1.0, moved.fetched / moved.requested) if moved.requested else 1.0,
        demand_miss_rate=moved.misses / moved.heads if moved.heads else 0.0,
        h2d_bytes_per_step=moved.h2d_bytes / moved.steps,
        context_tokens=settings.context_tokens,
        budget_pages=found.budget_pages,
        slot_pages=found.slot_pages,
        steps=moved.steps,
    )


def _agreement(mine: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Share of tokens before the first that differs: after it the two have different contexts."""
    shares = []
    for one, other in zip(mine, theirs, strict=True):
        differs = [number for number, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
        shares.append((differs[0] if differs else len(one)) / len(one))
    return float(np.mean(shares))


def _read_tasks(network: Network, tokenizer: Any, text: str, settings: EvaluationSettings, tell: Progress) -> _Tasks:
    draw = random.Random(settings.seed)
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    needed = settings.context_tokens + settings.decoded_tokens
    if len(ids) < settings.skipped_tokens + needed:
        raise SpecError(
            f"text: {len(ids)} tokens, but evaluate.skipped_tokens = {settings.skipped_tokens}, "
            f"context_tokens = {settings.context_tokens} and decoded_tokens = {settings.decoded_tokens} need "
            f"{settings.skipped_tokens + needed}"
        )
    total, texts, passkeys = settings.num_texts + settings.num_passkeys, [], []
    for number in range(settings.num_texts):
        at = draw.randrange(settings.skipped_tokens, len(ids) - needed + 1)
        prompt = read_prompt(network, ids[at : at + settings.context_tokens])
        texts.append((prompt, ids[at + settings.context_tokens : at + needed]))
        tell("reading", number + 1, total)
    for number in range(settings.num_passkeys):
        passkeys.append(_passkey(network, tokenizer, ids, settings, number, draw))
        tell("reading", settings.num_texts + number + 1, total)
    return _Tasks(texts, passkeys)


def _passkey(
    network: Network, tokenizer: Any, ids: torch.Tensor, settings: EvaluationSettings, number: int, draw: random.Random
) -> _Passkey:
    """A five-digit key in the middle of real text, at depths spread evenly; asked for in completion format."""
    key = str(draw.randrange(10000, 100000))
    needle, question, answer = (
        tokenizer(part, return_tensors="pt", add_special_tokens=False).input_ids[0]
        for part in (f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n", "\nThe pass key is", f" {key}")
    )
    filler = settings.context_tokens - len(needle)
    if filler < 1:
        raise SpecError(f"evaluate.context_tokens = {settings.context_tokens}: too few to hide a passkey in")
    start = draw.randrange(settings.skipped_tokens, len(ids) - filler + 1)
    depth = (number + 0.5) / settings.num_passkeys
    before = round(depth * filler)
    hay = ids[start : start + filler]
    prompt = read_prompt(network, torch.cat([hay[:before], needle, hay[before:]]))
    return _Passkey(prompt, question, answer.tolist())
