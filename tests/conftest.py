"""What many tests share: the demo's body, a tiny random checkpoint, and the bundle that is exported from it once."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import run_command


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        from handiffuser.engines.build import gpu

        if gpu() is None:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def body_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from handiffuser.training.body import make_body

    path = tmp_path_factory.mktemp("body") / "smplh_demo.npz"
    make_body(path)
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(body_path: Path):
    """A random checkpoint of odd sizes, with a positional kernel that does something."""
    import torch
    from handiffuser.models.checkpoint import random_checkpoint
    from handiffuser.models.configs import CONFIGS

    checkpoint = random_checkpoint(CONFIGS["tiny"], seed=3, body=body_path)
    generator = torch.Generator().manual_seed(0)
    for parameter in checkpoint.position_kernel.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    for module in checkpoint.modules().values():
        module.requires_grad_(False)
    return checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint_folder(tiny_checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny_checkpoint.save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, exported by the command as a user types it."""
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    result = run_command("export.cli", tiny_checkpoint_folder, folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="session")
def tiny_half(tiny_checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in half, exported and compared with float32 by the command. Not to be written into."""
    folder = tmp_path_factory.mktemp("half") / "tiny"
    result = run_command("export.cli", tiny_checkpoint_folder, folder, "--precision", "fp16")
    assert result.returncode == 0, result.stderr
    assert "fp16 beside float32, 6 pictures" in result.stderr
    return folder


@pytest.fixture(scope="session")
def tiny_bf16(tiny_checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in bfloat16, exported and compared with float32 by the command. Not to be written into."""
    folder = tmp_path_factory.mktemp("bf16") / "tiny"
    result = run_command("export.cli", tiny_checkpoint_folder, folder, "--precision", "bf16")
    assert result.returncode == 0, result.stderr
    assert "(tolerance 0.1, emulated)" in result.stderr and "emulated bf16 beside float32, 6 pictures" in result.stderr
    assert "runs on NVIDIA GPUs only" in result.stderr
    return folder


@pytest.fixture()
def all_at_once(monkeypatch):
    """Every step advances all jobs in flight, whatever was measured: rounding in a batch depends on its size."""
    from handiffuser.runtime.steptimes import StepTimes

    monkeypatch.setattr(StepTimes, "choose", lambda times, active, alone=False: active)
