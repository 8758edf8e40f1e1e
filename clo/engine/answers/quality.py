"""What a design's answers are worth, as a record. Knows nothing about how it is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """One contender against full attention. Bytes and pages are per sequence and decode step.

    `delta_nll` is nats per token above full attention on fed text; its standard error is over texts.
    `agreement`: share of greedily generated tokens that equal full attention's, until the first that does not.
    `top1_agreement`: share of fed tokens at which both find the same token most likely.
    `output_error`, `mass_recalled`: see `Fidelity`; NaN where attention is full.
    `hit_rate`: share of the attended pages that needed no transfer in their step.
    `selections_per_head`: how often a head selected anew in a step, `demand_miss_rate`: of these, too late to prefetch.
    `refetch_bytes_per_step`: if everything attended were fetched in every step. `index_bytes_per_step`: read to select.
    `tau`: the one threshold of all heads, if there is one. `passkey_rate` is `None` where none was asked for.
    """

    design: str
    tau: float | None
    nll: float
    delta_nll: float
    delta_nll_se: float
    delta_nll_by_text: list[float]
    passkey_rate: float | None
    passkeys_found: list[bool]
    agreement: float
    top1_agreement: float
    output_error: float
    mass_recalled: float
    hit_rate: float
    selections_per_head: float
    demand_miss_rate: float
    h2d_bytes_per_step: float
    refetch_bytes_per_step: float
    index_bytes_per_step: float
    context_tokens: int
    budget_pages: int
    slot_pages: int
    steps: int

    def as_record(self) -> dict[str, Any]:
        """For JSON and tables; what is not a number becomes `None`."""
        record = asdict(self)
        return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in record.items()}


def paired(differences: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error of one difference per text. Tokens of one text are not independent, texts are.

    The error is NaN for a single text.
    """
    count = len(differences)
    error = float(np.std(differences, ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return float(np.mean(differences)), error


def compared(records: Sequence[dict[str, Any]], against: str) -> list[dict[str, Any]]:
    """The records with `against`, `delta_against` and `delta_against_se`: the change of NLL from that design."""
    (other,) = [record["delta_nll_by_text"] for record in records if record["design"] == against]
    found = []
    for record in records:
        mean, error = paired(np.subtract(record["delta_nll_by_text"], other).tolist())
        shown = None if math.isnan(error) else error
        found.append({**record, "against": against, "delta_against": mean, "delta_against_se": shown})
    return found
