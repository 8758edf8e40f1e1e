"""A decoder of any size without a download: random weights, and prompts that are made up, not read.

What it says means nothing, but it costs what a real one of its shape costs, and moves about as many pages: queries
resemble earlier ones, and passages keep their weight, as in the recorded trace of SmolLM2-135M. Knows nothing about
designs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from clo.engine.memory import local_machine
from clo.engine.models.made_up import library_kind
from clo.engine.models.network import Network
from clo.engine.prompts import Prompt
from clo.errors import SpecError
from clo.specs import ModelSpec
from clo.units import format_bytes

WEIGHT_SCALE = 0.02
TOKEN_LIKENESS = 0.86
"""Of the variance of a token's embedding the share that all tokens have in common. With it about
half of the heads keep their sets in a step of `clo`, as recorded (`tests/engine/test_random_weights.py`)."""
TOKEN_SCALE = 30.0
"""Of an embedding's values: what layers add to it, random as they are, is to leave the likeness."""
PASSAGE_TOKENS = 16
PASSAGE_SPREAD = 0.25
"""Of the logarithm of the length of a passage's keys. With it `clo` and `resolve` with slots of one
budget fetch about as many pages as recorded (the same tests)."""

PRECISION = {torch.float32: "single precision", torch.bfloat16: "bfloat16"}
MOST_OF_MEMORY = 0.8


def dtype_on(device: torch.device | str) -> torch.dtype:
    """What models run in: single precision on a CPU, bfloat16 on a GPU."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def need_device(name: str) -> None:
    """Raise `SpecError` where there is no such device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SpecError("--device cuda: torch sees no CUDA device on this machine")


def checked(spec: ModelSpec, device: torch.device | str = "cpu") -> ModelSpec:
    """`spec`, if this machine can hold its weights in `dtype_on` it. Raises `SpecError` that says what is needed."""
    library_kind(spec)
    dtype = dtype_on(device)
    needed = _all_weights_of(spec, dtype.itemsize).weight_bytes
    memory = local_machine(torch.device(device)).gpu.memory_bytes
    if needed > MOST_OF_MEMORY * memory:
        raise SpecError(
            f"model {spec.name}: its weights take {format_bytes(needed)} in {PRECISION[dtype]}, this machine has "
            f"{format_bytes(memory)} of memory: choose a smaller model, or lower model.num_layers"
        )
    return spec


def _all_weights_of(spec: ModelSpec, num_bytes: int) -> ModelSpec:
    """The same with all weights of so many bytes a value."""
    experts = spec.experts and spec.experts.with_fields(weight_bytes_per_value=None).model_dump()
    return spec.with_fields(weight_bytes_per_value=num_bytes, mlp_weight_bytes_per_value=None, experts=experts)


def random_model(
    spec: ModelSpec,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    likeness: float = TOKEN_LIKENESS,
) -> Any:
    """A `transformers` model of the shape of `spec`, in evaluation mode, of the kind that `library_kind` says.

    With no `likeness` embeddings are the library's.
    """
    import transformers

    kind, fields = library_kind(spec)
    config = getattr(transformers, f"{kind}Config")(**_common_fields(spec) | fields)
    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
            if likeness:
                _make_alike(model.get_input_embeddings().weight, likeness)
            return model
    finally:
        torch.set_default_dtype(before)


def _make_alike(embeddings: torch.Tensor, likeness: float) -> None:
    with torch.no_grad():
        common = torch.randn(embeddings.shape[1]) * TOKEN_SCALE * likeness**0.5
        embeddings.normal_(std=TOKEN_SCALE * (1 - likeness) ** 0.5).add_(common)


def _common_fields(spec: ModelSpec) -> dict[str, Any]:
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_query_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_positions,
        "tie_word_embeddings": spec.tied_embeddings,
        "initializer_range": WEIGHT_SCALE,
        "name_or_path": spec.name,
    } | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))


def random_prompt(network: Network, num_tokens: int, *, seed: int = 0) -> Prompt:
    """Keys and values of `num_tokens` tokens that nobody computed: a long context for the price of its memory."""
    model, source = network.spec, torch.Generator(network.device).manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source, device=network.device).to(network.dtype)

    def keys_of(heads: int, width: int) -> torch.Tensor:
        passages = draw(heads, -(-num_tokens // PASSAGE_TOKENS), 1).mul(PASSAGE_SPREAD).sub(PASSAGE_SPREAD**2).exp()
        lengths = passages.repeat_interleave(PASSAGE_TOKENS, 1)[:, :num_tokens]
        return draw(heads, num_tokens, width).mul_(lengths)

    def layer(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        linear = model.linear_in(index)
        if linear is not None:
            states = draw(linear.num_value_heads, linear.key_dim, linear.value_dim)
            return draw(linear.conv_width, linear.conv_tokens), states.float()
        latent = model.latent
        widths = (model.head_dim, model.head_dim) if latent is None else (latent.kv_rank, latent.rope_dim)
        return keys_of(model.num_kv_heads, widths[0]), draw(model.num_kv_heads, num_tokens, widths[1])

    def indexer_keys(index: int) -> torch.Tensor | None:
        indexer = model.indexer_in(index)
        return None if indexer is None else keys_of(1, indexer.head_dim)[0]

    kv, logits = tuple(map(layer, range(model.num_layers))), draw(model.vocab_size)
    return Prompt(kv, logits, num_tokens, tuple(map(indexer_keys, range(model.num_layers))) if model.indexer else ())


def random_text(network: Network, batch: int, *, seed: int = 0) -> Iterator[torch.Tensor]:
    """Tokens `[batch]` of one step after another, without end."""
    source = torch.Generator(network.device).manual_seed(seed)
    while True:
        yield torch.randint(network.spec.vocab_size, (batch,), generator=source, device=network.device)
