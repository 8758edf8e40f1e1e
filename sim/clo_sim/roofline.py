"""The least that must move in a step, and how long the links take for that. Knows nothing about order or caches' rules.

Device memory: every weight a step uses once (as many experts as in the mean), the attended keys and values once, and
states of linear attention in and out.
Host link: what no cache of the plan's size can avoid fetching for the exact selection (Belady, with the measured steps
known in advance). Compute: dense products and attention at the datasheet rate.
"""

from __future__ import annotations

from clo.plan import DecodePlan
from clo.results import Roofline
from clo.specs import Attend
from clo.table_prices import FP8_BYTES, has_4bits
from clo_sim.stand_in import TrafficSource


def roofline(plan: DecodePlan, source: TrafficSource, moved_bytes: float) -> Roofline:
    """Lower bounds for one decode step of `plan`, which moves `moved_bytes` to the device.

    Where reused sets move less than any exact design could, what they move is the bound.
    """
    states = 2 * plan.model.state_bytes * plan.sequences
    hbm_bytes = plan.model.step_weight_bytes(plan.workload.batch) + attended_bytes(plan) + states
    h2d_bytes = min(moved_bytes, fewest_link_bytes(plan, source))
    gpu = plan.machine.gpu
    hbm_s = hbm_bytes / gpu.hbm_bytes_per_s
    h2d_s = h2d_bytes / plan.machine.link.h2d_bytes_per_s
    compute_s = _bf16_flops(plan) / gpu.peak_flops_per_s
    return Roofline(
        hbm_bytes=hbm_bytes,
        hbm_s=hbm_s,
        h2d_bytes=h2d_bytes,
        h2d_s=h2d_s,
        compute_s=compute_s,
        seconds=max(hbm_s, h2d_s, compute_s),
    )


def attended_bytes(plan: DecodePlan) -> float:
    """Keys and values that attention reads in a step, bytes."""
    coded = len(plan.sparse_layers) * plan.attended_tokens * (plan.model.num_kv_heads - plan.pinned_heads_per_layer)
    saved = coded * (plan.model.kv_bytes_per_value - plan.attended_bytes_per_value) * plan.model.head_token_values
    return (sum(_attended_tokens(plan)) * plan.model.head_token_bytes - saved) * plan.sequences


def fewest_link_bytes(plan: DecodePlan, source: TrafficSource) -> float:
    """Bytes host to device that no cache of this size avoids."""
    if not plan.design.offloads:
        return 0.0
    if plan.design.attend is Attend.FULL:
        tokens, heads = plan.workload.context_tokens, plan.offloaded_heads
        return len(plan.sparse_layers) * heads * tokens * plan.model.head_token_bytes
    return source.fewest_fetched_pages(plan) * plan.page_bytes


def _attended_tokens(plan: DecodePlan) -> list[float]:
    """Tokens attended in each layer, summed over its KV heads, one sequence."""
    heads, pinned, context = plan.model.num_kv_heads, plan.pinned_heads_per_layer, plan.workload.context_tokens
    sparse = float((heads - pinned) * plan.attended_tokens + pinned * context)
    return [
        sparse if plan.is_sparse(layer) else float(heads * plan.model.attended_at_most(layer, context))
        for layer in range(plan.model.num_layers)
    ]


def _bf16_flops(plan: DecodePlan) -> float:
    """Arithmetic of a step; what runs with fp8 weights takes half the time and counts half, with 4 bits a quarter.

    The maps of latent attention stay in bf16.
    """
    model, narrow = plan.model, _narrow(plan.model.weight_bytes_per_value)
    head = model.vocab_size * model.hidden_size
    around = model.all_attention_weight_values
    maps = 0 if model.latent is None else model.num_layers * model.latent.map_values(model.num_query_heads)
    behind = _narrow(min(model.mlp_weight_bytes, model.expert_weight_bytes))
    others = head + behind * (model.token_weight_values - head - around)
    attention = sum(_attended_tokens(plan)) * plan.model.group_size * plan.model.attention_flops
    attention += 0.0 if model.linear is None else model.num_linear_layers * model.linear.flops
    return 2 * plan.workload.batch * others + plan.sequences * (2 * (narrow * (around - maps) + maps) + attention)


def _narrow(weight_bytes: float) -> float:
    """Time of arithmetic with such weights, at best, over that of bf16."""
    if has_4bits(weight_bytes):
        return 0.25
    return 0.5 if weight_bytes == FP8_BYTES else 1.0
