"""What many tests share: the demo's body, a tiny random checkpoint and its exports. README.md says how that works."""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib import import_module, metadata
from pathlib import Path

# One thread for each worker; commands that tests start inherit it. Libraries read it when they are imported.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import handiffuser  # noqa: E402, F401 (before a test imports a library that would report to its maker)
import pytest  # noqa: E402
from commands import invoke  # noqa: E402
from filelock import FileLock  # noqa: E402

# Tests that use these fixtures are slow: exports in half and bfloat16, eight compiled graphs, seventeen plans, every
# stage trained, the peers' own export.
LONG = {"tiny_half", "tiny_bf16", "overflowing", "cases", "seventeen_plans", "trained", "peers_export"}

# The rooms and libraries that an export of the tiny checkpoint depends on.
ROOMS = ("models", "export", "calibration", "demo")
LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy")
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
def content_key() -> str:
    """A hash of everything that can change an export, so that a run may take what an earlier run made."""
    digest = hashlib.sha256(code_of(Path(__file__)))
    for library in LIBRARIES:
        digest.update(f"{library} {metadata.version(library)}\n".encode())
    for module in ("handiffuser", *(f"handiffuser.{room}" for room in ROOMS)):
        folder = Path(import_module(module).__file__ or "").parent
        for path in sorted(folder.glob("*.py")):
            digest.update(f"{module} {path.name}\n".encode() + code_of(path))
    return digest.hexdigest()[:16]


def kept(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """As `once`, and across runs: a copy of what an earlier run made from the same sources, if there is one."""

    def copy(folder: Path) -> None:
        CACHE.mkdir(parents=True, exist_ok=True)
        entry = CACHE / f"{name}-{content_key()}"
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where there is no GPU; marks tests of the longest fixtures as slow."""
    for item in items:
        if LONG & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        from handiffuser.engines.build import gpu

        if gpu() is None:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What runs compile goes into the run's temporary folder, which all workers share, not into the user's home."""
    base = tmp_path_factory.getbasetemp()
    os.environ["XDG_CACHE_HOME"] = str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "user-cache")


@pytest.fixture(scope="session")
def body_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's body, made by its own code."""

    def make(folder: Path) -> None:
        from handiffuser.demo.body import make_body

        folder.mkdir()
        make_body(folder / "smplh_demo.npz")

    return kept(tmp_path_factory, "body", make) / "smplh_demo.npz"


@pytest.fixture(scope="session")
def tiny_checkpoint_folder(body_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of odd sizes. Its positional kernel and its attention to words change the picture."""

    def make(folder: Path) -> None:
        import torch
        from handiffuser.models.checkpoint import random_checkpoint
        from handiffuser.models.configs import CONFIGS

        checkpoint = random_checkpoint(CONFIGS["tiny"], seed=3, body=body_path)
        generator = torch.Generator().manual_seed(0)
        for parameter in checkpoint.position_kernel.parameters():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        for block in checkpoint.hand_prior.blocks:
            block.words.out.weight.data = 0.3 * torch.randn(block.words.out.weight.shape, generator=generator)
        checkpoint.save(folder)

    return kept(tmp_path_factory, "checkpoint", make)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_checkpoint_folder: Path):
    from handiffuser.models.checkpoint import Checkpoint

    return Checkpoint.load(tiny_checkpoint_folder)


def exported(checkpoint: Path, factory: pytest.TempPathFactory, precision: str, *said: str) -> Path:
    """The tiny checkpoint, exported by `hd-export`. Its stderr must hold all of `said`."""

    def make(folder: Path) -> None:
        result = invoke("export.cli", checkpoint, folder, "--precision", precision)
        assert result.returncode == 0, result.stderr
        (folder / "stderr.txt").write_text(result.stderr)

    folder = kept(factory, precision, make)
    stderr = (folder / "stderr.txt").read_text()
    assert all(words in stderr for words in said), stderr
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tiny_checkpoint_folder, tmp_path_factory, "fp32")


@pytest.fixture(scope="session")
def tiny_half(tiny_checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In half, and compared with float32."""
    return exported(tiny_checkpoint_folder, tmp_path_factory, "fp16", "fp16 beside float32, 6 pictures")


@pytest.fixture(scope="session")
def tiny_bf16(tiny_checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16, and compared with float32."""
    said = ("(tolerance 0.1, emulated)", "emulated bf16 beside float32, 6 pictures", "runs on NVIDIA GPUs only")
    return exported(tiny_checkpoint_folder, tmp_path_factory, "bf16", *said)


@pytest.fixture()
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    try:
        refused = subprocess.run(line, capture_output=True, text=True).stderr
    except OSError as error:
        refused = str(error)
    if refused:
        pytest.skip(f"no disk can be mounted: {refused.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture()
def all_at_once(monkeypatch):
    """Every step advances all jobs in flight, whatever was measured: rounding in a batch depends on its size."""
    from handiffuser.runtime.steptimes import StepTimes

    monkeypatch.setattr(StepTimes, "choose", lambda times, active, unguided=(): active)
