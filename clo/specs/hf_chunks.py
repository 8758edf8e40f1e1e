"""What a config of Llama 4 says of its experts, and of attention within chunks, under the names that others use.

Three of four layers attend within a chunk: a token sees those before it since the last multiple of the chunk's length.
They are counted as windows of that length, which is the most that a token sees, and twice what it sees in the mean.
"""

from __future__ import annotations

from typing import Any

WITH_CHUNKS = ("llama4_text",)
CHUNKED = "chunked_attention"
_USUAL = {"attention_chunk_size": 8192, "no_rope_layer_interval": 4, "interleave_moe_layer_step": 1}
"""What configs may leave out."""


def chunks_as_windows(config: dict[str, Any]) -> dict[str, Any]:
    """A config with its windows, experts and MLPs as other kinds of model name them; as it is if of another kind."""
    if config.get("model_type") not in WITH_CHUNKS or not isinstance(config.get("num_hidden_layers"), int):
        return config
    kinds = config.get("layer_types") or ["full_attention" if each else CHUNKED for each in _whole_layers(config)]
    width = config.get("intermediate_size")
    mixed = _layers_with_experts(config)
    return config | {
        "layer_types": ["sliding_attention" if kind == CHUNKED else kind for kind in kinds],
        "sliding_window": config.get("attention_chunk_size", _USUAL["attention_chunk_size"]),
        "mlp_layer_types": ["sparse" if layer in mixed else "dense" for layer in range(config["num_hidden_layers"])],
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width,
        "intermediate_size": config.get("intermediate_size_mlp", width),
    }


def chunk_problem(config: dict[str, Any]) -> str:
    """What cannot be read of such a config, as field, value and rule; empty if nothing."""
    if config.get("model_type") not in WITH_CHUNKS:
        return ""
    for name in _USUAL:
        value = config.get(name, _USUAL[name])
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            return f"{name} = {value!r}: must be a positive whole number"
    for name in ("no_rope_layers", "moe_layers"):
        value = config.get(name)
        if not isinstance(value, list | None) or any(not isinstance(each, int) for each in value or []):
            return f"{name} = {value!r}: must be a list of whole numbers"
    given, count = config.get("no_rope_layers") or [], config.get("num_hidden_layers")
    if given and isinstance(count, int) and len(given) != count:
        return f"no_rope_layers: {len(given)} of them, one for each of {count} layers is expected"
    return ""


def _whole_layers(config: dict[str, Any]) -> list[bool]:
    """Whether a layer attends to everything: those without rotary positions, which the field's ones are not."""
    if rotated := config.get("no_rope_layers"):
        return [not each for each in rotated]
    interval = config.get("no_rope_layer_interval", _USUAL["no_rope_layer_interval"])
    return [(layer + 1) % interval == 0 for layer in range(config["num_hidden_layers"])]


def _layers_with_experts(config: dict[str, Any]) -> set[int]:
    if (listed := config.get("moe_layers")) is not None:
        return set(listed)
    step = config.get("interleave_moe_layer_step", _USUAL["interleave_moe_layer_step"])
    return set(range(step - 1, config["num_hidden_layers"], step))
