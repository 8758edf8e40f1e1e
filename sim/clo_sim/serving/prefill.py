"""What a chunk of prefill takes. Knows nothing about requests or decoding.

A simplification, with these parts:

- dense layers: the profile's tables of GEMMs and experts at as many rows as the chunk has tokens (measured, or carried
  over to this GPU), the bytes of norms and activations over device memory, and all-reduces where GPUs share the model;
- attention, by pairs of tokens (`prefill_attention.py`); where GPUs attend for sequences of their own, a chunk's tokens
  are taken to be dealt out to them evenly;
- linear attention, by tokens, as if those of a chunk were one sequence's: then a head has to take one after the other;
- link: offloaded layers read the prompt's earlier KV back from the host, layer by layer, chunk after chunk, as far as
  it did not stay on the GPU, in memory that nothing else needs; what the prefix cache holds of the layers on the GPU
  comes once; new KV goes out. Both directions are taken to overlap with compute perfectly: a chunk takes the longest of
  compute, way in and way out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clo.placement import (
    hosted_block_bytes,
    hosted_token_bytes,
    paged_layer_token_bytes,
    pinned_heads,
    sparse_layers,
)
from clo.pricing import Pricer
from clo.schedule.decode import BEST_TOKEN_VALUES
from clo.schedule.ops import experts_work
from clo.schedule.work import AllReduce, Gemm, Work
from clo.specs import Design, ModelSpec, Projection
from clo.table_prices import TablePrices
from clo_sim.intervals import CostDraw
from clo_sim.scene import Scene, gpu_tables
from clo_sim.serving.prefill_attention import pair_prices, pairs_in_window, pairs_of
from clo_sim.serving.requests import NS_PER_S

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPrices:
    """Prices of a worker's chunks. `dense_ns[n]` is the time of the dense layers for n tokens; others are per token.

    `pair_ns` is for a pair of tokens in all layers, and one within `window_tokens` costs `window_share` of that again
    (see `prefill_attention.PairPrices`); `in_ns` is for a token read back by the offloaded layers, `cached_in_ns` for a
    token of a prefix hit that the other layers load, `hit_ns` for the states of linear attention that a hit loads;
    `out_ns` for a new token that leaves. `offloaded_bytes` is what a token takes on a GPU in the offloaded layers while
    its prompt is under way.
    `table_share` is that of GEMMs, experts and all-reduces, which measured tables price, and of linear attention where
    it was timed, in what a full chunk takes beside attention's pairs, `known_share` that of costs with a known spread;
    `attention_measured` says whether attention was measured on this GPU, `attention_known` whether its costs have a
    spread that is known.
    """

    dense_ns: Sequence[int]
    table_share: float = 1.0
    attention_measured: bool = False
    attention_known: bool = True
    known_share: float = 1.0
    head_ns: int = 0
    pair_ns: float = 0.0
    window_tokens: int = 0
    window_share: float = 0.0
    in_ns: float = 0.0
    cached_in_ns: float = 0.0
    hit_ns: float = 0.0
    out_ns: float = 0.0
    offloaded_bytes: int = 0

    @property
    def chunk_tokens(self) -> int:
        """Tokens a chunk holds at most."""
        return len(self.dense_ns) - 1

    def pairs(self, start: int, tokens: int) -> float:
        """What tokens from `start` on attend to, in pairs of a layer without a window (see `pair_ns`)."""
        return pairs_of(start, tokens) + self.window_share * pairs_in_window(start, tokens, self.window_tokens)

    def compute_ns(self, tokens: int, pairs: float, finished: int) -> float:
        """Computing a chunk of `tokens` that makes `pairs` and ends `finished` prompts."""
        return self.dense_ns[tokens] + pairs * self.pair_ns + finished * self.head_ns

    def chunk_ns(self, compute_ns: float, tokens: int, read_back: int, hits: Sequence[int] = ()) -> int:
        """A chunk that also reads `read_back` earlier tokens, and loads those of prefix `hits`."""
        inward = read_back * self.in_ns + sum(hits) * self.cached_in_ns + len(hits) * self.hit_ns
        return int(max(compute_ns, inward, tokens * self.out_ns))

    def kept_tokens(self, free_bytes: int) -> int:
        """Tokens of a prompt under way whose KV in offloaded layers so much free GPU memory holds."""
        return max(0, free_bytes // self.offloaded_bytes) if self.offloaded_bytes else 0

    def alone_ns(self, input_tokens: int, cached: int = 0, *, free_bytes: int = 0) -> int:
        """A prompt with nothing else in its chunks, of which the first `cached` tokens are in the host's memory.

        `free_bytes` of a GPU hold earlier tokens of offloaded layers.
        """
        total, start, resident, kept = 0, cached, 0, self.kept_tokens(free_bytes)
        while start < input_tokens:
            tokens = min(self.chunk_tokens, input_tokens - start)
            pairs = self.pairs(start, tokens)
            hits = [cached] if cached and start == cached else []
            compute_ns = self.compute_ns(tokens, pairs, int(start + tokens == input_tokens))
            total += self.chunk_ns(compute_ns, tokens, start - resident, hits)
            start += tokens
            resident = min(start, kept)
        return total


def prefill_prices(
    scene: Scene, design: Design, *, chunk_tokens: int, block_tokens: int = 0, draw: CostDraw | None = None
) -> PrefillPrices:
    """Prices of chunks of up to `chunk_tokens`; a service that keeps prefixes (in blocks) sends all new KV out.

    With a `draw`, GEMMs, element-wise kernels and attention vary with their spreads; the link's is not known.
    """
    model, link = scene.part, scene.machine.link
    pricer = Pricer(gpu_tables(scene.profile, "serving"), scene.machine)
    sparse = len(sparse_layers(model, design)) if design.offloads else 0
    pinned = pinned_heads(model, design) / model.num_kv_heads
    share = 1.0 / scene.machine.num_owners
    paged = sparse * paged_layer_token_bytes(model, design)
    offloaded, whole = paged * (1 - pinned), hosted_token_bytes(model, design)
    leaving = hosted_block_bytes(model, design, block_tokens) / block_tokens if block_tokens else paged
    attention = pair_prices(model, pricer, chunk_tokens=chunk_tokens, draw=draw)
    head, sharing = Gemm(m=1, n=model.vocab_size, k=model.hidden_size), scene.machine.tensor_parallel
    tables, small = (
        _table_seconds(scene, pricer.tables, chunk_tokens),
        _elementwise_seconds(scene, pricer, chunk_tokens),
    )
    named = {"elementwise": small, "prefill_linear_attention": _linear_seconds(scene, pricer, chunk_tokens)}
    errors = [pricer.uncertainty(work) for work in tables]
    errors += [(name, getattr(pricer.profile, name).spread) for name in named]
    factors = [1.0 if draw is None else draw.factor(*error) for error in errors]
    parts = np.array([*tables.values(), *named.values()])
    best = factors[1] * pricer.tables.seconds(AllReduce(sharing, BEST_TOKEN_VALUES)) if sharing > 1 else 0.0
    shares = parts[:, -1] / parts[:, -1].sum()
    timed = shares[: len(tables)].sum() + pricer.profile.prefill_linear_attention.source.is_measured * shares[-1]
    return PrefillPrices(
        dense_ns=_whole_ns(np.array(factors) @ parts),
        table_share=float(timed),
        attention_measured=attention.measured,
        attention_known=attention.known,
        known_share=float(sum(share for share, (_, spread) in zip(shares, errors, strict=True) if spread)),
        head_ns=round((factors[0] * pricer.tables.seconds(head) + best) * NS_PER_S),
        pair_ns=share * attention.pair_s * NS_PER_S,
        window_tokens=attention.window_tokens,
        window_share=attention.window_share,
        in_ns=share * offloaded / link.h2d_bytes_per_s * NS_PER_S,
        cached_in_ns=share * (whole - offloaded) / link.h2d_bytes_per_s * NS_PER_S,
        hit_ns=share * model.state_bytes / link.h2d_bytes_per_s * NS_PER_S,
        out_ns=share * leaving / link.d2h_bytes_per_s * NS_PER_S,
        offloaded_bytes=math.ceil(share * offloaded),
    )


def _table_seconds(scene: Scene, tables: TablePrices, chunk_tokens: int) -> dict[Work, Floats]:
    """What measured tables price of 1, 2, ... tokens, by the work of a full chunk: GEMMs first."""
    model, sharing = scene.part, scene.machine.tensor_parallel
    first = model.projections_in(0)[0]
    gemm = Gemm(chunk_tokens, first.n, first.k, model.weight_bytes_per_value)
    found: dict[Work, Floats] = {gemm: _gemm_seconds(scene, tables, _up_to(chunk_tokens))}
    if sharing > 1:
        sums = AllReduce(sharing, chunk_tokens * model.hidden_size)
        found[sums] = _all_reduce_seconds(scene, tables, _up_to(chunk_tokens))
    if model.experts is not None:
        passed = experts_work(model, model.experts, _up_to(chunk_tokens))
        seconds = np.asarray(model.num_expert_layers * tables.seconds(passed))
        found[experts_work(model, model.experts, chunk_tokens)] = seconds
    return found


def _gemm_seconds(scene: Scene, tables: TablePrices, tokens: Any) -> Floats:
    """GEMMs of all layers, for each number of `tokens`."""
    model = scene.part
    own = tokens / scene.machine.num_owners
    around: Counter[Projection] = Counter()
    for layer in range(model.num_layers):
        around.update(_around_attention(model, layer))
    attention = sum(
        count * tables.seconds(Gemm(own, each.n, each.k, model.product_weight_bytes(each)))
        for each, count in around.items()
    )
    others: Counter[tuple[int, int, float]] = Counter()
    width_of, router = model.mlp_weight_bytes, model.wide_weight_bytes
    for layer in range(model.num_layers):
        width, experts = model.mlp_width(layer), model.experts_in(layer)
        mlp = [(2 * width, model.hidden_size, width_of), (model.hidden_size, width, width_of)] if width else []
        others.update([*mlp, *([(experts.num_experts, model.hidden_size, router)] if experts else [])])
    behind = sum(count * tables.seconds(Gemm(tokens, n, k, each)) for (n, k, each), count in others.items())
    indexers = sum(
        tables.seconds(Gemm(own, each.n, each.k, model.weight_bytes_per_value)) for each in model.indexer_projections
    )
    return np.asarray(attention + model.num_indexers * indexers + behind)


def _around_attention(model: ModelSpec, layer: int) -> list[Projection]:
    """Products of a layer before and after attention; in latent attention, keys and values are made of the vectors."""
    products = [*model.projections_in(layer), model.out_projection_in(layer)]
    if (latent := model.latent) is not None:
        width = model.num_query_heads * (latent.nope_dim + latent.value_dim)
        products.append(Projection("key_value_proj", width, latent.kv_rank))
    return products


def _up_to(chunk_tokens: int) -> Floats:
    return np.arange(1, chunk_tokens + 1, dtype=np.float64)


def _all_reduce_seconds(scene: Scene, tables: TablePrices, tokens: Any) -> Floats:
    """GPUs that share the model add up hidden states of `tokens`: the embedding's, and two of every layer."""
    sums = AllReduce(scene.machine.tensor_parallel, scene.part.hidden_size * tokens)
    return np.asarray((2 * scene.part.num_layers + 1) * tables.seconds(sums))


