"""Python imports this first, in the process that `run.py` starts and in those that it starts in turn."""

import os

if kind := os.environ.get("CLO_REHEARSAL"):
    from tests.rehearsal import launches, operations

    operations.install()
    launches.install(kind)
