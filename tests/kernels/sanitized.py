"""Runs operations once each, small, for a memory checker to watch: `python sanitized.py [operation ...]`.

Those that know of vectors that are key and value in one, with such vectors too.
"""

import sys
from dataclasses import replace

import torch

from clo_kernels_bench.correctness import cases, verdict, verdicts_of_shared_vectors
from clo_kernels_bench.problems import Sizes


def main(names):
    """All operations, or those named."""
    torch.manual_seed(0)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    sizes = Sizes(
        device=device, batch=2, kv_heads=2, head_dim=64, num_pages=64, budget=12, slots=20, dtype=torch.float16
    )
    chosen = {name: case for name, case in cases(sizes).items() if not names or name in names}
    found = [verdict(name, "watched", *case) for name, case in chosen.items()]
    shared = replace(sizes, group=20, head_dim=48, value_dim=32)
    found += [one for one in verdicts_of_shared_vectors(shared, "watched, shared vectors") if one.operation in chosen]
    print(*found, sep="\n")
    return 0 if found and all(one.passed for one in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
