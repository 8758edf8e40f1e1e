"""`clo show`, and what a name or a path stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import run, simulate

from clo import presets
from clo.specs import Design, MachineSpec, ModelSpec, Spec


class TestShow:
    @pytest.mark.parametrize("kind", ["models", "machines", "designs", "profiles", "traces"])
    def test_lists_every_preset(self, kind: Any) -> None:
        assert set(json.loads(run("show", kind, "--json"))[kind]) == set(presets.names(kind))
        assert all(name in run("show", kind) for name in presets.names(kind))

    def test_everything_at_once(self) -> None:
        listed = json.loads(run("show", "--json"))
        assert {kind: sorted(records) for kind, records in listed.items()} == {
            kind: presets.names(kind) for kind in ("models", "machines", "designs", "profiles", "traces")
        }
        # what is shown can be read back as what it is
        for name, fields in listed["designs"].items():
            assert Design.parse(fields) == presets.load_design(name)

    @pytest.mark.parametrize(
        ("kind", "name", "record"),
        [("designs", "clo", Design), ("machines", "h200", MachineSpec), ("models", "llama-3-8b", ModelSpec)],
    )
    def test_one_thing_is_shown_with_what_each_field_means(self, kind: str, name: str, record: type[Spec]) -> None:
        shown = " ".join(run("show", kind, name).split())
        for field, about in record.model_fields.items():
            assert field in shown
            assert (about.description or "") in shown

    def test_fields_are_named_as_they_are_set(self) -> None:
        assert " gpu.hbm_bytes_per_s " in run("show", "machines", "h200")
        assert "host | events | flags | graph" in run("show", "designs", "clo")

    def test_a_profile_says_where_each_cost_is_from(self) -> None:
        costs = json.loads(run("show", "profiles", "h200", "--json"))["profiles"]["h200"]
        assert "log_latency" not in json.dumps(costs)  # packed tables say nothing to a reader
        assert costs["gemm"]["source"] == "aiconfigurator"
        assert costs["zero_copy"]["source"] == "literature"
        known = [cost for cost in costs.values() if isinstance(cost, dict) and "source" in cost]
        assert sum(costs["sources"].values()) == len(known) > 25


def test_a_trace_is_a_preset_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "renamed.bin"
    path.write_bytes((presets.folder("traces") / "smollm2-135m-4k.npz").read_bytes())
    described = run("trace", "--json")
    assert described == run("trace", "smollm2-135m-4k", "--json") == run("trace", path, "--json")


def test_a_profile_lies_beside_the_machine_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_bytes((presets.folder("profiles") / "l40s.json").read_bytes())
    text = (presets.folder("machines") / "l40s.toml").read_text()
    machine = tmp_path / "mine.toml"
    for named, found in {"mine.json": tmp_path / "mine.json", tmp_path / "mine.json": tmp_path / "mine.json"}.items():
        machine.write_text(text.replace('profile = "l40s"', f'profile = "{named}"'))
        assert Path(presets.load_machine(str(machine)).profile) == found
        assert simulate("--machine", machine)["profile"] == "l40s"
    machine.write_text(text)
    assert presets.load_machine(str(machine)).profile == "l40s"
