"""A layer with linear attention in the cache that `transformers` is given: states, the library's own throughout.

Knows nothing about designs. Needs a version of the library that has such layers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer

from clo.engine.cache_layers import Owned
from clo.engine.finite import States


class LinearLayer(Owned, LinearAttentionLayer):  # type: ignore[misc]
    """The library's own: states that every token changes, and what the next convolution spans."""

    def update_conv_state(self, conv_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the convolution reads of a prompt, or of several tokens. Raises `EngineError` once it is closed."""
        self.cache.check_open()
        seen: torch.Tensor = super().update_conv_state(conv_states, *args, **kwargs)
        return seen

    def update_recurrent_state(self, recurrent_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The states after the new tokens."""
        states: torch.Tensor = super().update_recurrent_state(recurrent_states, *args, **kwargs)
        self.cache.mixed(self.index, states)
        return states

    def newest(self) -> States:
        """What the newest token left here."""
        return States(projected=_only(self.conv_states)[..., -1], states=_only(self.recurrent_states))

    def activate_past_recording(self) -> None:
        """Assisted generation takes back tokens that it guessed, which states cannot."""
        self.crop(0)

    def release(self) -> None:
        """Of a cache that is closed the states are not needed any more."""
        LinearAttentionLayer.__init__(self)


def _only(states: Any) -> torch.Tensor:
    """Newer versions of the library number the states of a layer, of which there is one."""
    found: torch.Tensor = states[0]
    return found if isinstance(states, dict) else states
