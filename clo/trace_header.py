"""What an attention trace says about itself, and which pages are candidates. Knows nothing about its arrays' codes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from clo.errors import SpecError, TraceError
from clo.specs.base import Spec
from clo.trace_file import NO_PAGE, QUERY_ENCODING

SCHEMA_VERSION = 1


def candidate_pages(tokens: int, page_size: int, recent_window_tokens: int) -> int:
    """How many pages a head may choose from when `tokens` tokens are in the cache: pages 1 to this number.

    Page p covers tokens [p * page_size, (p + 1) * page_size). It is a candidate if it ends before the recent window
    begins (so it is full); page 0, which holds the sinks, is always resident and never a candidate.
    """
    return max(0, (tokens - recent_window_tokens) // page_size - 1)


class TraceHeader(Spec):
    """What was recorded, and how. `context_tokens` counts the tokens attended at the first step, its own included."""

    schema_version: int = SCHEMA_VERSION
    model: str
    num_layers: PositiveInt
    num_query_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    page_size: PositiveInt
    context_tokens: PositiveInt
    num_steps: PositiveInt
    max_budget_pages: PositiveInt = Field(description="longest page list kept")
    num_sink_tokens: NonNegativeInt
    recent_window_tokens: PositiveInt
    lookaheads: tuple[PositiveInt, ...]
    selectors: tuple[str, ...] = Field(min_length=1)
    group_fold: str = Field(description="how the query heads of a group vote on a page")
    text_source: str
    text_sha256: str
    nll_per_token: float = Field(description="mean negative log likelihood of the decoded text, nats")
    recorded_at: str = Field(description="ISO date")
    versions: dict[str, str]
    query_encoding: str = QUERY_ENCODING
    recorded_layers: tuple[NonNegativeInt, ...] = Field(
        default=(), description="which of the model's layers, where others have a window or linear attention; none: all"
    )
    model_layers: PositiveInt | None = Field(default=None, description="layers of the model; none: those recorded")

    @model_validator(mode="after")
    def _consistent(self) -> TraceHeader:
        if self.num_query_heads % self.num_kv_heads:
            raise ValueError("num_query_heads must be a multiple of num_kv_heads")
        if list(self.lookaheads) != sorted(set(self.lookaheads)):
            raise ValueError("lookaheads must ascend")
        if any(distance >= self.layers_of_model for distance in self.lookaheads):
            raise ValueError("lookaheads must be less than the model's layers")
        if any(distance > self.places[-1] for distance in self.lookaheads):
            raise ValueError("lookaheads must predict a recorded layer")
        if len(self.places) != self.num_layers or list(self.places) != sorted(set(self.places)):
            raise ValueError("recorded_layers must name num_layers layers, and ascend")
        if self.places[-1] >= self.layers_of_model:
            raise ValueError("recorded_layers must be less than model_layers")
        if len(set(self.selectors)) != len(self.selectors):
            raise ValueError("selectors must differ")
        if self.num_candidate_pages(0) < 1 or self.num_candidate_pages(self.num_steps - 1) >= NO_PAGE:
            raise ValueError("context_tokens must give at least one candidate page, and fewer than 65535")
        return self

    @property
    def places(self) -> tuple[int, ...]:
        """Which of the model's layers each recorded one is."""
        return self.recorded_layers or tuple(range(self.num_layers))

    @property
    def layers_of_model(self) -> int:
        """Of any kind."""
        return self.model_layers or self.num_layers

    def first_predicted(self, distance: int) -> int:
        """First recorded layer that has an approximate query from `distance` of the model's layers before it."""
        return sum(place < distance for place in self.places)

    @property
    def group_size(self) -> int:
        """Query heads of one KV head."""
        return self.num_query_heads // self.num_kv_heads

    def num_candidate_pages(self, step: int) -> int:
        """Candidate pages at a step: see `candidate_pages`."""
        return candidate_pages(self.context_tokens + step, self.page_size, self.recent_window_tokens)

    @property
    def query_shape(self) -> tuple[int, int, int, int]:
        """[steps, layers, query heads, head_dim]."""
        return (self.num_steps, self.num_layers, self.num_query_heads, self.head_dim)

    @property
    def page_shape(self) -> tuple[int, int, int, int]:
        """[steps, layers, KV heads, max_budget_pages]."""
        return (self.num_steps, self.num_layers, self.num_kv_heads, self.max_budget_pages)

    @property
    def universe(self) -> int:
        """Pages that are a candidate at some step."""
        return self.num_candidate_pages(self.num_steps - 1)

    @property
    def list_shape(self) -> tuple[int, int, int, int]:
        """[entries, steps, layers, KV heads] of a coded page list."""
        return (min(self.max_budget_pages, self.universe), *self.page_shape[:3])


def parse_header(member: NDArray[Any] | None) -> TraceHeader:
    """The header from its member, JSON as bytes. Raises `TraceError` for anything else, or another schema."""
    if member is None or member.dtype != np.uint8:
        raise TraceError("not a trace file: it has no header")
    try:
        data = json.loads(member.tobytes())
        version = data["schema_version"]
    except (ValueError, KeyError, TypeError):
        raise TraceError("not a trace file: its header is not JSON with a schema_version") from None
    if version != SCHEMA_VERSION:
        raise TraceError(
            f"header.schema_version = {version!r}: this version reads {SCHEMA_VERSION} (a newer trace needs a newer "
            "clo-offload)"
        )
    try:
        return TraceHeader.parse(data)
    except SpecError as error:
        raise TraceError(str(error)) from None
