"""Standard streams that are closed, full, or that no one reads any more.

A command's result goes to stdout: if it cannot be written, the command fails. What a command says goes to stderr: if that
cannot be written, the work goes on.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Any

BROKEN_PIPE = 141  # what a shell reports for a process that a closed pipe ended: 128 + SIGPIPE


class Talk(io.FileIO):
    """stderr. What cannot be written there is dropped."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            return super().write(data) or 0
        return len(data)


class Patient(io.TextIOWrapper):
    """stderr as text, over Talk."""


def open_standard() -> None:
    """Opens closed standard streams (`>&-`) as /dev/null, and lets stderr fail in silence.

    A command calls it before it opens anything: the system gives the lowest free number to the next file, so a model's
    file could become stdout.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            _open_null(number)
        if getattr(sys, name) is None:  # Python found it closed
            stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    stderr = sys.stderr
    if isinstance(stderr, io.TextIOWrapper) and stderr is sys.__stderr__ and not isinstance(stderr, Patient):
        talk = io.BufferedWriter(Talk(2, "w", closefd=False))
        patient = Patient(talk, stderr.encoding, stderr.errors, line_buffering=True, write_through=True)
        sys.stderr = sys.__stderr__ = patient  # type: ignore[misc]


def _open_null(number: int) -> None:
    """Opens /dev/null as a file descriptor that processes we start inherit."""
    opened = os.open(os.devnull, os.O_RDWR)
    if opened == number:
        os.set_inheritable(number, True)
    else:
        os.dup2(opened, number)
        os.close(opened)


def stdout_error() -> OSError | None:
    """Why what was printed cannot be written to stdout; None where it is written."""
    if sys.__stdout__ is None:
        return None
    try:
        sys.__stdout__.flush()
    except ValueError:  # it was closed on purpose
        return None
    except OSError as error:
        return error
    return None


def give_up_stdout(command: str, error: OSError) -> int:
    """Says that stdout cannot be written, unless its reader left early (`| head -1`). Returns the exit code."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter would try again at its end, and complain
    if error.errno == errno.EPIPE:
        return BROKEN_PIPE
    print(f"{command}: Standard output cannot be written: {error.strerror or error}.", file=sys.stderr)
    return 1
