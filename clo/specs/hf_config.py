"""Reads a Hugging Face `config.json` into a `ModelSpec`, or says what about the model is beyond one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clo.errors import SpecError
from clo.files import read_json
from clo.specs.hf_attention import COUNTS, attention_fields, attention_problem
from clo.specs.hf_blocks import as_others_say
from clo.specs.hf_chunks import chunk_problem, chunks_as_windows
from clo.specs.hf_weights import BF16, FP8, UnknownCacheError, UnknownWidthError, Widths, cache_width, weight_widths
from clo.specs.model import ModelSpec

_HF_FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_query_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
}


def model_from_hf_config(path: Path) -> ModelSpec:
    """Read a Hugging Face `config.json` (or a folder that holds one).

    Raises `SpecError` naming what is missing, or what this model has that no `ModelSpec` can say: read as a dense model
    with a full cache it would get the wrong bytes.
    """
    file = path / "config.json" if path.is_dir() else path
    config = _read_json(file)
    text_config = config.get("text_config") or config
    if not isinstance(text_config, dict):
        raise SpecError(f"{file}: text_config = {text_config!r}: a JSON object is expected")
    merged = as_others_say(_quantized_beside(file) | config | text_config)
    if problem := chunk_problem(merged):
        raise SpecError(f"{file}: {problem}")
    merged = chunks_as_windows(merged)
    if _experts_field(merged) and "moe_intermediate_size" in merged:
        # some leave out the width of an MLP that none of their layers has
        merged.setdefault("intermediate_size", merged["moe_intermediate_size"])
    missing = [theirs for theirs in _HF_FIELDS.values() if theirs not in merged]
    if missing:
        raise SpecError(
            f"{file}: no field {missing[0]!r}: not the config of a decoder-only transformer, or it leaves out what its "
            "kind has by default: write it in"
        )
    if problem := _ill_typed(merged) or _not_modelled(merged):
        raise SpecError(f"{file}: {problem}")
    try:
        values = _hf_values(merged, file)
    except (TypeError, ZeroDivisionError) as error:
        raise SpecError(f"{file}: head counts and sizes must be positive whole numbers ({error})") from None
    return ModelSpec.parse(values, where=str(file))


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_WITH_EXPERTS = (
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "gpt_oss",
    "kimi_k2",
    "llama4_text",
    "minimax_m2",
    "minimax_m3",
    "minimax_m3_vl",
    "minimax_m3_vl_text",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_vl_moe_text",
)
"""Kinds of model whose fields about experts are known; others mean different things by the same names."""


_LISTS = ("layer_types", "mlp_only_layers", "mlp_layer_types", "indexer_types")
_COUNTS = (
    "n_shared_experts",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "first_k_dense_replace",
)


def _ill_typed(config: dict[str, Any]) -> str:
    """What about optional fields is of the wrong type, as field, value and rule; empty if nothing is."""
    for field in (*_LISTS, *_COUNTS, *COUNTS):
        kind, rule = (list, "a list") if field in _LISTS else (int, "a whole number")
        if config.get(field) is not None and not isinstance(config[field], kind):
            return f"{field} = {config[field]!r}: must be {rule}"
    return ""


def _not_modelled(config: dict[str, Any]) -> str:
    """What about this model is beyond a `ModelSpec`, as field, value and rule; empty if nothing is."""
    if problem := attention_problem(config) or _other_experts(config) or _other_mlp(config):
        return problem
    try:
        weight_widths(config)
        cache_width(config)
    except UnknownWidthError as error:
        what = "caches" if isinstance(error, UnknownCacheError) else "weights"
        return (
            f"quantization_config: {error}: such {what} are not known: describe the model in TOML, with {error.field}"
        )
    return ""


_NOT_GATED: tuple[str, ...] = (
    "codegen",
    "falcon",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "mpt",
    "nemotron",
    "opt",
)
_NOT_GATED += ("apertus", "arcee", "bloom", "phi", "persimmon", "starcoder2", "xglm")
"""Kinds of model whose MLP has two matrices and not three."""
_ACTIVATIONS_OF_TWO = ("relu2", "xielu", "gelu_new", "gelu_fast")
"""Activations that no kind with a gate is known with."""


def _other_mlp(config: dict[str, Any]) -> str:
    kind, activation = config.get("model_type"), config.get("hidden_act") or config.get("activation_function")
    if kind in _NOT_GATED:
        return f"model_type = {kind!r}: its MLP has no gate: only gated ones are modelled"
    if activation in _ACTIVATIONS_OF_TWO:
        return f"hidden_act = {activation!r}: of MLPs without a gate: only gated ones are modelled"
    return ""


def _quantized_beside(file: Path) -> dict[str, Any]:
    """What ModelOpt says of quantised weights, in a file of its own beside the config (not in every one within it)."""
    beside = file.parent / "hf_quant_config.json"
    quantized = _read_json(beside).get("quantization") if beside.is_file() else None
    return {"quantization_config": quantized} if isinstance(quantized, dict) and quantized.get("quant_algo") else {}


def _other_experts(config: dict[str, Any]) -> str:
    field, kind = _experts_field(config), config.get("model_type")
    if field is None:
        unsaid = kind in _WITH_EXPERTS and not any(name in config for name in _EXPERTS)
        return f"model_type = {kind!r}: no field says how many experts ({', '.join(_EXPERTS)})" if unsaid else ""
    if kind not in _WITH_EXPERTS:
        known = ", ".join(_WITH_EXPERTS)
        return f"{field} = {config[field]!r}: experts of model_type = {kind!r} are not known (known: {known})"
    if config.get("moe_layer_freq") not in (None, 1):
        return f"moe_layer_freq = {config['moe_layer_freq']!r}: which layers that means is not known"
    step = config.get("decoder_sparse_step")
    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 1):
        return f"decoder_sparse_step = {step!r}: must be a positive whole number"
    others = [layer for layer in config.get("mlp_only_layers") or [] if not isinstance(layer, int)]
    return f"mlp_only_layers: {others[0]!r}: must be the number of a layer" if others else ""


def _dense_layers(config: dict[str, Any]) -> set[int]:
    """Which layers have no experts."""
    count, step = config["num_hidden_layers"], config.get("decoder_sparse_step") or 1
    kinds, first = config.get("mlp_layer_types") or [], config.get("first_k_dense_replace")
    if kinds:
        first = 0
    elif first is None:
        first = _FIRST_DENSE.get(config.get("model_type"), 0)
    dense = {layer for layer, kind in enumerate(kinds) if kind == "dense"}
    dense |= {layer for layer in range(count) if layer < first or (layer + 1) % step}
    return (dense | set(config.get("mlp_only_layers") or [])) & set(range(count))


def _experts_field(config: dict[str, Any]) -> str | None:
    return next((field for field in _EXPERTS if config.get(field) not in (None, 0, 1)), None)


def _hf_values(config: dict[str, Any], file: Path) -> dict[str, Any]:
    values = {ours: config[theirs] for ours, theirs in _HF_FIELDS.items()}
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    widths, experts, cached = weight_widths(config), experts_of(config), cache_width(config)
    if experts is not None and widths.experts != widths.mlp:
        experts["weight_bytes_per_value"] = widths.experts
    return (
        values
        | {
            "name": file.resolve().parent.name if file.name == "config.json" else file.stem,
            "source": f"{file}; assumed: {_named(widths, experts is not None)} weights, {_NAMES[cached]} KV, gated MLP",
            "kv_bytes_per_value": cached,
            "weight_bytes_per_value": widths.attention,
            "mlp_weight_bytes_per_value": widths.mlp if widths.mlp != widths.attention else None,
            "num_kv_heads": heads if kv_heads is None else kv_heads,
            "head_dim": None if config.get("kv_lora_rank") else _head_dim(config, file),
            "tied_embeddings": bool(config.get("tie_word_embeddings", _tied_unless_said(config))),
            "experts": experts,
        }
        | attention_fields(config)
    )


_NAMES = {BF16: "bf16", FP8: "fp8"}


def _named(widths: Widths, with_experts: bool) -> str:
    used = dict.fromkeys(widths if with_experts else widths[:2])
    return ", ".join(_NAMES.get(width, "4-bit") for width in used)


def _tied_unless_said(config: dict[str, Any]) -> bool:
    """Configs leave out what is a kind's default: embeddings of Gemma and Cohere are tied, of the others not."""
    return str(config.get("model_type", "")).startswith(("gemma", "cohere"))


