"""What linear attention takes on each GPU, and how far off that is where it was not fitted: docs/kernel-costs.md.

From measurements (`pip install "clo-offload[tables]"`). Beside the share of the memory's rate that the profiles take,
that of TensorRT-LLM's older kernel, and how much too fast the shortest prompts are priced.
"""

from __future__ import annotations

from clo.errors import ProfileError
from clo.profile import ScanCost, StreamCost
from clo_calibration.tables.linear import decode_cost, linear_costs
from clo_calibration.tables.measurements import GPUS, read_hardware, read_linear_decode, read_linear_prefill

SHORT_PROMPT = 128


def main() -> None:
    print("| GPU | decode: latency, share of HBM | TensorRT-LLM's | prefill | up to 128 tokens, at worst |")
    for gpu in GPUS:
        costs = linear_costs(gpu)
        decode, prefill = costs["linear_attention"], costs.get("prefill_linear_attention")
        assert isinstance(decode, StreamCost)
        step = f"{_us(decode.latency_s)}, {decode.efficiency:.0%} ({decode.spread:.1%}, {decode.samples})"
        scan = _scan(gpu, prefill) if isinstance(prefill, ScanCost) else "- | -"
        print(f"| {gpu} | {step} | {_older(gpu)} | {scan} |")


def _older(gpu: str) -> str:
    try:
        samples = read_linear_decode(gpu, framework="trtllm")
    except ProfileError:
        return "-"
    return f"{decode_cost(samples, read_hardware(gpu)['hbm_bytes_per_s']).efficiency:.0%}"


def _scan(gpu: str, cost: ScanCost) -> str:
    each = f"{cost.per_token_s * 1e9:.0f} + {cost.per_head_token_s * 1e9:.2f} ns ({cost.spread:.0%})"
    samples = read_linear_prefill(gpu)
    short = samples.take(samples.points[:, 0] <= SHORT_PROMPT)
    tokens, _, heads = short.points.T
    off = cost.latency_s + tokens * (cost.per_token_s + heads * cost.per_head_token_s)
    return f"{_us(cost.latency_s)}, {each} | {(off / short.seconds - 1.0).min():+.0%}"


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"


if __name__ == "__main__":
    main()
