"""Where the commands begin. Each loads its libraries late, so that Ctrl-C while they load is a sentence, too."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from .errors import HanDiffuserError

if TYPE_CHECKING:
    import click

INTERRUPTED = 130  # what a shell reports for Ctrl-C


def start(command: str, module: str) -> None:
    """Runs `main` of a module of this package; exit code INTERRUPTED when Ctrl-C comes first."""
    try:
        import_module(module, "handiffuser").main()
    except KeyboardInterrupt:
        print(f"{command}: Interrupted.", file=sys.stderr)
        sys.exit(INTERRUPTED)


def run(name: str, command: click.Command, interrupted: str = "Interrupted.") -> None:
    """Runs a click command; one sentence and an exit code instead of a traceback."""
    import click

    try:
        code = command.main(standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo(f"{name}: {interrupted}", err=True)
        code = INTERRUPTED
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (HanDiffuserError, OSError) as error:
        click.echo(f"{name}: {error}", err=True)
        code = 1
    sys.exit(code)


def hd_run() -> None:
    start("hd-run", ".runtime.cli")


def hd_export() -> None:
    start("hd-export", ".export.cli")


def hd_engines() -> None:
    start("hd-engines", ".engines.cli")


def hd_train() -> None:
    start("hd-train", ".training.cli")


def hd_bench() -> None:
    start("hd-bench", ".benchmarks.cli")
