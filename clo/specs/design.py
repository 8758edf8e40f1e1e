"""An offloading design as orthogonal choices. Knows nothing about models, machines or time."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from clo.specs.base import Spec


class Attend(StrEnum):
    """Which tokens a head attends to."""

    FULL = "full"
    SPARSE = "sparse"


class Selector(StrEnum):
    """How pages are scored: what index of the keys stays on the device. `indexer`: the model's own."""

    EXACT = "exact"
    PAGE_MINMAX = "page_minmax"
    PAGE_MEAN = "page_mean"
    KEY_4BIT = "key_4bit"
    SIGN_HASH = "sign_hash"
    INDEXER = "indexer"


class PageCoding(StrEnum):
    """How pages are kept on the host and in slots: as computed, or with 8 bits a value and a step for every 16."""

    NONE = "none"
    INT8 = "int8"


class Cache(StrEnum):
    """What becomes of fetched pages after the step."""

    RESIDENT = "resident"
    NONE = "none"
    LRU = "lru"
    HEAD_REUSE = "head_reuse"


class OnMiss(StrEnum):
    """What a head that must select anew fetches: all of its new set, or what is not resident yet."""

    REPLACE = "replace"
    DIFF = "diff"


class PrefetchQuery(StrEnum):
    """The query that chooses what is prefetched."""

    LAYER_AHEAD = "layer_ahead"
    PREVIOUS_STEP = "previous_step"


class GqaFold(StrEnum):
    """How the cosines of a group's query heads become one decision."""

    MEAN = "mean"
    MIN = "min"
    IMPORTANCE = "importance"


class Transfer(StrEnum):
    """Who moves a page from the host to its slot."""

    PAGE_COPIES = "page_copies"
    STAGED = "staged"
    CPU_ZERO_COPY = "cpu_zero_copy"
    GPU_ZERO_COPY = "gpu_zero_copy"


class Sync(StrEnum):
    """Who orders transfers and kernels."""

    HOST = "host"
    EVENTS = "events"
    FLAGS = "flags"
    GRAPH = "graph"


class ResolveOn(StrEnum):
    """Where residency is looked up and eviction is decided."""

    GPU = "gpu"
    CPU = "cpu"


