"""What memory a container leaves: limits of Linux control groups. Knows nothing about who asks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GROUPS, MINE = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class _Files:
    """How a version of control groups calls a group's limit, what it has taken, and the part that can be dropped."""

    limit: str
    taken: str
    droppable: str


VERSION_1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = _Files("memory.max", "memory.current", "inactive_file")


def limit_bytes() -> float:
    """The lowest limit of this process's group and those it is in; infinite where there is none."""
    return min((_number(group / files.limit) for group, files in _groups()), default=math.inf)


def room_bytes() -> float:
    """What can be taken below the limits; file pages that the kernel would drop count as free."""
    return min((_room(group, files) for group, files in _groups()), default=math.inf)


def _groups() -> Iterator[tuple[Path, _Files]]:
    """From the process's own group up; none where the system has no such groups."""
    try:
        lines = MINE.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers == "":
            top, files = GROUPS, VERSION_2
        elif "memory" in controllers.split(","):
            top, files = GROUPS / "memory", VERSION_1
        else:
            continue
        # in a container the group may go by its name outside: its files lie at the top then
        group = top / own.lstrip("/")
        yield from ((folder, files) for folder in (group, *group.parents) if folder.is_relative_to(top))


def _room(group: Path, files: _Files) -> float:
    limit, taken = _number(group / files.limit), _number(group / files.taken)
    if math.inf in (limit, taken):
        return limit
    return max(0.0, limit - max(0.0, taken - _droppable(group, files)))


def _droppable(group: Path, files: _Files) -> float:
    try:
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) for line in lines if line.startswith(f"{files.droppable} ")), 0.0)


def _number(file: Path) -> float:
    """Infinite where the file is not there or says `max`."""
    try:
        return float(file.read_text(encoding="ascii").replace("max", "inf"))
    except (OSError, ValueError):
        return math.inf
