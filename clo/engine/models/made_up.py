"""Which kind of `transformers` model has a shape, and the fields of its config. Knows nothing about weights."""

from __future__ import annotations

from typing import Any

from clo.errors import SpecError
from clo.specs import ExpertsSpec, IndexerSpec, LatentSpec, ModelSpec
from clo.specs.hf_attention import LINEAR, WINDOWED

FULL = "full_attention"


def library_kind(spec: ModelSpec) -> tuple[str, dict[str, Any]]:
    """The library's name of a kind of model built as `spec` says, and those fields of its config that others have not.

    Raises `SpecError` where the decoder, or the library, has none.
    """
    experts, own = spec.experts, {}
    if spec.indexer is not None and spec.latent is None:
        raise SpecError(
            f"model {spec.name}: an indexer without latent attention is simulated only: the real decoder has none"
        )
    if spec.latent is not None:
        heads = _latent(spec, spec.latent)
        return ("DeepseekV3", heads) if spec.indexer is None else _indexed(spec, spec.indexer, heads)
    if spec.head_dim % 2:
        raise SpecError(f"model {spec.name}: head_dim = {spec.head_dim}: rotary positions need an even one")
    if spec.gated_attention and spec.windowed_layers:
        raise SpecError(
            f"model {spec.name}: windows together with gated attention are simulated only: no such model of the "
            "library is known here"
        )
    if spec.linear is not None or spec.gated_attention:
        return "Qwen3Next", _hybrid(spec)
    if spec.windowed_layers:
        own = {"sliding_window": spec.window_tokens, "layer_types": _kinds(spec, spec.windowed_layers, WINDOWED)}
        if experts is None:
            return "Qwen3", own | {"use_sliding_window": True}
        if experts.shared_intermediate_size:
            return "Qwen2Moe", own | {"use_sliding_window": True} | _mixture(spec, experts)
        if spec.num_expert_layers < spec.num_layers:
            raise SpecError(
                f"model {spec.name}: windows together with layers without experts, and no shared expert in the others, "
                "are simulated only: no such model of the library is known here"
            )
        routed = {"num_local_experts": experts.num_experts, "intermediate_size": experts.intermediate_size}
        return "GptOss", own | routed | {"num_experts_per_tok": experts.experts_per_token}
    if experts is None:
        # a Llama's hidden size must be a multiple of its query heads
        return ("Qwen3" if spec.hidden_size % spec.num_query_heads else "Llama"), own
    return ("Qwen2Moe" if experts.shared_intermediate_size else "Qwen3Moe"), _mixture(spec, experts)


def _latent(spec: ModelSpec, latent: LatentSpec) -> dict[str, Any]:
    experts = spec.experts
    if latent.rope_dim % 2:
        raise SpecError(f"model {spec.name}: latent.rope_dim = {latent.rope_dim}: rotary positions need an even one")
    heads = {
        "num_key_value_heads": spec.num_query_heads,
        "kv_lora_rank": latent.kv_rank,
        "q_lora_rank": latent.query_rank or None,
        "qk_rope_head_dim": latent.rope_dim,
        "qk_nope_head_dim": latent.nope_dim,
        "v_head_dim": latent.value_dim,
        # what the library turns by the position
        "head_dim": latent.rope_dim,
    }
    if experts is None:
        return heads | {"first_k_dense_replace": spec.num_layers}
    shared, each = experts.shared_intermediate_size, experts.intermediate_size
    if experts.layers:
        raise SpecError(
            f"model {spec.name}: latent attention with experts in layers of your choice (experts.layers) is simulated "
            "only: no such model of the library is known here"
        )
    if not shared or shared % each:
        raise SpecError(
            f"model {spec.name}: latent attention with a shared expert of other than a multiple of "
            f"{each} (experts.shared_intermediate_size = {shared}) is simulated only: no such model of the library is "
            "known here"
        )
    return heads | {
        "n_routed_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "moe_intermediate_size": each,
        "n_shared_experts": shared // each,
        "first_k_dense_replace": experts.dense_layers,
        # a step costs the same whatever the groups that a router looks at
        "n_group": 1,
        "topk_group": 1,
    }


def _indexed(spec: ModelSpec, indexer: IndexerSpec, heads: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    own = {"index_n_heads": indexer.num_heads, "index_head_dim": indexer.head_dim, "index_topk": indexer.top_tokens}
    if not indexer.shared_layers:
        return "DeepseekV32", heads | own
    kinds = ["shared" if layer in indexer.shared_layers else "full" for layer in range(spec.num_layers)]
    return "GlmMoeDsa", heads | own | {"indexer_types": kinds}


def _mixture(spec: ModelSpec, experts: ExpertsSpec) -> dict[str, Any]:
    shared = experts.shared_intermediate_size
    return {
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "moe_intermediate_size": experts.intermediate_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(spec.num_layers) if spec.experts_in(layer) is None],
    } | ({"shared_expert_intermediate_size": shared} if shared else {})


def _hybrid(spec: ModelSpec) -> dict[str, Any]:
    linear, experts = spec.linear, spec.experts
    if not spec.gated_attention or (experts is not None and not experts.shared_intermediate_size):
        raise SpecError(
            f"model {spec.name}: linear attention without a gate in the other layers, or with experts none of which is "
            "shared, is simulated only: no such model of the library is known here"
        )
    states = (
        {}
        if linear is None
        else {
            "linear_num_key_heads": linear.num_key_heads,
            "linear_num_value_heads": linear.num_value_heads,
            "linear_key_head_dim": linear.key_dim,
            "linear_value_head_dim": linear.value_dim,
            "linear_conv_kernel_dim": linear.conv_tokens,
        }
    )
    kinds = _kinds(spec, () if linear is None else linear.layers, LINEAR)
    routed = {"num_experts": 0, "mlp_only_layers": []} if experts is None else _mixture(spec, experts)
    return {"layer_types": kinds} | states | routed


def _kinds(spec: ModelSpec, others: tuple[int, ...], name: str) -> list[str]:
    return [name if layer in others else FULL for layer in range(spec.num_layers)]
