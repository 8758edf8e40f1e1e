"""Decodes a batch under a design on one thread: the same operations as on a machine with lanes, so the same answers.

For those who want many answers and no timeline. Knows nothing about streams, transfers that overlap or time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from clo.engine import inline
from clo.engine.checks import check_alike
from clo.engine.decoder import Decoder
from clo.engine.heads import HeadProfile
from clo.engine.layers import AttendedLayer, Layer, LinearLayer, OffloadedLayer, StreamedLayer
from clo.engine.layers.indexed import IndexerSelection
from clo.engine.make_layers import make_layers
from clo.engine.models.network import Network, Rotation
from clo.engine.models.probe import check_taken_apart
from clo.engine.prompts import Prompt
from clo.engine.step_traffic import StepTraffic
from clo.errors import EngineError
from clo.plan import DecodePlan
from clo.schedule.ops import Stage
from clo.specs import Design


class Observed(NamedTuple):
    """One attention of a layer, which still holds what was attended. Shapes as in `OffloadedLayer.attend`."""

    number: int
    layer: OffloadedLayer
    query: torch.Tensor
    attended: torch.Tensor
    lengths: torch.Tensor
    sink_logits: torch.Tensor | None = None


Observer = Callable[[Observed], None]
"""Told of every attention."""


class InlineDecoder:
    """Like `Decoder`: `prefill` the prompts, then `step` with each next token. It holds no threads.

    Raises `SpecError` where the design does not fit the model.
    """

    def __init__(
        self,
        network: Network,
        design: Design,
        *,
        max_new_tokens: int = 256,
        heads: HeadProfile | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.network, self.max_new_tokens, self._observer = network, max_new_tokens, observer
        self._sizes = Decoder(network, design, max_new_tokens=max_new_tokens, heads=heads)
        self._sizes.close()  # only its sizes and checks are needed
        self._plan: DecodePlan | None = None
        self.layers: Sequence[Layer] = ()
        self._lengths = torch.empty(0)
        self._tokens: list[int] = []
        self._broken = False

    @property
    def plan(self) -> DecodePlan:
        """The design's numbers for these prompts. Raises `EngineError` before there are any."""
        if self._plan is None:
            raise EngineError("decoder: no prompt yet: call prefill first")
        return self._plan

    @property
    def traffic(self) -> StepTraffic:
        """What the last step moved."""
        return StepTraffic.of(self.plan, self.layers)

    def prefill(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        """Take in prompts that have been read; logits `[batch, vocab_size]` of what follows them."""
        check_taken_apart(self.network)
        lengths = [prompt.num_tokens for prompt in prompts]
        check_alike(self.network, lengths)
        self._plan = self._sizes.make_plan(lengths)
        self.layers = make_layers(
            self.network, self._plan, self._sizes.heads, self._plan.workload.context_tokens + self.max_new_tokens
        )
        for sequence, prompt in enumerate(prompts):
            prompt.load_into(self.layers, sequence)
        self._tokens, self._broken = lengths, False
        self._lengths = torch.tensor(lengths, dtype=torch.int32, device=self.network.device)
        return torch.stack([prompt.logits for prompt in prompts])

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Decode one token a sequence, `[batch]`; logits `[batch, vocab_size]` of the next."""
        if self._broken:
            raise EngineError("decoder: the last step failed half-way: call prefill again")
        if max(self._tokens) >= self.plan.workload.context_tokens + self.max_new_tokens:
            raise EngineError(f"decoder: max_new_tokens = {self.max_new_tokens} tokens have been decoded")
        self._broken = True
        self._tokens = [tokens + 1 for tokens in self._tokens]
        for kv in self.layers:
            kv.begin(self._tokens)
        network = self.network
        with torch.inference_mode():
            self._lengths = self._lengths + 1
            hidden = network.embed(tokens.to(network.device))
            rotations, predicted = network.rotations(hidden, self._lengths.long() - 1), set[int]()
            for layer in range(len(self.layers)):
                contribution = self._contribution(layer, hidden, rotations, predicted)
                hidden = network.after_attention(layer, hidden, contribution)
            logits = network.lm_head(network.final_norm(hidden))
        self._broken = False
        return logits

    def _contribution(
        self, index: int, hidden: torch.Tensor, rotations: Sequence[Rotation], predicted: set[int]
    ) -> torch.Tensor:
        """Of a layer's attention to the hidden state; on the way a later layer's pages are prefetched."""
        layer, network = self.layers[index], self.network
        normed = network.input_norm(index, hidden)
        self._prefetch(inline.predicts(self.plan, index), hidden, rotations, predicted)
        if isinstance(layer, LinearLayer):
            return network.linear_attention(index, normed, layer.states)
        self._ask_indexer(index, Stage.DEMAND, normed, rotations[index])
        asked = network.qkv(index, normed)
        query, key = network.rotate(asked.query, asked.key, rotations[index])
        now = query[:, :, 0].contiguous()
        attended = self._attended(index, layer, now, asked.kept(key), was_predicted=index in predicted)
        return network.out_proj(index, network.output_gate(network.values(index, attended), asked.gate))

    def _ask_indexer(self, index: int, stage: Stage, normed: torch.Tensor, rotation: Rotation) -> None:
        """A layer whose model chooses for it does so by this hidden state; of its own, it keeps the indexer's key."""
        layer, indexer = self.layers[index], self.network.indexer(index) if self.plan.design.asks_indexer else None
        if indexer is None or not isinstance(layer, OffloadedLayer):
            return
        assert isinstance(layer.selection, IndexerSelection)
        seen = self.network.seen(index, normed, rotation)
        if stage is Stage.DEMAND:
            layer.selection.append_key(indexer.key(seen), self._lengths)
        own = stage is Stage.DEMAND and self.plan.design.speculates_last_step
        for each in tuple(Stage) if own else (stage,):
            layer.selection.ask(each, partial(indexer.choose, seen))

    def _attended(
        self,
        index: int,
        layer: AttendedLayer,
        now: torch.Tensor,
        new: tuple[torch.Tensor, torch.Tensor | None],
        *,
        was_predicted: bool,
    ) -> torch.Tensor:
        """Attention output `[batch, query_heads, head_dim]`."""
        lengths, sinks = self._lengths, self.network.sink_logits(index)
        if isinstance(layer, OffloadedLayer):
            layer.append(*new, lengths, store=True)
            tell = self._observer
            observe = tell and (lambda out: tell(Observed(index, layer, now, out, lengths, sinks)))
            return inline.attend(layer, now, lengths, was_predicted=was_predicted, sink_logits=sinks, observe=observe)
        layer.append(*new, lengths)
        if isinstance(layer, StreamedLayer):
            layer.copy(Stage.DEMAND, self.plan.design.page_size)
        return layer.attend(now, lengths, sinks)

    def _prefetch(
        self, target: int | None, hidden: torch.Tensor, rotations: Sequence[Rotation], predicted: set[int]
    ) -> None:
        layer = None if target is None else self.layers[target]
        if target is not None and isinstance(layer, OffloadedLayer):
            self._ask_indexer(target, Stage.PREFETCH, self.network.input_norm(target, hidden), rotations[target])
            inline.prefetch(layer, self.network.predicted_query(target, hidden, rotations[target]), self._lengths)
            predicted.add(target)
