"""The documents: every command on them is one that there is, with options that it has; those that can, run.

A line that needs a GPU, hours, or files of the reader's own (named in capitals) is checked for its options alone.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import house
import pytest
from commands import invoke
from handiffuser import cpu, hub
from handiffuser.engines.backends import BACKENDS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
GUIDES = [ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"]  # for people who change the code
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
    "hd-repair": ("repair.cli", "repair_command"),
}
BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)
INLINE = re.compile(r"`((?:hd-\w+) [^`]*)`")
RUNS = re.compile(r"^printf|^hd-run demo|^hd-engines (list|verify) demo")  # in seconds, with what ships
LONGER = re.compile(r"^hd-run demo|^hd-data (demo|check|look|latents) |^hd-eval (out|demo|--reference demo)")
# Parameters that name a file or folder which must be there before; those that name what a command makes.
READS = {"engines", "checkpoint", "folder", "what", "reference", "against", "prompts_file", "hand_params", "hand_mean"}
READS |= {"image", "mask", "donor", "api_keys", "data", "start", "texts", "source", "body", "a", "b", "answers", "file"}
READS |= {"path", "judge", "photo", "hands_file", "hand_mean"}
MAKES = {"output", "out", "report"}


def typed(page: Path, inline: bool = True) -> list[str]:
    """The lines of a page that a reader types, without their comments: of its blocks, then of its sentences."""
    text = page.read_text(encoding="utf-8")
    found = [line for block in BLOCK.findall(text) for line in block.splitlines()]
    if inline:
        found += [" ".join(line.split()) for line in INLINE.findall(text)]
    return [re.sub(r"\s+#.*$", "", line).strip() for line in found]


def lines():
    return [
        pytest.param(line, id=f"{page.name}: {line[:60]}")
        for page in PAGES
        for line in typed(page)
        if line.startswith("hd-") and "..." not in line
    ]


def context(line: str) -> click.Context:
    """Has click read a line, down to its subcommand, without running anything. Raises what click would say."""
    name, *words = shlex.split(line)
    module, attribute = MODULES[name]
    command = getattr(import_module(f"handiffuser.{module}"), attribute)
    here = click.Context(command, info_name=name)
    while isinstance(command, click.Group):
        name, command, words = command.resolve_command(here, words)
        assert command is not None
        here = click.Context(command, info_name=name, parent=here)
    return command.make_context(here.info_name, list(words), parent=here.parent)


def test_the_pages_have_commands():
    assert len(lines()) > 30 and {line.values[0].split()[0] for line in lines()} >= set(MODULES) - {"hd-bench"}


@pytest.mark.parametrize("line", lines())
def test_options_are_those_that_there_are(line):
    try:
        context(line)
    except click.exceptions.Exit as done:  # --check, which reads no other argument
        assert done.exit_code == 0
    except click.MissingParameter:  # a sentence that names a command, and no line to type
        assert not re.search(r" -\w| --", line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_line_finds_what_it_reads(page):
    """What a line reads is the reader's own, in capitals, an id of the Hub, or made by an earlier line of the page."""
    there = {"demo"}
    for line in typed(page, inline=False):
        there.update(re.findall(r"> (\S+)$", line))
        if not line.startswith("hd-"):
            continue
        given = context(line).params
        for name in READS & set(given):
            for value in given[name] if isinstance(given[name], tuple) else [given[name]]:
                text = str(value)
                if hub.parse(text) is not None:
                    continue  # it is downloaded
                assert value is None or re.search("[A-Z]{2}", text) or text.split("/")[0] in there, (line, text)
        there.update(str(given[name]) for name in MAKES & set(given))


def run_in_order(chosen: list[str], folder: Path) -> None:
    """As a newcomer would: one line after the other, in a folder that was empty before.

    bash runs the first line, and those with characters that mean something to it. The others run in this process.
    """
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for number, line in enumerate(chosen):
        if "openvino" in line and not (cpu.has_bf16() and BACKENDS["openvino"].installed()):
            continue
        if number and line.startswith("hd-") and not set("|<>&;$*?~`") & set(line):
            name, *words = shlex.split(line)
            result = invoke(MODULES[name][0], *words, cwd=folder)
        else:
            result = subprocess.run(
                ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
            )
        assert result.returncode == 0, (line, result.stderr)


