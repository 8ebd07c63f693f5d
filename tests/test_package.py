"""The wheel and the sdist are complete: installed alone into an empty place, the commands work from an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from commands import listen
from kept import once

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """sdist, and the wheel built from that sdist, made once for all workers."""
    return once(tmp_path_factory, "dist", build)


def build(out: Path) -> None:
    source = out.with_name("dist-source")
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in files:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    result = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", out, source], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_the_sdist_holds_the_sources(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    for wanted in ("README.md", "LICENSE", "pyproject.toml", "core/contract.py", "demo/bundle/manifest.json"):
        assert wanted in names


def tracked_data() -> list[str]:
    """The files of the package's rooms that git tracks and that are not Python, as they are named in the package."""
    import tomllib  # from Python 3.11 on

    rooms = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    names = []
    for package, folder in rooms.items():
        listed = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True)
        inside = package.removeprefix("handiffuser").lstrip(".")
        names += [str(Path(inside, Path(name).relative_to(folder))) for name in listed.stdout.splitlines()]
    beside = ("benchmarks/results/",)  # for readers of the repository
    return [name for name in names if not name.endswith((".py", ".md", ".sh")) and not name.startswith(beside)]


@pytest.mark.slow
def test_the_wheel_runs_from_an_empty_folder(built, tmp_path):
    site, work = tmp_path / "site", tmp_path / "empty"
    work.mkdir()
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site]
    subprocess.run([*install, next(built.glob("*.whl"))], check=True, timeout=300)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    code = (
        "import handiffuser, sys; assert handiffuser.__file__.startswith(sys.argv[1]), handiffuser.__file__\n"
        "from handiffuser.runtime.cli import main\n"
        "sys.argv = ['hd-run', 'demo', 'a left hand', '--steps', '2']\n"
        "main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, site], cwd=work, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert list((work / "out").glob("*.png"))
    for name in ("models", "training", "export", "calibration", "engines", "runtime", "serving"):
        assert (site / "handiffuser" / name / "__init__.py").exists()
    missing = [name for name in tracked_data() if not (site / "handiffuser" / name).is_file()]
    assert not missing, missing
    assert {"hd-run", "hd-export", "hd-train"} <= {path.name for path in (site / "bin").iterdir()}


@pytest.mark.parametrize(
    "command", ["hd_run", "hd_serve", "hd_export", "hd_engines", "hd_train", "hd_eval", "hd_repair"]
)
def test_ctrl_c_while_the_libraries_load_is_a_sentence(command):
    script = (
        "import os, signal, sys, threading\n"
        "from handiffuser import commands\n"
        "sys.argv = ['hd', '--help']\n"
        "class Slow:\n"  # a library that never finishes loading
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'click':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Slow())\n"
        f"commands.{command}()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, preexec_fn=listen
    )
    assert result.returncode == 130, result.stderr
    assert result.stderr == f"{command.replace('_', '-')}: Interrupted.\n"
