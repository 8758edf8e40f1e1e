"""Evaluations on workers that may die, here and on a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor
from typing import Any

import pytest
from commands import CLO as COMMAND
from questions import EXPLORE, explored, many, numbers

from clo.errors import CloError
from clo_sim.evaluation import evaluate
from clo_sim.scene import Scene
from clo_sim.workers import MAX_DEATHS, LocalPool, Workers


class CountingPool(LocalPool):
    """Counts how often workers had to be started."""

    starts = 0

    def start(self) -> tuple[Executor, Any]:
        self.starts += 1
        return super().start()


class DeadPool:
    """Workers that cannot live."""

    lost: tuple[type[Exception], ...] = (BrokenExecutor,)
    size, starts = 2, 0

    def start(self) -> tuple[Executor, Any]:
        self.starts += 1
        raise BrokenExecutor("killed")

    def stop(self) -> None:
        pass


class TestWorkers:
    def test_a_killed_worker_loses_nothing(self, scene: Scene) -> None:
        tasks = many(40)
        pool, found = CountingPool(scene, 2), []
        with Workers(scene, pool) as workers:
            for number, one in workers.run(tasks):
                if not found:
                    os.kill(pool.pids[0], signal.SIGKILL)
                found.append((number, one))
        assert pool.starts == 2, "the kill came too late to matter"
        assert sorted(number for number, _ in found) == list(range(len(tasks)))
        here = [evaluate(scene, task) for task in tasks]
        assert numbers([one for _, one in sorted(found, key=lambda pair: pair[0])]) == numbers(here)

    def test_workers_that_always_die_are_given_up(self, scene: Scene) -> None:
        pool = DeadPool()
        with pytest.raises(CloError, match="workers died 3 times without finishing any of 20"):
            list(Workers(scene, pool).run(many(20)))
        assert pool.starts == MAX_DEATHS

    def test_little_work_starts_no_workers(self, scene: Scene) -> None:
        pool = DeadPool()
        local = CountingPool(scene, 2)
        assert len(list(Workers(scene, local).run(many(3)))) == 3
        assert len(list(Workers(scene, pool).run(many(1)))) == 1
        assert (local.starts, pool.starts) == (0, 0)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed", reason="Dask comes with the cluster extra")
    local = distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
    yield local
    local.close()


class TestCluster:
    def test_two_real_workers_of_which_one_is_killed(self, cluster: Any, scene: Scene) -> None:
        from clo_sim.workers import DaskPool

        tasks, found = many(60), []
        victim = next(iter(cluster.workers.values())).pid
        with Workers(scene, DaskPool(scene, cluster.scheduler_address)) as workers:
            for number, one in workers.run(tasks):
                if not found:
                    os.kill(victim, signal.SIGKILL)
                found.append((number, one))
        assert sorted(number for number, _ in found) == list(range(len(tasks)))
        here = [evaluate(scene, task) for task in tasks]
        assert numbers([one for _, one in sorted(found, key=lambda pair: pair[0])]) == numbers(here)

    def test_both_workers_work_and_the_command_agrees(self, cluster: Any) -> None:
        arguments = ["--vary", "tau=0.3,0.5,0.7,0.9", "--vary", "slot_budgets=1,2"]
        there = explored(*arguments, "--cluster", cluster.scheduler_address)
        assert there == explored(*arguments, "--workers", "1")

    @pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "tcp://nowhere"])
    def test_no_scheduler_is_one_line(self, address: str) -> None:
        pytest.importorskip("distributed", reason="Dask comes with the cluster extra")
        command = [*COMMAND, *EXPLORE, "--cluster", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert f"--cluster {address}: " in done.stderr
