"""Versions read off folders' names are those that importlib.metadata reads."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import handiffuser
import pytest
from handiffuser import installed


@pytest.mark.parametrize("name", ["numpy", "msgspec", "pytest-xdist", "Pillow", "handiffuser"])
def test_versions_are_those_of_importlib(name):
    assert installed.version(name) == metadata.version(name)


def test_all_of_this_environment():
    found = {one.metadata["Name"]: one.version for one in metadata.distributions() if one.metadata["Name"]}
    assert len(found) > 20 and {name: installed.version(name) for name in found} == found
    assert handiffuser.__version__ == found["handiffuser"]


def test_what_is_not_installed(monkeypatch, tmp_path):
    assert installed.version("tensorrt-cu99") is None
    (tmp_path / "some_thing-2.0+cpu.dist-info").mkdir()
    (tmp_path / "broken.dist-info").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(tmp_path / "gone.zip")])
    assert installed.version("Some.Thing") == "2.0+cpu" and installed.version("broken") is None


def test_a_run_on_a_cpu_imports_nothing_of_a_gpu():
    """Nor what takes long and is of no use to it."""
    code = "import sys, handiffuser.runtime.cli as _; print(*sorted(sys.modules))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "handiffuser.runtime.loading" in loaded
    unwanted = {"torch", "onnx", "openvino", "rich", "importlib.metadata", "multiprocessing", "fsspec"}
    ours = {f"handiffuser.{name}" for name in ("runtime.device_loading", "runtime.device", "runtime.remote",
                                               "engines.tensorrt", "engines.inductor", "engines.build")}  # fmt: skip
    assert not loaded & (unwanted | ours)
