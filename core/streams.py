"""Standard streams that are closed or full, or whose reader left.

A command's result goes to stdout: if it cannot be written, the command fails. What a command says goes to stderr: if
that cannot be written, the work goes on.
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


class Result(io.FileIO):
    """stdout. It keeps the first error of writing."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            self.error = self.error or error
            raise


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
    for name, number, kind in (("stdout", 1, Result), ("stderr", 2, Talk)):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__") and not isinstance(_raw(stream), kind):  # a test's stream stays
            raw = kind(number, "w", closefd=False)
            layers = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
            buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)
            stream = io.TextIOWrapper(buffer, stream.encoding, stream.errors, **layers)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def _raw(stream: Any) -> Any:
    """The file below a standard stream."""
    return getattr(stream.buffer, "raw", stream.buffer)


def _open_null(number: int) -> None:
    """Opens /dev/null as a file descriptor that processes we start inherit."""
    opened = os.open(os.devnull, os.O_RDWR)
    if opened == number:
        os.set_inheritable(number, True)
    else:
        os.dup2(opened, number)
        os.close(opened)


def stdout_error() -> OSError | None:
    """Why what was printed could not be written to stdout; None where it is written."""
    stdout: Any = sys.__stdout__
    raw = _raw(stdout)
    if not isinstance(raw, Result):
        return None
    with contextlib.suppress(OSError, ValueError):  # ValueError: it was closed on purpose
        stdout.flush()
    return raw.error


def give_up_stdout(command: str, error: OSError) -> int:
    """Says that stdout cannot be written, unless its reader left early (`| head -1`). Returns the exit code."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter would try again at its end, and complain
    if error.errno == errno.EPIPE:
        return BROKEN_PIPE
    print(f"{command}: Standard output cannot be written: {error.strerror or error}.", file=sys.stderr)
    return 1
