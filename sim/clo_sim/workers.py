"""Where evaluations run: in this process, in worker processes of this machine, or on a Dask cluster.

Results come as they end. A worker that dies takes only what it was working on with it, and that is handed to another.
Processes and cluster are both `concurrent.futures` executors. (Not through joblib: by its source, 1.6, its Dask backend
never reports a task whose workers died for good, so a sweep would wait.) Knows nothing about which tasks are worth it.
"""

from __future__ import annotations

import os
import pickle
import re
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from clo.errors import CloError
from clo_sim.evaluation import Evaluation, evaluate
from clo_sim.scene import Scene
from clo_sim.variation import Task

TYPICAL_S = {"clock": 0.02, "simpy": 0.2}
"""CPU seconds of one evaluation, roughly (128 replayed steps of 32 layers, caches of replays cold)."""
WORTH_STARTING_S = 4.0
"""Less work than this is done here: workers take seconds of CPU time to start and to replay what others have too."""
MAX_DEATHS = 3
"""So often in a row may all that is under way be lost before the workers are given up."""

_CHUNKS_PER_WORKER = 4
_LARGEST_CHUNK = 16

Numbered = list[tuple[int, Task]]
Done = list[tuple[int, Evaluation]]


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pool(Protocol):
    """Workers behind an executor of `concurrent.futures`."""

    lost: tuple[type[Exception], ...]

    def start(self) -> tuple[Executor, Any]:
        """An executor with live workers, and what `evaluate_chunk` there takes as its scene."""

    @property
    def size(self) -> int:
        """How many tasks run at the same time."""

    def stop(self) -> None:
        """End the workers; tasks not begun are dropped."""


