"""What a Hugging Face `config.json` says of a model's attention, and what of that is beyond a `ModelSpec`.

Latent attention, an indexer, sliding windows, linear attention: each by the fields and kinds of model that are known.
"""

from __future__ import annotations

from typing import Any

from clo.specs.hf_blocks import WITH_BLOCKS, block_fields, block_problem
from clo.specs.hf_chunks import WITH_CHUNKS

COUNTS = (
    "kv_lora_rank",
    "q_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "full_attention_interval",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
)
"""Fields about attention that are whole numbers where they are given."""


def attention_problem(config: dict[str, Any]) -> str:
    """What about attention is beyond a `ModelSpec`, as field, value and rule; empty if nothing is."""
    problems = (_other_latent, block_problem, linear_problem, _other_windows, _other_states)
    return next((found for problem in problems if (found := problem(config))), "")


def attention_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `ModelSpec` that say how attention differs from keys and values in every head of every layer."""
    return _windows(config) | linear_fields(config) | _latent(config) | _indexer(config) | block_fields(config)


WITH_INDEXER = ("deepseek_v32", "glm_moe_dsa")
"""Kinds of model whose latent attention is to what an indexer chooses."""
_WITH_LATENT = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_k2", "youtu", *WITH_INDEXER)
_INDEXER_FIELDS = {"num_heads": "index_n_heads", "head_dim": "index_head_dim", "top_tokens": "index_topk"}
_LATENT_FIELDS = {
    "kv_rank": "kv_lora_rank",
    "rope_dim": "qk_rope_head_dim",
    "nope_dim": "qk_nope_head_dim",
    "value_dim": "v_head_dim",
}


def _other_latent(config: dict[str, Any]) -> str:
    """What about latent attention is beyond a `ModelSpec`, or not said."""
    kind = config.get("model_type")
    if not config.get("kv_lora_rank"):
        return f"model_type = {kind!r}: latent attention needs kv_lora_rank" if kind in _WITH_LATENT else ""
    if kind not in _WITH_LATENT:
        known = ", ".join(_WITH_LATENT)
        return (
            f"kv_lora_rank = {config['kv_lora_rank']!r}: latent attention of model_type = {kind!r} is not known "
            f"(known: {known})"
        )
    if "q_lora_rank" not in config:
        return "no field 'q_lora_rank': latent attention needs it (null: queries from the hidden state)"
    if problem := _other_indexer(config):
        return problem
    missing = [theirs for theirs in _LATENT_FIELDS.values() if config.get(theirs) is None]
    return f"no field {missing[0]!r}: latent attention needs it" if missing else ""


def _other_indexer(config: dict[str, Any]) -> str:
    """What about an indexer is beyond a `ModelSpec`, or not said."""
    if config.get("model_type") not in WITH_INDEXER:
        topk = config.get("index_topk")
        return f"index_topk = {topk!r}: known of model_type {', '.join(WITH_INDEXER)} only" if topk else ""
    missing = [theirs for theirs in _INDEXER_FIELDS.values() if config.get(theirs) is None]
    if missing:
        return f"no field {missing[0]!r}: an indexer needs it"
    kinds = config.get("indexer_types")
    if kinds is None:
        unsaid = [name for name in ("index_topk_pattern", "index_topk_freq") if config.get(name) not in (None, 1)]
        return f"{unsaid[0]} = {config[unsaid[0]]!r}: read from indexer_types only" if unsaid else ""
    others = sorted(set(map(str, kinds)) - {"full", "shared"})
    if others or len(kinds) != config["num_hidden_layers"]:
        named = f" = {', '.join(others)}" if others else ""
        return f"indexer_types{named}: full or shared is expected for each layer"
    return ""


def _indexer(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("model_type") not in WITH_INDEXER:
        return {}
    shared = [layer for layer, kind in enumerate(config.get("indexer_types") or []) if kind == "shared"]
    sizes = {ours: config[theirs] for ours, theirs in _INDEXER_FIELDS.items()}
    return {"indexer": sizes | {"shared_layers": shared}}


def _latent(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of latent attention, over those of keys and values in every head."""
    if not config.get("kv_lora_rank"):
        return {}
    latent = {ours: config[theirs] for ours, theirs in _LATENT_FIELDS.items()}
    return {
        "num_kv_heads": 1,
        "head_dim": latent["kv_rank"] + latent["rope_dim"],
        "latent": latent | {"query_rank": config.get("q_lora_rank") or 0},
    }


WITH_LINEAR = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
"""Kinds of model with Gated DeltaNet in some layers, and a gate behind the attention of the others."""
_LINEAR_FIELDS = {
    "num_key_heads": "linear_num_key_heads",
    "num_value_heads": "linear_num_value_heads",
    "key_dim": "linear_key_head_dim",
    "value_dim": "linear_value_head_dim",
    "conv_tokens": "linear_conv_kernel_dim",
}
LINEAR = "linear_attention"
STATES_OF_MAMBA = ("mamba_", "ssm_")
"""Begin fields of models with Mamba's layers, which many list under no `layer_types` (Nemotron-H, Bamba, Falcon-H1)."""


