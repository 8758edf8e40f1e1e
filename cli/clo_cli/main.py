"""The `clo` command: finds its subcommands without importing them, and turns errors into one line and exit code 2.

Knows nothing about what a subcommand does beyond the line that `clo --help` shows.
"""

from __future__ import annotations

import importlib
import os
import sys

import click

from clo.errors import CloError, ran_out

# every product here is small: a second BLAS thread costs more than it brings, tenfold on a busy machine
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# of a GPU, that streams share: with the default of 8 a copy may wait behind a kernel that waits for it
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

COMMANDS = {
    "explore": "Compare designs, sweep their choices, and show what each choice is worth.",
    "simulate": "Run one design in simulation: metrics, and a timeline if asked.",
    "show": "List models, machines, designs, profiles and traces, each with its source.",
    "serve-sim": "Serve a trace of requests in simulation: latencies, goodput, memory.",
    "plan": "The smallest fleet and best design for a load and an SLO; when offloading helps.",
    "run": "Decode on this machine, reported like a simulation.",
    "generate": "Text from a real model that decodes under a design.",
    "evaluate": "How good a real model's answers stay under designs.",
    "heads": "What a trace says about each head: importance, similarity, prefetchability.",
    "calibrate": "Time every operation on this machine and fit its costs.",
    "validate": "How far simulated steps are from real ones on this machine.",
    "record": "Record an attention trace from a real model.",
    "trace": "Show what is in an attention trace.",
    "plot": "Draw figures from a result, a sweep or a timeline.",
}


class LazyGroup(click.Group):
    """Imports a subcommand's file only when it is run, so that `clo --help` needs nothing but click."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        command: click.Command = getattr(importlib.import_module(f"clo_cli.{name}"), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="clo-offload", prog_name="clo")
def clo() -> None:
    """Ways of offloading the KV cache of long-context LLM inference: compared in simulation, and run for real.

    \b
    Which design for my model and machine?  clo explore
    How many GPUs for my traffic?           clo plan
    How far off is that on my machine?      clo calibrate, clo validate
    How good do answers stay?               clo evaluate

    No command needs a GPU.
    """


READER_GONE = 141
"""What a shell reports for a program that a closed pipe has ended."""


def main() -> None:
    """Entry point: bad input, and output that cannot be written, end with one line on stderr and exit code 2."""
    try:
        sys.exit(_run())
    except BrokenPipeError:
        _drop_output()
        sys.exit(READER_GONE)
    except OSError as error:
        _drop_output()
        sys.exit(_refuse(f"{error.filename or 'output'}: {error.strerror or error}"))


def _run() -> int:
    """Run the command line and return the exit code."""
    try:
        return _invoke()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0
    except click.ClickException as error:
        return _refuse(" ".join(error.format_message().split()))
    except CloError as error:
        return _refuse(str(error))
    except click.Abort:
        click.echo("clo: interrupted", err=True)
        return 130
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return _refuse(f"memory ran out: a smaller model, context or batch takes less ({reason})")


def _invoke() -> int:
    try:
        return clo(standalone_mode=False) or 0
    except SystemExit as stopped:
        # click and rich exit with 1, and do so only here, when the reader of a pipe (`| head`) has gone
        if stopped.code != 1:
            raise
        _drop_output()
        return READER_GONE


def _drop_output() -> None:
    """Send what is still buffered nowhere: Python would try, and complain, once more at the end."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)


def _refuse(message: str) -> int:
    click.echo(f"clo: error: {message}", err=True)
    return 2


if __name__ == "__main__":
    main()
