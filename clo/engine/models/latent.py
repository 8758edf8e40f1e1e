"""Latent attention of a `transformers` decoder, taken apart: into the vectors' space, and back. Knows no other parts.

A step never makes keys and values of single heads (DeepSeek-V2, arXiv 2405.04434, 2.1.2): the map that would make keys
is applied to queries, the one that would make values to what attention gives.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from clo.engine.models.anatomy import AS_THEY_ARE, Norms
from clo.specs import LatentSpec


class LatentAttention:
    """The parts of one attention module, each of which runs the model's own weights."""

    def __init__(self, attention: Any, norms: Norms = AS_THEY_ARE) -> None:
        self._module, self._norms = attention, norms
        self._rank, self._rope = int(attention.kv_lora_rank), int(attention.qk_rope_head_dim)
        self._nope = int(attention.qk_nope_head_dim)

    @property
    def spec(self) -> LatentSpec:
        """Its shape."""
        return LatentSpec(
            kv_rank=self._rank,
            rope_dim=self._rope,
            nope_dim=self._nope,
            value_dim=self._module.v_head_dim,
            query_rank=self._module.q_lora_rank or 0,
        )

    def low(self, normed: torch.Tensor) -> torch.Tensor:
        """What queries are made from, `[batch, tokens, query_rank]`; without a low rank the queries themselves."""
        module = self._module
        return (module.q_proj if self._is_direct else module.q_a_proj)(normed)

    def normed_low(self, low: torch.Tensor) -> torch.Tensor:
        """By a norm of its own, if it is one."""
        return low if self._is_direct else self._norm(self._module.q_a_layernorm)(low)

    def queries(self, low: torch.Tensor) -> torch.Tensor:
        """Every head's, `[batch, tokens, heads * query_dim]`."""
        return low if self._is_direct else self._module.q_b_proj(low)

    def vector(self, normed: torch.Tensor) -> torch.Tensor:
        """What is cached, `[batch, tokens, vector_dim]`, before its norm and without the position."""
        return self._module.kv_a_proj_with_mqa(normed)

    def normed_vector(self, vector: torch.Tensor) -> torch.Tensor:
        """All but the part that the position goes into."""
        normed = self._norm(self._module.kv_a_layernorm)(vector[..., : self._rank])
        return torch.cat([normed, vector[..., self._rank :]], -1)

    def in_heads(self, query: torch.Tensor) -> torch.Tensor:
        """Queries `[batch, tokens, heads * query_dim]` as `[batch, heads, tokens, query_dim]`."""
        return query.unflatten(-1, (-1, self._nope + self._rope)).transpose(1, 2)

    def map_queries(self, heads: torch.Tensor) -> torch.Tensor:
        """Queries `[batch, heads, tokens, query_dim]` in the vectors' space, `[..., vector_dim]`."""
        mapped = torch.einsum("bhtd,hdr->bhtr", heads[..., : self._nope], self._maps[:, : self._nope])
        return torch.cat([mapped, heads[..., self._nope :]], -1)

    def query(self, normed: torch.Tensor, rotation: Any, turn: Callable[..., Any] | None = None) -> torch.Tensor:
        """All of that one after the other, and the position: rotated queries `[batch, heads, tokens, vector_dim]`.

        By `turn`, if it is given, and else as the model rotates.
        """
        query = self.map_queries(self.in_heads(self.queries(self.normed_low(self.low(normed)))))
        turned: torch.Tensor = (turn or self.rotate)(query, query[:, :1], rotation)[0]
        return turned

    def map_outputs(self, attended: torch.Tensor) -> torch.Tensor:
        """Values of every head, `[..., heads, value_dim]`, of what attention to vectors gave, `[..., kv_rank]`."""
        return torch.einsum("...hr,hvr->...hv", attended, self._maps[:, self._nope :])

    def rotate(self, query: torch.Tensor, key: torch.Tensor, rotation: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary positions into the last part of both, `[batch, heads, tokens, vector_dim]`."""
        rotated = self._rotated(query[..., self._rank :], key[..., self._rank :], rotation)
        ends = zip((query, key), rotated, strict=True)
        turned = [torch.cat([whole[..., : self._rank], end.to(whole.dtype)], -1) for whole, end in ends]
        return turned[0], turned[1]

    def _rotated(self, query: torch.Tensor, key: torch.Tensor, rotation: Any) -> Any:
        library = sys.modules[type(self._module).__module__]
        if isinstance(rotation, torch.Tensor):  # complex numbers (DeepSeek-V2)
            return library.apply_rotary_emb(query, key, rotation)
        # kinds of model that can only do it one way do not say so
        paired = hasattr(library, "apply_rotary_pos_emb_interleave")
        if getattr(self._module.config, "rope_interleave", paired):
            return library.apply_rotary_pos_emb_interleave(query, key, *rotation)
        return library.apply_rotary_pos_emb(query, key, *rotation)

    def _norm(self, module: Any) -> Any:
        return self._norms.get(module, module)

    @property
    def _is_direct(self) -> bool:
        """Whether queries are projected from the hidden state, without a low rank."""
        return self._module.q_lora_rank is None

    @property
    def _maps(self) -> torch.Tensor:
        """`[heads, nope_dim + value_dim, kv_rank]`: to keys, then to values."""
        weight: torch.Tensor = self._module.kv_b_proj.weight
        return weight.unflatten(0, (self._module.num_heads, -1))
