"""Runs that are cut off and go on from their record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from questions import CLO, SPACE, many, numbers

from clo.errors import CloError
from clo_sim.evaluation import evaluate
from clo_sim.explore import Exploration, explore
from clo_sim.record import Record
from clo_sim.scene import Scene
from clo_sim.variation import scene_with


class CutOffError(Exception):
    """Stands for a power cut."""


def cut_after(count: int) -> Any:
    def progress(done: int, total: int) -> None:
        if done == count:
            raise CutOffError

    return progress


@pytest.fixture(scope="module", params=[None, 40], ids=["grid", "search"])
def uninterrupted(scene: Scene, request: pytest.FixtureRequest) -> tuple[dict[str, Any], Exploration]:
    """A question and its answer: all of a grid, or a budget spent by an optimiser."""
    space: Any = {"design.tau": [n / 40 for n in range(40)]} if request.param is None else SPACE
    question: dict[str, Any] = {
        "named": [],
        "base": CLO,
        "space": space,
        "budget": request.param,
        "num_finalists": 2,
    }
    return question, explore(scene, **question)


class TestRecord:
    @settings(max_examples=4, deadline=None)
    @given(cut=st.integers(1, 39))
    def test_a_resumed_run_is_an_uninterrupted_one(
        self,
        scene: Scene,
        tmp_path_factory: pytest.TempPathFactory,
        uninterrupted: tuple[dict[str, Any], Exploration],
        cut: int,
    ) -> None:
        question, whole = uninterrupted
        path = tmp_path_factory.mktemp("record") / "record.jsonl"
        with Record(path) as record, pytest.raises(CutOffError):
            explore(scene, **question, record=record, progress=cut_after(cut))
        with Record(path) as record:
            assert len(record) == cut
            resumed = explore(scene, **question, record=record)
        assert resumed.recalled == cut
        assert numbers(resumed.candidates) == numbers(whole.candidates)
        assert resumed.best == whole.best
        assert resumed.choices == whole.choices

    def test_each_evaluation_is_recorded_once(self, scene: Scene, tmp_path: Path) -> None:
        path = tmp_path / "record.jsonl"
        for _ in range(2):
            with Record(path) as record:
                explore(scene, named=[CLO], base=CLO, space={"design.slot_budgets": [1, 2]}, record=record)
        keys = [json.loads(line)["key"] for line in path.read_text().splitlines()[1:]]
        assert len(keys) == len(set(keys)) > 4

    def test_another_question_takes_nothing_from_it(self, scene: Scene, tmp_path: Path) -> None:
        for seed in (1, 2):
            other = scene_with(scene, [("workload.seed", seed)])
            with Record(tmp_path / "record.jsonl") as record:
                assert explore(other, named=[CLO], base=CLO, space={}, record=record).recalled == 0

    def test_a_line_cut_off_is_done_again(self, scene: Scene, tmp_path: Path) -> None:
        path = tmp_path / "record.jsonl"
        with Record(path) as record:
            record.add("a", evaluate(scene, many(1)[0]))
            record.add("b", evaluate(scene, many(2)[1]))
        path.write_bytes(path.read_bytes()[:-7])
        with Record(path) as record:
            assert record.get("a") is not None
            assert record.get("b") is None
            record.add("c", evaluate(scene, many(3)[2]))
        with Record(path) as record:
            assert len(record) == 2

    def test_two_runs_do_not_share_one(self, tmp_path: Path) -> None:
        with Record(tmp_path / "record.jsonl"), pytest.raises(CloError, match="another run"):
            Record(tmp_path / "record.jsonl")

    @pytest.mark.parametrize("text", ["hello\n", "{}\n", '{"what": "clo evaluations", "schema_version": 9}\n', "hello"])
    def test_other_files_are_refused_and_left_alone(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "record.jsonl"
        path.write_text(text)
        with pytest.raises(CloError, match=r"record\.jsonl"):
            Record(path)
        assert path.read_text() == text

    def test_a_damaged_line_is_named(self, scene: Scene, tmp_path: Path) -> None:
        path = tmp_path / "record.jsonl"
        with Record(path):
            pass
        path.write_text(path.read_text() + '{"key": "a"}\n')
        with pytest.raises(CloError, match="line 2: not an evaluation"):
            Record(path)
