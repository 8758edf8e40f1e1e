"""One thread that carries keys and values between device and host, in the order in which it is asked.

On CUDA it works on a stream of its own beside the computing one (not yet run on a GPU). Knows nothing about models or
caches; a copy that fails, or that does not end, is reported to whoever waits for it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from clo.errors import EngineError


class Errand:
    """Something asked of a `Carrier`. `what` says it in errors."""

    def __init__(self, what: str, work: Callable[[], None], ready: Any) -> None:
        self.what, self.work, self.ready = what, work, ready
        self.done = threading.Event()
        self.arrived: Any = None
        """On CUDA, an event of the carrier's stream behind the copies."""


class Carrier:
    """Use it in a `with` block: leaving it drops what has not begun and ends the thread.

    After an errand has failed the others are not begun, and every call raises the `EngineError` that names it. Nothing
    waits longer than `patience_s`.
    """

    def __init__(self, device: torch.device, patience_s: float) -> None:
        self._device, self._patience_s = device, patience_s
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._errands: queue.SimpleQueue[Errand | None] = queue.SimpleQueue()
        self._failure: EngineError | None = None
        self._dropped = False
        self._doing = ""
        self._thread = threading.Thread(target=self._serve, name="clo prefill", daemon=True)
        self._thread.start()

    def __enter__(self) -> Carrier:
        return self

    def __exit__(self, *_: object) -> None:
        self._dropped = True
        self._errands.put(None)
        self._thread.join(self._patience_s)

    def ask(self, what: str, work: Callable[[], None]) -> Errand:
        """Do `work` behind everything asked before, and behind what the computing stream has been given until now."""
        self._check()
        errand = Errand(what, work, self._now())
        self._errands.put(errand)
        return errand

    def wait(self, errand: Errand) -> None:
        """Go on (on CUDA: let the computing stream go on) when it is done. Raises `EngineError` if it, or one before,
        failed."""
        if not errand.done.wait(self._patience_s):
            # what hangs is what is being done, often something asked long before
            raise EngineError(f"prefill: {self._doing or errand.what}: not done in {self._patience_s:g} s")
        self._check()
        if errand.arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(errand.arrived)

    def _now(self) -> Any:
        """On CUDA, an event behind what the computing stream has been given."""
        return None if self._stream is None else torch.cuda.current_stream(self._device).record_event()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _serve(self) -> None:
        with self._on_stream(), torch.inference_mode():
            while (errand := self._errands.get()) is not None:
                self._do(errand)
            if self._stream is not None:
                # what the copies read and write may be freed when this thread has ended
                self._stream.synchronize()

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _do(self, errand: Errand) -> None:
        self._doing = errand.what
        try:
            if self._failure is None and not self._dropped:
                if self._stream is not None:
                    self._stream.wait_event(errand.ready)
                errand.work()
                errand.arrived = None if self._stream is None else self._stream.record_event()
        except BaseException as error:
            self._failure = EngineError(f"prefill: {errand.what}: {str(error) or type(error).__name__}")
            self._failure.__cause__ = error
        finally:
            # an errand holds on to tensors: whoever waits for it needs them no more
            del errand.work
            errand.done.set()
