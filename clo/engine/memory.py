"""How much memory a KV cache takes here, and whether there is that much. Knows nothing about what it is for."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from clo.engine import containers
from clo.engine.layers.offloaded import slots_and_budget
from clo.engine.prefill import prefill_bytes
from clo.errors import SpecError
from clo.plan import DecodePlan
from clo.specs import Attend, GpuSpec, HostSpec, LinkSpec, MachineSpec, ModelSpec, Selector
from clo.units import format_bytes
from clo_kernels.layout import ring_rows
from clo_kernels.page_index import IndexKind, entry_shape

STATED = "CLO_HOST_MEMORY_BYTES"
MEMINFO, STATM = Path("/proc/meminfo"), Path("/proc/self/statm")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheBytes:
    """What the layers of a batch take, and what reading a prompt takes beside them while it lasts."""

    device: float
    host: float
    prefill: float
    host_layers: int

    @property
    def pinned(self) -> float:
        """What pinned host memory takes: torch gives it in powers of two, and each layer has its own."""
        layer = math.ceil(self.host / max(1, self.host_layers))
        return float(self.host_layers << max(0, layer - 1).bit_length()) if layer else 0.0


def cache_bytes(plan: DecodePlan, max_tokens: int) -> CacheBytes:
    """With room for `max_tokens` a sequence. Without page tables and scores, which are small."""
    model, batch = plan.model, plan.workload.batch
    sparse, windowed = len(plan.sparse_layers), len(model.windowed_layers)
    whole, dense = batch * max_tokens * model.layer_token_bytes, len(model.whole_layers) - sparse
    in_windows = windowed * batch * min(max_tokens, model.window_tokens or 0) * model.layer_token_bytes
    others = in_windows + batch * (_state_bytes(model) + _indexer_bytes(plan, max_tokens))
    reading = prefill_bytes(plan, plan.workload.context_tokens)
    if plan.design.attend is Attend.FULL:
        device = (dense + sparse) * whole + others
        return CacheBytes(device=device, host=sparse * whole, prefill=reading, host_layers=sparse)
    pages = math.ceil(max_tokens / plan.design.page_size)
    device = others + dense * whole + sparse * batch * _offloaded_bytes(plan, max_tokens, pages)
    offloaded = sparse if plan.design.offloads else 0
    host = offloaded * batch * pages * model.num_kv_heads * plan.page_bytes
    return CacheBytes(device=device, host=host, prefill=reading, host_layers=offloaded)


def _indexer_bytes(plan: DecodePlan, max_tokens: int) -> float:
    """What a model's own indexers keep of one sequence, in what the model runs in."""
    if not plan.design.asks_indexer:
        return 0.0
    kept = [plan.model.indexer_in(layer) for layer in plan.sparse_layers]
    return max_tokens * plan.model.kv_bytes_per_value * sum(each.head_dim for each in kept if each is not None)


def _state_bytes(model: ModelSpec) -> float:
    """What layers with linear attention keep of one sequence as the library does it.

    States in float32 whatever a config says, and beside them as many tokens as the convolution spans.
    """
    linear = model.linear
    if linear is None:
        return 0.0
    conv = linear.conv_tokens * linear.conv_width * model.kv_bytes_per_value
    return model.num_linear_layers * (4.0 * linear.value_width * linear.key_dim + conv)


def _offloaded_bytes(plan: DecodePlan, max_tokens: int, pages: int) -> float:
    """Device bytes of one sequence in a layer that selects pages."""
    model, design, size = plan.model, plan.design, plan.design.page_size
    slots, _ = slots_and_budget(plan, pages)
    tokens = size + ring_rows(design.recent_window_tokens + 1, size)
    exact = design.selector is Selector.EXACT
    index = 0.0
    if not design.asks_indexer:
        kind = IndexKind.PAGE_MEAN if exact else IndexKind(design.selector.value)
        value_bytes = 4 if kind.of_tokens else model.kv_bytes_per_value
        index = pages * math.prod(entry_shape(kind, size, model.head_dim)) * value_bytes
    keys = max_tokens * model.head_dim * model.kv_bytes_per_value if exact else 0.0
    per_head = tokens * model.head_token_bytes + slots * plan.page_bytes + index + keys
    return model.num_kv_heads * per_head + plan.pinned_heads_per_layer * max_tokens * model.head_token_bytes


