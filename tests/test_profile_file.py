"""Profiles in files: read back as written, refused by field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_profile

from clo.errors import ProfileError
from clo.profile import load_profile


class TestFiles:
    def profile_file(self, tmp_path: Path, **changes: Any) -> Path:
        path = tmp_path / "profile.json"
        path.write_text(json.dumps(tiny_profile().model_dump(mode="json") | changes))
        return path

    def test_a_profile_survives_the_file(self, tmp_path: Path) -> None:
        assert load_profile(self.profile_file(tmp_path)) == tiny_profile()

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"schema_version": 2}, "schema_version = 2"),
            ({"zero_copy": {"source": "assumed"}}, "profile.zero_copy.latency_s: a value is required"),
            ({"kernel_launch": {"source": "guessed", "seconds": 1}}, "profile.kernel_launch.source = 'guessed'"),
            ({"stream_sync": {"source": "assumed", "seconds": -1}}, "profile.stream_sync.seconds = -1"),
            ({"warp_drive": 1}, "profile.warp_drive: unknown field"),
        ],
        ids=["newer", "missing", "source", "negative", "unknown"],
    )
    def test_a_bad_profile_names_file_and_field(self, tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
        path = self.profile_file(tmp_path, **changes)
        with pytest.raises(ProfileError) as failure:
            load_profile(path)
        assert str(path) in str(failure.value)
        assert problem in str(failure.value)
        assert "\n" not in str(failure.value)

    @pytest.mark.parametrize(
        "content", ["", '{"name": "x"', "[]", "\x00"], ids=["empty", "truncated", "list", "binary"]
    )
    def test_no_profile_at_all(self, tmp_path: Path, content: str) -> None:
        path = tmp_path / "profile.json"
        path.write_text(content)
        with pytest.raises(ProfileError, match=r"profile\.json"):
            load_profile(path)