class Design(Spec):
    """One way to decode with the KV cache on the host. Every field is a choice that can be swept on its own."""

    name: str = Field(default="custom", description="how reports call it")
    description: str = Field(default="", description="what it stands for, in a line")
    attend: Attend = Field(default=Attend.SPARSE, description="attend to every token, or to a budget of pages")

    selector: Selector = Field(default=Selector.KEY_4BIT, description="what scores the pages")
    page_size: PositiveInt = Field(default=16, description="tokens in a page, the unit of storage and transfer")
    page_coding: PageCoding = Field(
        default=PageCoding.NONE,
        description="how pages are kept on the host and in slots; sinks, window and what is dense stay as computed",
    )
    budget_fraction: float = Field(default=0.1, gt=0, le=1, description="pages attended, as a share of the context")
    budget_pages: PositiveInt | None = Field(default=None, description="pages attended; overrides budget_fraction")
    min_budget_pages: PositiveInt = Field(
        default=1,
        description="the least that budget_fraction comes to: a share of a short prompt is little for a long answer",
    )
    num_sink_tokens: NonNegativeInt = Field(
        default=4, description="first tokens, always resident; the real decoder keeps and attends their whole page"
    )
    recent_window_tokens: PositiveInt = Field(default=64, description="last tokens, always resident")

    cache: Cache = Field(default=Cache.HEAD_REUSE, description="what becomes of fetched pages")
    tau: float = Field(
        default=0.8, ge=-1, le=2, description="a head is reused while cosine(query, anchor) >= tau; above 1: never"
    )
    target_hit_rate: float | None = Field(
        default=None, gt=0, lt=1, description="choose tau per head so that it is reused this often; overrides tau"
    )
    tau_importance_power: float = Field(
        default=0.0,
        ge=0,
        le=4,
        description="more important heads are renewed sooner: tau of a KV head is 1 - (1 - tau) / importance ** power",
    )
    gqa_fold: GqaFold = Field(default=GqaFold.MEAN, description="how a group's query heads decide together")
    on_miss: OnMiss = Field(default=OnMiss.DIFF, description="fetch the whole new set, or only what is missing")
    slot_pages: PositiveInt | None = Field(default=None, description="cache size: pages a KV head keeps on the device")
    slot_budgets: float | None = Field(
        default=None, ge=1, description="cache size as a multiple of the budget; neither set: all memory that is left"
    )
    resolve_on: ResolveOn = Field(default=ResolveOn.GPU, description="where residency and eviction are decided")

    pinned_head_fraction: float = Field(
        default=0.0, ge=0, le=1, description="share of KV heads, those that would move most, kept whole on the device"
    )
    dense_layers: NonNegativeInt = Field(
        default=2, description="first layers kept on the device, attended in full; streamed designs have none"
    )

    prefetch_depth: int = Field(default=1, ge=0, le=2, description="layers ahead that transfers start")
    prefetch_query: PrefetchQuery = Field(default=PrefetchQuery.LAYER_AHEAD, description="what predicts the selection")

    transfer: Transfer = Field(default=Transfer.GPU_ZERO_COPY, description="who moves a page into its slot")
    num_ctas: PositiveInt = Field(default=16, description="thread blocks of a zero-copy kernel")
    transfer_threads: PositiveInt = Field(default=8, description="CPU threads that gather, write or submit copies")
    sync: Sync = Field(default=Sync.GRAPH, description="who orders transfers and kernels")

    @field_validator("budget_pages", "target_hit_rate", "slot_pages", "slot_budgets", mode="before")
    @classmethod
    def _left_open(cls, value: Any) -> Any:
        return None if value in ("fit", "none", "null", "") else value

    @model_validator(mode="after")
    def _consistent(self) -> Design:
        _require(
            self.slot_pages is None or self.slot_budgets is None,
            "slot_pages and slot_budgets both set the cache size: set one",
        )
        _require(
            self.attend is Attend.SPARSE or self.cache in (Cache.RESIDENT, Cache.NONE),
            f"attend = full needs every page in every step: cache must be resident or none, not {self.cache}",
        )
        streams = self.attend is Attend.FULL and self.offloads
        _require(
            not streams or self.transfer is Transfer.PAGE_COPIES,
            f"attend = full streams whole layers by the copy engine: transfer must be page_copies, not {self.transfer}",
        )
        _require(
            not streams or self.sync in (Sync.EVENTS, Sync.GRAPH),
            f"attend = full has no page list that a host could wait for: sync must be events or graph, not {self.sync}",
        )
        _require(
            self.attend is Attend.SPARSE or self.page_coding is PageCoding.NONE,
            f"attend = full has no slots that coded pages could be read from: page_coding must be none, not "
            f"{self.page_coding}",
        )
        _require(
            self.prefetch_query is PrefetchQuery.LAYER_AHEAD or self.cache is Cache.LRU,
            f"prefetch_query = previous_step attends pages of the last step: cache must be lru, not {self.cache}",
        )
        _require(
            self.target_hit_rate is None or not self.tau_importance_power,
            "target_hit_rate and tau_importance_power both set tau per head: set one",
        )
        _require(
            self.num_sink_tokens <= self.page_size,
            f"num_sink_tokens = {self.num_sink_tokens} must fit the first page of {self.page_size} tokens",
        )
        return self

    @property
    def selects(self) -> bool:
        """Whether pages are scored and chosen at all."""
        return self.attend is Attend.SPARSE

    @property
    def asks_indexer(self) -> bool:
        """Whether the model's own indexer chooses."""
        return self.selects and self.selector is Selector.INDEXER

    @property
    def offloads(self) -> bool:
        """Whether KV lives on the host."""
        return self.cache is not Cache.RESIDENT

    @property
    def gated(self) -> bool:
        """Whether a cosine gate decides, per KV head, if a set is reused."""
        return self.cache is Cache.HEAD_REUSE or self.speculates_last_step

    @property
    def tau_by_head(self) -> bool:
        """Whether heads have thresholds of their own, which come from a head profile."""
        return self.gated and (self.target_hit_rate is not None or self.tau_importance_power > 0)

    @property
    def folds_by_importance(self) -> bool:
        """Whether the gate weighs a group's query heads, by a head profile."""
        return self.gated and self.gqa_fold is GqaFold.IMPORTANCE

    def as_without_head_profile(self) -> Design:
        """The same with one threshold for all heads and plain means, as it runs where nothing is known of heads."""
        if not self.gated:
            return self
        return self.with_fields(target_hit_rate=None, tau_importance_power=0.0, gqa_fold=GqaFold.MEAN)

    @property
    def speculates_last_step(self) -> bool:
        """Whether a step attends the pages that the previous step's query chose, corrected where it drifted."""
        return self.prefetch_query is PrefetchQuery.PREVIOUS_STEP

    @property
    def prefetches(self) -> bool:
        """Whether transfers start before the layer that needs them."""
        return self.offloads and (self.prefetch_depth > 0 or self.speculates_last_step)

    @property
    def codes_pages(self) -> bool:
        """Whether pages are rounded to fewer bits."""
        return self.page_coding is not PageCoding.NONE

    @property
    def prefetches_layers(self) -> bool:
        """Whether they start while an earlier layer of the same step computes."""
        return self.prefetches and not self.speculates_last_step

    @property
    def replaces_sets(self) -> bool:
        """Whether a head that keeps a set fetches all of a new one, resident or not."""
        return self.cache is Cache.HEAD_REUSE and self.on_miss is OnMiss.REPLACE

    @property
    def cpu_moves(self) -> bool:
        """Whether CPU threads take part in every transfer."""
        return self.transfer is not Transfer.GPU_ZERO_COPY


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
