"""Waits of the launching thread, none of them without end. Knows nothing about what is waited for."""

from __future__ import annotations

from collections.abc import Mapping

from clo.engine.cuda.device import DeviceApi, Event, Stream
from clo.engine.cuda.threads import Ledger, poll
from clo.engine.faults import FailedOperationError
from clo.errors import EngineError
from clo.schedule import Lane, Op, Token


class BoundedWaits:
    """Each raises `EngineError` after `patience_s`, naming the operation if there is one."""

    def __init__(self, device: DeviceApi, streams: Mapping[Lane, Stream], patience_s: float) -> None:
        self._device, self._streams, self._patience_s = device, streams, patience_s

    def event(self, event: Event, op: Op | None, ledger: Ledger | None) -> None:
        """Until it has happened; a step that fails meanwhile (`ledger`) ends the wait."""

        def ready() -> bool:
            return self._device.done(event) or (ledger is not None and ledger.failure is not None)

        if not poll(ready, self._patience_s):
            raise self._too_long(op)

    def stream(self, lane: Lane, op: Op | None, ledger: Ledger | None) -> None:
        """Until the stream of `lane` has nothing left to do."""
        event, stream = self._device.event(timed=False), self._streams[lane]
        with self._device.on(stream):
            self._device.record(event, stream)
        self.event(event, op, ledger)

    def threads(self, token: Token, op: Op, ledger: Ledger) -> None:
        """Until the transfer threads have done `token`."""
        if not ledger.wait(token, self._patience_s):
            raise self._too_long(op)
        if ledger.failure is not None:
            raise ledger.failure

    def _too_long(self, op: Op | None) -> BaseException:
        error = EngineError(f"not done in {self._patience_s:g} s")
        return error if op is None else FailedOperationError(op, error)
