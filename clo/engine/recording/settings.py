"""What to record of a model. Knows nothing about how."""

from __future__ import annotations

from dataclasses import dataclass

from clo.errors import SpecError
from clo.trace import candidate_pages

SELECTORS = ("exact", "page_minmax")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordSettings:
    """What to record. Tokens and pages; `context_tokens` counts the first recorded step's own token."""

    context_tokens: int
    num_steps: int
    page_size: int = 16
    max_budget_pages: int = 64
    selectors: tuple[str, ...] = SELECTORS
    lookaheads: tuple[int, ...] = (1, 2)
    num_sink_tokens: int = 4
    recent_window_tokens: int = 64

    def __post_init__(self) -> None:
        for name in ("context_tokens", "num_steps", "page_size", "max_budget_pages", "recent_window_tokens"):
            if getattr(self, name) < 1:
                raise SpecError(f"record.{name} = {getattr(self, name)}: must be at least 1")
        if not 0 <= self.num_sink_tokens <= self.page_size:
            raise SpecError(f"record.num_sink_tokens = {self.num_sink_tokens}: must fit the first page")
        if unknown := set(self.selectors) - set(SELECTORS):
            raise SpecError(f"record.selectors: {', '.join(sorted(unknown))}: known are {', '.join(SELECTORS)}")
        if not self.selectors:
            raise SpecError("record.selectors: at least one is needed")
        if any(distance < 1 for distance in self.lookaheads):
            raise SpecError(f"record.lookaheads = {self.lookaheads}: must be layers ahead, at least 1")
        if list(self.lookaheads) != sorted(set(self.lookaheads)):
            raise SpecError(f"record.lookaheads = {self.lookaheads}: must ascend")
        if self.candidates(0) < 1:
            raise SpecError(
                f"record.context_tokens = {self.context_tokens}: no page of {self.page_size} tokens lies between the "
                f"first page and the window of {self.recent_window_tokens} tokens"
            )

    def candidates(self, step: int) -> int:
        """Candidate pages of a step: see `clo.trace.candidate_pages`."""
        return candidate_pages(self.context_tokens + step, self.page_size, self.recent_window_tokens)
