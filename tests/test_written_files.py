"""Files that commands write: by one run at a time, whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import SMALL, refuse

from clo.errors import CloError
from clo.files import sole_writer
from clo_cli.main import main


class TestSoleWriter:
    def test_two_runs_do_not_mix_their_results(self, tmp_path: Path) -> None:
        with sole_writer(tmp_path):
            for command in (["explore"], ["plan", "--load", "poisson:1", "--slo", "e2e_p99<30s"]):
                line = refuse(*command, "--out", str(tmp_path))
                assert f"{tmp_path}: another run is writing its results there" in line
        assert not list(tmp_path.iterdir())
        with sole_writer(tmp_path):
            pass

    def test_a_run_that_was_killed_holds_nothing(self, tmp_path: Path) -> None:
        holds = "import sys; from pathlib import Path; from clo.files import sole_writer\n"
        holds += "with sole_writer(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
        process = subprocess.Popen(
            [sys.executable, "-c", holds, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(CloError, match="another run is writing"), sole_writer(tmp_path):
            pass
        process.kill()
        process.communicate()
        with sole_writer(tmp_path):
            pass

    def test_where_files_cannot_be_locked_nothing_is_held(self, tmp_path: Path) -> None:
        program = "import sys; sys.modules['fcntl'] = None\nfrom pathlib import Path\n"
        program += "from clo.files import sole_writer\n"
        program += "with sole_writer(Path(sys.argv[1])), sole_writer(Path(sys.argv[1])): print('both')"
        done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, check=True)
        assert done.stdout == b"both\n"


@pytest.mark.parametrize("option", ["--out", "--timeline"])
def test_nothing_is_left_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    path = tmp_path / "result.json"
    monkeypatch.setattr("sys.argv", ["clo", "simulate", *SMALL, option, str(path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"clo: error: {path}: cannot be written: No space left on device\n"
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_file_that_could_not_be_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clo.files import write_whole

    path = tmp_path / "result.json"
    path.write_text("before")

    def fail(file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fail)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
