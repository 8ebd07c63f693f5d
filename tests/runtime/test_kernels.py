"""Our kernels: their arithmetic, compiled for the host, gives numpy's numbers; the shipped PTX was made from them."""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
from importlib import resources

import numpy as np
import pytest
from handiffuser.runtime.canvas import Blend
from handiffuser.runtime.device_noise import TYPES as NOISE
from handiffuser.runtime.device_pictures import TYPES as BLEND
from handiffuser.runtime.noise import HANDS, LATENTS, MAX_SEED, normal, stream_key

FOLDER = resources.files("handiffuser.runtime")


KERNELS = {"noise": ("normal", ["u64"] * 5 + ["f32"]), "blend": ("blend", ["u64"] * 4 + ["f32"] * 2 + ["u64"] * 2)}


def compiled(folder, name, types):
    """The function of NAME.cu as a C++ compiler sees it."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, library = folder / f"{name}.cpp", folder / f"{name}.so"
    source.write_text(FOLDER.joinpath(f"{name}.cu").read_text())
    subprocess.run([compiler, "-O2", "-std=gnu++17", "-shared", "-fPIC", "-o", library, source], check=True)
    function = getattr(ctypes.CDLL(str(library)), KERNELS[name][0])
    function.argtypes = types
    return function


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    function = compiled(tmp_path_factory.mktemp("noise"), "noise", NOISE)

    def draw(seed, stream, step, count, scale=1.0):
        out = np.full(count + 3, 99, np.float32)
        function(out.ctypes.data, seed, stream_key(stream), step, count, scale)
        assert (out[count:] == 99).all()
        return out[:count]

    return draw


def test_the_blend_is_the_hosts(tmp_path):
    function = compiled(tmp_path, "blend", BLEND)
    x, known, noise = np.random.default_rng(0).normal(size=(3, 4, 6, 8)).astype(np.float32)
    mask = np.random.default_rng(1).uniform(size=(1, 6, 8)).astype(np.float32)
    mask[0, 0], mask[0, 1] = 0, 1
    shares = np.array([[0.3, 0.9], [0.7, 0.5]], np.float32)
    blend = Blend(known, noise, mask, shares)
    for masked, expected in ((True, blend(0, x)), (False, blend.start())):
        state = x.copy() if masked else np.full_like(x, np.nan)
        pointers = (known.ctypes.data, noise.ctypes.data, mask.ctypes.data if masked else 0)
        function(state.ctypes.data, *pointers, *shares[int(masked)], 48, state.size)
        np.testing.assert_allclose(state, expected, rtol=1e-6, atol=1e-6)
    assert np.array_equal(blend(0, x)[:, 1], x[:, 1])


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


@pytest.mark.parametrize("name", KERNELS)
def test_ptx_was_made_from_the_source(name):
    ptx, (entry, types) = FOLDER.joinpath(f"{name}.ptx").read_text(), KERNELS[name]
    assert hashlib.sha256(FOLDER.joinpath(f"{name}.cu").read_bytes()).hexdigest() in ptx.splitlines()[0]
    (parameters,) = re.findall(rf"\.entry {entry}\((.*?)\)", ptx, re.S)
    assert re.findall(r"\.param \.(\w+)", parameters) == types
    assert ".version 6.3\n" in ptx and ".target sm_75\n" in ptx  # every driver that knows Turing takes it


@pytest.mark.parametrize("architecture", ["75", "80", "86", "89", "90", "100", "120"])
def test_ptx_assembles(tmp_path, architecture):
    if shutil.which("ptxas") is None:
        pytest.skip("no ptxas")
    for name in KERNELS:
        (tmp_path / f"{name}.ptx").write_bytes(FOLDER.joinpath(f"{name}.ptx").read_bytes())
        line = ["ptxas", f"-arch=sm_{architecture}", "-o", tmp_path / "out", tmp_path / f"{name}.ptx"]
        subprocess.run(line, check=True)
