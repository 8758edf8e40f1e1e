"""Decode steps of a Llama-3-8B shape with 128K tokens under several designs, on a CUDA device: `python3
benchmarks/decode_designs.py --out decode.json`; of another shape with `--model`. **Not yet run on a GPU.**

Random weights, and a made-up context and text, the same for every design; pages turn over about as fast as with a real
model (clo/engine/random_weights.py). What offloads keeps one budget of pages on the device: all would fit. For each
design: TPOT of steps whose operations are not timed (median, 10th and 90th percentile of all in the file), bytes over
the link, what share of a pinned copy's rate that is, and, from further steps with times, what the main stream waited
for. A design that does not fit, or fails, is named with the reason. Where the memory is too small for all layers there
are fewer: the file says how many.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clo import presets
from clo.engine.decoder import Decoder
from clo.engine.measure import go_on, run_steps
from clo.engine.models.network import Network
from clo.engine.prompts import Prompt
from clo.engine.random_weights import need_device, random_model, random_prompt, random_text
from clo.engine.run import result_of
from clo.errors import CloError
from clo.specs import Design, ModelSpec
from clo.specs.cut import first_layers

CONTEXT = 130_816
"""With the tokens that follow at most 2**17: pinned memory comes in powers of two."""
SPARE = 128
DESIGNS = ("resident", "resident-sparse", "clo", "clo-v2", "resolve", "streamed", "lru-cpu", "staged", "recall")
"""What others are compared with comes first, the slowest last: time may run out. Those whose pages are on the host come
after each other: pinned memory is taken once. `clo-v2` needs GDRCopy: without it the file names it among those left
out."""
COPY_BYTES = 256 << 20


def main() -> int:
    """Write the file anew after each design."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results as JSON")
    parser.add_argument("--seconds", type=float, default=300, help="begin no design after this (default 300)")
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens before the first step")
    parser.add_argument("--model", default="llama-3-8b", help="preset: only its shape")
    parser.add_argument("--layers", type=int, help="the first layers only (default: as many as fit)")
    parser.add_argument("--steps", type=int, default=16, help="steps to measure, after three more")
    parser.add_argument(
        "--slot-budgets",
        type=float,
        default=1.0,
        help="pages that offloading designs keep on the device, in budgets (default 1: else all would fit in the end)",
    )
    options = parser.parse_args()
    need_device("cuda")
    end = time.monotonic() + options.seconds
    device = torch.device("cuda", 0)
    memory = 0.85 * torch.cuda.get_device_properties(device).total_memory
    shape = fitting(presets.load_model(options.model), options.context, memory, options.layers)
    network = Network(random_model(shape, dtype=torch.bfloat16, device=device), shape.name)
    prompt = random_prompt(network, options.context)
    link = copy_rate(device)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device),
        "model": shape.name,
        "layers": shape.num_layers,
        "context_tokens": options.context,
        "pinned_copy_bytes_per_s": link,
        "designs": [],
        "left_out": [],
    }
    lost = ""
    for name in DESIGNS:
        if lost or time.monotonic() > end:
            report["left_out"].append(f"{name}: {lost or 'no time left'}")
            continue
        try:
            design = sized(presets.load_design(name, shape), options.slot_budgets)
            row = measured(network, design, prompt, options.steps, link)
        except (CloError, RuntimeError) as error:
            report["left_out"].append(f"{name}: {str(error).splitlines()[0]}")
            print(report["left_out"][-1], flush=True)
        else:
            report["designs"].append(row)
            print(line(row), flush=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        lost = "" if returned(device) else f"the device was lost at {name}"
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if report["designs"] else 1


def sized(design: Design, slot_budgets: float) -> Design:
    """With slots of so many budgets, if pages are on the host."""
    return design.as_without_head_profile().with_fields(**({"slot_budgets": slot_budgets} if design.offloads else {}))


def returned(device: torch.device) -> bool:
    """Give memory back; whether the device still works."""
    gc.collect()
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(f"the device was lost: {str(error).splitlines()[0]}", flush=True)
        return False
    return True


def fitting(shape: ModelSpec, context: int, memory: float, most: int | None = None) -> ModelSpec:
    """The first layers, `most` of them or as many as leave room for the prompt and a copy of it in `memory`."""
    fewest = shape.whole_layers[0] + 1
    for layers in range(min(shape.num_layers, most or shape.num_layers), fewest, -1):
        smaller = first_layers(shape, layers)
        if smaller.weight_bytes + 2.5 * layers * context * shape.layer_token_bytes < memory:
            return smaller
    return first_layers(shape, fewest)


def copy_rate(device: torch.device) -> float:
    """Bytes a second of the best of ten copies of pinned memory."""
    here = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    best = 0.0
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        there.copy_(here, non_blocking=True)
        end.record()
        torch.cuda.synchronize(device)
        best = max(best, COPY_BYTES / start.elapsed_time(end) * 1e3)
    return best


def measured(network: Network, design: Design, prompt: Prompt, steps: int, link: float) -> dict[str, Any]:
    """One design: first without times of operations, then, going on with the same sequences, with them."""
    with Decoder(network, design, max_new_tokens=SPARE, timed=False) as decoder:
        text = random_text(network, 1)
        plain = run_steps(decoder, [prompt], steps=steps, warmup_steps=3, text=text)
        decoder.time_operations(True)
        timed = go_on(decoder, text, steps=max(2, steps // 4))
    seconds, result = plain.step_s, result_of(timed)
    moved = float(plain.traffic.spec_pages.sum() + plain.traffic.demand_pages.sum()) * plain.plan.page_bytes / steps
    tpot = float(np.median(seconds))
    return {
        "design": design.name,
        "sync": str(design.sync),
        "offloads": design.offloads,
        "slot_pages": plain.plan.slot_pages,
        "budget_pages": plain.plan.budget_pages,
        "tpot_s": tpot,
        "tpot_p10_s": float(np.percentile(seconds, 10)),
        "tpot_p90_s": float(np.percentile(seconds, 90)),
        "samples_s": seconds.tolist(),
        "h2d_bytes_per_step": moved,
        "pcie_utilisation": moved / tpot / link,
        "hit_rate": plain.traffic.hit_rate,
        "timed_tpot_s": result.tpot_s,
        "stalls_s": result.stall_s,
        "busy_s": result.busy_s,
        "kv_device_bytes": result.kv_device_bytes,
    }


def line(row: dict[str, Any]) -> str:
    """For people."""
    stalls = ", ".join(f"{cause} {seconds * 1e3:.2f}" for cause, seconds in row["stalls_s"].items() if seconds > 1e-5)
    return (
        f"{row['design']:16} {row['sync']:6} TPOT {row['tpot_s'] * 1e3:8.2f} ms  link {row['pcie_utilisation']:5.1%}  "
        f"{row['h2d_bytes_per_step'] / 1e6:8.1f} MB a step  stalls, ms: {stalls or 'none'}"
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CloError as error:
        sys.exit(f"decode_designs: {error}")
