"""What a decoder refuses before it begins: designs, head profiles and tokens that do not fit. Changes nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clo.engine.cuda.bar import is_installed as bar_is_installed
from clo.engine.heads import HeadProfile
from clo.engine.models.network import Network
from clo.errors import SpecError
from clo.specs import Attend, Design, ModelSpec, Selector, Sync, Transfer


def check_design(design: Design, heads: HeadProfile | None) -> None:
    """Raise `SpecError` for what needs a head profile that is not given, or whole layers where heads are streamed."""
    if design.tau_by_head and (heads is None or heads.tau is None):
        field = "tau_importance_power" if design.target_hit_rate is None else "target_hit_rate"
        raise SpecError(
            f"design.{field}: thresholds per head come from a head profile: give heads (see "
            "clo.engine.heads.heads_for), or set tau"
        )
    if design.folds_by_importance and (heads is None or heads.importance is None):
        raise SpecError(
            "design.gqa_fold = importance: the weights come from a head profile: give heads (see "
            "clo.engine.heads.heads_for), or choose mean"
        )
    if design.attend is Attend.FULL and design.offloads and design.pinned_head_fraction:
        raise SpecError("design.pinned_head_fraction: the decoder streams whole layers: set it to 0")


def check_device(design: Design, heads: HeadProfile, device: torch.device) -> None:
    """Raise `SpecError` for what cannot run on a CUDA device: it is simulated only, or needs the host in every step."""
    if device.type != "cuda":
        return
    if stores_through_bar(design) and not bar_is_installed(device):
        raise SpecError(
            "design.transfer = cpu_zero_copy: CPU stores through the PCIe BAR need GDRCopy (libgdrapi and its driver), "
            "which is not installed: here this is simulated only: choose gpu_zero_copy, page_copies or staged"
        )
    if design.sync is not Sync.GRAPH:
        return
    if design.selects and design.selector is Selector.EXACT:
        raise SpecError(
            "design.selector = exact reads lengths on the host in every layer, which a recorded graph cannot: "
            "choose another selector, or sync = events"
        )
    if heads.refresh_rate is not None:
        raise SpecError("heads.refresh_rate: a recorded graph cannot ask the host's clock: choose design.sync = events")


def check_alike(network: Network, lengths: Sequence[int]) -> None:
    """Raise `SpecError` for a batch of texts of which the model rotates some otherwise than the others."""
    if not lengths:
        return
    alike = network.longest_alike(min(lengths))
    if alike != network.longest_alike(max(lengths)):
        raise SpecError(
            f"prompts of {min(lengths)} to {max(lengths)} tokens: {network.spec.name} rotates those of more than "
            f"{alike} tokens differently: decode them in a batch of their own"
        )


def check_shared_choices(model: ModelSpec, design: Design) -> None:
    """Raise `SpecError` where pages would be fetched for a layer before the one whose choice it shares has chosen."""
    if design.asks_indexer and design.prefetches_layers and model.indexer is not None and model.indexer.shared_layers:
        raise SpecError(
            f"design.prefetch_depth = {design.prefetch_depth}: layer {model.indexer.shared_layers[0]} of {model.name} "
            "shares the choice of a layer before it, which is made too late to fetch ahead: set it to 0 (this is "
            "simulated only)"
        )


def check_recordable(
    design: Design, host_sees_experts: bool, device: torch.device, *, host_sees_positions: bool = False
) -> None:
    """Raise `SpecError` where a step would be recorded in which the host must know what was computed."""
    if device.type != "cuda" or design.sync is not Sync.GRAPH:
        return
    if host_sees_positions:
        raise SpecError(
            "design.sync = graph: before transformers 5.21 the host chooses LongRoPE's factors, which cannot be "
            "recorded: install a newer version, or choose sync = events"
        )
    if host_sees_experts:
        raise SpecError(
            "design.sync = graph: experts that are called one by one cannot be recorded: load the model in bfloat16 "
            'with experts_implementation="grouped_mm", or with "batched_mm", or choose sync = events'
        )


def stores_through_bar(design: Design) -> bool:
    """Whether CPU threads write what is fetched into device memory themselves."""
    return design.offloads and design.selects and design.transfer is Transfer.CPU_ZERO_COPY


def check_tokens(tokens: torch.Tensor, what: str, vocab_size: int, count: int | None = None) -> None:
    """Raise `SpecError` for what are no token ids, `count` of them; ids on a device are not looked at."""
    if tokens.ndim != 1 or tokens.is_floating_point() or count not in (None, len(tokens)):
        wanted = "[tokens]" if count is None else f"[{count}], one a sequence"
        raise SpecError(f"{what}: {tokens.dtype} of shape {list(tokens.shape)}, expected integers {wanted}")
    if tokens.device.type == "cpu" and bool(((tokens < 0) | (tokens >= vocab_size)).any()):
        raise SpecError(
            f"{what}: ids from {int(tokens.min())} to {int(tokens.max())}, the model has 0 to {vocab_size - 1}"
        )


def check_heads(heads: HeadProfile, model: ModelSpec) -> None:
    """Raise `SpecError` for a profile of another model."""
    for name, found, count in (
        ("tau", heads.tau, model.num_kv_heads),
        ("importance", heads.importance, model.num_query_heads),
    ):
        if found is not None and tuple(found.shape) != (model.num_layers, count):
            raise SpecError(f"heads.{name}: shape {list(found.shape)}, {model.name} has {[model.num_layers, count]}")