def _other_states(config: dict[str, Any]) -> str:
    """What says that layers keep a state of another kind than Gated DeltaNet's."""
    if config.get("model_type") in WITH_LINEAR:
        return ""
    named = [name for name in config if name.startswith(STATES_OF_MAMBA) and config[name] is not None]
    return f"{named[0]} = {config[named[0]]!r}: layers with Mamba's states are not modelled" if named else ""


def _linear_layers(config: dict[str, Any]) -> list[int]:
    """As listed; without a list every so many layers one attends to keys and values, four by default."""
    layers = range(config["num_hidden_layers"])
    kinds, interval = config.get("layer_types"), config.get("full_attention_interval") or 4
    if kinds:
        return [layer for layer, kind in zip(layers, kinds, strict=False) if kind == LINEAR]
    return [layer for layer in layers if (layer + 1) % interval]


def linear_problem(config: dict[str, Any]) -> str:
    """What about linear attention is beyond a `ModelSpec`, or not said."""
    kind, kinds = config.get("model_type"), config.get("layer_types") or []
    if kind not in WITH_LINEAR:
        known = ", ".join(WITH_LINEAR)
        return (
            f"layer_types: {LINEAR} of model_type = {kind!r} is not known (known: {known})" if LINEAR in kinds else ""
        )
    if others := sorted({str(each) for each in kinds} - {"full_attention", LINEAR}):
        return f"layer_types: {', '.join(others)} beside {LINEAR} is not modelled"
    places, count = _linear_layers(config), config["num_hidden_layers"]
    if (kinds and len(kinds) != count) or len(places) == count:
        return "layer_types: one for each layer is expected, and one with keys and values"
    if config.get("attn_output_gate") is False:
        return "attn_output_gate = False: attention of this kind of model is known with a gate only"
    missing = [theirs for theirs in _LINEAR_FIELDS.values() if config.get(theirs) is None]
    return f"no field {missing[0]!r}: linear attention needs it" if places and missing else ""


def linear_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `ModelSpec` about linear attention, and about the gate that comes with it."""
    if config.get("model_type") not in WITH_LINEAR:
        return {}
    sizes = {ours: config.get(theirs) for ours, theirs in _LINEAR_FIELDS.items()}
    narrow = config.get("mamba_ssm_dtype", "float32") in ("bfloat16", "float16")
    sizes |= {"layers": _linear_layers(config), "state_bytes_per_value": 2.0 if narrow else 4.0}
    return {"gated_attention": True, "linear": sizes if sizes["layers"] else None}


WITH_WINDOWS = ("gemma2", "gemma3_text", "gpt_oss", "ministral", "olmo3", "qwen2", "qwen2_moe", "qwen3")
"""Kinds of model whose windowed layers differ from the others in nothing but the window."""


def _other_windows(config: dict[str, Any]) -> str:
    """What about layers that keep less than the whole context is beyond a `ModelSpec`."""
    kinds, window = config.get("layer_types") or [], config.get("sliding_window")
    if config.get("model_type") in WITH_LINEAR:
        kinds = [kind for kind in kinds if kind != LINEAR]
    if config.get("model_type") in WITH_BLOCKS:
        kinds = []
    if config.get("model_type") in WITH_INDEXER and set(kinds) & set(INDEXED):
        if not set(kinds) <= set(INDEXED):
            beside = ", ".join(sorted({str(kind) for kind in kinds} - set(INDEXED)))
            return f"layer_types: {beside} beside layers with an indexer is not modelled"
        kinds = []
    others = sorted({str(kind) for kind in kinds} - {"full_attention", WINDOWED})
    if others:
        return f"layer_types: {', '.join(others)} is not modelled, full_attention and {WINDOWED} only"
    if not kinds:
        # Qwen's configs name a window that is off unless it is switched on
        in_use = config.get("use_sliding_window", not str(config.get("model_type", "")).startswith("qwen"))
        limits = in_use and _limits(window, config)
        return f"sliding_window = {window}: which layers have it is not said (layer_types)" if limits else ""
    if WINDOWED not in kinds:
        return ""
    if config.get("model_type") not in (*WITH_WINDOWS, *WITH_CHUNKS):
        known = ", ".join(WITH_WINDOWS)
        return f"layer_types: windows of model_type = {config.get('model_type')!r} are not known (known: {known})"
    if not isinstance(window, int):
        return f"sliding_window = {window!r}: layer_types needs a number of tokens"
    if len(kinds) != config["num_hidden_layers"] or "full_attention" not in kinds:
        return "layer_types: one for each layer is expected, and one that attends to the whole context"
    return ""


WINDOWED = "sliding_attention"
INDEXED = ("indexed_attention", "deepseek_sparse_attention")
"""What attention to the choice of an indexer is called: in Transformers, and in released configs."""


def _limits(window: Any, config: dict[str, Any]) -> bool:
    positions = config["max_position_embeddings"]
    return isinstance(window, int) and isinstance(positions, int) and window < positions


def _windows(config: dict[str, Any]) -> dict[str, Any]:
    places = [layer for layer, kind in enumerate(config.get("layer_types") or []) if kind == WINDOWED]
    window = config.get("sliding_window")
    return {"window_tokens": window, "windowed_layers": places} if places and _limits(window, config) else {}
