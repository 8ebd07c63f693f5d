"""The documents: every command on them is one that there is, with options that it has; those that can, run.

A line that needs a GPU, hours, or files of the reader's own (named in capitals) is checked for its options alone.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest
from handiffuser.engines import cpu, openvino

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
MODULES = {
    "hd-run": ("runtime.cli", "run"),
    "hd-serve": ("serving.cli", "serve"),
    "hd-export": ("export.cli", "command"),
    "hd-engines": ("engines.cli", "commands"),
    "hd-body": ("models.body", "commands"),
    "hd-data": ("data.cli", "commands"),
    "hd-train": ("training.cli", "commands"),
    "hd-bench": ("benchmarks.cli", "bench"),
    "hd-eval": ("evaluation.cli", "evaluate"),
}
BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)
INLINE = re.compile(r"`((?:hd-\w+) [^`]*)`")
RUNS = re.compile(r"^hd-run demo|^hd-engines (list|verify) demo")  # in seconds, with what ships


def lines():
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        typed = [line for block in BLOCK.findall(text) for line in block.splitlines()]
        typed += [" ".join(line.split()) for line in INLINE.findall(text)]
        for line in typed:
            line = re.sub(r"\s+#.*$", "", line).strip()
            if line.startswith("hd-") and "..." not in line:
                found.append(pytest.param(line, id=f"{page.name}: {line[:60]}"))
    return found


def context(line: str) -> None:
    """Has click read a line, down to its subcommand, without running anything. Raises what click would say."""
    name, *words = shlex.split(line)
    module, attribute = MODULES[name]
    command = getattr(import_module(f"handiffuser.{module}"), attribute)
    here = click.Context(command, info_name=name)
    while isinstance(command, click.Group):
        name, command, words = command.resolve_command(here, words)
        assert command is not None
        here = click.Context(command, info_name=name, parent=here)
    command.make_context(here.info_name, list(words), parent=here.parent)


def test_the_pages_have_commands():
    assert len(lines()) > 30 and {line.values[0].split()[0] for line in lines()} >= set(MODULES) - {"hd-bench"}


@pytest.mark.parametrize("line", lines())
def test_options_are_those_that_there_are(line):
    try:
        context(line)
    except click.MissingParameter:  # a sentence that names a command, and no line to type
        assert not re.search(r" -\w| --", line)


@pytest.mark.parametrize("line", [line for line in lines() if RUNS.match(line.values[0])])
def test_it_runs(line, tmp_path):
    if "openvino" in line and not (cpu.has_bf16() and openvino.is_installed()):
        pytest.skip("no bfloat16 here, or no OpenVINO")
    (tmp_path / "prompts.txt").write_text("a fist\n")
    if "some-id" in line:
        run = [sys.executable, "-m", "handiffuser.runtime.cli", "demo", "a fist", "-o", "out", "--steps", "2"]
        subprocess.run(run, cwd=tmp_path, check=True, capture_output=True)
        hands = next((tmp_path / "out").glob("*.hands.npz"))
        line = line.replace("out/some-id.hands.npz", str(hands))
    name, *words = shlex.split(line)
    command = [sys.executable, "-m", f"handiffuser.{MODULES[name][0]}", *words]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), (page.name, target)


def test_tables_have_rows_of_one_length():
    """A cell too many is dropped without a word when the page is shown."""
    for page in PAGES:
        columns = 0
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            cells = len(re.sub(r"`[^`]*`", "", line).replace(r"\|", "").split("|")) if line.startswith("|") else 0
            assert not cells or not columns or cells == columns, f"{page.name}:{number}: {line}"
            columns = cells
