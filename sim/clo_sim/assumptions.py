"""What a simulated step takes for granted, in words. Knows nothing about how it was simulated."""

from __future__ import annotations

import math

from clo.kernel_scaling import measured_on
from clo.kernel_tables import (
    BYTES_PER_VALUE,
    DecodeAttentionTable,
    ExpertsTable,
    GemmTable,
    LatentAttentionTable,
    LatentMapTable,
)
from clo.operation_costs import OperationProfile
from clo.placement import pinned_heads
from clo.plan import DecodePlan
from clo.pricing import Pricer
from clo.profile import Profile
from clo.specs import Transfer
from clo.table_prices import FP8_BYTES, TablePrices, has_4bits
from clo_sim.priced import PricedStep
from clo_sim.scene import Scene

TIMED_LINEAR_WIDTH, TIMED_STATE_BYTES = 128, 4.0
"""Of keys and values in heads of linear attention, and of a value of their states."""
TIMED_WIDTHS = (
    LatentAttentionTable.KV_RANK,
    LatentAttentionTable.VECTOR_DIM,
    LatentMapTable.HEAD_DIM,
    LatentMapTable.HEAD_DIM,
)


def assumptions_of(scene: Scene, plan: DecodePlan, priced: PricedStep) -> tuple[str, ...]:
    """What traffic and kernel times take for granted, a line each."""
    about = (_table_notes, _weight_notes, _cache_notes, _experts_notes, _latent_notes, _linear_notes)
    tables = [note for notes in about for note in notes(scene)]
    about_plan = (_coding_notes, _sharing_notes, _pinning_notes, _reading_notes)
    return (*priced.traffic.assumptions, *tables, *(note for notes in about_plan for note in notes(scene, plan)))


def _coding_notes(scene: Scene, plan: DecodePlan) -> tuple[str, ...]:
    """Attention that reads coded pages was timed nowhere, and rounding them costs next to nothing."""
    coding, profile = plan.design.page_coding, scene.profile
    if not plan.design.codes_pages:
        return ()
    if isinstance(profile, OperationProfile):
        return (f"{coding} pages are coded and read in the time that their bytes take: {profile.name} timed none",)
    timed = _width_name(_attention_table(scene, profile, plan.attended_bytes_per_value))
    return (f"attention over {coding} pages takes as long as over as many bytes of {timed}; coding a page is free",)


def _experts_notes(scene: Scene) -> tuple[str, ...]:
    """Which experts the tokens of a real model pass is not known."""
    if scene.model.experts is None:
        return ()
    notes = ["every token is sent to experts evenly and independently: real routing is skewed and reads fewer of them"]
    if not isinstance(scene.profile, OperationProfile):
        table = TablePrices(scene.profile, scene.machine).experts(scene.model.expert_weight_bytes)
        if not measured_on(table, scene.machine.gpu):
            notes.append(f"times of experts, measured on {table.device}, grow or shrink as their roofline does")
    return tuple(notes)


def _weight_notes(scene: Scene) -> tuple[str, ...]:
    """Weights that are not bf16 run other kernels, or should."""
    model, profile = scene.model, scene.profile
    if isinstance(profile, OperationProfile):
        return ()
    tables, notes = TablePrices(profile, scene.machine), list[str]()
    shared = model.experts is None or model.experts.shared_intermediate_size
    mlps = bool(shared) or model.num_expert_layers < model.num_layers
    widths = dict.fromkeys((model.weight_bytes_per_value, *([model.mlp_weight_bytes] if mlps else [])))
    products: list[tuple[str, float, GemmTable | ExpertsTable]] = [
        ("weights", width, tables.gemm(width)) for width in widths
    ]
    if model.experts is not None:
        width = model.expert_weight_bytes
        products.append(("experts' weights", width, tables.experts(width)))
    for what, width, table in products:
        if width == BYTES_PER_VALUE:
            continue
        if table.weight_bytes == BYTES_PER_VALUE:
            notes.append(
                f"{what} of {width:g} bytes were not timed: bf16 kernels, scaled along their roofline, are taken"
            )
        else:
            kind = "4-bit" if has_4bits(width) else "fp8"
            notes.append(f"{kind} weights take the fastest {kind} kernels that were timed, whatever scales they need")
    return tuple(dict.fromkeys(notes))


def _sharing_notes(scene: Scene, plan: DecodePlan) -> tuple[str, ...]:
    """Of GPUs that share the model one is simulated."""
    count = scene.machine.tensor_parallel
    if count == 1:
        return ()
    notes = [
        f"the {count} GPUs do alike: bytes, memory and link are of one of them, tokens/s of all, and none waits for "
        "another's transfers"
    ]
    if plan.kv_copies > 1:
        copies = f"each KV head is kept, and its pages are fetched, by {plan.kv_copies} GPUs"
        notes.append(f"{copies}: they are more than heads")
    if plan.machine.deals_sequences:
        notes.append(
            f"each GPU attends for {plan.sequences} sequences; handing out and collecting hidden states take as long "
            "as all-reduces of them"
        )
    table = None if isinstance(scene.profile, OperationProfile) else scene.profile.all_reduce
    if table is not None and not measured_on(table, scene.machine.gpu):
        notes.append(f"an all-reduce takes as long as between {table.device} GPUs")
    return tuple(notes)


