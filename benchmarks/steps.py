"""How many decode steps a CPU second of one core simulates, and how the cost grows. Ends with one JSON line.

`make bench` runs it. Process time is counted, not wall time; preparation (replay, recording, pricing) is told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import clo_sim
from clo import presets
from clo.specs import Design, ModelSpec
from clo_sim.clock import step_seconds
from clo_sim.priced import PricedStep, StepShape, price_step
from clo_sim.scene import Scene
from clo_sim.simulator import run_simpy
from clo_sim.synthetic import fit_synthetic

CONTEXT_TOKENS, BATCH = 131072, 16


def cpu_seconds(work: Callable[[], object]) -> float:
    """Process time of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def best_rate(steps: int, work: Callable[[], object], repeats: int) -> float:
    """Steps per CPU second: the best of some repeats, since other load can only slow a repeat down."""
    return steps / min(cpu_seconds(work) for _ in range(repeats))


def scene_for(model: ModelSpec | str, steps: int, source: clo_sim.TrafficSource) -> Scene:
    """The main job's scene with this many measured steps."""
    workload = clo_sim.make_scene(source=source).workload.with_fields(
        context_tokens=CONTEXT_TOKENS, batch=BATCH, steps=steps, warmup_steps=32
    )
    return clo_sim.make_scene(model, workload=workload, source=source)


def simpy_rate(priced: PricedStep, repeats: int) -> float:
    """Steps per CPU second on the simulator, everything from building the device to the collected times included."""
    return best_rate(priced.num_steps, lambda: run_simpy(priced), repeats)


def clock_rate(scene: Scene, designs: list[Design], repeats: int) -> float:
    """Steps per CPU second over a sweep of designs with one schedule: pricing and evaluation of each, traffic given."""
    plans = [scene.plan(design) for design in designs]
    shapes = [StepShape.of_plan(plan) for plan in plans]
    priced = [scene.priced(plan) for plan in plans]

    def evaluate() -> None:
        for shape, known in zip(shapes, priced, strict=True):
            step_seconds(price_step(shape, known.pricer, known.traffic))

    return best_rate(sum(one.num_steps for one in priced), evaluate, repeats)


def growth(source: clo_sim.TrafficSource, steps: int) -> dict[str, dict[str, float]]:
    """Microseconds of CPU per simulated step against layers, KV heads and measured steps."""
    base = presets.load_model("llama-3-8b")
    models = {
        "layers": {str(count): base.with_fields(num_layers=count) for count in (16, 32, 64)},
        "kv_heads": {str(count): base.with_fields(num_kv_heads=count) for count in (4, 8, 16)},
    }
    result = {
        what: {value: _microseconds(model, steps, source) for value, model in variants.items()}
        for what, variants in models.items()
    }
    result["steps"] = {str(count): _microseconds(base, count, source) for count in (steps // 16, steps // 4, steps)}
    return result


def _microseconds(model: ModelSpec, steps: int, source: clo_sim.TrafficSource) -> float:
    # a machine large enough that no variant runs out of memory: only the number of operations should matter
    machine = presets.load_machine("h200")
    roomy = machine.with_fields(
        gpu=machine.gpu.model_dump() | {"memory_bytes": 1e13}, host=machine.host.model_dump() | {"memory_bytes": 1e13}
    )
    scene = scene_for(model, steps, source)
    scene = clo_sim.make_scene(model, roomy, workload=scene.workload, source=source)
    priced = scene.priced(scene.plan(presets.load_design("clo").with_fields(slot_budgets=2.0)))
    return round(1e6 / simpy_rate(priced, 2), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="measured steps")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-growth", action="store_true", help="skip the growth table")
    args = parser.parse_args()
    print(f"generating a synthetic trace of {args.steps + 32} steps from the recorded one ...")
    trace = fit_synthetic(presets.load_trace()).generate(num_steps=args.steps + 32)
    source = clo_sim.TrafficSource(trace)
    scene = scene_for("llama-3-8b", args.steps, source)
    design = presets.load_design("clo")
    report: dict[str, object] = {"layers": 32, "steps": args.steps, "design": design.name}
    prepare = cpu_seconds(lambda: scene.priced(scene.plan(design)))
    print(f"preparing (replay, recording, pricing): {prepare:.2f} CPU seconds")
    report["simpy_steps_per_cpu_s"] = round(simpy_rate(scene.priced(scene.plan(design)), args.repeats))
    print(f"simulator: {report['simpy_steps_per_cpu_s']} steps per CPU second")
    sweep = [design.with_fields(num_ctas=ctas) for ctas in (4, 8, 16, 32, 64)]
    report["clock_steps_per_cpu_s"] = round(clock_rate(scene, sweep, args.repeats))
    print(f"clock, over a sweep of {len(sweep)} designs: {report['clock_steps_per_cpu_s']} steps per CPU second")
    if not args.no_growth:
        report["simpy_us_per_step"] = growth(source, args.steps)
        for what, values in report["simpy_us_per_step"].items():  # type: ignore[attr-defined]
            print(f"us per simulated step against {what}: " + ", ".join(f"{k}: {v}" for k, v in values.items()))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
