"""What a run makes once for all its workers, and what later runs take from earlier ones."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import os
import shutil
import time
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path

import pytest
from filelock import FileLock

# The rooms and libraries that an export of the tiny checkpoint depends on.
ROOMS = ("models", "export", "calibration", "demo")
LIBRARIES = ("handiffuser", "torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy")
CACHE = Path(os.environ.get("HANDIFFUSER_TEST_CACHE", Path.home() / ".cache" / "handiffuser-tests"))
DAYS = 7  # for which an unused entry of the cache stays


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` fills once for all workers of a run. Tests must not write into it."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = base / f"shared-{name}", base / f"shared-{name}.done"
    with FileLock(base / f"shared-{name}.lock"):
        if not done.exists():
            make(folder)
            done.touch()
    return folder


def code_of(path: Path) -> bytes:
    """What a Python file does: its syntax tree without comments and docstrings, which change no export."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree).encode()


@functools.cache
def content_key(*more: str) -> str:
    """A hash of everything that can change an export, so that a run may take what an earlier run made.

    more: further rooms that it depends on.
    """
    digest = hashlib.sha256(code_of(Path(__file__)))
    for library in LIBRARIES:
        digest.update(f"{library} {metadata.version(library)}\n".encode())
    for module in ("handiffuser", *(f"handiffuser.{room}" for room in (*ROOMS, *more))):
        folder = Path(import_module(module).__file__ or "").parent
        for path in sorted(folder.glob("*.py")):
            digest.update(f"{module} {path.name}\n".encode() + code_of(path))
    return digest.hexdigest()[:16]


def kept(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None], *more: str) -> Path:
    """As `once`, and across runs: a copy of what an earlier run made from the same sources, if there is one.

    name: says all that `make` takes from outside itself. more: as for `content_key`.
    """

    def copy(folder: Path) -> None:
        CACHE.mkdir(parents=True, exist_ok=True)
        own = hashlib.sha256(inspect.getsource(make).encode()).hexdigest()[:8]
        entry = CACHE / f"{name}-{content_key(*more)}-{own}"
        with FileLock(f"{entry}.lock"):
            if not entry.exists():
                remove_unused()
                unfinished = entry.with_suffix(".part")
                shutil.rmtree(unfinished, ignore_errors=True)
                make(unfinished)
                unfinished.rename(entry)
            os.utime(entry)
            shutil.copytree(entry, folder)

    return once(factory, name, copy)


def remove_unused() -> None:
    """Removes what no run has taken from the cache for DAYS."""
    for old in CACHE.iterdir():
        if time.time() - old.stat().st_mtime > DAYS * 86400:
            if old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.unlink(missing_ok=True)
