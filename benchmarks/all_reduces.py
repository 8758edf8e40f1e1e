"""What GPUs that share a model take to add up hidden states: the figures of docs/tensor-parallel.md.

Of a model as wide as Llama-3-70B, for a decode step of 1, 16 and 64 sequences and for a chunk of 2,048 prompt tokens,
and how fast large sums go over each GPU's links: an all-reduce moves at least `2 (n - 1) / n` of its bytes each way.
"""

from __future__ import annotations

from clo import presets
from clo.kernel_tables import BYTES_PER_VALUE

HIDDEN = 8192
TOKENS = (1, 16, 64, 2048)
LARGE_VALUES = 2.0**28


def main() -> None:
    print(f"| GPU | GPUs |{''.join(f' {tokens} tokens, us |' for tokens in TOKENS)} large sums, GB/s |")
    for name in presets.names("profiles"):
        table = presets.load_named_profile(name).all_reduce
        for gpus in map(int, table.num_gpus):
            times = "".join(f" {1e6 * table.seconds(gpus, tokens * HIDDEN):.1f} |" for tokens in TOKENS)
            moved = 2 * (gpus - 1) / gpus * BYTES_PER_VALUE * LARGE_VALUES
            print(f"| {name} | {gpus} |{times} {moved / table.seconds(gpus, LARGE_VALUES) / 1e9:.0f} |")


if __name__ == "__main__":
    main()