def _elementwise_seconds(scene: Scene, pricer: Pricer, chunk_tokens: int) -> Floats:
    """Element-wise kernels of all layers for 1, 2, ... tokens."""
    model = scene.part
    hidden, attended = model.hidden_size, model.query_width
    # rotary embedding reads and writes the queries, keys and values are written
    rotary = 2 * attended + 2 * model.layer_token_bytes / 2
    values, kernels = 0.0, 0
    for layer in range(model.num_layers):
        width, experts, linear = model.mlp_width(layer), model.experts_in(layer), model.linear_in(layer)
        gated = model.gated_attention or linear is not None
        # two norms read and write the hidden state twice each; gate and activation touch three widths
        around = 8 * hidden + (0 if linear else rotary) + (3 * model.out_projection_in(layer).k if gated else 0)
        values += around / scene.machine.num_owners
        values += 3 * width + (4 * experts.num_experts if experts else 0)
        kernels += 2 + (linear is None) + gated + bool(width) + (experts is not None)
    small = pricer.profile.elementwise
    rate = small.efficiency * scene.machine.gpu.hbm_bytes_per_s
    return np.asarray(kernels * small.latency_s + _up_to(chunk_tokens) * values * 2.0 / rate)


def _linear_seconds(scene: Scene, pricer: Pricer, chunk_tokens: int) -> Floats:
    """Linear attention of all layers that have it, for 1, 2, ... tokens."""
    model, own = scene.part, _up_to(chunk_tokens) / scene.machine.num_owners
    if (linear := model.linear) is None:
        return np.zeros(chunk_tokens)
    scanned = pricer.profile.prefill_linear_attention.seconds(own, linear.num_value_heads)
    return np.asarray(model.num_linear_layers * scanned)


def _whole_ns(seconds: Floats) -> list[int]:
    """For 0, 1, ... tokens; more tokens never take less."""
    return [0, *accumulate(map(int, np.rint(seconds * NS_PER_S)), max)]
