"""`hd-run --check`: what it says of a machine, with everything installed and with nothing but the base dependencies."""

from __future__ import annotations

import sys

import pytest
from click.testing import CliRunner
from handiffuser.engines import backends
from handiffuser.runtime import check
from handiffuser.runtime.cli import run

NOT_BASE = ("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "torch", "cuda", "cuda.bindings")


def checked():
    return CliRunner().invoke(run, ["--check"])


def test_onnx_runtime_works_here():
    result = checked()
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("handiffuser ") and sys.version.split()[0] in lines[0]
    for name in ("CPU: ", "GPU: ", "NVIDIA driver: ", "Cache: "):
        assert any(line.startswith(name) for line in lines), name
    assert any(line.split()[:2] == ["onnxruntime", "yes"] for line in lines)
    assert any(line.split() == ["export", "complete"] for line in lines)


def test_with_the_base_dependencies_alone(monkeypatch):
    """It names the extra for everything that is missing, and the exit code says that no picture can be made."""
    for name in NOT_BASE:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(backends, "find_spec", lambda package: None)
    base = {"handiffuser", "numpy", "click", "msgspec", "rich", "pillow", "tokenizers"}
    monkeypatch.setattr(check, "version", lambda package: "1.0" if package in base else None)
    result = checked()
    assert result.exit_code == 1, result.output
    assert result.output.count('pip install "handiffuser[') >= 13
    assert result.output.rstrip().endswith('Install one: pip install "handiffuser[cpu]".')
    assert "Traceback" not in result.output and " yes " not in result.output


def test_every_backend_of_the_table_has_a_line():
    lines = checked().output.partition("Backends")[2].partition("Extras")[0].splitlines()
    assert [line.split()[0] for line in lines[1:] if line] == list(backends.BACKENDS)


def test_a_package_that_is_broken_is_named(monkeypatch):
    def broken(package):
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(check, "imported", broken)
    words, works = check.state(backends.BACKENDS["openvino"], gpu=False)
    assert not works and "libcudart.so.13" in words and words.endswith('pip install "handiffuser[openvino]"')


@pytest.mark.parametrize(("gpu", "works"), [(False, False), (True, True)])
def test_a_backend_of_gpus_needs_one(monkeypatch, gpu, works):
    monkeypatch.setattr(check, "imported", lambda package: None)
    monkeypatch.setattr(backends, "find_spec", lambda package: True)
    words, good = check.state(backends.BACKENDS["tensorrt"], gpu)
    assert good is works and words.endswith("cuda" if gpu else "needs an NVIDIA GPU.")


@pytest.mark.parametrize(
    ("marker", "version", "expected"),
    [
        (' python_version < "3.13" and extra == "eval"', (3, 12), True),
        (' python_version < "3.13" and extra == "eval"', (3, 13), False),
        (' python_version >= "3.11" and extra == "cuda"', (3, 10), False),
        (' extra == "eval"', (3, 13), True),
    ],
)
def test_requirements_of_other_pythons_do_not_count(monkeypatch, marker, version, expected):
    monkeypatch.setattr(check.sys, "version_info", (*version, 0))
    assert check.applies(marker) is expected


def test_the_driver_is_read_from_its_own_file(monkeypatch, tmp_path):
    file = tmp_path / "version"
    monkeypatch.setattr(check, "DRIVER", file)
    assert check.driver_version() is None
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n")
    assert check.driver_version() == "580.95.05"
