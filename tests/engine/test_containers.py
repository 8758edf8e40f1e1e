"""Limits of control groups, read from files as Linux writes them."""

import math
from pathlib import Path

import pytest

from clo.engine import containers, memory


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(containers, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(containers, "MINE", tmp_path / "mine")
    return tmp_path / "cgroup"


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def member_of(groups: Path, *lines: str) -> None:
    (groups.parent / "mine").write_text("\n".join(lines) + "\n")


def test_without_groups_nothing_limits(groups: Path) -> None:
    assert containers.limit_bytes() == containers.room_bytes() == math.inf
    member_of(groups, "0::/", "9:name=systemd:/")
    assert containers.limit_bytes() == containers.room_bytes() == math.inf


def test_the_tightest_of_nested_groups_counts(groups: Path) -> None:
    member_of(groups, "0::/pods/one")
    group(groups / "pods", memory__max="1000", memory__current="900", memory__stat="anon 800\ninactive_file 100")
    group(groups / "pods/one", memory__max="600", memory__current="150", memory__stat="inactive_file 0")
    assert containers.limit_bytes() == 600
    assert containers.room_bytes() == 1000 - (900 - 100)


def test_a_name_from_outside_leaves_the_files_at_the_top(groups: Path) -> None:
    member_of(groups, "0::/outside/only")
    group(groups, memory__max="500", memory__current="200")
    assert (containers.limit_bytes(), containers.room_bytes()) == (500, 300)


def test_no_limit_is_none(groups: Path) -> None:
    member_of(groups, "0::/")
    group(groups, memory__max="max", memory__current="200")
    assert containers.room_bytes() == math.inf


def test_the_first_version(groups: Path) -> None:
    member_of(groups, "5:devices:/", "4:cpu,memory:/job", "0::/")
    stat = "inactive_file 1\ntotal_inactive_file 50"
    job = {"memory__limit_in_bytes": "400", "memory__usage_in_bytes": "250", "memory__stat": stat}
    group(groups / "memory/job", **job)
    assert (containers.limit_bytes(), containers.room_bytes()) == (400, 200)


def test_a_group_beyond_its_limit_has_no_room(groups: Path) -> None:
    member_of(groups, "0::/")
    group(groups, memory__max="100", memory__current="120")
    assert containers.room_bytes() == 0


def test_the_cache_is_held_to_it(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(memory.STATED, raising=False)
    member_of(groups, "0::/")
    group(groups, memory__max="5000", memory__current="2000")
    assert memory.available_host_bytes() == 3000
    assert memory.host_memory_bytes() == 5000
    monkeypatch.setenv(memory.STATED, "9e18")
    assert memory.available_host_bytes() > 1e18
