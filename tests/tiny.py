"""A world small enough to work out on paper: round costs, two layers, two heads, traces written out page by page."""

from __future__ import annotations

from typing import Any

import numpy as np

from clo.kernel_tables import DecodeAttentionTable, GemmTable, LatentAttentionTable, LatentMapTable
from clo.profile import (
    BookkeepingCost,
    CopyCost,
    FixedCost,
    InterferenceCost,
    Profile,
    StreamCost,
    SubmitCost,
    ThreadCost,
    ZeroCopyCost,
)
from clo.specs import Design, GpuSpec, HostSpec, LinkSpec, MachineSpec, ModelSpec, Workload
from clo.trace import AttentionTrace
from clo.trace_header import TraceHeader
from clo.traffic import Traffic
from clo_sim.scene import Scene
from clo_sim.stand_in import TrafficSource

PAGE_SIZE = 4
WINDOW = 4
NO_PAGE = 0xFFFF
NO_TRAFFIC = Traffic(
    **{name: np.zeros((1, 1)) for name in ("spec_heads", "spec_pages", "demand_heads", "demand_pages")},
    **{name: np.zeros((1, 1)) for name in ("write_back_pages", "requested_pages", "reused_heads")},
    heads=1.0,
    overlap=1.0,
)


def tiny_model(**changes: Any) -> ModelSpec:
    """Two layers, two KV heads of one query head, head_dim 2: 16 bytes of KV per token and head in float32."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "num_layers": 2,
        "hidden_size": 4,
        "intermediate_size": 8,
        "num_query_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 2,
        "vocab_size": 16,
        "max_positions": 4096,
        "kv_bytes_per_value": 4.0,
    }
    return ModelSpec(**fields | changes)


def tiny_machine(**changes: Any) -> MachineSpec:
    """One page of a tiny head (64 bytes) takes a second over the link."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "profile": "tiny",
        "gpu": GpuSpec(memory_bytes=1e9, num_sms=10, hbm_bytes_per_s=1e12, peak_flops_per_s=1e15),
        "link": LinkSpec(h2d_bytes_per_s=64.0, d2h_bytes_per_s=64.0),
        "host": HostSpec(memory_bytes=1e9, memory_bytes_per_s=1e12, num_threads=4),
        "reserve_bytes": 0.0,
    }
    return MachineSpec(**fields | changes)


def flat_table(cls: Any, seconds: float) -> Any:
    """A kernel table with one latency in its range, whatever the shape."""
    axes = _AXES[cls]
    shape = tuple(len(values) for values in axes.values())
    grid = np.full(shape, seconds)
    return cls.from_latencies(grid, **axes, hbm_bytes_per_s=1e30, flops_per_s=1e30)


_AXES: dict[Any, dict[str, list[int]]] = {
    GemmTable: {"m": [1, 2**20], "n": [1, 2**20], "k": [1, 2**20]},
    DecodeAttentionTable: {
        "batch": [1, 2**20],
        "num_query_heads": [1, 1024],
        "num_kv_heads": [1, 1024],
        "head_dim": [1, 1024],
        "kv_tokens": [1, 2**24],
    },
    LatentAttentionTable: {"batch": [1, 2**20], "num_query_heads": [1, 1024], "kv_tokens": [1, 2**24]},
    LatentMapTable: {"rows": [1, 2**20], "num_heads": [1, 1024]},
}


def tiny_profile(**changes: Any) -> Profile:
    """A GEMM takes a second, attention two, a small kernel a quarter; transfers only their bytes; launches nothing."""
    assumed = {"source": "assumed"}
    small = StreamCost(latency_s=0.25, efficiency=1.0, **assumed)
    nothing = FixedCost(seconds=0.0, **assumed)
    copy = CopyCost(latency_s=0.0, piece_bytes=[1.0, 1e9], bytes_per_s=[1e30, 1e30], **assumed)
    thread = ThreadCost(per_piece_s=0.0, bytes_per_s_per_thread=64.0, **assumed)
    fields: dict[str, Any] = {
        "name": "tiny",
        "machine": "tiny",
        "date": "2026-01-01",
        "gemm": flat_table(GemmTable, 1.0),
        "decode_attention": flat_table(DecodeAttentionTable, 2.0),
        **dict.fromkeys(("elementwise", "hit_test", "score_pages", "select_pages", "resolve_pages"), small),
        "zero_copy": ZeroCopyCost(latency_s=0.0, in_flight_bytes_per_cta=1e9, round_trip_s=1.0, **assumed),
        "copy_h2d": copy,
        "copy_d2h": copy,
        "submit": SubmitCost(per_call_s=0.0, per_descriptor_s=0.0, **assumed),
        "host_gather": thread,
        "bar_write": thread,
        "bookkeeping": BookkeepingCost(per_head_s=0.0, per_page_s=0.0, **assumed),
        "kernel_launch": nothing,
        "graph_launch": nothing,
        "stream_sync": nothing,
        "read_back": nothing,
        "thread_wake": nothing,
        "doorbell": nothing,
        "ready_flag": nothing,
        "interference": InterferenceCost(per_sm_share=0.0, dma=0.0, **assumed),
    }
    return Profile(**fields | changes)


