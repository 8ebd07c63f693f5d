"""Where the commands begin. Each loads its libraries late, so that Ctrl-C while they load is a sentence, too."""

from __future__ import annotations

import sys
from importlib import import_module


def start(command: str, module: str) -> None:
    """Runs `main` of a module of this package; exit code 130, as a shell reports it, when Ctrl-C comes first."""
    try:
        import_module(module, "handiffuser").main()
    except KeyboardInterrupt:
        print(f"{command}: Interrupted.", file=sys.stderr)
        sys.exit(130)


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