class Workers:
    """Evaluates tasks in `pool`, in this process where there is none or so little to do that it does not pay."""

    def __init__(self, scene: Scene, pool: Pool | None = None) -> None:
        self.scene = scene
        self._pool = pool
        self._started: tuple[Executor, Any] | None = None

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Evaluation]]:
        """Each task's place and evaluation, once, in whatever order they end."""
        if self._pool is None or not self._pays(tasks):
            return ((number, evaluate(self.scene, task)) for number, task in enumerate(tasks))
        return self._spread(self._pool, list(enumerate(tasks)))

    def _pays(self, tasks: Sequence[Task]) -> bool:
        if self._started is not None or not isinstance(self._pool, LocalPool):
            return len(tasks) > 1
        return sum(TYPICAL_S.get(task.level, 0.0) for task in tasks) >= WORTH_STARTING_S

    def _spread(self, pool: Pool, todo: Numbered) -> Iterator[tuple[int, Evaluation]]:
        deaths = 0
        while todo:
            before = len(todo)
            done: set[int] = set()
            for chunk in self._round(pool, todo):
                done.update(number for number, _ in chunk)
                yield from chunk
            todo = [item for item in todo if item[0] not in done]
            deaths = 0 if len(todo) < before else deaths + 1
            if deaths == MAX_DEATHS:
                raise CloError(
                    f"workers died {deaths} times without finishing any of {len(todo)} evaluations (memory?)"
                )

    def _round(self, pool: Pool, todo: Numbered) -> Iterator[Done]:
        """Hand out everything; chunks whose worker died are missing, and the workers are started anew."""
        died = False
        try:
            if self._started is None:
                self._started = pool.start()
            executor, scene = self._started
            futures = [executor.submit(evaluate_chunk, scene, part) for part in chunks(todo, pool.size)]
        except pool.lost:
            futures, died = [], True
        for future in as_completed(futures):
            try:
                done: Done = future.result()
            except pool.lost:
                died = True
            else:
                yield done
        if died:
            self.close()

    def close(self) -> None:
        """End the workers; the next tasks start new ones."""
        if self._pool is not None:
            self._pool.stop()
        self._started = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def chunks(todo: Numbered, workers: int) -> list[Numbered]:
    """Neighbours, which share replays, in pieces: simulations one by one, clock runs a few at a time."""
    if any(task.level == "simpy" for _, task in todo):
        size = 1
    else:
        size = max(1, min(_LARGEST_CHUNK, len(todo) // (_CHUNKS_PER_WORKER * workers)))
    return [todo[start : start + size] for start in range(0, len(todo), size)]


class LocalPool:
    """Worker processes of this machine."""

    lost: tuple[type[Exception], ...] = (BrokenExecutor,)

    def __init__(self, scene: Scene, num_workers: int) -> None:
        self.size = num_workers
        self._scene = scene
        self._executor: ProcessPoolExecutor | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def start(self) -> tuple[Executor, Any]:
        """Processes that know the scene by a file: it is large, and each reads it once."""
        self._folder = tempfile.TemporaryDirectory(prefix="clo-")
        path = Path(self._folder.name) / "scene.pickle"
        path.write_bytes(pickle.dumps(self._scene))
        # spawned, not forked: a fork of a process with threads (progress bar, BLAS) may inherit a held lock
        self._executor = ProcessPoolExecutor(self.size, mp_context=get_context("spawn"), initializer=_enter_worker)
        return self._executor, StoredScene(str(path))

    @property
    def pids(self) -> list[int]:
        """The workers' process ids."""
        return list(self._executor._processes) if self._executor else []

    def stop(self) -> None:
        """End the processes as soon as each is done with its chunk."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
        if self._folder is not None:
            self._folder.cleanup()
        self._executor = self._folder = None


_ADDRESS = re.compile(r"([a-z]+://)?[^/\s]+:\d+")


class DaskPool:
    """The workers of a Dask cluster that is already there. Raises `CloError` where there is none at the address."""

    def __init__(self, scene: Scene, address: str) -> None:
        self._distributed = _import_distributed()
        # OSError: the connection, or waiting for a worker, timed out
        self.lost: tuple[type[Exception], ...] = (
            CancelledError,
            OSError,
            self._distributed.scheduler.KilledWorker,
            self._distributed.client.FutureCancelledError,
        )
        self._scene, self._address = scene, address
        self._client: Any = self._connect()
        self._executor: Executor | None = None

    def _connect(self) -> Any:
        where = f"--cluster {self._address}"
        if not _ADDRESS.fullmatch(self._address):
            raise CloError(f"{where}: expected the address of a scheduler, e.g. tcp://10.0.0.1:8786")
        try:
            client = self._distributed.Client(self._address, timeout=10, set_as_default=False)
        except (OSError, ValueError, TypeError) as error:
            raise CloError(f"{where}: no Dask scheduler answers: {' '.join(str(error).split())}") from None
        try:
            if not client.ncores():
                raise CloError(f"{where}: the scheduler has no workers: start some with `dask worker {self._address}`")
            client.run(_import_evaluation)
        except ImportError as error:
            client.close()
            raise CloError(f"{where}: its workers need clo-offload installed ({error})") from None
        except BaseException:
            client.close()
            raise
        return client

    @property
    def size(self) -> int:
        """Workers at this moment."""
        return max(1, len(self._client.ncores()))

    def start(self) -> tuple[Executor, Any]:
        """The cluster as an executor; every worker gets the scene once."""
        self._client = self._client or self._connect()
        executor: Executor = self._client.get_executor(pure=False)
        self._executor = executor
        return executor, self._client.scatter(self._scene, broadcast=True)

    def stop(self) -> None:
        """Drop what is not done and leave; the workers are not ours and stay."""
        if self._executor is not None:
            self._executor.shutdown(wait=False)
        if self._client is not None:
            self._client.close()
        self._client = self._executor = None


def _import_distributed() -> Any:
    try:
        import distributed
    except ImportError:
        raise CloError('--cluster needs Dask: pip install "clo-offload[cluster]"') from None
    return distributed


def _import_evaluation() -> None:
    import clo_sim.evaluation  # noqa: F401


@dataclass(frozen=True, slots=True)
class StoredScene:
    """A pickled scene's file."""

    path: str


_ONE_AT_A_TIME = threading.Lock()


def evaluate_chunk(scene: Scene | StoredScene, todo: Numbered) -> Done:
    """Runs in a worker; a scene keeps its replays from chunk to chunk."""
    # a Dask worker may have several threads: they gain nothing here, and a scene's replays are not made for them
    with _ONE_AT_A_TIME:
        known = _load(scene.path) if isinstance(scene, StoredScene) else scene
        return [(number, evaluate(known, task)) for number, task in todo]


@lru_cache(maxsize=1)
def _load(path: str) -> Scene:
    scene: Scene = pickle.loads(Path(path).read_bytes())
    return scene


def _enter_worker() -> None:
    """Ctrl-C is for the process that collects the results; when that is gone, so are its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
