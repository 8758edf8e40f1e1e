"""What goes wrong in a step, in the words of every machine. Knows nothing about lanes or devices."""

from __future__ import annotations

from clo.errors import EngineError
from clo.schedule import Op


class FailedOperationError(Exception):
    """What went wrong, and in which operation."""

    def __init__(self, op: Op, error: BaseException) -> None:
        super().__init__(op.name)
        self.op, self.error = op, error


def explained(failure: BaseException) -> BaseException:
    """An `EngineError` that names operation and layer, where they are known."""
    if not isinstance(failure, FailedOperationError):
        return failure
    reason = str(failure.error) or type(failure.error).__name__
    error = EngineError(f"operation {failure.op.name} of layer {failure.op.layer}: {reason}")
    error.__cause__ = failure.error
    return error
