"""What a layer with latent attention makes of hidden states, one operation of the schedule after the other.

For its own step, and for the query of a later layer that it predicts. Knows nothing about caches and designs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from clo.engine.models.indexer import Seen
from clo.engine.models.network import Asked, Network, Rotation
from clo.schedule.ops import Stage


@dataclass(frozen=True, slots=True, eq=False)
class Ahead:
    """A query that is being made for `layer`, before it runs."""

    layer: int
    normed: torch.Tensor
    low: torch.Tensor


class LatentQueries:
    """On the way from one operation to the next: queries, the vector to cache, and the query of a later layer."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._normed = self._low = self._vector = torch.empty(0)
        self._ahead: Ahead | None = None

    def project(self, layer: int, normed: torch.Tensor, target: int | None, hidden: torch.Tensor) -> None:
        """To low ranks; of `hidden`, as if it were the input of layer `target`, too."""
        network, own = self._network, self._network.latent(layer)
        self._normed, self._low, self._vector, self._ahead = normed, own.low(normed), own.vector(normed), None
        if target is not None:
            ahead = network.input_norm(target, hidden)
            self._ahead = Ahead(target, ahead, network.latent(target).low(ahead))

    def norm(self, layer: int) -> None:
        """The low ranks."""
        own = self._network.latent(layer)
        self._low, self._vector = own.normed_low(self._low), own.normed_vector(self._vector)
        if self._ahead is not None:
            later = self._network.latent(self._ahead.layer)
            self._ahead = replace(self._ahead, low=later.normed_low(self._ahead.low))

    def seen(self, layer: int, rotations: Sequence[Rotation]) -> dict[tuple[Stage, int], Seen]:
        """What indexers read of these low ranks: the layer's own, and that of the later layer."""
        found = {(Stage.DEMAND, layer): Seen(self._normed, self._low, rotations[layer])}
        if (ahead := self._ahead) is not None:
            found[Stage.PREFETCH, ahead.layer] = Seen(ahead.normed, ahead.low, rotations[ahead.layer])
        return found

    def widen(self, layer: int) -> None:
        """Low ranks to queries."""
        self._low = self._network.latent(layer).queries(self._low)
        if self._ahead is not None:
            later = self._network.latent(self._ahead.layer)
            self._ahead = replace(self._ahead, low=later.queries(self._ahead.low))

    def mapped(self, layer: int) -> Asked:
        """What the layer asks for and leaves, before rotation."""
        return self._network.mapped(layer, self._low, self._vector)

    def predicted(self) -> tuple[int, torch.Tensor] | None:
        """A later layer, and what it would ask before rotation, `[batch, query_heads, 1, head_dim]`."""
        if self._ahead is None:
            return None
        later = self._network.latent(self._ahead.layer)
        return self._ahead.layer, later.map_queries(later.in_heads(self._ahead.low))
