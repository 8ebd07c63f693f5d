"""Every install line of the documents, in an environment of its own: what pip would install, and a first command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
import venv
from pathlib import Path

import platforms
import pytest
from kept import once

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
EXTRAS = {
    extras: f"{path.name}: {line.strip()}"
    for path in PAGES
    for line in path.read_text(encoding="utf-8").splitlines()
    for extras in re.findall(r"pip install \"?\.\[([\w,-]+)\]", line)
}
BOTH = {"onnxruntime", "onnxruntime-gpu"}
pytestmark = pytest.mark.slow


def closure(extras: str) -> frozenset[str]:
    """The extras of an install line with those that they bring."""
    return frozenset(platforms.extras_of(*extras.split(",")))


# Packages that satisfy a line satisfy each line of fewer extras, so pip solves the longest lines alone.
LONGEST = [line for line in EXTRAS if not any(closure(line) < closure(other) for other in EXTRAS)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What git has of the project: building it must leave nothing in the work tree."""
    out = tmp_path_factory.mktemp("source")
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes((ROOT / name).read_bytes())
    return out


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """What pip makes of a clone before it installs it, made once for all workers."""

    def make(folder):
        result = run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source)
        assert result.returncode == 0, result.stderr

    return next(once(tmp_path_factory, "wheel", make).glob("*.whl"))


def run(*command, cwd=None, timeout=900):
    return subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=timeout)


def test_lines_were_found():
    assert {
        "cpu",
        "cpu,test",
        "cpu,export",
        "cpu,export,tensorrt-rtx",
        "cuda",
        "cpu,bench,export,serve",
    } <= EXTRAS.keys()


@pytest.mark.parametrize("extras", LONGEST)
def test_resolves(wheel, tmp_path, extras):
    """pip finds a set of packages, and never both of ONNX Runtime's."""
    if "tensorrt" in extras.split(","):
        pytest.skip("full TensorRT's wheels are on NVIDIA's index alone")
    report = tmp_path / "report.json"
    result = run(
        sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet",
        "--report", report, f"{wheel}[{extras}]",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    names = {item["metadata"]["name"].lower() for item in json.loads(report.read_text())["install"]}
    assert "handiffuser" in names and len(names & BOTH) <= 1
    if {"cpu", "cuda"} & set(extras.split(",")):
        assert names & BOTH
    if "cuda" in extras.split(","):  # onnxruntime-gpu alone has none of the libraries that it loads
        assert any("cudnn" in name for name in names) and any("cuda-runtime" in name for name in names)


def test_no_extra_but_cpu_and_cuda_brings_onnx_runtime(source):
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    bring = {name for name, packages in extras.items() if any("onnxruntime" in p for p in packages)}
    refer = {
        name for name, packages in extras.items() if any(re.search(r"handiffuser\[.*(cpu|cuda)", p) for p in packages)
    }
    assert bring == {"cpu", "cuda"} and not refer


def environment(folder: Path) -> Path:
    venv.create(folder, with_pip=True)
    return folder / "bin"


def install(bin: Path, what: object) -> None:
    """Without compiling thousands of files that nothing imports."""
    result = run(bin / "pip", "install", "--quiet", "--no-compile", what)
    assert result.returncode == 0, result.stderr


def test_the_first_command_of_the_readme(source, tmp_path):
    """As it stands on the page; in a copy of the sources, as after a clone."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("python3 -m venv") and "hd-run" in line)
    result = run("bash", "-c", line, cwd=source)
    assert result.returncode == 0, result.stderr
    assert len(list((source / "out").glob("*.hands.npz"))) == 2 and (source / "out" / "index.html").exists()
    import shutil

    shutil.rmtree(source / ".venv")
    shutil.rmtree(source / "out")


def test_without_extras_messages_name_them_and_a_server_needs_its_own_alone(wheel, tmp_path, tiny_checkpoint_folder):
    """In one environment: first the bare package, then pip install ".[cpu,serve]" and hd-serve demo."""
    bin = environment(tmp_path / "env")
    install(bin, wheel)
    out = tmp_path / "out"
    for command, extra, says in (
        (("hd-run", "demo", "a fist"), "[cpu]", "stderr"),
        (("hd-run", "--check"), "[cpu]", "stdout"),
        (("hd-export", tiny_checkpoint_folder, out), "[export]", "stderr"),
        (("hd-train", "init", "nowhere", out), "[train]", "stderr"),
        (("hd-bench", "demo"), "[cpu]", "stderr"),
    ):
        result = run(bin / command[0], *command[1:], cwd=tmp_path)
        assert result.returncode == 1 and extra in getattr(result, says) and "Traceback" not in result.stderr, command
    install(bin, f"{wheel}[cpu,serve]")
    a_server_paints(bin, tmp_path)


def a_server_paints(bin: Path, tmp_path: Path) -> None:
    """One picture by Python's own client."""
    line = [str(bin / "hd-serve"), "demo", "--port", "0", "--threads", "1"]
    with subprocess.Popen(line, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as server:
        try:
            said = []
            while server.poll() is None and not (said and "Ready: " in said[-1]):
                said.append(server.stderr.readline())
            body = json.dumps({"prompt": "two open hands", "num_inference_steps": 2}).encode()
            url = said[-1].split("Ready: ")[1].strip() + "/v1/images/generations"
            asked = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(asked, timeout=60) as answer:
                assert json.load(answer)["data"][0]["b64_json"].startswith("iVBOR")  # a PNG's first bytes
        finally:
            server.terminate()
        assert server.wait(30) == 0 and "Traceback" not in "".join(said) + server.stderr.read()


def test_a_gpu_user_can_export_and_build_without_one(wheel, tmp_path, tiny_checkpoint_folder):
    """The README's line for RTX GPUs, in a clean environment: export, plans, and what hd-run says here."""
    bin = environment(tmp_path / "env")
    install(bin, f"{wheel}[cpu,export,tensorrt-rtx]")
    out = tmp_path / "engines"
    result = run(
        bin / "hd-export", tiny_checkpoint_folder, out, "--backend", "tensorrt-rtx", "--batch-sizes", 1,
        "--fidelity", "never", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0 and list((out / "plans").glob("unet*.plan")), result.stderr
    result = run(bin / "hd-run", out, "two open hands", "--steps", 2, cwd=tmp_path)
    assert "Traceback" not in result.stderr
