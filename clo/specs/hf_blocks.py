"""What a config of MiniMax-M3 says of its experts and of its indexer of blocks, under the names it goes by."""

from __future__ import annotations

from typing import Any

WITH_BLOCKS = ("minimax_m3", "minimax_m3_vl", "minimax_m3_vl_text")
"""Kinds of model whose KV heads attend to blocks that an indexer chooses: in releases, and in Transformers."""
SPARSE = "minimax_m3_sparse"
_SIZES = {
    "num_heads": ("index_n_heads", "sparse_num_index_heads"),
    "head_dim": ("index_head_dim", "sparse_index_dim"),
    "block_tokens": ("index_block_size", "sparse_block_size"),
    "blocks": ("index_topk_blocks", "sparse_topk_blocks"),
}
"""By their names in Transformers, and in the `sparse_attention_config` of releases, which counts."""
_KNOWN = {"sparse_init_block": 0, "sparse_local_block": 1, "sparse_score_type": "max", "use_sparse_attention": True}
_KEY_BYTES_PER_VALUE = 2.0
"""Keys of an indexer are bf16, as engines cache them."""


def as_others_say(config: dict[str, Any]) -> dict[str, Any]:
    """A config with its experts under the names that other kinds of model use; as it is if of another kind."""
    if config.get("model_type") not in WITH_BLOCKS or "dense_intermediate_size" not in config:
        return config
    places, width = config.get("moe_layer_freq"), config.get("shared_intermediate_size")
    shared = config.get("n_shared_experts")
    renamed: dict[str, Any] = {
        "intermediate_size": config["dense_intermediate_size"],
        "moe_intermediate_size": config.get("intermediate_size"),
        "n_shared_experts": None,
    }
    if isinstance(width, int) and isinstance(shared, int | None):
        renamed["shared_expert_intermediate_size"] = width * (1 if shared is None else shared)
    if isinstance(places, list):
        kinds = ["sparse" if place else "dense" for place in places]
        renamed |= {"moe_layer_freq": None, "mlp_layer_types": kinds, "first_k_dense_replace": None}
    return config | renamed


def block_problem(config: dict[str, Any]) -> str:
    """What about an indexer of blocks is beyond a `ModelSpec`, or not said, as field, value and rule."""
    if config.get("model_type") not in WITH_BLOCKS:
        return ""
    nested = config.get("sparse_attention_config")
    if not isinstance(nested, dict | None):
        return f"sparse_attention_config = {nested!r}: a JSON object is expected"
    for name, known in _KNOWN.items():
        if (nested or {}).get(name, known) != known:
            return f"sparse_attention_config.{name} = {(nested or {})[name]!r}: known with {known!r} only"
    if config.get("index_local_blocks", 1) != 1:
        return f"index_local_blocks = {config['index_local_blocks']!r}: known with 1 only"
    if config.get("attention_output_gate"):
        return "attention_output_gate = True: not modelled beside an indexer"
    for theirs in _SIZES.values():
        size = _size(config, theirs)
        if isinstance(size, bool) or not isinstance(size, int):
            return f"{' or '.join(theirs)} = {size!r}: an indexer of blocks needs a whole number"
    return _layers_problem(config)


def _layers_problem(config: dict[str, Any]) -> str:
    sparse = _sparse_layers(config)
    if sparse is None:
        return f"sparse_attention_freq or layer_types: full_attention or {SPARSE} is expected for each layer"
    dense = sparse.index(True) if True in sparse else len(sparse)
    if dense == len(sparse) or not all(sparse[dense:]):
        return "sparse_attention_freq or layer_types: layers that attend to everything must be the first ones, not all"
    return ""


def block_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `ModelSpec` about such an indexer; `block_problem` must have found nothing."""
    if config.get("model_type") not in WITH_BLOCKS:
        return {}
    sizes = {ours: _size(config, theirs) for ours, theirs in _SIZES.items()}
    blocks, sparse = sizes.pop("blocks"), _sparse_layers(config)
    assert sparse is not None
    fields = {
        "top_tokens": blocks * sizes["block_tokens"],
        "key_bytes": _KEY_BYTES_PER_VALUE * sizes["head_dim"],
        "dense_layers": sparse.index(True),
    }
    return {"indexer": sizes | fields}


def _size(config: dict[str, Any], names: tuple[str, str]) -> Any:
    flat, nested = names
    return (config.get("sparse_attention_config") or {}).get(nested, config.get(flat))


def _sparse_layers(config: dict[str, Any]) -> list[bool] | None:
    """Whether each layer has an indexer; none where it is not said, or not of each."""
    kinds: Any = config.get("layer_types")
    if not kinds:
        kinds = (config.get("sparse_attention_config") or {}).get("sparse_attention_freq")
        known: tuple[Any, Any] = (0, 1)
    else:
        known = ("full_attention", SPARSE)
    if not isinstance(kinds, list) or len(kinds) != config["num_hidden_layers"]:
        return None
    return [kind == known[1] for kind in kinds] if all(kind in known for kind in kinds) else None
