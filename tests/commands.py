"""Runs the commands as a user would, in a process of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path


def run_command(
    module: str, *arguments: object, cwd: Path | None = None, timeout: float = 900
) -> subprocess.CompletedProcess[str]:
    """run_command("runtime.cli", "demo", "a hand") is `hd-run demo "a hand"`."""
    command = [sys.executable, "-m", f"handiffuser.{module}", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)


def run_study(name: str, *arguments: object, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    """run_study("rows", "out") is `python studies/rows.py out`."""
    command = [sys.executable, Path(__file__).parent.parent / "studies" / f"{name}.py", *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=timeout)


def listen() -> None:
    """For `preexec_fn`: lets signals through. A shell starts background jobs deaf to Ctrl-C, and the tests may run in
    one; a user's terminal does not."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
