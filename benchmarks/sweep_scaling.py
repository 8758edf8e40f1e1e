"""How a sweep scales from one worker to two: elapsed and CPU time of the same simulations. Ends with one JSON line.

Elapsed time is what scaling is about, and other load on the machine spoils it; so CPU time is reported too: what two
workers spend against one says how much of the work they do twice. Workers are warm (started, and past one replay) when
the clock starts; what starting takes is told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import clo_sim
from clo import presets
from clo_sim.scene import Scene
from clo_sim.variation import Task
from clo_sim.workers import LocalPool, Workers

# as in /proc/stat: time that the cores spent on anything, anyone's
_BUSY_FIELDS = slice(0, 3)


def tasks_of(count: int, level: str) -> list[Task]:
    """Designs of which each needs a replay of its own, as neighbours in a search over tau do."""
    base = presets.load_design("clo")
    return [
        Task(design=base.with_fields(tau=0.4 + 0.5 * number / count), level="simpy" if level == "simpy" else "clock")
        for number in range(count)
    ]


def children_cpu_s() -> float:
    """CPU time of workers that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def machine_busy_s() -> float:
    """CPU time of everybody on this machine since it started (Linux), seconds."""
    with open("/proc/stat") as file:
        fields = [int(value) for value in file.readline().split()[1:]]
    return sum(fields[_BUSY_FIELDS]) / os.sysconf("SC_CLK_TCK")


def measure(scene: Scene, tasks: list[Task], num_workers: int) -> dict[str, float]:
    """Elapsed and CPU seconds of `tasks` on warm workers, and what others took of the machine meanwhile."""
    before = children_cpu_s()
    start = time.perf_counter()
    with Workers(scene, LocalPool(scene, num_workers)) as workers:
        warm = [Task(design=task.design.with_fields(tau=0.3 + 0.01 * n)) for n, task in enumerate(tasks[:4])] * 40
        assert len(list(workers.run(warm))) == len(warm)
        started, warm_busy = time.perf_counter(), machine_busy_s()
        times = [one.tpot_s for _, one in sorted(workers.run(tasks), key=lambda pair: pair[0])]
        elapsed, busy = time.perf_counter() - started, machine_busy_s() - warm_busy
    assert len(times) == len(tasks)
    return {
        "elapsed_s": round(elapsed, 2),
        "start_s": round(started - start, 2),
        "worker_cpu_s": round(children_cpu_s() - before, 2),
        "machine_busy_s": round(busy, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=60)
    parser.add_argument("--level", choices=("clock", "simpy"), default="simpy")
    parser.add_argument("--repeats", type=int, default=3, help="the best of each counts: other load can only slow down")
    args = parser.parse_args()
    scene, tasks = clo_sim.make_scene(), tasks_of(args.tasks, args.level)
    report: dict[str, object] = {"tasks": args.tasks, "level": args.level}
    best: dict[int, float] = {}
    for repeat in range(args.repeats):
        for count in (1, 2):
            seen = measure(scene, tasks, count)
            best[count] = min(best.get(count, seen["elapsed_s"]), seen["elapsed_s"])
            report[f"workers_{count}_run_{repeat + 1}"] = seen
            print(f"{count} worker(s), run {repeat + 1}: {seen}")
    report["speedup"] = round(best[1] / best[2], 2)
    print(f"two workers against one: {report['speedup']} times as fast")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
