"""Table of sums over GPUs."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from clo.kernel_tables.table import BYTES_PER_VALUE, Axis, KernelTable


class AllReduceTable(KernelTable):
    """Time until each of `num_gpus` GPUs holds the sum of what all of them have, `num_values` bfloat16 values.

    Timed inside a CUDA graph. Where the GPUs have no link of their own, what they send takes from the host link. More
    GPUs bring more links: large sums can take them less time.
    """

    ARGUMENTS: ClassVar[tuple[str, ...]] = ("num_gpus", "num_values")
    MAY_FALL: ClassVar[tuple[str, ...]] = ("num_gpus",)

    num_gpus: Axis
    num_values: Axis
    over_host_link: bool = Field(default=False, description="whether the GPUs reach each other by the host link only")

    def roofline_seconds(self, num_gpus: Any, num_values: Any) -> Any:
        """What was there is read once, the sum is written once; links between GPUs are not in the datasheet's rates."""
        return 2.0 * BYTES_PER_VALUE * num_values / self.hbm_bytes_per_s
