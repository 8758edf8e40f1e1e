"""Which layers and heads of a model's KV cache a design keeps where, and in how many bytes. Knows no machine."""

from __future__ import annotations

import math

from clo.errors import SpecError
from clo.specs import Attend, Design, IndexerSpec, ModelSpec, PageCoding, Selector, Workload

STEP_VALUES = 16
"""Values of a coded page that share a step of two bytes."""
CODED_BYTES_PER_VALUE = {PageCoding.INT8: 1.0 + 2.0 / STEP_VALUES}


def dense_layers(model: ModelSpec, design: Design) -> int:
    """All layers of a design that attends in full on the device, none of a streamed one, else `design.dense_layers`."""
    if design.attend is Attend.FULL:
        return 0 if design.offloads else model.num_layers
    return min(design.dense_layers, model.num_layers)


def is_sparse(model: ModelSpec, design: Design, layer: int) -> bool:
    """Whether pages of a layer are selected, or come from the host; there is no such layer past the last."""
    if not dense_layers(model, design) <= layer < model.num_layers:
        return False
    return layer not in model.windowed_layers and model.linear_in(layer) is None


def sparse_layers(model: ModelSpec, design: Design) -> tuple[int, ...]:
    """All such layers, ascending."""
    return tuple(layer for layer in range(model.num_layers) if is_sparse(model, design, layer))


def own_indexer(model: ModelSpec) -> IndexerSpec:
    """The model's indexer. Raises `SpecError` for a model that has none."""
    if model.indexer is None:
        raise SpecError(
            f"design.selector = indexer: {model.name} has no indexer (model.indexer): choose a selector of pages"
        )
    return model.indexer


def choosing_layers(model: ModelSpec, design: Design) -> tuple[int, ...]:
    """Layers whose pages are scored and selected: of the sparse ones those that share no other layer's indexer."""
    return tuple(layer for layer in sparse_layers(model, design) if not shares_choice(model, design, layer))


def shares_choice(model: ModelSpec, design: Design, layer: int) -> bool:
    """Whether a layer attends to what the last layer with an indexer of its own chose."""
    if not design.asks_indexer or not is_sparse(model, design, layer):
        return False
    return layer in own_indexer(model).shared_layers


def page_bytes_per_value(model: ModelSpec, design: Design) -> float:
    """Bytes of a key or value element in a page, on the host and in slots."""
    return CODED_BYTES_PER_VALUE.get(design.page_coding, model.kv_bytes_per_value)


def paged_head_token_bytes(model: ModelSpec, design: Design) -> float:
    """Key and value of one token in one KV head as pages keep them, bytes."""
    return model.head_token_values * page_bytes_per_value(model, design)


def paged_layer_token_bytes(model: ModelSpec, design: Design) -> float:
    """The same in all KV heads of a layer, bytes."""
    return model.num_kv_heads * paged_head_token_bytes(model, design)


def hosted_token_bytes(model: ModelSpec, design: Design) -> float:
    """KV cache of one more token if all of it is kept on the host: of offloaded layers as pages keep it, bytes.

    With the keys of a model's own indexer, which nothing else could make anew.
    """
    paged = len(sparse_layers(model, design)) if design.offloads else 0
    coded = paged * (model.layer_token_bytes - paged_layer_token_bytes(model, design))
    keys = len(choosing_layers(model, design)) * own_indexer(model).key_bytes if design.asks_indexer else 0.0
    return model.kv_bytes_per_token - coded + keys


def hosted_block_bytes(model: ModelSpec, design: Design, tokens: int) -> float:
    """A block of a kept prefix: the KV of so many tokens and, so that a prompt can go on there, a state of each layer.

    In every block, as in vLLM, whose states are kept at the ends of blocks.
    """
    return tokens * hosted_token_bytes(model, design) + model.state_bytes


def pinned_heads(model: ModelSpec, design: Design) -> int:
    """KV heads of a layer whose KV stays on the device whole."""
    return round(design.pinned_head_fraction * model.num_kv_heads) if design.offloads else 0


def index_bytes_per_head(model: ModelSpec, design: Design, workload: Workload) -> float:
    """Device bytes of the selector's index for one KV head of one sequence.

    Page min/max holds two vectors a page, page mean one; 4-bit keys half a byte a key element, and a step and an offset
    of two bytes a token; sign-hash codes 128 bits a token; the exact selector is an oracle that keeps every key on the
    device; a model's own indexer has a key for every token, which all KV heads share.
    """
    if not design.selects:
        return 0.0
    if design.asks_indexer:
        return workload.context_tokens * own_indexer(model).key_bytes / model.num_kv_heads
    tokens, vector = workload.context_tokens, model.head_dim * model.kv_bytes_per_value
    pages = math.ceil(tokens / design.page_size)
    sizes = {
        Selector.EXACT: tokens * vector,
        Selector.PAGE_MINMAX: pages * 2 * vector,
        Selector.PAGE_MEAN: pages * vector,
        Selector.KEY_4BIT: tokens * (model.head_dim / 2 + 4),
        Selector.SIGN_HASH: tokens * 16.0,
    }
    return sizes[design.selector]