def make_trace(
    pages: Any,
    *,
    angles: Any = None,
    predicted_pages: Any = None,
    predicted_angles: Any = None,
    context_tokens: int = 48,
    lookaheads: tuple[int, ...] = (1,),
    importance: Any = None,
) -> AttentionTrace:
    """A trace with these page choices `[steps, layers, kv_heads, budget]` and queries at these angles, in degrees.

    Head_dim is 2, so that the cosine of two queries is the cosine of the difference of their angles
    `[steps, layers, query_heads]`; `importance` is `[layers, query_heads]`. Predicted choices and angles, the same for
    every lookahead, default to the real ones.
    """
    chosen = np.asarray(pages, dtype=np.uint16)
    steps, layers, heads, budget = chosen.shape
    real = np.zeros((steps, layers, heads)) if angles is None else np.asarray(angles, dtype=float)
    ahead = real if predicted_angles is None else np.asarray(predicted_angles, dtype=float)
    ahead_pages = chosen if predicted_pages is None else np.asarray(predicted_pages, dtype=np.uint16)
    header = TraceHeader(
        model="tiny",
        num_layers=layers,
        num_query_heads=real.shape[2],
        num_kv_heads=heads,
        head_dim=2,
        page_size=PAGE_SIZE,
        context_tokens=context_tokens,
        num_steps=steps,
        max_budget_pages=budget,
        num_sink_tokens=4,
        recent_window_tokens=WINDOW,
        lookaheads=lookaheads,
        selectors=("exact",),
        group_fold="written by hand",
        text_source="written by hand",
        text_sha256="",
        nll_per_token=0.0,
        recorded_at="2026-01-01",
        versions={},
    )
    return AttentionTrace.from_arrays(
        header,
        queries=_vectors(real),
        lookahead_queries=dict.fromkeys(lookaheads, _vectors(ahead)),
        pages={"exact": chosen},
        lookahead_pages={("exact", distance): ahead_pages for distance in lookaheads},
        resident_mass=np.zeros((steps, layers, heads)),
        head_importance=np.ones(real.shape[1:]) if importance is None else np.asarray(importance, dtype=float),
    )


def _vectors(degrees: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=-1)


def random_trace(seed: int, *, steps: int = 6, layers: int = 3, heads: int = 2, budget: int = 4) -> AttentionTrace:
    """Drifting angles and random choices from a 64-token context's candidates, predicted one and two layers ahead."""
    rng = np.random.default_rng(seed)
    shape = (steps, layers, heads)
    angles = np.cumsum(rng.normal(0, 25, size=shape), axis=0)

    def choices() -> np.ndarray[Any, Any]:
        lists = [rng.permutation(np.arange(1, 15))[:budget] for _ in range(steps * layers * heads)]
        return np.stack(lists).reshape(*shape, budget)

    return make_trace(
        choices(),
        angles=angles,
        predicted_pages=choices(),
        predicted_angles=angles + rng.normal(0, 10, size=shape),
        context_tokens=64,
        lookaheads=(1, 2),
    )


def tiny_scene(trace: AttentionTrace, *, batch: int = 1, steps: int | None = None, **changes: Any) -> Scene:
    """The trace's own model on the tiny machine; every recorded step is measured unless `steps` is given."""
    header = trace.header
    model = tiny_model(
        num_layers=header.num_layers, num_query_heads=header.num_query_heads, num_kv_heads=header.num_kv_heads
    )
    fields: dict[str, Any] = {
        "model": model,
        "machine": tiny_machine(),
        "profile": tiny_profile(),
        "workload": Workload(
            context_tokens=header.context_tokens, batch=batch, steps=steps or header.num_steps, warmup_steps=0
        ),
        "source": TrafficSource(trace),
    }
    return Scene(**fields | changes)


def tiny_design(budget: int, **changes: Any) -> Design:
    """A sparse design over tiny pages, no dense layers."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "selector": "exact",
        "page_size": PAGE_SIZE,
        "recent_window_tokens": WINDOW,
        "budget_pages": budget,
        "dense_layers": 0,
        "prefetch_depth": 0,
        "slot_pages": budget,
    }
    return Design(**fields | changes)
