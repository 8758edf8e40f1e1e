"""What follows attention in a decoder layer, taken apart: a gated MLP, or experts. Knows nothing of the rest."""

from __future__ import annotations

from typing import Any

import torch

from clo.engine.models.anatomy import has_part
from clo.errors import SpecError

Routed = tuple[torch.Tensor, torch.Tensor]
"""Of every token its experts' numbers, and what each counts, `[batch, experts_per_token]`."""

GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")
FUSED = ("gate_up_proj", "down_proj", "activation_fn")
"""Of one whose gate and what it gates come from one projection (Phi-3, GLM)."""
SHARED = ("shared_expert", "shared_experts")
ROUTERS = ("gate", "router")
CORRECTION = "e_score_correction_bias"
"""What a mixture adds to the scores of its router, where the router has not got it itself (MiniMax-M2)."""


class Mlp:
    """A gated MLP that every token passes, experts of which a router chooses, or both. Each runs the model's modules.

    Hidden states are `[batch, 1, hidden_size]`. Raises `SpecError` for one that is built differently.
    """

    def __init__(self, module: Any, owner: str) -> None:
        self._experts: Any = getattr(module, "experts", None)
        self._gated: Any = module if self._experts is None else _first(module, SHARED)
        self._gate_of_shared: Any = getattr(module, "shared_expert_gate", None)
        self._router: Any = _first(module, ROUTERS) if self.has_experts else None
        self._correction: Any = getattr(module, CORRECTION, None)
        # in versions of the library before 5.11 some routers give scores, and the mixture chooses
        self._choose: Any = getattr(module, "route_tokens_to_experts", None)
        self._owner = owner
        self._is_fused = self.is_gated and has_part(self._gated, FUSED[0])
        needed = FUSED if self._is_fused else GATED
        missing = [f"mlp.{part}" for part in needed if self.is_gated and not has_part(self._gated, part)]
        missing += ["mlp.gate"] if self.has_experts and self._router is None else []
        if missing:
            raise SpecError(
                f"model {owner}: layers lack {missing[0]}: not a Llama or Qwen-style model: clo.engine.offload leaves "
                "it whole"
            )

    @property
    def is_gated(self) -> bool:
        """Whether every token passes a gated MLP; beside experts it is the shared one."""
        return self._gated is not None

    @property
    def has_experts(self) -> bool:
        """Whether tokens are routed."""
        return self._experts is not None

    def gate_up_proj(self, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gate and what it gates."""
        if self._is_fused:
            gate, up = self._gated.gate_up_proj(normed).chunk(2, dim=-1)
            return gate, up
        return self._gated.gate_proj(normed), self._gated.up_proj(normed)

    def activation(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Gated activation."""
        activate = self._gated.activation_fn if self._is_fused else self._gated.act_fn
        activated: torch.Tensor = activate(gate) * up
        return activated

    def down_proj(self, normed: torch.Tensor, activated: torch.Tensor) -> torch.Tensor:
        """What the gated MLP gives; of a shared expert, as much of it as its own gate says."""
        projected: torch.Tensor = self._gated.down_proj(activated)
        if self._gate_of_shared is None:
            return projected
        return torch.sigmoid(self._gate_of_shared(normed)) * projected

    def route(self, normed: torch.Tensor) -> Routed:
        """The experts of every token and their weights, by the model's own router."""
        correction = () if self._correction is None else (self._correction,)
        given = self._router(normed[:, 0], *correction)
        if isinstance(given, tuple) and len(given) == 3:
            return given[2], given[1]
        if self._choose is None or isinstance(given, tuple):
            raise SpecError(f"model {self._owner}: its router gives neither scores nor experts: use clo.engine.offload")
        chosen: Routed = self._choose(given)
        return chosen

    def experts(self, normed: torch.Tensor, routed: Routed) -> torch.Tensor:
        """The sum of what its experts give for each token."""
        given: torch.Tensor = self._experts(normed[:, 0], *routed)
        return given[:, None]

    def all(self, normed: torch.Tensor) -> torch.Tensor:
        """All of it, one after the other."""
        given = None
        if self.is_gated:
            given = self.down_proj(normed, self.activation(*self.gate_up_proj(normed)))
        if self.has_experts:
            return add(self.experts(normed, self.route(normed)), given)
        assert given is not None
        return given


def add(of_experts: torch.Tensor, of_shared: torch.Tensor | None) -> torch.Tensor:
    """In the order in which models add them up."""
    return of_experts if of_shared is None else of_experts + of_shared


def _first(module: Any, names: tuple[str, ...]) -> Any:
    return next((getattr(module, name) for name in names if has_part(module, name)), None)
