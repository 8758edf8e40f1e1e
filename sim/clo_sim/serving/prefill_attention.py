"""What attention of a prompt takes, by the pairs of tokens that it makes. Knows nothing about chunks' other work.

A pair is a new token and one not after it. Four kinds of model, each at the share of the datasheet rate that the
profile says:

- keys and values in every head: 4 x query heads x head_dim flops a pair, in windowed layers for each pair in a window
  (in layers with linear attention there are no pairs: see `prefill.py`);
- latent attention: the same with its widths, and every chunk makes the keys and values of all tokens before it anew;
- latent attention to what an indexer chooses: the indexer scores every pair and ranks the scores (four bytes each, at
  the rate of `select_pages`), in layers with an indexer; attention is to the chosen tokens, in their own space. As if
  those were the latest: as many they are;
- keys and values in every head to the blocks that an indexer chose: likewise, with a score to rank for every block and
  head, and attention to everything in the layers before the first indexer.
"""

from __future__ import annotations

from dataclasses import dataclass

from clo.kernel_scaling import measured_on
from clo.pricing import Pricer
from clo.profile import ArithmeticCost
from clo.schedule.ops import INDEX_SCORE_BYTES
from clo.specs import IndexerSpec, LatentSpec, ModelSpec
from clo_sim.intervals import CostDraw


@dataclass(frozen=True, slots=True, kw_only=True)
class PairPrices:
    """Of all layers together: `pair_s` for a pair, and of that `window_share` for a pair within `window_tokens`, again.

    `measured` says whether these costs were measured on this GPU, `known` whether they have a spread that is known.
    """

    pair_s: float
    window_tokens: int = 0
    window_share: float = 0.0
    measured: bool = False
    known: bool = True


def pairs_of(start: int, tokens: int) -> float:
    """Pairs of a token in `[start, start + tokens)` and one not after it, half a pair for itself."""
    return tokens * (start + 0.5 * tokens)


def pairs_in_window(start: int, tokens: int, window_tokens: int) -> float:
    """Those of them that are within `window_tokens` of each other."""
    whole = min(tokens, max(0, window_tokens - start))
    return pairs_of(start, whole) + window_tokens * (tokens - whole)


def pair_prices(model: ModelSpec, pricer: Pricer, *, chunk_tokens: int, draw: CostDraw | None = None) -> PairPrices:
    """Prices of `model` in chunks that are full; with a `draw` they vary with their spreads."""
    rates = _Rates(pricer, draw)
    if model.indexer is not None and model.latent is not None:
        return _chosen(model, model.indexer, model.latent, rates)
    if model.indexer is not None:
        return _chosen_blocks(model, model.indexer, rates)
    flops, entry = _pair_flops(model, chunk_tokens), "prefill_attention"
    if model.latent is not None:
        entry = "prefill_latent_attention"
    windowed = len(model.windowed_layers)
    whole = model.num_layers - windowed - model.num_linear_layers
    return PairPrices(
        pair_s=whole * rates.seconds(entry, flops),
        window_tokens=model.window_tokens or 0,
        window_share=windowed / whole,
        measured=rates.measured(entry),
        known=rates.known(entry),
    )


@dataclass(frozen=True, slots=True)
class _Rates:
    """Seconds of arithmetic by the profile's entries."""

    pricer: Pricer
    draw: CostDraw | None

    def seconds(self, entry: str, flops: float) -> float:
        """Time of `flops` at the share of the datasheet rate that `entry` says."""
        cost = self._cost(entry)
        factor = 1.0 if self.draw is None else self.draw.factor(entry, cost.spread)
        return factor * flops / (cost.efficiency * self.pricer.machine.gpu.peak_flops_per_s)

    def ranked_s(self, scores: float) -> float:
        """Time of choosing the best of so many scores."""
        ranking = self.pricer.profile.select_pages.efficiency * self.pricer.machine.gpu.hbm_bytes_per_s
        return scores * INDEX_SCORE_BYTES / ranking

    def measured(self, entry: str) -> bool:
        """Whether that share was measured on this GPU."""
        return self._cost(entry).source.is_measured and measured_on(self.pricer.profile.gemm, self.pricer.machine.gpu)

    def known(self, entry: str) -> bool:
        """Whether that share varies in draws."""
        return self._cost(entry).spread > 0

    def _cost(self, entry: str) -> ArithmeticCost:
        cost: ArithmeticCost = getattr(self.pricer.profile, entry)
        return cost


def _pair_flops(model: ModelSpec, chunk_tokens: int) -> float:
    """Attention of one layer, for a new token and one not after it.

    Latent attention makes the keys and values of every earlier token anew in each chunk: a pair's share of that.
    """
    if (latent := model.latent) is None:
        return 4.0 * model.num_query_heads * model.head_dim
    again = 2.0 * latent.map_values(model.num_query_heads) / chunk_tokens
    return 2.0 * model.num_query_heads * (latent.query_dim + latent.value_dim) + again


def _chosen(model: ModelSpec, indexer: IndexerSpec, latent: LatentSpec, rates: _Rates) -> PairPrices:
    scored_s = rates.seconds("prefill_indexer", 2.0 * indexer.query_width) + rates.ranked_s(1.0)
    attended = 2.0 * model.num_query_heads * (latent.vector_dim + latent.kv_rank)
    pair_s = model.num_indexers * scored_s
    chosen_s = model.num_layers * rates.seconds("prefill_chosen_attention", attended)
    return PairPrices(
        pair_s=pair_s,
        window_tokens=indexer.top_tokens,
        window_share=chosen_s / pair_s,
        measured=rates.measured("prefill_indexer") and rates.measured("prefill_chosen_attention"),
        known=rates.known("prefill_indexer") and rates.known("prefill_chosen_attention"),
    )


def _chosen_blocks(model: ModelSpec, indexer: IndexerSpec, rates: _Rates) -> PairPrices:
    entries = ["prefill_block_indexer", "prefill_block_attention"]
    if indexer.dense_layers:
        entries.append("prefill_attention")
    flops = 4.0 * model.num_query_heads * model.head_dim
    scores = indexer.num_heads / indexer.block_tokens
    scored_s = rates.seconds("prefill_block_indexer", 2.0 * indexer.query_width) + rates.ranked_s(scores)
    pair_s = model.num_indexers * scored_s + indexer.dense_layers * rates.seconds("prefill_attention", flops)
    chosen_s = (model.num_layers - indexer.dense_layers) * rates.seconds("prefill_block_attention", flops)
    return PairPrices(
        pair_s=pair_s,
        window_tokens=indexer.top_tokens,
        window_share=chosen_s / pair_s,
        measured=all(map(rates.measured, entries)),
        known=all(map(rates.known, entries)),
    )
