"""docs/data.md stays true: its commands and example are run, those that need others' data are checked for options."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from commands import invoke
from handiffuser.data.cli import commands
from handiffuser.data.samples import HANDS

TEXT = (Path(__file__).parent.parent / "docs/data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
LINES = [line.partition("#")[0].strip() for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
RUN = [line for line in LINES if line.startswith("hd-") and " convert " not in line]


@pytest.mark.slow
def test_every_command_runs(tmp_path, monkeypatch):
    """In the order of the page, in one empty folder; with fewer scenes and without a process for each, to be quick.

    (test_docs.py runs them as they stand.)
    """
    assert len(RUN) >= 7
    monkeypatch.chdir(tmp_path)
    for line in RUN:
        name, *arguments = shlex.split(line.replace("--scenes 40", "--scenes 8"))
        if name == "hd-data":
            assert commands.main(arguments, standalone_mode=False) == 0, line
        else:
            result = invoke({"hd-run": "runtime.cli"}[name], *arguments, cwd=tmp_path)
            assert result.returncode == 0, (line, result.stderr)
    assert (tmp_path / "scenes.html").stat().st_size > 10_000
    assert len(list((tmp_path / "scenes").glob("latents-*"))) == 2  # as they are, and flipped


def test_the_example_runs(tmp_path):
    example = next(block for kind, block in BLOCKS if kind == "python" and "write_shards" in block)
    result = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "photo-0001 ['a left hand', 'an open left hand'] 1\n"


@pytest.mark.parametrize("line", [line for line in LINES if " convert " in line])
def test_conversions_have_these_options(line):
    """They need data whose licences forbid to pass it on."""
    convert = commands.commands["convert"]
    convert.make_context("convert", shlex.split(line)[2:], resilient_parsing=False)


def test_all_arrays_all_commands_and_all_formats_are_told():
    assert all(f"`{name}`" in TEXT for name in HANDS)
    assert all(f"hd-data {name} " in TEXT for name in commands.commands)
    from handiffuser.data.convert import FORMATS

    assert all(f"hd-data convert {name} " in TEXT and f"| `{name}` |" in TEXT for name in FORMATS)


def test_what_latents_are_kept_of_is_what_the_page_says():
    options = {option for parameter in commands.commands["latents"].params for option in parameter.opts}
    named = set(re.findall(r"--[a-z0-9-]+", TEXT.split("## Latents")[1].split("## The order")[0]))
    assert named <= options
