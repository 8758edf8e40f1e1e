"""Decodes a batch under a design on one thread: the same operations as on a machine with lanes, so the same answers.

For those who want many answers and no timeline. Knows nothing about streams, transfers that overlap or time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from clo.engine import inline
from clo.engine.decoder import Decoder
from clo.engine.heads import HeadProfile
from clo.engine.layers import Layer, OffloadedLayer, StreamedLayer
from clo.engine.make_layers import make_layers
from clo.engine.models.network import Network, Rotation
from clo.engine.models.probe import check_taken_apart
from clo.engine.prompts import Prompt
from clo.engine.step_traffic import StepTraffic
from clo.errors import EngineError
from clo.plan import DecodePlan
from clo.schedule.ops import Stage
from clo.specs import Design

Observer = Callable[[int, OffloadedLayer, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Told of every attention: layer number, layer, query, what was attended, lengths (see `OffloadedLayer.attend`)."""


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
        self._plan = self._sizes.make_plan(lengths)
        self.layers = make_layers(
            self.network, self._plan, self._sizes.heads, self._plan.workload.context_tokens + self.max_new_tokens
        )
        for sequence, prompt in enumerate(prompts):
            for layer, (keys, values) in zip(self.layers, prompt.kv, strict=True):
                layer.load(sequence, keys, values)
        self._tokens = lengths
        self._lengths = torch.tensor(lengths, dtype=torch.int32, device=self.network.device)
        return torch.stack([prompt.logits for prompt in prompts])

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Decode one token a sequence, `[batch]`; logits `[batch, vocab_size]` of the next."""
        if max(self._tokens) >= self.plan.workload.context_tokens + self.max_new_tokens:
            raise EngineError(f"decoder: max_new_tokens = {self.max_new_tokens} tokens have been decoded")
        self._tokens = [tokens + 1 for tokens in self._tokens]
        for kv in self.layers:
            kv.begin(self._tokens)
        network = self.network
        with torch.inference_mode():
            self._lengths = self._lengths + 1
            hidden = network.embed(tokens.to(network.device))
            rotation, predicted = network.rotation(hidden, self._lengths.long() - 1), set[int]()
            for layer in range(len(self.layers)):
                hidden = hidden + network.out_proj(layer, self._attended(layer, hidden, rotation, predicted))
                gate_up = network.gate_up_proj(layer, network.post_norm(layer, hidden))
                hidden = hidden + network.down_proj(layer, network.activation(layer, *gate_up))
            return network.lm_head(network.final_norm(hidden))

    def _attended(self, index: int, hidden: torch.Tensor, rotation: Rotation, predicted: set[int]) -> torch.Tensor:
        """Attention output `[batch, query_heads, head_dim]`; on the way a later layer's pages are prefetched."""
        layer, lengths = self.layers[index], self._lengths
        query, key, value = self.network.qkv(index, self.network.input_norm(index, hidden))
        self._prefetch(inline.predicts(self.plan, index), hidden, rotation, predicted)
        query, key = self.network.rotate(query, key, rotation)
        now, new = query[:, :, 0].contiguous(), (key[:, :, 0].contiguous(), value[:, :, 0].contiguous())
        if isinstance(layer, OffloadedLayer):
            layer.append(*new, lengths, store=True)
            observe = None if self._observer is None else lambda out: self._tell(index, layer, now, out)
            return inline.attend(layer, now, lengths, was_predicted=index in predicted, observe=observe)
        layer.append(*new, lengths)
        if isinstance(layer, StreamedLayer):
            layer.copy(Stage.DEMAND, self.plan.design.page_size)
        return layer.attend(now, lengths)

    def _prefetch(self, target: int | None, hidden: torch.Tensor, rotation: Rotation, predicted: set[int]) -> None:
        layer = None if target is None else self.layers[target]
        if target is not None and isinstance(layer, OffloadedLayer):
            inline.prefetch(layer, self.network.predicted_query(target, hidden, rotation), self._lengths)
            predicted.add(target)

    def _tell(self, index: int, layer: OffloadedLayer, query: torch.Tensor, attended: torch.Tensor) -> None:
        assert self._observer is not None
        self._observer(index, layer, query, attended, self._lengths)
