"""How many requests a CPU second of one core serves in simulation, and what a plan costs. Ends with one JSON line.

`make bench` runs it on a load like a published conversation trace (long prompts, short answers, shared prefixes), made
here; `--requests trace.jsonl` takes the trace itself, `--plan` sizes fleets on all machine types as well. Process time
is counted; pricing decode steps is told apart. Before any number it checks that coalescing is exact.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

import clo_sim
from clo import presets
from clo_sim.serving import Request, RequestTrace, ServiceSettings, read_requests, serve, worker_costs

PLAN_DESIGNS = "resident,resident-sparse,streamed,lru-cpu,resolve,clo"


def conversation_like(count: int, *, seed: int = 0) -> RequestTrace:
    """3.4 requests a second; prompts of a median of 7,000 and a mean of 12,000 tokens, answers of 340 on average."""
    rng = np.random.default_rng(seed)
    inputs = np.clip(np.exp(rng.normal(np.log(7000), 1.04, count)), 900, 126_000).astype(int).tolist()
    outputs = np.clip(rng.gamma(2.0, 170.0, count), 1, 2000).astype(int).tolist()
    arrivals = np.cumsum(rng.exponential(1 / 3.4, count) * 1e9).astype(int).tolist()
    rows, talks = [], []
    for arrival, size, output in zip(arrivals, inputs, outputs, strict=True):
        # two of five requests go on with a talk that was there before
        old = talks[int(rng.integers(max(0, len(talks) - 500), len(talks)))] if talks and rng.random() < 0.4 else ()
        blocks = (*old, *range(1_000_000 * len(rows), 1_000_000 * len(rows) + size // 512))[: size // 512]
        talks.append(blocks)
        rows.append(Request(arrival, size, output, tuple(blocks)))
    return RequestTrace("conversation-like", tuple(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=Path, help="a Mooncake JSONL or Azure CSV trace")
    parser.add_argument("--design", default="clo")
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plan", action="store_true", help="also a plan over four machine types and six designs")
    args = parser.parse_args()
    trace = conversation_like(12_000) if args.requests is None else read_requests(args.requests)
    settings = ServiceSettings(gpus=args.gpus)
    costs = worker_costs(clo_sim.make_scene(), presets.load_design(args.design), trace)
    check(trace.first(300), costs, settings)
    cpu_s = []
    for _ in range(args.repeats + 1):
        start = time.process_time()
        run = serve(trace, costs, settings)
        cpu_s.append(time.process_time() - start)
    # the first run prices decode steps as well
    report: dict[str, object] = {
        "requests": len(trace),
        "design": args.design,
        "gpus": args.gpus,
        "serving_requests_per_cpu_s": round(len(trace) / min(cpu_s[1:])),
        "first_run_cpu_s": round(cpu_s[0], 2),
        "decode_steps": sum(replica.tally.decode_steps for replica in run.replicas),
    }
    print(f"{trace.name}: {report['serving_requests_per_cpu_s']} requests per CPU second, {args.gpus} GPUs")
    print(f"the first run, which prices decode steps: {report['first_run_cpu_s']} CPU seconds")
    if args.plan and args.requests is not None:
        report["plan_wall_s"] = round(plan_seconds(args.requests), 1)
        print(
            f"a plan over 4 machine types and 6 designs: {report['plan_wall_s']} s of wall time, {os.cpu_count()} cores"
        )
    print(json.dumps(report))


def check(trace: RequestTrace, costs: object, settings: ServiceSettings) -> None:
    """No speed from wrong numbers: steps taken at once give what they give one by one."""
    together, alone = (serve(trace, costs, one) for one in (settings, replace(settings, coalesce=False)))  # type: ignore[arg-type]
    if together.stamps != alone.stamps:
        sys.exit("coalesced and single decode steps disagree: no speed is reported")


def plan_seconds(requests: Path) -> float:
    """Wall time of the command, the map left out."""
    program = "from clo_cli.main import main; main()"
    arguments = ["plan", "--requests", str(requests), "--slo", "ttft_p95<6s, tpot_p95<50ms", "--designs", PLAN_DESIGNS]
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", program, *arguments, "--no-map"], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start


if __name__ == "__main__":
    main()
