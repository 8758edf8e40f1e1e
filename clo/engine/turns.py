"""What `transformers` says of new tokens: how many in front of a prompt are padding, and where text goes on.

Knows nothing of caches and designs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from clo.errors import SpecError


@dataclass(frozen=True, slots=True, eq=False)
class Turns:
    """Of a batch, after the tokens that it has been given so far."""

    padding: tuple[int, ...] = ()
    """Tokens in front of each sequence that are none of its text."""
    _next: torch.Tensor | None = None
    """The position `[batch]` of the next token of each."""

    def then(self, held: int, batch: int, count: int, mask: Any, positions: torch.Tensor | None) -> Turns:
        """After `count` more tokens of each sequence, where `held` are in the cache, padding with them.

        `mask` is as the model was given it, one of tokens `[batch, tokens]`, of pairs, or such of each kind of layers;
        without one, a token that is decoded goes on as its prompt did. `positions` are `[batch or 1, count]`. Raises
        `SpecError` for tokens that do not go on where the cache ends, and for others that are hidden than those in
        front of a prompt.
        """
        mask = _of_whole_layers(mask)
        decoded = count == 1 and held > 0
        # a mask of pairs made by the library for one token has no column for that token: the cache tells it so
        made_here = decoded and mask is not None and mask.dim() == 4 and mask.shape[-1] == held
        told = padding_in_front(mask, batch, held if made_here else held + count)
        padding = (self.padding or told) if decoded and mask is None else told
        if not decoded:
            self._check_goes_on(held, count, padding, positions)
        self._check_same(held, padding)
        return Turns(padding, None if positions is None else (positions[:, -1] + 1).expand(batch))

    def _check_goes_on(self, held: int, count: int, padding: tuple[int, ...], positions: torch.Tensor | None) -> None:
        """A prompt that does not would be attended as if it did."""
        begins = wanted = held
        if held and positions is not None and self._next is not None:
            pairs = zip(positions[:, 0].expand(len(padding)).tolist(), self._next.tolist(), padding, strict=True)
            # while a sequence is padding still, positions mean nothing
            others = [(first, after) for first, after, hidden in pairs if hidden < held and first != after]
            begins, wanted = others[0] if others else (held, held)
        if count == 0 or begins != wanted:
            raise SpecError(
                f"input_ids: {count} new tokens from position {begins} on, the cache holds {held}: give generate() the "
                "whole conversation, with use_cache, and the model what is new, or offload() anew for another prompt"
            )

    def _check_same(self, held: int, padding: tuple[int, ...]) -> None:
        before = self.padding or (0,) * len(padding)
        for sequence, (now, then) in enumerate(zip(padding, before, strict=True)):
            if min(now, held) != min(then, held):
                raise SpecError(
                    f"attention_mask: it hides {now} tokens in front of sequence {sequence}, before it hid {then}: "
                    "offload() the model anew for other prompts"
                )


def padding_in_front(mask: Any, batch: int, tokens: int) -> tuple[int, ...]:
    """How many tokens in front of each of `batch` sequences of `tokens` tokens a mask hides (see `Turns.then`).

    Raises `SpecError` where it hides others, too: those of an answer cannot be taken out of a cache.
    """
    mask = _of_whole_layers(mask)
    if mask is None:
        return (0,) * batch
    of_pairs = mask.dim() == 4
    seen = mask if mask.dtype == torch.bool else mask == 0 if of_pairs else mask != 0
    # the newest token sees whatever any other does
    seen = (seen[:, 0, -1] if of_pairs else seen).expand(batch, -1)
    hidden = (~seen).cumprod(1).sum(1)
    if not bool((hidden + seen.sum(1) == seen.shape[1]).all()):
        raise SpecError("attention_mask: it hides tokens behind others: pad prompts in front (padding_side='left')")
    if bool(hidden.any()) and seen.shape[1] != tokens:
        raise SpecError(f"attention_mask: {seen.shape[1]} tokens, expected {tokens}: those of the cache and the new")
    return tuple(hidden.tolist())


def _of_whole_layers(mask: Any) -> Any:
    return mask.get("full_attention") if isinstance(mask, Mapping) else mask
