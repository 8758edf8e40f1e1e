"""What clock and simulator report of their steps. Knows nothing about how the times came about.

The main stream's time is split without rest: busy time by part, what contention added, and stalls by cause. Their sum
is TPOT.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from clo.schedule.machine import Cause, Lane

Times = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """What an executor reports for each step. All arrays are `[steps]`, seconds.

    `gaps` is the main stream's idle time by the cause it waited for (its last gap, to the end of the step, counts as
    sync); `main_busy` is how long its operations really took, `main_alone` how long they take when nothing contends.
    """

    seconds: Times
    gaps: dict[Cause, Times]
    main_busy: Times
    main_alone: Times
    lane_busy: dict[Lane, Times] = field(default_factory=dict)
