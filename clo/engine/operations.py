"""What each operation of the schedule does to real tensors. Knows nothing about lanes, threads or time.

One decode step is the operations of `clo.schedule` in any order that its waits allow.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor
from functools import partial

import torch

from clo.engine.cuda.bar import Bar
from clo.engine.cuda.copies import copy_rows
from clo.engine.finite import Projected, States, explain_step
from clo.engine.inline import predicts
from clo.engine.latent_queries import LatentQueries
from clo.engine.layers import Layer, LinearLayer, OffloadedLayer, StreamedLayer
from clo.engine.layers.indexed import IndexerSelection
from clo.engine.layers.selection import candidates
from clo.engine.models.indexer import Indexer, Seen
from clo.engine.models.mlp import add
from clo.engine.models.network import Asked, Network, Rotation
from clo.engine.staging import Staging
from clo.engine.words import Words, two_memories
from clo.errors import EngineError
from clo.plan import DecodePlan
from clo.schedule import Op
from clo.schedule.ops import PREFETCH_MARK, Stage, StepOps
from clo_kernels.layout import INT32


class Operations:
    """The tensors of one batch while it decodes, and every operation on them by its name in the schedule."""

    def __init__(
        self, network: Network, plan: DecodePlan, layers: Sequence[Layer], pool: Executor, bar: Bar | None = None
    ) -> None:
        self.network, self.plan, self.layers = network, plan, layers
        self._pool, self._bar = pool, bar
        self._stores = not StepOps(plan).copies_back
        self.host_lengths = [0] * plan.workload.batch
        self.lengths = torch.zeros(plan.workload.batch, dtype=INT32, device=network.device)
        self._tokens = torch.zeros(plan.workload.batch, dtype=torch.int64, device=network.device)
        self._finite = torch.ones((), dtype=torch.bool)
        self.logits = torch.empty(0)
        nothing = torch.empty(0)
        self._hidden = self._normed = self._attended = self._activated = self._candidates = nothing
        self._asked, self._latent = Asked(nothing, nothing, nothing), LatentQueries(network)
        self._gate_up, self._routed = (nothing, nothing), (nothing, nothing)
        self._of_mlp: torch.Tensor | None = None
        self._rotations: Sequence[Rotation] = ()
        self._predicted: dict[int, torch.Tensor] = {}
        self._seen: dict[tuple[Stage, int], Seen] = {}
        self._real: dict[int, torch.Tensor] = {}
        self._projected: dict[int, Projected | States] = {}
        self._staging = Staging()

    def take(self, lengths: Sequence[int]) -> None:
        """Prompts of so many tokens have been read."""
        self.host_lengths = list(lengths)
        self.lengths.copy_(torch.tensor(self.host_lengths, dtype=INT32))

    def begin(self, tokens: torch.Tensor) -> None:
        """The host's part of a new step: the next token of every sequence, `[batch]`, and how long they are now."""
        self.host_lengths = [length + 1 for length in self.host_lengths]
        for layer in self.layers:
            layer.begin(self.host_lengths)
        self._tokens.copy_(tokens)

    def embed(self) -> None:
        """The device's part: what the first layer reads."""
        self.lengths += 1
        self._hidden = self.network.embed(self._tokens)
        self._rotations = self.network.rotations(self._hidden, self.lengths.long() - 1)
        if any(isinstance(layer, OffloadedLayer) for layer in self.layers):
            self._candidates = candidates(self.plan.design, self.lengths)
        self._predicted.clear()

    def check(self) -> None:
        """After a step; raises `EngineError` for logits that are not finite."""
        if not bool(self._finite):
            kept = {index: kv for index, kv in enumerate(self.layers) if not isinstance(kv, LinearLayer)}
            why = explain_step(kept, self._projected, self.host_lengths, gated=self.plan.model.gated_attention)
            raise EngineError(f"operation lm_head of layer {len(self.layers) - 1}: the logits are not finite, {why}")

    def key(self) -> Hashable:
        """What a recorded step depends on: where the weights are."""
        return self.network.addresses

    def letter(self, op: Op) -> Words | None:
        """What `op` found that CPU threads or the launching thread must know."""
        kv = self.layers[op.layer]
        return kv.residency.letter(_stage_of(op)) if isinstance(kv, OffloadedLayer) and _chooses(op) else None

    def run(self, op: Op) -> None:
        """Do `op`; of a name that the schedule does not use, `KeyError`."""
        stage = _stage_of(op)
        with torch.inference_mode():
            _BY_NAME[op.name.removeprefix(PREFETCH_MARK)](self, stage, op.layer)

    def moved_bytes(self, op: Op) -> float:
        """Bytes that `op`, just done, moved over the host link."""
        kv, stage = self.layers[op.layer], _stage_of(op)
        name = op.name.removeprefix(PREFETCH_MARK)
        if isinstance(kv, StreamedLayer) and name == "copy_pages":
            return kv.copied_tokens * self.plan.model.layer_token_bytes
        if isinstance(kv, OffloadedLayer) and name in ("gather_pages", "copy_pages", "copy_staged", "bar_write"):
            return kv.residency.fetched_pages(stage) * self.plan.page_bytes
        if name != ("append_kv" if self._stores else "write_back"):
            return 0.0
        if isinstance(kv, StreamedLayer):
            return kv.shape.batch * self.plan.model.layer_token_bytes
        return kv.written_back_pages * self.plan.page_bytes if isinstance(kv, OffloadedLayer) else 0.0

    def _offloaded(self, layer: int) -> OffloadedLayer:
        kv = self.layers[layer]
        assert isinstance(kv, OffloadedLayer), f"layer {layer} fetches no pages"
        return kv

    def _nothing(self, _stage: Stage, _layer: int) -> None:
        """Done elsewhere: by the caller, who samples, or with another operation where the model has them in one."""

    def _input_norm(self, _stage: Stage, layer: int) -> None:
        self._normed = self.network.input_norm(layer, self._hidden)

    def _qkv_proj(self, _stage: Stage, layer: int) -> None:
        self._asked = self.network.qkv(layer, self._normed)
        self._predict(layer)

    def _latent_proj(self, _stage: Stage, layer: int) -> None:
        self._latent.project(layer, self._normed, predicts(self.plan, layer), self._hidden)

    def _latent_norm(self, _stage: Stage, layer: int) -> None:
        self._latent.norm(layer)
        if self.plan.design.asks_indexer:
            self._seen |= self._latent.seen(layer, self._rotations)

    def _query_proj(self, _stage: Stage, layer: int) -> None:
        self._latent.widen(layer)

    def _map_queries(self, _stage: Stage, layer: int) -> None:
        self._asked = self._latent.mapped(layer)
        if (ahead := self._latent.predicted()) is not None:
            target, query = ahead
            rotated, _ = self.network.rotate(query, query[:, :1], self._rotations[target])
            self._predicted[target] = rotated[:, :, 0].contiguous()

    def _map_outputs(self, _stage: Stage, layer: int) -> None:
        self._attended = self.network.values(layer, self._attended)

    def _linear_proj(self, _stage: Stage, layer: int) -> None:
        """A layer with linear attention projects where it attends: the model has one module for all of it."""
        self._predict(layer)

    def _predict(self, layer: int) -> None:
        target = predicts(self.plan, layer)
        if target is not None:
            rotation = self._rotations[target]
            self._predicted[target] = self.network.predicted_query(target, self._hidden, rotation)

    def _append_kv(self, _stage: Stage, layer: int) -> None:
        asked, kv = self._asked, self.layers[layer]
        query, key = self.network.rotate(asked.query, asked.key, self._rotations[layer])
        self._real[layer] = query[:, :, 0].contiguous()
        new_key, new_value = asked.kept(key)
        self._projected[layer] = Projected(self._real[layer], new_key, new_key if new_value is None else new_value)
        if isinstance(kv, OffloadedLayer) and isinstance(kv.selection, IndexerSelection):
            kv.selection.append_key(self._indexer(layer).key(self._seen[Stage.DEMAND, layer]), self.lengths)
        assert not isinstance(kv, LinearLayer), f"layer {layer} has no keys and values"
        if isinstance(kv, OffloadedLayer | StreamedLayer):
            kv.append(new_key, new_value, self.lengths, store=self._stores)
        else:
            kv.append(new_key, new_value, self.lengths)

    def _write_back(self, _stage: Stage, layer: int) -> None:
        kv = self.layers[layer]
        if isinstance(kv, OffloadedLayer | StreamedLayer):
            kv.write_back()

    def _query_of(self, stage: Stage, layer: int) -> torch.Tensor:
        speculates = self.plan.design.speculates_last_step
        return self._predicted[layer] if stage is Stage.PREFETCH and not speculates else self._real[layer]

    def _hit_test(self, stage: Stage, layer: int) -> None:
        self._offloaded(layer).gate.test(stage, self._query_of(stage, layer))

    def _score_pages(self, stage: Stage, layer: int) -> None:
        self._who_selects(stage, layer)
        self._offloaded(layer).score(stage, self._query_of(stage, layer), self.lengths, self._candidates)

    def _who_selects(self, stage: Stage, layer: int) -> None:
        kv, design = self._offloaded(layer), self.plan.design
        if design.speculates_last_step and stage is Stage.PREFETCH:
            kv.gate.the_others_miss(self._real[layer])
        elif not design.gated:
            kv.gate.everyone_misses(stage)

    def _indexer(self, layer: int) -> Indexer:
        indexer = self.network.indexer(layer)
        assert indexer is not None, f"layer {layer} has no indexer"
        return indexer

    def _index_tokens(self, stage: Stage, layer: int) -> None:
        """The model's own indexer scores and selects."""
        kv = self._offloaded(layer)
        assert isinstance(kv.selection, IndexerSelection), f"layer {layer} is selected for by another"
        of = Stage.DEMAND if self.plan.design.speculates_last_step else stage
        kv.selection.ask(stage, partial(self._indexer(layer).choose, self._seen[of, layer]))
        self._who_selects(stage, layer)
        kv.score(stage, self._query_of(stage, layer), self.lengths, self._candidates)
        kv.select(stage, self._candidates)

    def _select_pages(self, stage: Stage, layer: int) -> None:
        self._offloaded(layer).select(stage, self._candidates)

    def _resolve_pages(self, stage: Stage, layer: int) -> None:
        self._offloaded(layer).resolve(stage)

    def _gather_pages(self, stage: Stage, layer: int) -> None:
        self._offloaded(layer).gather(stage)

    def _copy_pages(self, stage: Stage, layer: int) -> None:
        kv = self.layers[layer]
        if isinstance(kv, StreamedLayer):
            kv.copy(stage, self.plan.design.page_size)
            return
        offloaded = self._offloaded(layer)
        offloaded.residency.announce(stage)
        moves, host, slots = offloaded.residency.fetches(stage), offloaded.host_rows, offloaded.slot_rows
        if two_memories(slots.device):
            copy_rows(slots, moves.target, host, moves.source)
            return
        for source, target in zip(moves.source.tolist(), moves.target.tolist(), strict=True):
            slots[target].copy_(host[source])

    def _host_gather(self, stage: Stage, layer: int) -> None:
        kv = self._offloaded(layer)
        moves = kv.residency.fetches(stage)
        staging, host = self._staging.take((stage, layer), kv, len(moves)), kv.host_rows

        def collect(part: slice) -> None:
            torch.index_select(host, 0, moves.source[part], out=staging[part])

        self._in_parts(collect, len(moves))

    def _copy_staged(self, stage: Stage, layer: int) -> None:
        kv = self._offloaded(layer)
        kv.residency.announce(stage)
        self._staging.send((stage, layer), kv, kv.residency.fetches(stage).target)

    def _bar_write(self, stage: Stage, layer: int) -> None:
        """Threads store into the slots: on the CPU machine device memory is as writable as any."""
        kv, bar = self._offloaded(layer), self._bar
        moves, host, slots = kv.residency.fetches(stage), kv.host_rows, kv.slot_rows

        def write(part: slice) -> None:
            if bar is None:
                slots.index_copy_(0, moves.target[part], host.index_select(0, moves.source[part]))
            else:
                bar.write(slots, moves.target[part], host, moves.source[part])

        if bar is not None:
            bar.prepare(slots)
        self._in_parts(write, len(moves))
        if bar is None:
            kv.residency.announce(stage)
        else:
            kv.residency.announce_through(stage, bar)
            bar.flush()

    def _in_parts(self, work: Callable[[slice], None], count: int) -> None:
        """Nearly equal parts, one a thread."""
        threads = min(self.plan.design.transfer_threads, count)
        parts = [slice(count * at // threads, count * (at + 1) // threads) for at in range(threads)]
        futures = [self._pool.submit(_quietly, work, part) for part in parts]
        for future in futures:
            future.result()

    def _attention(self, _stage: Stage, layer: int) -> None:
        kv = self.layers[layer]
        assert not isinstance(kv, LinearLayer), f"layer {layer} has no keys and values"
        self._attended = kv.attend(self._real[layer], self.lengths, self.network.sink_logits(layer))

    def _pinned_attention(self, stage: Stage, layer: int) -> None:
        """Pinned heads are attended with the others, unless there are no others."""
        if self.plan.pinned_heads_per_layer == self.plan.model.num_kv_heads:
            self._attention(stage, layer)

    def _linear_attention(self, _stage: Stage, layer: int) -> None:
        """All that such a layer adds to the hidden state: its projections, its gate and its norm, too."""
        kv = self.layers[layer]
        assert isinstance(kv, LinearLayer), f"layer {layer} has keys and values"
        self._attended = self.network.linear_attention(layer, self._normed, kv.states)
        self._projected[layer] = States.left(kv.kept)

    def _output_gate(self, _stage: Stage, layer: int) -> None:
        if not isinstance(self.layers[layer], LinearLayer):
            self._attended = self.network.output_gate(self._attended, self._asked.gate)

    def _out_proj(self, _stage: Stage, layer: int) -> None:
        linear = isinstance(self.layers[layer], LinearLayer)
        self._hidden = self._hidden + (self._attended if linear else self.network.out_proj(layer, self._attended))

    def _post_norm(self, _stage: Stage, layer: int) -> None:
        self._normed, self._of_mlp = self.network.post_norm(layer, self._hidden), None

    def _gate_up_proj(self, _stage: Stage, layer: int) -> None:
        self._gate_up = self.network.mlp(layer).gate_up_proj(self._normed)

    def _activation(self, _stage: Stage, layer: int) -> None:
        self._activated = self.network.mlp(layer).activation(*self._gate_up)

    def _down_proj(self, _stage: Stage, layer: int) -> None:
        mlp = self.network.mlp(layer)
        given = mlp.down_proj(self._normed, self._activated)
        if mlp.has_experts:
            self._of_mlp = given
        else:
            self._hidden = self._hidden + self.network.of_mlp(layer, given)

    def _router_proj(self, _stage: Stage, layer: int) -> None:
        """The choice, too: the model has one module for both."""
        self._routed = self.network.mlp(layer).route(self._normed)

    def _experts(self, _stage: Stage, layer: int) -> None:
        given = add(self.network.mlp(layer).experts(self._normed, self._routed), self._of_mlp)
        self._hidden = self._hidden + self.network.of_mlp(layer, given)

    def _final_norm(self, _stage: Stage, _layer: int) -> None:
        self._normed = self.network.final_norm(self._hidden)

    def _lm_head(self, _stage: Stage, _layer: int) -> None:
        self.logits = self.network.lm_head(self._normed)
        self._finite = torch.isfinite(self.logits).all()


# functions, not bound methods: those would keep the layers alive until a garbage collection
_BY_NAME: dict[str, Callable[[Operations, Stage, int], None]] = {
    "input_norm": Operations._input_norm,
    "qkv_proj": Operations._qkv_proj,
    "latent_proj": Operations._latent_proj,
    "latent_norm": Operations._latent_norm,
    "query_proj": Operations._query_proj,
    "map_queries": Operations._map_queries,
    "map_outputs": Operations._map_outputs,
    "linear_proj": Operations._linear_proj,
    "decay_proj": Operations._nothing,
    "linear_attention": Operations._linear_attention,
    "output_gate": Operations._output_gate,
    "append_kv": Operations._append_kv,
    "write_back": Operations._write_back,
    "hit_test": Operations._hit_test,
    "score_pages": Operations._score_pages,
    "select_pages": Operations._select_pages,
    "index_tokens": Operations._index_tokens,
    "share_pages": Operations._select_pages,
    "resolve_pages": Operations._resolve_pages,
    "lru_update": Operations._resolve_pages,
    "gather_pages": Operations._gather_pages,
    "copy_pages": Operations._copy_pages,
    "host_gather": Operations._host_gather,
    "copy_staged": Operations._copy_staged,
    "bar_write": Operations._bar_write,
    "attention": Operations._attention,
    "pinned_attention": Operations._pinned_attention,
    "out_proj": Operations._out_proj,
    "post_norm": Operations._post_norm,
    "gate_up_proj": Operations._gate_up_proj,
    "activation": Operations._activation,
    "down_proj": Operations._down_proj,
    "router_proj": Operations._router_proj,
    "route": Operations._nothing,
    "experts": Operations._experts,
    "final_norm": Operations._final_norm,
    "lm_head": Operations._lm_head,
    "sample": Operations._nothing,
}


CHOOSING = ("select_pages", "index_tokens", "share_pages", "resolve_pages")
"""Operations that find what CPU threads, or the launching thread, must know."""


def _chooses(op: Op) -> bool:
    return op.name.removeprefix(PREFETCH_MARK) in CHOOSING


def _stage_of(op: Op) -> Stage:
    return Stage.PREFETCH if op.name.startswith(PREFETCH_MARK) else Stage.DEMAND


def _quietly(work: Callable[[slice], None], part: slice) -> None:
    with torch.inference_mode():
        work(part)
