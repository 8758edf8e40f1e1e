"""The one family of errors this project raises on purpose, and how others say that memory ran out."""


class CloError(Exception):
    """Base of every deliberate error: one line that names the field, the value and the rule."""


class SpecError(CloError, ValueError):
    """A model, machine, design or workload that breaks a rule, or does not fit another one."""


class TraceError(CloError, ValueError):
    """An attention trace that is corrupt, truncated, of a newer schema, or does not fit the request."""


class RequestError(CloError, ValueError):
    """A request trace with a line that cannot be read, a load that cannot be generated, an SLO that says nothing."""


class ProfileError(CloError, ValueError):
    """A profile that is corrupt, of a newer schema, or lacks a cost that the design needs."""


class NotFoundError(CloError, LookupError):
    """A name that no preset and no file answers to."""


class EngineError(CloError, RuntimeError):
    """A decode that cannot go on: a lane that died, a flag that never came, numbers that are none."""


def ran_out(error: BaseException) -> bool:
    """Whether it says that memory could not be had, of a device or of the host; torch says so in words."""
    said = str(error).lower()
    in_words = isinstance(error, RuntimeError) and ("out of memory" in said or "allocate memory" in said)
    return isinstance(error, MemoryError) or in_words
