"""The transfer threads' side of a CUDA step: one thread that serves doorbells in order and submits copies.

What an operation splits among more threads is its own affair. Knows nothing about streams or how a step is launched.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from clo.engine.faults import FailedOperationError
from clo.errors import EngineError
from clo.schedule import Op, Token

EAGER_S = 50e-3
"""So long a poll only gives way to other threads; after that it sleeps between looks."""
SLEEP_S = 50e-6


def poll(ready: Callable[[], bool], patience_s: float) -> bool:
    """Whether `ready` came true in time. Other Python threads run between looks."""
    began = time.perf_counter()
    while not ready():
        waited = time.perf_counter() - began
        if waited > patience_s:
            return False
        time.sleep(0 if waited < EAGER_S else SLEEP_S)
    return True


@dataclass(slots=True)
class Errand:
    """Something for the transfer threads: after `is_asked`, if there is one, `do` it.

    `do` may return an event: then the operations of `tokens` beyond the first are done when it has happened.
    """

    op: Op
    tokens: tuple[Token, ...]
    do: Callable[[], Any]
    is_asked: Callable[[], bool] | None = None


@dataclass(slots=True)
class Ledger:
    """Which of the threads' operations of one step are done, and which sites are answered with them."""

    publish: Callable[[int], None]
    release: Callable[[], None]
    failure: BaseException | None = None
    _done: set[Token] = field(default_factory=set)
    _sites: dict[Token, set[int]] = field(default_factory=dict)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def announce(self, token: Token, site: int) -> None:
        """Answer `site` once `token` is done."""
        with self._changed:
            if token not in self._done:
                self._sites.setdefault(token, set()).add(site)
                return
        self.publish(site)

    def finish(self, token: Token) -> None:
        """`token` is done."""
        with self._changed:
            self._done.add(token)
            sites = self._sites.pop(token, set())
            self._changed.notify_all()
        for site in sites:
            self.publish(site)

    def wait(self, token: Token, patience_s: float) -> bool:
        """Whether `token` was done in time, or the step has failed."""
        with self._changed:
            return self._changed.wait_for(lambda: token in self._done or self.failure is not None, patience_s)

    def fail(self, error: BaseException) -> None:
        """Nobody is to wait for anything more; the first failure is the one that is told."""
        with self._changed:
            self.failure = self.failure or error
            self._changed.notify_all()
        self.release()


class TransferThread:
    """Does errands one after another; copies it has submitted are watched meanwhile. Close it."""

    def __init__(self, is_over: Callable[[Any], bool], patience_s: float) -> None:
        self._is_over, self._patience_s = is_over, patience_s
        self._queue: queue.SimpleQueue[tuple[Ledger, Errand] | None] = queue.SimpleQueue()
        self._copies: list[tuple[Ledger, Any, tuple[Token, ...]]] = []
        self._thread = threading.Thread(target=self._serve, name="clo transfer threads", daemon=True)
        self._thread.start()

    def put(self, ledger: Ledger, errand: Errand) -> None:
        """Queue an errand."""
        self._queue.put((ledger, errand))

    def close(self) -> None:
        """End the thread once it has done what is queued."""
        self.dismiss()
        self._thread.join(self._patience_s)

    def dismiss(self) -> None:
        """The same without waiting for it."""
        self._queue.put(None)

    def _serve(self) -> None:
        while (item := self._next()) is not None:
            ledger, errand = item
            event = None
            try:
                if ledger.failure is None:
                    event = self._do(ledger, errand)
            except BaseException as error:
                ledger.fail(FailedOperationError(errand.op, error))
            finally:
                self._settle(ledger, errand, event)

    def _next(self) -> tuple[Ledger, Errand] | None:
        while self._copies:
            self._look_at_copies()
            try:
                return self._queue.get_nowait()
            except queue.Empty:
                time.sleep(0)
        return self._queue.get()

    def _do(self, ledger: Ledger, errand: Errand) -> Any:
        if errand.is_asked is not None and not poll(lambda: self._asked(ledger, errand), self._patience_s):
            raise EngineError(f"the doorbell did not ring in {self._patience_s:g} s")
        if ledger.failure is not None:
            return None
        return errand.do()

    def _asked(self, ledger: Ledger, errand: Errand) -> bool:
        self._look_at_copies()
        assert errand.is_asked is not None
        return ledger.failure is not None or errand.is_asked()

    def _settle(self, ledger: Ledger, errand: Errand, event: Any) -> None:
        first, *others = errand.tokens
        ledger.finish(first)
        if event is not None and ledger.failure is None:
            self._copies.append((ledger, event, tuple(others)))
            return
        for token in others:
            ledger.finish(token)

    def _look_at_copies(self) -> None:
        under_way = []
        for ledger, event, tokens in self._copies:
            try:
                over = ledger.failure is not None or self._is_over(event)
            except BaseException as error:
                ledger.fail(error)
                over = True
            if not over:
                under_way.append((ledger, event, tokens))
                continue
            for token in tokens:
                ledger.finish(token)
        self._copies = under_way