def chosen(page: Path, pattern: re.Pattern[str]) -> list[str]:
    """The lines that match and take no file of the reader's own."""
    return [line for line in typed(page) if pattern.match(line) and not re.search(r" [A-Z_]{3,}\b", line)]


LONG = ("run.md",)  # many commands


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page.name in LONG else [], id=page.name)
        for page in PAGES
        if chosen(page, RUNS)
    ],
)
def test_it_runs(page, tmp_path):
    run_in_order(chosen(page, RUNS), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data.md", "evaluate.md"])
def test_pages_with_longer_commands_run_in_order(name, tmp_path):
    if name == "evaluate.md":
        pytest.importorskip("mediapipe")
    # A tenth of the pictures shows as well whether each line finds what it needs.
    run_in_order([line.replace(" 96", " 10") for line in chosen(ROOT / "docs" / name, LONGER)], tmp_path)


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    for page in (*PAGES, *GUIDES):
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            if link.startswith("http"):
                continue
            target, _, anchor = link.partition("#")
            there = page.parent / target if target else page
            assert there.exists() and (not anchor or anchor in anchors(there)), (page.name, link)


def test_every_page_is_in_the_readme():
    text = PAGES[0].read_text(encoding="utf-8")
    assert all(f"](docs/{page.name})" in text for page in PAGES[1:])


def test_the_guides_name_files_that_there_are():
    for page in GUIDES:
        for name in re.findall(r"`((?:\w+/)+[\w.]*|\w+\.(?:toml|md))`", page.read_text(encoding="utf-8")):
            assert (ROOT / name).exists() or "NAME" in name, (page.name, name)


def test_the_drawing_of_the_rooms_is_what_the_house_allows():
    text = GUIDES[0].read_text(encoding="utf-8")
    drawn = {room: set(rest.split()) for room, rest in re.findall(r"^   (\w+) ─+► (.+)$", text, re.MULTILINE)}
    assert set(drawn) == set(house.MAY_IMPORT)
    for room, allowed in house.MAY_IMPORT.items():
        if room == "benchmarks":  # "all rooms below, but ..."
            assert set(house.MAY_IMPORT) - allowed - {"benchmarks", "core"} <= drawn[room]
        else:
            assert drawn[room] - {"(core)", "nothing", "of", "ours"} == allowed, room
    assert set(re.findall(r"^\| `(\w+)/`", text, re.MULTILINE)) == set(house.MAY_IMPORT)


def test_extras_are_those_that_there_are():
    tomllib = pytest.importorskip("tomllib")
    extras = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    )
    for page in PAGES:
        for names in re.findall(r'pip install "\.\[([^]]+)\]"', page.read_text(encoding="utf-8")):
            assert set(names.split(",")) <= extras, (page.name, names)
    table = PAGES[0].read_text(encoding="utf-8").partition("## Nine tasks")[2].partition("\n\n`hd-train")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| ") and "extras" not in line]
    assert len(rows) == 9
    for row in rows:
        named = re.findall(r"`([^`]+)`", row[2])
        assert named and all(set(names.split(",")) <= extras for names in named), row


def test_the_errors_that_are_explained_are_those_that_come():
    """Each sentence of the table stands in the sources, in one piece or over two lines."""
    rooms = [path for path in ROOT.glob("*/*.py") if path.parts[-2] != "tests"]
    sources = "\n".join(path.read_text(encoding="utf-8") for path in rooms)
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)
    table = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8").partition("| what you see")[2]
    sentences = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(sentences) > 7
    for sentence in sentences:
        assert sentence in sources or sentence == "hd-run: command not found", sentence


def test_tables_have_rows_of_one_length():
    """A cell too many is dropped without a word when the page is shown."""
    for page in PAGES:
        columns = 0
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            cells = len(re.sub(r"`[^`]*`", "", line).replace(r"\|", "").split("|")) if line.startswith("|") else 0
            assert not cells or not columns or cells == columns, f"{page.name}:{number}: {line}"
            columns = cells
