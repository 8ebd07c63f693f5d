"""Each script of `examples/` runs as its first lines say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
BIN = Path(sys.executable).parent


def example(name: str, *arguments: object, timeout: float = 120) -> str:
    """What an example prints."""
    program = [sys.executable] if name.endswith(".py") else ["bash"]
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(
        [*program, EXAMPLES / name, *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_each_is_short():
    scripts = [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.sh")]
    assert len(scripts) >= 5
    for script in scripts:
        assert len(script.read_text(encoding="utf-8").splitlines()) < 40, script.name


def test_pictures(tmp_path):
    assert example("pictures.py", tmp_path).count(" s, right wrist at ") == 4
    assert len(list(tmp_path.glob("*.png"))) == len(list(tmp_path.glob("*.hands.npz"))) == 4


def test_edited_hands(tmp_path):
    said = example("edited_hands.py", tmp_path)
    tip, wrist = (int(word) for word in said.replace(".", " ").split() if word.isdigit())
    assert tip > 20 and wrist <= 1
    assert (tmp_path / "before.png").read_bytes() != (tmp_path / "after.png").read_bytes()


def test_custom_engine():
    assert "made on my accelerator" in example("custom_engine.py")


@pytest.mark.parametrize("name", ["client.py", "client.sh"])
def test_clients(name, tmp_path):
    from handiffuser import shipped
    from PIL import Image
    from served import serving

    with serving(shipped.resolve("demo", "bundle"), tmp_path / "server") as served:
        example(name, served.url, tmp_path / "fist.png")
    assert Image.open(tmp_path / "fist.png").size == (128, 128)


@pytest.mark.slow
def test_train(tmp_path, tiny_checkpoint_folder):
    from handiffuser.demo import dataset

    dataset.make(tmp_path / "data", 8, size=64, processes=1)
    example(
        "train.sh", tmp_path / "data", tiny_checkpoint_folder, tmp_path / "out", "--steps", 2, "--batch", 2,
        "--processes", 1, timeout=900,
    )  # fmt: skip
    assert list((tmp_path / "out" / "pictures").glob("*.png"))
