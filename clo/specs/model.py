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


_HF_FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_query_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
}


def model_from_hf_config(path: Path) -> ModelSpec:
    """Read a Hugging Face `config.json` (or a folder that holds one). Raises `SpecError` naming what is missing."""
    file = path / "config.json" if path.is_dir() else path
    config = _read_json(file)
    text_config = config.get("text_config") or config
    missing = [theirs for theirs in _HF_FIELDS.values() if theirs not in text_config]
    if missing:
        raise SpecError(f"{file}: no field {missing[0]!r}: not the config of a decoder-only transformer")
    try:
        values = _hf_values(text_config, file)
    except (TypeError, ZeroDivisionError) as error:
        raise SpecError(f"{file}: head counts and sizes must be positive whole numbers ({error})") from None
    return ModelSpec.parse(values, where=str(file))


def _hf_values(config: dict[str, Any], file: Path) -> dict[str, Any]:
    values = {ours: config[theirs] for ours, theirs in _HF_FIELDS.items()}
    heads = config["num_attention_heads"]
    return values | {
        "name": file.resolve().parent.name if file.name == "config.json" else file.stem,
        "source": str(file),
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def _read_json(file: Path) -> dict[str, Any]:
    data = read_json(file, SpecError)
    if not isinstance(data, dict):
        raise SpecError(f"{file}: a JSON object is expected, this is a {type(data).__name__}")
    return data
