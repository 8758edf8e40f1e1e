"""`offload`: a loaded `transformers` model decodes under a design, through the library's own cache and attention.

    cache = offload(model, "clo")
    model.generate(**inputs, cache=cache)  # past_key_values=cache before transformers 5.24

The model's own forward pass drives; what the design fetches, it fetches on the same thread. Layers with a sliding
window keep what is in it, in the library's own cache, and attend with the model's own attention and mask. Layers with
linear attention keep their states there, and nothing of them is anybody else's.
"""

from __future__ import annotations

import warnings
import weakref
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache

from clo import presets
from clo.engine import inline
from clo.engine.cache_layers import FullLayer, WindowedLayer
from clo.engine.decoder import Decoder
from clo.engine.finite import Projected, States, explain_step
from clo.engine.heads import HeadProfile, heads_for
from clo.engine.layers import AttendedLayer, OffloadedLayer, StreamedLayer
from clo.engine.make_layers import make_whole_layers
from clo.engine.models.anatomy import project_query
from clo.engine.models.network import Network, Rotation
from clo.engine.mount import Arrived, Mount, Mounted, hand_over
from clo.engine.step_traffic import StepTraffic
from clo.engine.torch_modes import changeable
from clo.engine.turns import Turns
from clo.errors import EngineError, SpecError
from clo.plan import DecodePlan
from clo.schedule.ops import Stage
from clo.specs import Design


def offload(
    model: Any,
    design: str | Path | Design = "clo",
    *,
    max_new_tokens: int = 1024,
    heads: HeadProfile | None = None,
    kv_memory_bytes: float | None = None,
) -> OffloadedCache:
    """Make `model` attend through a cache of `design` (a record, a preset's name or a TOML file), and return the cache.

    Give it to `model.generate` or to the model as `cache` (`past_key_values` before transformers 5.24); one serves a
    batch of prompts. Shorter ones are padded in front; padding is not kept. Prefill is the model's own, exact. Whatever
    comes after the first generated token, a chat's next turn too, is decoded token by token under the design;
    `max_new_tokens` is the room for all of it, as far as the model's positions go. With any other cache the model works
    as before, with SDPA as its attention: it returns no attention weights. (One with attention sinks, which SDPA does
    not know, keeps its "eager" attention for that, for prompts and for layers with a window.) `close`, the end of a
    `with` block, or dropping the last of a model's caches gives the model back as it was. A design whose thresholds,
    weights or pinned heads come from a head profile takes `heads`, or the shipped one if that is of such a model.
    Raises `SpecError` for a model or a design that does not fit.
    """
    chosen = design if isinstance(design, Design) else presets.load_design(str(design))
    network = Network(model, whole=True)
    heads = heads or _shipped_profile(chosen, network)
    decoder = Decoder(network, chosen, max_new_tokens=max_new_tokens, heads=heads, kv_memory_bytes=kv_memory_bytes)
    decoder.close()  # only its sizes and checks are needed: the model drives
    if chosen.prefetches_layers and chosen.selects:
        network.check_predicts()
    return OffloadedCache(decoder)


def _shipped_profile(design: Design, network: Network) -> HeadProfile | None:
    """For a design that cannot do without one. Raises `SpecError` for a model built otherwise."""
    by_gate = design.tau_by_head or design.folds_by_importance
    pins = design.offloads and design.selects and design.pinned_head_fraction > 0
    return heads_for(design, network.spec) if by_gate or pins else None