def _pinning_notes(scene: Scene, plan: DecodePlan) -> tuple[str, ...]:
    """Heads are pinned whole: where a part of a model has few, that is another share than was asked for."""
    fraction, pinned = plan.design.pinned_head_fraction, plan.pinned_heads_per_layer
    if scene.model.latent is not None:
        kept = "pinned whole" if pinned else "not pinned"
        between = plan.design.offloads and 0.0 < fraction < 1.0
        return (f"pinned_head_fraction = {fraction:g}: all heads share one vector, which is {kept}",) if between else ()
    if plan.kv_heads_of_all // plan.model.num_kv_heads * pinned == pinned_heads(scene.model, plan.design):
        return ()
    return (f"pinned_head_fraction = {fraction:g}: {pinned} of {plan.model.num_kv_heads} KV heads on each GPU",)


def _reading_notes(scene: Scene, plan: DecodePlan) -> tuple[str, ...]:
    """How many thread blocks reading host memory takes was not measured."""
    profile = scene.profile
    if plan.design.transfer is not Transfer.GPU_ZERO_COPY or not plan.design.offloads:
        return ()
    if isinstance(profile, OperationProfile) or profile.zero_copy.source.is_measured:
        return ()
    one, most = profile.zero_copy.rate(1), Pricer(profile, scene.machine).zero_copy_rate(scene.machine.gpu.num_sms)
    enough = math.ceil(most / one)
    return (f"{enough} of the design's {plan.design.num_ctas} thread blocks would be enough to read host memory",)


def _table_notes(scene: Scene) -> tuple[str, ...]:
    """Fitted kernel times belong to the GPU they were measured on; on another one they are carried over."""
    if isinstance(scene.profile, OperationProfile) or measured_on(scene.profile.gemm, scene.machine.gpu):
        return ()
    measured = scene.profile.gemm.device
    return (f"GEMM and attention times, measured on {measured}, grow or shrink as their roofline does to machine.gpu",)


def _cache_notes(scene: Scene) -> tuple[str, ...]:
    """Attention over a cache that is not bf16 runs other kernels."""
    width, profile = scene.model.kv_bytes_per_value, scene.profile
    if width == BYTES_PER_VALUE or isinstance(profile, OperationProfile):
        return ()
    table = _attention_table(scene, profile, width)
    if table.kv_bytes == width:
        return ()
    timed = _width_name(table)
    return (f"attention over a cache of {width:g} bytes a value takes as long as over as many bytes of {timed}",)


def _attention_table(scene: Scene, profile: Profile, width: float) -> DecodeAttentionTable | LatentAttentionTable:
    """Times of the model's attention over a cache of so many bytes a value."""
    prices = TablePrices(profile, scene.machine)
    return prices.decode_attention(width) if scene.model.latent is None else prices.latent_attention(width)


def _width_name(table: DecodeAttentionTable | LatentAttentionTable) -> str:
    """Over caches of what the table was timed."""
    return "fp8" if table.kv_bytes == FP8_BYTES else "bf16"


def _latent_notes(scene: Scene) -> tuple[str, ...]:
    """Who timed latent attention, and that not every width of it was."""
    latent, profile = scene.model.latent, scene.profile
    if latent is None or isinstance(profile, OperationProfile):
        return ()
    notes = []
    table = _attention_table(scene, profile, scene.model.kv_bytes_per_value)
    if table.framework_version != profile.gemm.framework_version:
        whose = f"{table.framework_version}, GEMMs with {profile.gemm.framework_version}"
        notes.append(f"latent attention was timed with kernels of {whose}")
    if scene.machine.tensor_parallel > 1 and not scene.machine.deals_sequences:
        notes.append("every GPU keeps, and fetches, the vectors of latent attention whole: all heads need them")
    widths = (latent.kv_rank, latent.vector_dim, latent.nope_dim, latent.value_dim)
    if widths != TIMED_WIDTHS:
        notes.append(f"latent attention was timed with widths {TIMED_WIDTHS}: others are priced by their bytes")
    return tuple(notes)


def _linear_notes(scene: Scene) -> tuple[str, ...]:
    """What of linear attention was not timed."""
    linear, width = scene.model.linear, TIMED_LINEAR_WIDTH
    if linear is None or isinstance(scene.profile, OperationProfile):
        return ()
    notes = []
    if not linear.key_dim == linear.value_dim == width:
        notes.append(f"linear attention was timed with heads of {width} values: others are priced by their bytes")
    if linear.state_bytes_per_value != TIMED_STATE_BYTES:
        notes.append("linear attention was timed with states in float32: others are priced by their bytes")
    return tuple(notes)
