"""`hd-engines compare`: a sound bundle passes, an overflow is named, and Polygraphy's own commands go on from there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from handiffuser.engines.cli import commands
from handiffuser.errors import EngineError

pytest.importorskip("polygraphy")
OVERFLOWING = "vae.decoder.up_blocks.0.resnets.0.conv1.weight"


def compare(*arguments):
    return CliRunner().invoke(commands, ["compare", *map(str, arguments)], standalone_mode=False)


def polygraphy(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    """A line of commands.sh, as a shell would run it, with this Python's Polygraphy."""
    here = [sys.executable, "-c", "import sys; from polygraphy.tools import main; sys.exit(main())"]
    words = [part for word in line.lstrip("# ").split() for part in (here if word == "polygraphy" else [word])]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300)


def test_half_precision_passes_and_polygraphy_reads_what_is_left(tiny_half, tmp_path):
    result = compare(tiny_half, "--graph", "unet", "--output", tmp_path / "out")
    assert result.return_value == 0, result.output
    lines = [line for line in (tmp_path / "out/unet/commands.sh").read_text().splitlines() if line[:10] == "polygraphy"]
    assert len(lines) == 2
    for line in lines:
        done = polygraphy(tmp_path / "out/unet", line)
        assert done.returncode == 0 and "PASSED" in done.stdout, done.stdout + done.stderr


def test_an_overflow_is_named(overflowing, tmp_path):
    """One convolution of the decoder is too strong for half precision; see conftest.py."""
    out = tmp_path / "out"
    result = compare(overflowing[1], "--graph", "image_decoder", "--output", out)
    assert result.return_value == 1 and "NOT FINITE" in result.output
    (node,) = re.findall(r"first at (\S+)", result.output)
    model = onnx.load(overflowing[1] / "image_decoder.onnx")
    (wrong,) = [node for node in model.graph.node if any(name.endswith(OVERFLOWING) for name in node.input)]
    assert node == wrong.name


@pytest.mark.slow
def test_polygraphy_finds_it_in_what_was_left(overflowing, tmp_path):
    """The commands of the search, as they stand in the file."""
    out = tmp_path / "out"
    compare(overflowing[1], "--graph", "image_decoder", "--output", out)
    folder = out / "image_decoder"
    for line in (folder / "commands.sh").read_text().splitlines():
        if line.startswith("# polygraphy"):
            done = polygraphy(folder, line)
            assert done.returncode == 0, done.stdout + done.stderr
    whole, part = (onnx.load(folder / name) for name in ("candidate.onnx", "reduced.onnx"))
    assert len(part.graph.node) < len(whole.graph.node) / 4


def test_what_cannot_be_compared_is_a_sentence(tiny_bundle, tiny_half, tmp_path, monkeypatch):
    for arguments, words in (
        ((tiny_bundle,), "needs a GPU to compare it with"),
        ((tiny_half, "--graph", "vae"), "got 'vae'"),
        ((tiny_half, "--backend", "tensorrt-rtx"), "No NVIDIA GPU"),
    ):
        result = compare(*arguments, "--output", tmp_path / "out")
        assert isinstance(result.exception, EngineError) and re.search(words, str(result.exception))
