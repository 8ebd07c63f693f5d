"""Runs the commands as a user would: `invoke` in this process, `run_command` in a process of its own."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from unittest import mock

from handiffuser import commands


def invoke(module: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """invoke("runtime.cli", "demo", "a hand") runs `hd-run demo "a hand"` here, which saves the seconds of its imports.

    It goes through the command's `main`: errors become a sentence and an exit code. Only signal handlers are left out.
    Use `run_command` where a test needs a process: signals, closed streams, an environment that is read at the start.
    """
    words = [f"handiffuser.{module}", *map(str, arguments)]
    before = Path.cwd()
    code: object = 0
    with contextlib.ExitStack() as stack:
        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(mock.patch.dict(os.environ))
        stack.enter_context(mock.patch.object(sys, "argv", words))
        stack.enter_context(mock.patch.object(commands, "hear_interrupts", lambda sentence: None))
        stack.enter_context(mock.patch.object(commands, "leave", sys.exit))
        stack.callback(os.chdir, before)
        os.chdir(cwd or before)
        try:
            import_module(f"handiffuser.{module}").main()
        except SystemExit as error:
            code = error.code
    said = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(words, int(code or 0), *said)  # type: ignore[call-overload]


def hd_train(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`hd-train` in this process, for which accelerate takes only one precision unless it forgets the last."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return invoke("training.cli", *arguments)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@contextlib.contextmanager
def instead_of_exporting(bundle: Path, where: str = "bundle") -> Iterator[None]:
    """Exports in this process copy the graphs of a bundle, for tests of what comes before and after them.

    where: the module of `export` that asks for them; `lower` asks for the float32 that other precisions are compared
    with.
    """

    def copy(checkpoint: object, folder: Path, *_: object, **__: object) -> list[object]:
        shutil.copytree(bundle, folder, dirs_exist_ok=True)
        return []

    with mock.patch(f"handiffuser.export.{where}.make_bundle", copy):
        yield


def run_command(
    module: str,
    *arguments: object,
    cwd: Path | None = None,
    timeout: float = 900,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """run_command("runtime.cli", "demo", "a hand") is `hd-run demo "a hand"`."""
    command = [sys.executable, "-m", f"handiffuser.{module}", *map(str, arguments)]
    environment = {**os.environ, **(env or {})}
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=timeout, env=environment
    )


def run_study(name: str, *arguments: object, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    """run_study("rows", "out") is `python studies/rows.py out`."""
    command = [sys.executable, Path(__file__).parent.parent / "studies" / f"{name}.py", *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=timeout)


def listen() -> None:
    """For `preexec_fn`: lets signals through. A shell starts background jobs deaf to Ctrl-C, and the tests may run in
    one; a user's terminal does not."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