def check_weights(model: ModelSpec, device: torch.device) -> None:
    """Raise `SpecError` where all the memory that a CPU has, or is said to have, does not hold the weights."""
    if device.type != "cuda" and model.weight_bytes >= host_memory_bytes():
        said = f" ({STATED})" if stated_host_bytes() else ""
        raise SpecError(
            f"model {model.name}: its weights take {format_bytes(model.weight_bytes)}, this machine has "
            f"{format_bytes(host_memory_bytes())} of memory{said}: choose a smaller model"
        )


def check_memory(plan: DecodePlan, device: torch.device, max_tokens: int) -> None:
    """Raise `SpecError` that says what is needed, what is available and what to change, before anything is taken."""
    needed = cache_bytes(plan, max_tokens)
    on_device = needed.device + needed.prefill
    if device.type == "cuda":
        _check(plan, max_tokens, "device memory", on_device, available_device_bytes(device))
        _check(plan, max_tokens, "pinned host memory", needed.pinned, available_host_bytes())
    else:
        # a CPU's "device" is the host's memory too
        _check(plan, max_tokens, "host memory", on_device + needed.host, available_host_bytes())


def _check(plan: DecodePlan, max_tokens: int, what: str, needed: float, available: float) -> None:
    if needed > available:
        raise SpecError(f"{explain_need(plan, max_tokens, what, needed)}, {format_bytes(available)} are available")


def explain_need(plan: DecodePlan, max_tokens: int, what: str = "", needed: float | None = None) -> str:
    """What the batch needs, and what to change so that it needs less."""
    every, work = cache_bytes(plan, max_tokens), plan.workload
    total = every.device + every.prefill + every.host if needed is None else needed
    slots = "" if plan.design.attend is Attend.FULL else ", design.slot_budgets or slot_pages"
    return (
        f"design {plan.design.name}: the KV cache of {work.batch} prompts of up to {work.context_tokens} tokens with "
        f"max_new_tokens = {max_tokens - work.context_tokens} needs {format_bytes(total)} of {what or 'memory'} "
        f"(read fewer or shorter prompts at once, or lower max_new_tokens{slots})"
    )


def stated_host_bytes() -> float | None:
    """`CLO_HOST_MEMORY_BYTES`: for machines whose operating system does not know, such as a virtual one whose memory
    grows as it is used. Raises `SpecError` for what is no number of bytes."""
    stated = os.environ.get(STATED)
    if not stated:
        return None
    try:
        found = float(stated)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise SpecError(f"{STATED} = {stated}: must be a number of bytes, such as 120e9")
    return found


def host_memory_bytes() -> float:
    """All of the host's memory: as stated, or as the operating system reports it, up to a container's limit."""
    reported = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return stated_host_bytes() or min(reported, containers.limit_bytes())


def _taken_bytes() -> float:
    """What this process holds in memory now, where the system tells."""
    try:
        return float(STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0.0


def available_host_bytes() -> float:
    """What can be taken without pushing anything out: what is stated, less what this process has, or what the operating
    system estimates, up to what a container leaves."""
    if stated := stated_host_bytes():
        return max(0.0, stated - _taken_bytes())
    return min(_estimated_bytes(), containers.room_bytes())


def _estimated_bytes() -> float:
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return host_memory_bytes()


def available_device_bytes(device: torch.device) -> float:
    """Free on a CUDA device, with what its allocator keeps for later."""
    free, _ = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def local_machine(device: torch.device) -> MachineSpec:
    """This machine's memory, for plans; rates are not known without calibration and are not used."""
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else host_memory_bytes()
    return MachineSpec(
        name=f"this machine ({device.type})",
        source="as reported by the operating system",
        profile="none",
        gpu=GpuSpec(memory_bytes=float(memory), num_sms=1, hbm_bytes_per_s=1.0, peak_flops_per_s=1.0),
        link=LinkSpec(h2d_bytes_per_s=1.0, d2h_bytes_per_s=1.0),
        host=HostSpec(memory_bytes=host_memory_bytes(), memory_bytes_per_s=1.0, num_threads=torch.get_num_threads()),
        reserve_bytes=0.0,
    )
