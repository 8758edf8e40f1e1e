"""How a sweep scales from one worker to two: elapsed and CPU time of the same simulations. Ends with one JSON line.

Elapsed time is what scaling is about, and other load on the machine spoils it. So the CPU time of each worker is read
too (Linux): the busiest worker's is what the sweep takes where every worker has a core of its own. Workers are warm
(started, scene loaded) when measuring begins; what starting takes is told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import clo_sim
from clo import presets
from clo_sim.scene import Scene
from clo_sim.variation import Task
from clo_sim.workers import TYPICAL_S, WORTH_STARTING_S, LocalPool, Workers

ENOUGH_TO_START = 1 + int(WORTH_STARTING_S / TYPICAL_S["clock"])
"""Evaluations on the clock that workers are started for."""


def tasks_of(count: int, level: str) -> list[Task]:
    """Designs of which each needs a replay of its own, as neighbours in a search over tau do."""
    base = presets.load_design("clo")
    return [
        Task(design=base.with_fields(tau=0.4 + 0.5 * number / count), level="simpy" if level == "simpy" else "clock")
        for number in range(count)
    ]


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, seconds (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    # user and system time are the 14th and 15th field of the line
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(scene: Scene, tasks: list[Task], num_workers: int) -> dict[str, float]:
    """Elapsed seconds of `tasks` on warm workers, and CPU seconds of the busiest worker, of all, and our own."""
    pool, start = LocalPool(scene, num_workers), time.perf_counter()
    with Workers(scene, pool) as workers:
        warm = [Task(design=task.design, level="clock") for task in tasks[:1]] * ENOUGH_TO_START
        assert len(list(workers.run(warm))) == len(warm)
        started, own = time.perf_counter(), time.process_time()
        before = {pid: cpu_seconds(pid) for pid in pool.pids}
        done = list(workers.run(tasks))
        elapsed, own = time.perf_counter() - started, time.process_time() - own
        spent = [cpu_seconds(pid) - already for pid, already in before.items()]
    assert sorted(number for number, _ in done) == list(range(len(tasks)))
    assert all(one.runs for _, one in done)
    return {
        "elapsed_s": round(elapsed, 2),
        "busiest_worker_cpu_s": round(max(spent), 2),
        "all_workers_cpu_s": round(sum(spent), 2),
        "own_cpu_s": round(own, 2),
        "start_s": round(started - start, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=60)
    parser.add_argument("--level", choices=("clock", "simpy"), default="simpy")
    parser.add_argument("--repeats", type=int, default=3, help="the best of each counts: other load can only slow down")
    args = parser.parse_args()
    scene, tasks = clo_sim.make_scene(), tasks_of(args.tasks, args.level)
    report: dict[str, object] = {"tasks": args.tasks, "level": args.level}
    runs: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    for repeat in range(args.repeats):
        for count, seen in runs.items():
            seen.append(measure(scene, tasks, count))
            print(f"{count} worker(s), run {repeat + 1}: {seen[-1]}")
    for name in ("elapsed_s", "busiest_worker_cpu_s"):
        one, two = (min(seen[name] for seen in runs[count]) for count in (1, 2))
        report[f"speedup_by_{name}"] = round(one / two, 2)
    print(json.dumps(report | {"runs": runs}))


if __name__ == "__main__":
    main()