_FIRST_DENSE: dict[Any, int] = {"glm4_moe_lite": 1}
"""First layers without experts, of kinds that may leave that out."""


def experts_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of an `ExpertsSpec`; `None` for a model without experts, or with experts of an unknown kind."""
    field = _experts_field(config)
    if field is None or _other_experts(config):
        return None
    dense = _dense_layers(config)
    others = [layer for layer in range(config["num_hidden_layers"]) if layer not in dense]
    if not others:
        return None
    at_first = dense == set(range(len(dense)))
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    shared = (config.get("n_shared_experts") or 0) * width
    return {
        "num_experts": config[field],
        "experts_per_token": config.get("num_experts_per_tok"),
        "intermediate_size": width,
        "shared_intermediate_size": config.get("shared_expert_intermediate_size") or shared,
    } | ({"dense_layers": len(dense)} if at_first else {"layers": others})


def _head_dim(config: dict[str, Any], file: Path) -> Any:
    given, width, heads = config.get("head_dim"), config["hidden_size"], config["num_attention_heads"]
    if given is not None:
        return given
    if width % heads:
        raise SpecError(
            f"{file}: hidden_size = {width} is no multiple of num_attention_heads = {heads}: head_dim is needed"
        )
    return width // heads


def _read_json(file: Path) -> dict[str, Any]:
    data = read_json(file, SpecError)
    if not isinstance(data, dict):
        raise SpecError(f"{file}: a JSON object is expected, this is a {type(data).__name__}")
    return data
