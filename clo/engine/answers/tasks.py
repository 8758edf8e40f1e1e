"""What a model is asked in an evaluation: places in a text with their continuations, and hidden passkeys.

Knows nothing about designs or about what an answer is worth.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from clo.engine.models.network import Network
from clo.engine.prompts import Prompt, read_prompt
from clo.engine.texts import Split
from clo.errors import SpecError
from clo.progress import PhaseProgress

NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nThe pass key is"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """What is asked. Tokens; `seed` chooses places in the text and keys.

    `decoded_tokens` are decoded at each place twice: the text's own, and greedily generated ones. `split` is the part
    of the text that is read. `batch_texts` places are decoded together.
    """

    context_tokens: int = 1024
    num_texts: int = 4
    decoded_tokens: int = 64
    num_passkeys: int = 10
    split: Split = Split.REPORT
    batch_texts: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("context_tokens", "num_texts", "batch_texts"):
            if getattr(self, name) < 1:
                raise SpecError(f"evaluate.{name} = {getattr(self, name)}: must be at least 1")
        if self.decoded_tokens < 2:
            raise SpecError(f"evaluate.decoded_tokens = {self.decoded_tokens}: must be at least 2")
        if self.num_passkeys < 0:
            raise SpecError(f"evaluate.num_passkeys = {self.num_passkeys}: must not be negative")

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Passkey:
    """A prompt that hides a key, and the tokens of question and answer."""

    prompt: Prompt
    question: torch.Tensor
    answer: torch.Tensor


@dataclass(frozen=True, slots=True)
class Tasks:
    """Prompts that have been read, for all designs: continuations `[decoded_tokens]`, passkeys hidden in the texts."""

    texts: list[tuple[Prompt, torch.Tensor]]
    passkeys: list[Passkey]


def read_tasks(
    network: Network,
    tokenizer: Any,
    text: str,
    settings: EvaluationSettings,
    progress: PhaseProgress,
) -> Iterator[Tasks]:
    """`num_texts` places that do not overlap, `batch_texts` at a time.

    Key n is hidden in place n (modulo the places) at depth (n + 1/2) / keys: what precedes it is not read again. Raises
    `SpecError` for a text or a context that is too short.
    """
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    draw, places = random.Random(settings.seed), _places(ids, settings)
    keys = [str(draw.randrange(10000, 100000)) for _ in range(settings.num_passkeys)]
    for first in range(0, settings.num_texts, settings.batch_texts):
        texts, passkeys = [], []
        for number in range(first, min(first + settings.batch_texts, settings.num_texts)):
            at, end = places[number], places[number] + settings.context_tokens
            prompt = read_prompt(network, ids[at:end])
            progress("reading", number + 1, settings.num_texts)
            texts.append((prompt, ids[end : end + settings.decoded_tokens]))
            for key in range(number, settings.num_passkeys, settings.num_texts):
                depth = (key + 0.5) / settings.num_passkeys
                passkeys.append(_hide(network, tokenizer, ids[at:end], prompt, keys[key], depth))
        yield Tasks(texts, passkeys)


def check_text(tokenizer: Any, text: str, settings: EvaluationSettings) -> None:
    """Raise `SpecError` for a text or a context that is too short, before work starts."""
    _places(tokenizer(text, return_tensors="pt", verbose=False).input_ids[0], settings)
    needle = tokenizer(NEEDLE.format(key=12345), return_tensors="pt", add_special_tokens=False).input_ids[0]
    if settings.num_passkeys and len(needle) >= settings.context_tokens:
        raise SpecError(f"evaluate.context_tokens = {settings.context_tokens}: too few to hide a passkey in")


def _places(ids: torch.Tensor, settings: EvaluationSettings) -> list[int]:
    """One place in each of `num_texts` equal strips."""
    begin, end = settings.split.bounds(len(ids))
    needed, strip = settings.context_tokens + settings.decoded_tokens, (end - begin) // settings.num_texts
    if strip < needed:
        raise SpecError(
            f"text: its part '{settings.split}' has {end - begin} tokens, but evaluate.num_texts = "
            f"{settings.num_texts} places of context_tokens = {settings.context_tokens} and decoded_tokens = "
            f"{settings.decoded_tokens} need {settings.num_texts * needed}"
        )
    draw = random.Random(settings.seed)
    return [begin + number * strip + draw.randrange(strip - needed + 1) for number in range(settings.num_texts)]


def _hide(network: Network, tokenizer: Any, hay: torch.Tensor, known: Prompt, key: str, depth: float) -> Passkey:
    """A five-digit key in the middle of real text, asked for in completion format."""
    needle, question, answer = (
        tokenizer(part, return_tensors="pt", add_special_tokens=False).input_ids[0]
        for part in (NEEDLE.format(key=key), QUESTION, f" {key}")
    )
    before = round(depth * (len(hay) - len(needle)))
    tokens = torch.cat([hay[:before], needle, hay[before : len(hay) - len(needle)]])
    return Passkey(read_prompt(network, tokens, known=known, shared=before), question, answer)
