"""The noise kernel: its arithmetic, compiled for the host, gives numpy's numbers; the shipped PTX was made from it."""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
from importlib import resources

import numpy as np
import pytest
from handiffuser.runtime.noise import HANDS, LATENTS, MAX_SEED, normal, stream_key

FOLDER = resources.files("handiffuser.runtime")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """noise.cu as a C++ compiler sees it."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, library = tmp_path_factory.mktemp("noise") / "noise.cpp", tmp_path_factory.mktemp("noise") / "noise.so"
    source.write_text(FOLDER.joinpath("noise.cu").read_text())
    subprocess.run([compiler, "-O2", "-std=gnu++17", "-shared", "-fPIC", "-o", library, source], check=True)
    function = ctypes.CDLL(str(library)).normal
    function.argtypes = [ctypes.c_void_p, *[ctypes.c_uint64] * 4, ctypes.c_float]

    def draw(seed, stream, step, count, scale=1.0):
        out = np.full(count + 3, 99, np.float32)
        function(out.ctypes.data, seed, stream_key(stream), step, count, scale)
        assert (out[count:] == 99).all()
        return out[:count]

    return draw


@pytest.mark.parametrize("count", [1, 2, 3, 4, 330, 16384, 16387])
def test_the_same_numbers_as_numpys(kernel, count):
    for seed, stream, step in [(0, LATENTS, 0), (7, HANDS, 1), (MAX_SEED, LATENTS, 1000), (2**40 + 1, HANDS, 50)]:
        ours, expected = kernel(seed, stream, step, count), normal(seed, stream, step, (count,))
        np.testing.assert_array_max_ulp(ours, expected, 1)
        assert (ours == expected).mean() > 0.999 or count < 1000


def test_scaled(kernel):
    np.testing.assert_array_max_ulp(
        kernel(3, LATENTS, 0, 1000, 14.6), normal(3, LATENTS, 0, (1000,)) * np.float32(14.6), 1
    )


def test_ptx_was_made_from_the_source():
    ptx = FOLDER.joinpath("noise.ptx").read_text()
    assert hashlib.sha256(FOLDER.joinpath("noise.cu").read_bytes()).hexdigest() in ptx.splitlines()[0]
    (parameters,) = re.findall(r"\.entry normal\((.*?)\)", ptx, re.S)
    assert re.findall(r"\.param \.(\w+)", parameters) == ["u64"] * 5 + ["f32"]
    assert ".version 6.3\n" in ptx and ".target sm_75\n" in ptx  # every driver that knows Turing takes it


@pytest.mark.parametrize("architecture", ["75", "80", "86", "89", "90", "100", "120"])
def test_ptx_assembles(tmp_path, architecture):
    if shutil.which("ptxas") is None:
        pytest.skip("no ptxas")
    (tmp_path / "noise.ptx").write_bytes(FOLDER.joinpath("noise.ptx").read_bytes())
    subprocess.run(["ptxas", f"-arch=sm_{architecture}", "-o", tmp_path / "out", tmp_path / "noise.ptx"], check=True)