class OffloadedCache(Mounted, Cache):  # type: ignore[misc]
    """The KV cache of one batch. `traffic` says what the last token moved; close it, or use it in a `with` block."""

    def __init__(self, decoder: Decoder) -> None:
        network = decoder.network
        self._decoder, self._network = decoder, network
        self.plan: DecodePlan | None = None
        self._turns = Turns()
        self._kv: dict[int, AttendedLayer] = {}
        self._lengths = torch.zeros(0, dtype=torch.int32)
        self._tokens: list[int] = []
        self._predicted: dict[int, torch.Tensor] = {}
        self._projected: dict[int, Projected] = {}
        self._under_way = False
        self._to_come: dict[int, int] = {}
        """Of layers that the new tokens have not reached, how many those are."""
        self._unattended: int | None = None
        """The layer that has taken tokens which have not been attended yet."""
        super().__init__(layers=[_empty_layer(network, layer) for layer in range(len(network.layers))])
        for index, layer in enumerate(self.layers):
            layer.belong(self, index)
        self._first_full = network.spec.whole_layers[0]
        mount = Mount.on(network)
        mount.join(id(self))
        # also when nobody has the cache any more
        self._leave = weakref.finalize(self, mount.leave, id(self))

    def __bool__(self) -> bool:
        """Whether it is open and holds tokens: for a long prompt Phi drops what says that it does."""
        return self._leave.alive and (self.decodes or bool(self.get_seq_length()))

    def __enter__(self) -> OffloadedCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the KV cache. The model is as it was once all its caches are closed. A second call does nothing."""
        self._leave()
        self._kv = {}
        self._projected.clear()
        for layer in self.layers:
            layer.release()

    def check_open(self) -> None:
        """Raises `EngineError` after `close`."""
        if not self._leave.alive:
            raise EngineError("cache: closed: offload() the model anew")

    @property
    def traffic(self) -> StepTraffic:
        """What the last decoded token moved. Raises `EngineError` before there is one."""
        if self.plan is None:
            raise EngineError("cache: nothing has been decoded yet")
        return StepTraffic.of(self.plan, list(self._kv.values()))

    @property
    def decodes(self) -> bool:
        """Whether the prompt has been read and tokens are decoded under the design."""
        return self.plan is not None

    def layer(self, index: int) -> AttendedLayer:
        """The KV cache of one layer, once decoding has begun.

        Raises `EngineError` for one with a sliding window, or with linear attention.
        """
        spec = self._network.spec
        if index in spec.windowed_layers:
            raise EngineError(f"cache: layer {index} has a sliding window: what it keeps is in layers[{index}]")
        if spec.linear_in(index) is not None:
            raise EngineError(f"cache: layer {index} has linear attention: its states are in layers[{index}]")
        return self._kv[index]

    def begin_decoding(self) -> None:
        """The prompt is complete: make the caches, and let each layer hand over what prefill left."""
        first = self.layers[self._first_full]
        padding = self._turns.padding
        tokens = [first.keys.shape[2] - hidden for hidden in padding]
        self._decoder.max_new_tokens = self._most_new_tokens(max(tokens))
        self.plan = self._decoder.make_plan(tokens)
        room = max(tokens) + self._decoder.max_new_tokens
        with changeable():
            self._kv = make_whole_layers(self._network, self.plan, self._decoder.heads, room)
            self._lengths = torch.tensor(tokens, dtype=torch.int32, device=first.keys.device)
        self._tokens = tokens
        for index, kv in self._kv.items():
            layer = self.layers[index]
            for sequence, hidden in enumerate(padding):
                kv.load(sequence, layer.keys[sequence][:, hidden:], layer.values[sequence][:, hidden:])
            layer.release()

    def _most_new_tokens(self, tokens: int) -> int:
        """Those that were asked for, as far as the model's positions go, or those that it rotates as it did the prompt;
        at least one, which is refused after them."""
        asked, room = self._decoder.max_new_tokens, self._network.longest_alike(tokens) - tokens
        if room < min(asked, self._network.spec.max_positions - tokens):
            warnings.warn(
                f"cache: {self._network.spec.name} rotates texts of more than {tokens + room} tokens differently: it "
                f"has room for {room} new ones (Phi's generate() then reads everything anew, without offloading)",
                stacklevel=2,
            )
        return max(1, min(asked, room))

    def before_layer(
        self, layer: int, hidden: torch.Tensor, rotation: Rotation, positions: torch.Tensor | None
    ) -> None:
        """Decoder layer `layer` is about to run: it predicts what a later one asks."""
        target = None if self.plan is None else inline.predicts(self.plan, layer)
        if target is not None:
            rotation = self._network.rotation_for(target, layer, rotation, hidden, positions)
            self._predicted[target] = project_query(self._network.layers[target], hidden, rotation)

    def arrive(self, hidden: torch.Tensor, mask: Any, positions: torch.Tensor | None) -> None:
        """New tokens `[batch, tokens, hidden_size]` are about to run. Raises `CloError` for what cannot be done."""
        self.check_open()
        self._check_attended()
        if self._under_way:
            raise EngineError("cache: tokens were broken off half-way: offload() the model anew")
        self._check_gradients(hidden)
        batch, count = hidden.shape[:2]
        self._check_batch(batch)
        turns = self._turns.then(self.get_seq_length(), batch, count, mask, positions)
        self.given_mask = None
        self._make_room(count)
        self._turns = turns
        self._under_way = True
        self._to_come = dict.fromkeys(self._kv, count)

    def arrived(self, layer: int) -> None:
        """Layer `layer` has the new tokens: once the last one has, others may come."""
        self._under_way = self._under_way and layer < len(self.layers) - 1

    def _check_attended(self) -> None:
        """Keys that nobody asked for would leave no trace but wrong answers."""
        if self._unattended is not None:
            raise EngineError(
                f"cache: layer {self._unattended} did not attend to its new tokens: they were broken off there, or the "
                "model's attention implementation was changed while the cache is open; offload() the model anew"
            )

    def check_mode(self) -> None:
        """Raises `SpecError` where the library leaves a cache out."""
        decoder = self._network.decoder
        if decoder.training and getattr(decoder, "gradient_checkpointing", False):
            raise SpecError("model: gradient checkpointing uses no cache: call model.eval() before")

    def _check_gradients(self, hidden: torch.Tensor) -> None:
        """Raise `SpecError` where they would end in this cache."""
        # checkpointing lets embeddings require gradients even where none are recorded
        if torch.is_grad_enabled() and hidden.requires_grad:
            raise SpecError(
                "model: gradients do not go through this cache: call the model under torch.no_grad() (generate() does)"
            )

    def check_dtype(self, *new: torch.Tensor) -> None:
        """Raises `SpecError` for keys or values of another type than those that there is room for."""
        others = {tensor.dtype for tensor in new} - {self._network.dtype}
        if others:
            raise SpecError(
                f"cache: keys or values in {_short(others.pop())}, the model was in {_short(self._network.dtype)}: "
                "convert it before offload(), not after, and leave out torch.autocast"
            )

    def _check_batch(self, batch: int) -> None:
        held = batch
        if self.decodes or self.get_seq_length():
            held = len(self._tokens) if self.decodes else self.layers[self._first_full].keys.shape[0]
        if batch != held:
            raise SpecError(f"input_ids: a batch of {batch}, the cache holds one of {held}: offload() anew for another")

    def _make_room(self, count: int) -> None:
        """For so many tokens more of each sequence, unless they are the prompt's."""
        if not self.decodes:
            if self.get_seq_length() == 0 or count > 1:
                return
            self.begin_decoding()
        room = self._kv[self._first_full].shape.max_tokens
        if max(self._tokens) + count > room:
            model, why = self._network.spec, "give offload() a larger max_new_tokens"
            if room == self._network.longest_alike(max(self._tokens)):
                at_the_end = room == model.max_positions
                why = f"{model.name} has no more" if at_the_end else f"{model.name} rotates longer texts differently"
            raise EngineError(f"cache: there is room for {room} tokens: {why}")
        self._lengths = self._lengths + count
        self._tokens = [tokens + count for tokens in self._tokens]

    def take(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """New tokens of each sequence, `[batch, kv_heads, tokens, head_dim]`: what is attended next is their query."""
        self._check_attended()
        self._unattended = layer
        self._to_come.pop(layer, None)
        hand_over(self._network, Arrived(self, layer, key, value))

    def attend(self, arrived: Arrived, query: torch.Tensor, sink_logits: torch.Tensor | None) -> torch.Tensor:
        """Attention output `[batch, tokens, query_heads, head_dim]` under the design, as if they came one by one.

        Nothing overlaps here, so that a prefetch may as well be done when its layer runs.
        """
        predicted = self._predicted.pop(arrived.layer, None)
        query = self._network.of_cache(arrived.layer, query)
        attended = [self._attend_one(arrived, query, predicted, sink_logits, at) for at in range(query.shape[2])]
        return self._network.values(arrived.layer, torch.stack(attended, dim=1))

    def holds(self, layer: int) -> bool:
        """Whether a layer decodes under the design, and not in a window."""
        return layer in self._kv

    def attended(self, arrived: Arrived, query: torch.Tensor, output: torch.Tensor) -> None:
        """A layer's attention has run, under the design or in a window. Raises `EngineError` if its output is none."""
        self._unattended = None
        newest = (tensor[:, :, -1].contiguous() for tensor in (query, arrived.key, arrived.value))
        self._projected[arrived.layer] = Projected(*newest)
        if arrived.layer == len(self.layers) - 1:
            self._check_finite(output)
        self.arrived(arrived.layer)

    def mixed(self, layer: int, states: torch.Tensor) -> None:
        """A layer with linear attention has its new states `[batch, value_heads, key_dim, value_dim]`.

        Raises `EngineError` if they are none in the last layer, while decoding.
        """
        if self.decodes and layer == len(self.layers) - 1:
            self._check_finite(states)
        self.arrived(layer)

    def _check_finite(self, output: torch.Tensor) -> None:
        """What is not finite in any layer spoils the last one's attention, too: one look a token is enough."""
        if not bool(torch.isfinite(output).all()):
            last, spec = len(self.layers) - 1, self._network.spec
            made: dict[int, Projected | States] = {**self._projected, **self._states()}
            why = explain_step(self._kv, made, self._tokens, gated=spec.gated_attention)
            what = "output is" if spec.linear_in(last) is None else "states are"
            raise EngineError(f"attention of layer {last}: its {what} not finite, {why}")

    def _states(self) -> dict[int, States]:
        """What the newest token left in layers with linear attention."""
        linear = self._network.spec.linear
        return {layer: self.layers[layer].newest() for layer in (() if linear is None else linear.layers)}

    def _attend_one(
        self,
        arrived: Arrived,
        query: torch.Tensor,
        predicted: torch.Tensor | None,
        sink_logits: torch.Tensor | None,
        at: int,
    ) -> torch.Tensor:
        assert self.plan is not None
        kv, before = self._kv[arrived.layer], query.shape[2] - 1 - at
        lengths = self._lengths - before
        key, value = kv.shape.appended(*(tensor[:, :, at].contiguous() for tensor in (arrived.key, arrived.value)))
        now = query[:, :, at].contiguous()
        kv.begin([tokens - before for tokens in self._tokens])
        if isinstance(kv, OffloadedLayer):
            if predicted is not None:
                inline.prefetch(kv, predicted[:, :, at].contiguous(), lengths)
            kv.append(key, value, lengths, store=True)
            return inline.attend(kv, now, lengths, was_predicted=predicted is not None, sink_logits=sink_logits)
        kv.append(key, value, lengths)
        if isinstance(kv, StreamedLayer):
            kv.copy(Stage.DEMAND, self.plan.design.page_size)
        return kv.attend(now, lengths, sink_logits)

    def decoded_length(self, layer: int) -> int:
        """Tokens that the library counts while decoding: padding, too, and new ones once `layer` has them."""
        return self._tokens[0] + self._turns.padding[0] - self._to_come.get(layer, 0)

    def __reduce_ex__(self, _protocol: Any) -> NoReturn:
        """Copies are the library's way to keep a prompt for several continuations, which this cache does not."""
        raise SpecError("cache: it cannot be copied: offload() the model anew for each continuation of a prompt")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _empty_layer(network: Network, layer: int) -> Any:
    spec = network.spec
    if spec.linear_in(layer) is not None:
        from clo.engine.linear_layer import LinearLayer  # the oldest versions of the library have nothing of the kind

        return LinearLayer()
    return WindowedLayer(sliding_window=spec.window_tokens) if layer in spec.windowed_layers else FullLayer()
