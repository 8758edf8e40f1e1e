"""`clo plot`: each kind of file makes its figure, and what is wrong with a file is said in a line."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from click.testing import Result as CliResult
from figure_data import make_choices, make_points, make_results, make_timelines

from clo.errors import CloError
from clo.results import load_result
from clo.timeline import save_chrome_trace
from clo_cli.plot import _load_timelines, detect, plot
from clo_plots.pareto import DesignPoint
from clo_plots.sweep_table import load_points


def write_sweep(path: Path, points: Sequence[DesignPoint], *, without: str = "") -> None:
    rows = [{name: getattr(point, name) for name in DesignPoint.__slots__} for point in points]
    rows.append({"name": "too large", "named": False, "kv_device_bytes": 2e11, "tpot_s": None})
    pq.write_table(pa.Table.from_pylist([{k: v for k, v in row.items() if k != without} for row in rows]), path)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    names = ("stalls", "pareto", "timeline", "choices", "one")
    paths = {name: tmp_path / f"{name}.in" for name in names}
    rows = [result.model_dump(mode="json") for result in make_results()]
    paths["stalls"].write_text(json.dumps({"results": rows}))
    make_results()[0].save(paths["one"])
    write_sweep(paths["pareto"], make_points())
    save_chrome_trace(paths["timeline"], make_timelines())
    make_choices().save(paths["choices"])
    return paths


def run_plot(*args: str | Path) -> CliResult:
    return CliRunner().invoke(plot, [str(arg) for arg in args])


@pytest.mark.parametrize("kind", ["stalls", "pareto", "timeline", "choices"])
@pytest.mark.parametrize("given_kind", [True, False])
def test_each_kind_is_drawn_from_its_file(kind: str, given_kind: bool, files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "figures" / f"{kind}.png"
    done = run_plot(files[kind], "--out", out, *(["--kind", kind] if given_kind else []))
    assert done.exit_code == 0, done.exception
    assert done.output.startswith(f"{out}: {kind} figure")
    assert out.read_bytes().startswith(b"\x89PNG")


def test_several_files_make_one_figure(files: dict[str, Path], tmp_path: Path) -> None:
    assert detect(files["one"]) == "stalls"
    assert run_plot(files["one"], files["stalls"], "--out", tmp_path / "all.svg").exit_code == 0
    assert (tmp_path / "all.svg").read_bytes().startswith(b"<?xml")


def test_timelines_of_one_title_are_told_apart_by_their_files(tmp_path: Path) -> None:
    one, other, *_ = make_timelines()
    paths = tuple(tmp_path / f"{name}.json" for name in ("a", "b", "c"))
    for path, timeline in zip(paths, (one, one, other), strict=True):
        save_chrome_trace(path, [timeline])
    titles = [timeline.title for timeline in _load_timelines(paths)]
    assert titles == [f"a.json: {one.title}", f"b.json: {one.title}", other.title]


def test_designs_that_cannot_run_are_left_out(files: dict[str, Path]) -> None:
    assert load_points(files["pareto"]) == make_points()


def failure(*args: str | Path) -> str:
    done = run_plot(*args)
    assert isinstance(done.exception, CloError), done.exception
    return str(done.exception)


def bad_timeline(field: str, value: object) -> bytes:
    trace = make_timelines()[0].to_chrome_trace()
    next(event for event in trace["traceEvents"] if event["ph"] == "X")[field] = value
    return json.dumps(trace).encode()


def bad_result(**changes: object) -> bytes:
    return json.dumps(make_results()[0].model_dump(mode="json") | changes).encode()


def test_errors_name_the_file_in_one_line(tmp_path: Path) -> None:
    out = tmp_path / "figure.png"
    bad = tmp_path / "bad"
    for content, problem in (
        (b"\xff\xfe\x00", "not JSON"),
        (b"PAR1 but no more", "not Parquet, or truncated"),
        (b'{"a": 1}', "neither a result"),
        (b"[1]", "neither a result"),
        (b'{"results": []}', "nothing to draw"),
        (b'{"results": [3]}', "no list of results"),
        (b'{"results": [{}]}', "a value is required"),
        (b'{"traceEvents": []}', "nothing to draw"),
        (b'{"traceEvents": [{}]}', "not a timeline that clo wrote"),
        (bad_timeline("ts", math.nan), "not a timeline that clo wrote"),
        (bad_timeline("dur", math.inf), "not a timeline that clo wrote"),
        (bad_timeline("dur", None), "not a timeline that clo wrote"),
        (bad_timeline("args", {"layer": None, "part": "model"}), "not a timeline that clo wrote"),
        (bad_timeline("args", {"layer": 1, "part": "model", "waits_us": [1]}), "not a timeline that clo wrote"),
        (bad_result(tpot_s=-1), "result.tpot_s = -1: Input should be greater than 0"),
        (bad_result(tpot_s=math.nan), "result.tpot_s = nan"),
        (bad_result(busy_s={"model": None}), "result.busy_s.model"),
        (b'{"alternatives": []}', "a value is required"),
    ):
        bad.write_bytes(content)
        message = failure(bad, "--out", out)
        assert problem in message
        assert str(bad) in message
        assert "\n" not in message
    assert not out.exists()


def test_a_result_of_a_newer_schema_is_an_error(tmp_path: Path) -> None:
    path, out = tmp_path / "result.json", tmp_path / "figure.png"
    path.write_text(json.dumps(make_results()[0].model_dump(mode="json") | {"schema_version": 9}))
    message = failure(path, "--out", out)
    assert (
        message == f"{path}: result.schema_version = 9: this version reads 1 (a newer result needs a newer clo-offload)"
    )
    with pytest.raises(CloError, match="schema_version = 9"):
        load_result(path)


def test_missing_files_and_wrong_kinds_are_errors(files: dict[str, Path], tmp_path: Path) -> None:
    out, gone = tmp_path / "figure.png", tmp_path / "gone"
    for kind in (None, "stalls", "pareto", "timeline", "choices"):
        message = failure(gone, "--out", out, *(["--kind", kind] if kind else []))
        assert message == f"{gone}: No such file or directory"
    assert str(files["stalls"]) in failure(files["stalls"], "--out", out, "--kind", "pareto")
    assert str(files["choices"]) in failure(files["choices"], files["choices"], "--out", out)
    message = failure(files["stalls"], files["choices"], "--out", out)
    assert "choices figure" in message
    assert "stalls figure" in message
    assert "suffix" in failure(gone, "--out", tmp_path / "figure.gif")


def test_a_sweep_with_a_wrong_column_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "sweep.parquet"
    write_sweep(path, make_points(), without="tpot_s")
    assert failure(path, "--out", tmp_path / "figure.png") == f"{path}: not a sweep: has no column tpot_s"
    write_sweep(path, [DesignPoint(name="odd", kv_device_bytes=1e9, tpot_s=-1.0)])
    message = failure(path, "--out", tmp_path / "figure.png")
    assert message == f"{path}: odd: tpot_s = -1.0: must be a number above 0"


def test_a_design_that_was_simulated_is_drawn_once(tmp_path: Path) -> None:
    path, sizes = tmp_path / "sweep.parquet", {"kv_device_bytes": 1e9}
    tried = DesignPoint(name="clo tau=0.9", tpot_s=0.050, **sizes)
    simulated = DesignPoint(name="clo tau=0.9", tpot_s=0.055, finalist=True, **sizes)
    other = DesignPoint(name="clo tau=0.7", tpot_s=0.040, **sizes)
    write_sweep(path, [tried, other, simulated])
    assert load_points(path) == [other, simulated]
