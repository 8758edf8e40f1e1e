"""What a transformer looks like to an offloading decoder: shapes and bytes. Knows nothing about weights or machines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt, model_validator

from clo.errors import SpecError
from clo.files import read_json
from clo.specs.base import Spec


class ModelSpec(Spec):
    """A Llama/Qwen-style decoder: grouped-query attention, gated MLP, one KV cache per layer."""

    name: str = Field(description="how reports call it")
    source: str = Field(default="", description="where the shape was read")
    num_layers: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt = Field(description="width of the gated MLP")
    num_query_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    vocab_size: PositiveInt
    max_positions: PositiveInt = Field(description="longest context the model accepts, tokens")
    tied_embeddings: bool = False
    weight_bytes_per_value: float = Field(default=2.0, gt=0, description="bytes a weight takes (bf16: 2)")
    kv_bytes_per_value: float = Field(default=2.0, gt=0, description="bytes a key or value element takes (bf16: 2)")

    @model_validator(mode="after")
    def _grouped_evenly(self) -> ModelSpec:
        if self.num_query_heads % self.num_kv_heads:
            raise ValueError(
                f"num_query_heads = {self.num_query_heads} must be a multiple of num_kv_heads = {self.num_kv_heads}"
            )
        return self

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_query_heads // self.num_kv_heads

    @property
    def head_token_bytes(self) -> float:
        """Key and value of one token in one KV head of one layer, bytes."""
        return 2 * self.head_dim * self.kv_bytes_per_value

    @property
    def layer_token_bytes(self) -> float:
        """Key and value of one token in one layer, bytes."""
        return self.head_token_bytes * self.num_kv_heads

    @property
    def kv_bytes_per_token(self) -> float:
        """KV cache of one token in all layers, bytes (Llama-3-8B: 131,072)."""
        return self.layer_token_bytes * self.num_layers

    @property
    def qkv_width(self) -> int:
        """Output width of the fused query, key and value projection."""
        return (self.num_query_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def layer_weight_bytes(self) -> float:
        """Weights of one layer (projections and gated MLP; norms are negligible), bytes."""
        attention = self.hidden_size * (self.qkv_width + self.num_query_heads * self.head_dim)
        return (attention + 3 * self.hidden_size * self.intermediate_size) * self.weight_bytes_per_value

    @property
    def weight_bytes(self) -> float:
        """All weights on the device, bytes."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * self.layer_weight_bytes + embeddings * self.weight_bytes_per_value

    @property
    def step_weight_bytes(self) -> float:
        """Weights that a decode step reads, bytes: all but the input embedding, of which it reads a row a sequence."""
        head = self.vocab_size * self.hidden_size * self.weight_bytes_per_value
        return self.num_layers * self.layer_weight_bytes + head

    def shard(self, num_gpus: int) -> ModelSpec:
        """What each of `num_gpus` GPUs holds and computes: its heads, its part of the MLP and of the vocabulary.

        As in Megatron-LM (arXiv 1909.08053). What does not divide evenly is rounded up. Raises `SpecError` where the KV
        heads cannot be dealt out evenly.
        """
        if num_gpus == 1:
            return self
        if self.num_kv_heads % num_gpus:
            raise SpecError(
                f"machine.tensor_parallel = {num_gpus}: the {self.num_kv_heads} KV heads of {self.name} cannot be "
                "dealt out evenly to so many GPUs"
            )
        return self.with_fields(
            num_query_heads=self.num_query_heads // num_gpus,
            num_kv_heads=self.num_kv_heads // num_gpus,
            intermediate_size=-(-self.intermediate_size // num_gpus),
            vocab_size=-(-self.vocab_size // num_gpus),
        )


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
    missing = [theirs for theirs in _HF_FIELDS.values() if theirs not in text_config]
    if missing:
        raise SpecError(f"{file}: no field {missing[0]!r}: not the config of a decoder-only transformer")
    if problem := _not_modelled(config | text_config):
        raise SpecError(f"{file}: {problem}")
    try:
        values = _hf_values(text_config, file)
    except (TypeError, ZeroDivisionError) as error:
        raise SpecError(f"{file}: head counts and sizes must be positive whole numbers ({error})") from None
    return ModelSpec.parse(values, where=str(file))


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def _not_modelled(config: dict[str, Any]) -> str:
    """What about this model is beyond a `ModelSpec`, as field, value and rule; empty if nothing is."""
    for field in _EXPERTS:
        if config.get(field) not in (None, 0, 1):
            return f"{field} = {config[field]!r}: mixtures of experts are not modelled, dense MLPs only"
    if config.get("kv_lora_rank"):
        return (
            f"kv_lora_rank = {config['kv_lora_rank']!r}: latent attention (MLA) is not modelled, keys and values only"
        )
    if config.get("quantization_config"):
        return (
            "quantization_config: quantised weights are not modelled, GEMM times are those of bf16: describe the model "
            "in TOML, with weight_bytes_per_value"
        )
    return _windowed(config)


def _windowed(config: dict[str, Any]) -> str:
    """Layers that keep less than the whole context need less cache, which a `ModelSpec` cannot say."""
    kinds = config.get("layer_types") or []
    others = sorted({str(kind) for kind in kinds} - {"full_attention"})
    if others:
        return f"layer_types: {', '.join(others)} is not modelled, full_attention in every layer only"
    window, positions = config.get("sliding_window"), config["max_position_embeddings"]
    # Qwen's configs name a window that is off unless it is switched on
    in_use = config.get("use_sliding_window", not str(config.get("model_type", "")).startswith("qwen"))
    if kinds or not in_use or not isinstance(window, int) or not isinstance(positions, int) or window >= positions:
        return ""
    return f"sliding_window = {window}: windowed attention is not modelled, a cache of the whole context only"


def _hf_values(config: dict[str, Any], file: Path) -> dict[str, Any]:
    values = {ours: config[theirs] for ours, theirs in _HF_FIELDS.items()}
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    return values | {
        "name": file.resolve().parent.name if file.name == "config.json" else file.stem,
        "source": f"{file}; assumed: bf16 weights and KV, gated MLP",
        "num_kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": _head_dim(config, file),
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


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
