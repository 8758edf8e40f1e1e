"""A layer with linear attention in the cache that `transformers` is given: states, the library's own throughout.

Knows nothing about designs. Needs a version of the library that has such layers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer

from clo.engine.cache_layers import Owned
from clo.engine.finite import States
from clo.engine.layers.linear import states_of
from clo.engine.torch_modes import changeable, uncompiled


class LinearLayer(Owned, LinearAttentionLayer):  # type: ignore[misc]
    """The library's own: states that every token changes, and what the next convolution spans."""

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Room for the states."""
        with changeable():
            super().lazy_initialization(*args, **kwargs)

    @uncompiled
    def update_conv_state(self, conv_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the convolution reads of a prompt, or of several tokens. Raises `EngineError` once it is closed."""
        self.cache.check_open()
        seen: torch.Tensor = super().update_conv_state(conv_states, *args, **kwargs)
        return seen

    @uncompiled
    def update_recurrent_state(self, recurrent_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The states after the new tokens."""
        states: torch.Tensor = super().update_recurrent_state(recurrent_states, *args, **kwargs)
        self.cache.mixed(self.index, states)
        return states

    def newest(self) -> States:
        """What the newest token left here."""
        return States.left(states_of(self))

    def activate_past_recording(self) -> None:
        """Assisted generation takes back tokens that it guessed, which states cannot."""
        self.crop(0)

    def release(self) -> None:
        """Of a cache that is closed the states are not needed any more."""
        LinearAttentionLayer.__init__(self)
