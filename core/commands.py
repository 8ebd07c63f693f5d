"""Where the commands begin. Each loads its libraries late, so that Ctrl-C while they load is a sentence, too."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

from .errors import HanDiffuserError

if TYPE_CHECKING:
    import click

INTERRUPTED = 130  # what a shell reports for Ctrl-C
PATIENCE = 3.0  # seconds until Ctrl-C ends the process although it is in native code that does not hear it


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

    hear_interrupts(f"{name}: {interrupted}")
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
    leave(code)


def leave(code: int) -> NoReturn:
    """Ends the process. After Ctrl-C without ceremony: a thread may still be in native code (TensorRT's builder) that
    nothing stops, and that an ordinary exit would pull the interpreter away from."""
    if code == INTERRUPTED:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def hear_interrupts(sentence: str) -> None:
    """Has Ctrl-C end the process with this sentence even where the main thread is in native code for long.

    Python raises KeyboardInterrupt in its main thread when that is in Python next: after a build, a compilation or a
    run of a large graph that may be minutes. So a thread looks on, and does not wait longer than PATIENCE.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # a shell's background jobs ignore it
        return
    if threading.current_thread() is not threading.main_thread():
        return
    heard = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def interrupt(*_: object) -> None:
        heard.set()
        raise KeyboardInterrupt

    def look_on() -> None:
        while signal.SIGINT not in os.read(reader, 64):
            pass
        if not heard.wait(PATIENCE):
            os.write(2, f"{sentence}\n".encode())
            os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, interrupt)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # written to at once, wherever the main thread is
    threading.Thread(target=look_on, name="interrupts", daemon=True).start()


def hd_run() -> None:
    start("hd-run", ".runtime.cli")


def hd_export() -> None:
    start("hd-export", ".export.cli")


def hd_engines() -> None:
    start("hd-engines", ".engines.cli")


def hd_body() -> None:
    start("hd-body", ".models.body")


def hd_train() -> None:
    start("hd-train", ".training.cli")


def hd_bench() -> None:
    start("hd-bench", ".benchmarks.cli")
