"""What an export notes of the code that makes it: a change of any module that decides its bytes makes it stale."""

from __future__ import annotations

from pathlib import Path

import pytest
from handiffuser.export import source

EXPORT = Path(source.__file__).parent
# Modules of the room that no byte of a bundle depends on: the command, checks, folders, uploads, compiled graphs.
APART = {"__init__", "check", "cli", "inductor", "kept", "push", "source", "workspace"}


def code_of(monkeypatch, checkpoint, precision):
    """The files whose contents are part of the fingerprint."""
    files = []
    with monkeypatch.context() as patch:
        patch.setattr(source, "_contents", lambda code: files.extend(code) or [])
        source.fingerprint(checkpoint, None, precision=precision)
    assert all(path.is_file() for path in files), files
    return {path.resolve() for path in files}


def paths(*names):
    """Of modules "room/name", wherever the package is installed."""
    return {source._module(name).resolve() for name in names}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_each_module_that_decides_bytes_counts(tmp_path, monkeypatch, precision):
    code = code_of(monkeypatch, tmp_path, precision)
    own = {path.stem for path in EXPORT.glob("*.py")} - APART
    assert paths(*(f"export/{name}" for name in own - {"lower"})) <= code, "say in APART which modules change no byte"
    assert paths("core/contract", "core/weights", "core/adapters", "core/tensors", "engines/initializers") <= code
    assert (paths("export/lower", "calibration/mixed", "calibration/quantize") <= code) == (precision != "fp32")


def test_a_changed_module_makes_the_bundle_stale(tmp_path, monkeypatch):
    before = source.fingerprint(tmp_path, None, precision="fp32")["code"]
    assert source.fingerprint(tmp_path, None, precision="fp32")["code"] == before
    changed = tmp_path / "weights.py"
    changed.write_text("# another map of weights")
    found = source._module
    monkeypatch.setattr(source, "_module", lambda name: changed if name == "core/weights" else found(name))
    assert source.fingerprint(tmp_path, None, precision="fp32")["code"] != before
