"""Runs the command for tests: here, or in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from click.testing import CliRunner

from clo_cli.main import clo

SMALL = ["--context", "32768", "--batch", "4", "--steps", "8"]


def run(*arguments: Any) -> str:
    """Standard output of a command that succeeds."""
    done = CliRunner().invoke(clo, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def simulate(*arguments: Any) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(run("simulate", *SMALL, "--json", *arguments))
    return result


CLO = (sys.executable, "-c", "import sys; from clo_cli.main import main; sys.argv[0] = 'clo'; main()")


def refuse(*arguments: str) -> str:
    """The one line on stderr of a command that is refused with exit code 2."""
    done = subprocess.run([*CLO, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]
