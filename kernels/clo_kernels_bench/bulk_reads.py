"""What bulk reads of pinned memory reach: the bench runs this in a process of its own (`python bulk_reads.py`).

An address that the hardware refuses takes the device's context with it. Prints figures as JSON. **Not yet run on a
GPU.**
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import torch

from clo_kernels.bulk_gather import bulk_gather
from clo_kernels.gather_pages import gather_pages
from clo_kernels_bench import problems
from clo_kernels_bench.figures import Figure
from clo_kernels_bench.timing import graph_samples
from clo_kernels_bench.transfers import ALL_PROGRAMS, LAUNCH_BYTES, gather_calls, paged, pinned_storage

OPERATION = "gather_pages by bulk reads"
SHAPES = ((8, 4), (8, 16), (64, 4), (64, 16), (64, ALL_PROGRAMS))
"""KiB of a page, and programs."""


def differing_pages(storage: torch.Tensor, device: torch.device, page_kib: int) -> int:
    """How many of a few random pages arrive otherwise than by `gather_pages`."""
    sizes, pages = paged(storage, page_kib, device)
    fetch = problems.fetch_list(sizes, 16)
    slots = torch.zeros((*sizes.rows, 16, *pages.shape[3:]), dtype=pages.dtype, device=device)
    wanted = gather_pages(pages, slots.clone(), fetch).view(torch.int16)
    found = bulk_gather(pages, slots, fetch, num_programs=16).view(torch.int16)
    return int((found != wanted).flatten(3).any(3).sum())


def bulk_figures(device: torch.device) -> Iterator[Figure]:
    """Pages that were seen to arrive, timed as `gather_figures` times them. Raises `RuntimeError` where they do not."""
    storage = pinned_storage(device)
    for page_kib in sorted({page_kib for page_kib, _ in SHAPES}):
        wrong = differing_pages(storage, device, page_kib)
        if wrong:
            raise RuntimeError(f"{wrong} pages of {page_kib} KiB are not what was read")
    for page_kib, programs in SHAPES:
        calls = gather_calls(storage, device, page_kib, programs, LAUNCH_BYTES, gather=bulk_gather)
        yield Figure(
            operation=OPERATION,
            case={"page_KiB": page_kib, "programs": programs, "MiB": LAUNCH_BYTES >> 20},
            samples_us=graph_samples(calls, repeats=10),
            num_bytes=float(LAUNCH_BYTES),
        )


if __name__ == "__main__":
    json.dump([figure.as_json() for figure in bulk_figures(torch.device("cuda", 0))], sys.stdout)
