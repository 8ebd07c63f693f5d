"""What many tests share: the demo's body, a tiny random checkpoint and its exports. README.md says how that works."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

# One thread for each worker; commands that tests start inherit it. Libraries read it when they are imported.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a misspelt path in a test must not become a download

import handiffuser  # noqa: E402, F401 (before a test imports a library that would report to its maker)
import pytest  # noqa: E402
from commands import instead_of_exporting, invoke  # noqa: E402
from kept import kept  # noqa: E402

# Tests that use these fixtures are slow: exports in half and bfloat16 and of Stable Diffusion, compiled graphs,
# plans, every stage trained, the peers' own export.
LONG = {
    "tiny_half",
    "tiny_bf16",
    "bundle_of_start",
    "overflowing",
    "cases",
    "tiny_plans",
    "trained",
    "peers_export",
}
EXPORTS = {"tiny_bundle", "tiny_half", "tiny_bf16"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where there is no GPU; marks tests of the longest fixtures as slow."""
    for item in items:
        if LONG & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    # A worker begins with one part of the list. With all exports in the first, the others have work meanwhile.
    first = {item.path for item in items if EXPORTS & set(getattr(item, "fixturenames", ()))}
    items.sort(key=lambda item: item.path not in first)
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


def exported(
    checkpoint: Path, factory: pytest.TempPathFactory, precision: str, *said: str, exact: Path | None = None
) -> Path:
    """The tiny checkpoint, exported by `hd-export`. Its stderr must hold all of `said`.

    exact: its export in float32, which is then compared with this one instead of being made once more.
    """

    def make(folder: Path) -> None:
        with instead_of_exporting(exact, "lower") if exact else contextlib.nullcontext():
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
def tiny_half(tiny_checkpoint_folder: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In half, and compared with float32."""
    said = "fp16 beside float32, 6 pictures"
    return exported(tiny_checkpoint_folder, tmp_path_factory, "fp16", said, exact=tiny_bundle)


@pytest.fixture(scope="session")
def tiny_bf16(tiny_checkpoint_folder: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16, and compared with float32."""
    said = ("(tolerance 0.1, emulated)", "emulated bf16 beside float32, 6 pictures", "runs on NVIDIA GPUs only")
    return exported(tiny_checkpoint_folder, tmp_path_factory, "bf16", *said, exact=tiny_bundle)


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


@pytest.fixture(scope="module", autouse=True)
def what_is_loaded_stays() -> None:
    """Leaves libraries out of later collections of garbage. Many tests ask for one, and it would take half a second."""
    gc.collect()
    gc.freeze()
