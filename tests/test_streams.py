"""Closed, full and abandoned standard streams, for every command."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a shell and /dev/full")
BIN = Path(sys.executable).parent
COMMANDS = (
    "hd-run",
    "hd-serve",
    "hd-export",
    "hd-engines",
    "hd-body",
    "hd-data",
    "hd-train",
    "hd-bench",
    "hd-eval",
    "hd-repair",
)
CLOSED = {"stdin": "<&-", "stdout": ">&-", "stderr": "2>&-"}

# A command that opens a file, as a model's would be, and then talks. It says which number the file has.
TALKS = """
import sys
from pathlib import Path
import click
from handiffuser import commands

@click.command()
def talk():
    with open(sys.argv[0]) as model:
        Path("numbers").write_text(str(model.fileno()))
        print("a result")
        click.echo("a word", err=True)
        sys.stdin.read()
        click.echo("more", err=True)

del sys.argv[1:]
commands.run("hd-talk", talk)
"""


def shell(line: str, cwd: Path, **env: str) -> tuple[int, str]:
    """Exit code and stderr of a line of bash."""
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], cwd=cwd, capture_output=True, text=True, timeout=120, env=env or None
    )
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr, result.stderr
    return result.returncode, result.stderr


@pytest.fixture
def talk(tmp_path) -> str:
    (tmp_path / "talk.py").write_text(TALKS)
    return f"{sys.executable} talk.py"


@pytest.mark.parametrize("closed", [set(some) for count in (1, 2, 3) for some in combinations(CLOSED, count)])
def test_closed_streams_are_dev_null(talk, tmp_path, closed):
    """Also: no file that is opened later takes their numbers."""
    source = "" if "stdin" in closed else "</dev/null "
    code, stderr = shell(talk + " " + source + " ".join(CLOSED[name] for name in sorted(closed)), tmp_path)
    assert code == 0 and stderr == ("" if "stderr" in closed else "a word\nmore\n")
    assert int((tmp_path / "numbers").read_text()) > 2


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_result_that_cannot_be_written_is_an_error(talk, tmp_path, unbuffered):
    code, stderr = shell(f"{talk} </dev/null >/dev/full", tmp_path, PYTHONUNBUFFERED=unbuffered)
    assert code == 1 and "hd-talk: Standard output cannot be written: No space left on device." in stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_who_leaves_is_none(talk, tmp_path, unbuffered):
    """As of any program that SIGPIPE ends, without a word about it."""
    code, stderr = shell(f"(sleep 0.5; echo) | {talk} | exec true", tmp_path, PYTHONUNBUFFERED=unbuffered)
    assert code == 141 and set(stderr.split("\n")) <= {"a word", "more", ""}


@pytest.mark.parametrize("lost", ["2>/dev/full", "2> >(exec true)"])
def test_talk_that_is_lost_stops_nothing(talk, tmp_path, lost):
    assert shell(f"(sleep 0.3; echo) | {talk} {lost}", tmp_path) == (0, "")


def test_a_run_without_streams(tmp_path):
    line = f"{BIN}/hd-run demo 'a fist' --steps 1 <&- >&- 2>&-"
    assert shell(line, tmp_path) == (0, "") and list((tmp_path / "out").glob("*.png"))


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_each_command(tmp_path, command):
    assert shell(f"{BIN}/{command} --help <&- >&- 2>&-", tmp_path) == (0, "")
    assert shell(f"{BIN}/{command} --help | exec true", tmp_path)[0] in (0, 141)  # 0 where it was as fast
    code, stderr = shell(f"{BIN}/{command} --help >/dev/full", tmp_path)
    assert code == 1 and stderr.startswith(f"{command}: Standard output cannot be written")
