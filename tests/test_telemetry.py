"""No library that we ship with reports to its maker: no file of theirs, no name that is looked up."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from handiffuser import telemetry
from handiffuser.installed import version

ROOT = Path(__file__).parent.parent
CC = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(
    CC is None or not sys.platform.startswith("linux"), reason="the stand-in for the resolver needs Linux and cc"
)

# A resolver that notes each name and knows none but this machine: a test sends nothing, whatever telemetry does.
RESOLVER = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef int (*resolver)(const char *, const char *, const struct addrinfo *, struct addrinfo **);
int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
    const char *path = getenv("LOOKED_UP");
    if (!node || !strcmp(node, "localhost") || strspn(node, "0123456789.:") == strlen(node))
        return ((resolver)dlsym(RTLD_NEXT, "getaddrinfo"))(node, service, hints, found);
    FILE *file = path ? fopen(path, "a") : NULL;
    if (file) { fprintf(file, "%s\\n", node); fclose(file); }
    return EAI_NONAME;
}
"""


class House:
    """A home that nothing was written to, and what is looked up from it."""

    def __init__(self, folder: Path, library: Path) -> None:
        self.home, self.log = folder / "home", folder / "names.txt"
        self.home.mkdir(parents=True)
        # ONNX Runtime is silent where a variable says that it runs in CI; a user's machine has none of these.
        kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "OMP_NUM_THREADS")}
        self.env = {**kept, "HOME": str(self.home), "LD_PRELOAD": str(library), "LOOKED_UP": str(self.log)}

    def start(self, *command: object, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=self.env | env,
            cwd=self.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: object, **env: str) -> None:
        process = self.start(*command, **env)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output

    @property
    def names(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []

    @property
    def files(self) -> list[str]:
        """What libraries keep of their telemetry: a device id, events to send."""
        files = [str(path.relative_to(self.home)) for path in self.home.rglob("*")]
        return [file for file in files if "microsoft" in file.lower() or file.startswith("intel")]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resolver")
    (folder / "resolver.c").write_text(RESOLVER)
    subprocess.run(
        [str(CC), "-shared", "-fPIC", "-o", str(folder / "resolver.so"), str(folder / "resolver.c"), "-ldl"], check=True
    )
    return folder / "resolver.so"


@pytest.fixture(scope="module")
def patience(library, tmp_path_factory) -> float:
    """Seconds after which ONNX Runtime's telemetry was seen where it is on: that is what its absence is measured by."""
    house = House(tmp_path_factory.mktemp("on"), library)
    process = house.start("-c", "import time, onnxruntime; time.sleep(60)")
    started = time.monotonic()
    while process.poll() is None and time.monotonic() - started < 20 and not (house.files and house.names):
        time.sleep(0.05)
    process.kill()
    process.communicate()
    if not house.files:
        pytest.skip(f"onnxruntime {version('onnxruntime')} has no telemetry here")
    assert any("microsoft" in name for name in house.names), house.names
    return time.monotonic() - started


@pytest.fixture
def house(library, patience, tmp_path) -> House:
    return House(tmp_path / "house", library)


def silent(house: House) -> bool:
    assert not house.files and not house.names, (house.files, house.names)
    return True


@pytest.mark.slow
def test_a_run(house):
    house.run("-m", "handiffuser.runtime.cli", "demo", "a fist", "--steps", 1, "--quiet")
    assert silent(house)
    assert [path.name for path in house.home.iterdir() if path.name not in (".cache", "out")] == []


@pytest.mark.slow
def test_an_import(house, patience):
    """Of the package alone, by a program that then uses ONNX Runtime itself, for as long as telemetry needs."""
    house.run("-c", f"import handiffuser, onnxruntime, time; time.sleep({patience + 1})")
    assert silent(house)


def test_a_user_who_wants_it_gets_it(house):
    house.run("-c", "import handiffuser, onnxruntime", ORT_DISABLE_TELEMETRY="0")
    assert house.files


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])  # a thread, processes
def test_a_server(house, patience, workers):
    process = house.start(
        *("-m", "handiffuser.serving.cli", "demo", "--port", 0, "--workers", workers, "--threads", 1),
        *("--backend", "onnxruntime"),
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "Ready" in line:
                break
        time.sleep(patience + 1)
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert silent(house)


@pytest.mark.slow
def test_ray(house, patience):
    """Its processes look up the machine's own name, which does not count as a report."""
    house.run("-m", "handiffuser.runtime.cli", "demo", "a fist", "--steps", 1, "--ray", "--ray-workers", 1)
    reports = [name for name in house.names if "ray.io" in name or "microsoft" in name]
    assert not house.files and not reports, (house.files, house.names)


def test_openvino(house):
    pytest.importorskip("openvino")
    house.run("-c", "import handiffuser.engines.openvino, openvino; openvino.Core()")
    assert silent(house)


def test_openvino_for_a_user_who_wants_it(house):
    if version("openvino_telemetry") is None:
        pytest.skip("openvino-telemetry is not installed")
    (house.home / "intel").mkdir()
    (house.home / "intel" / "openvino_telemetry").write_text("1")
    house.run("-c", "import handiffuser, openvino")
    assert "www.google-analytics.com" in house.names


@pytest.mark.slow
def test_what_trains_and_exports(house):
    modules = "torch, diffusers, transformers, accelerate, onnxscript, openvino, peft, polygraphy, onnxruntime"
    house.run("-c", f"import handiffuser.export.cli, handiffuser.training.cli, {modules}")
    assert silent(house)


def test_the_choice_is_the_user_s(monkeypatch):
    for name in telemetry.OFF:
        monkeypatch.setenv(name, "yes, please")
    telemetry.off()
    assert all(os.environ[name] == "yes, please" for name in telemetry.OFF)
    for name in telemetry.OFF:
        monkeypatch.delenv(name)
    telemetry.off()
    assert {name: os.environ[name] for name in telemetry.OFF} == telemetry.OFF


@pytest.mark.parametrize("image", ["cpu", "cuda"])
def test_images_say_so_themselves(image):
    """What else runs in a container, such as a shell, is silent, too."""
    words = (ROOT / "docker" / f"{image}.Dockerfile").read_text().split()
    assert all(f"{name}={value}" in words for name, value in telemetry.OFF.items())
