"""The project's outside: versions, continuous integration, and what every command answers to --version."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner
from handiffuser.installed import version
from test_docs import MODULES

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", MODULES)
def test_every_command_has_a_version(command):
    module, attribute = MODULES[command]
    result = CliRunner().invoke(getattr(import_module(f"handiffuser.{module}"), attribute), ["--version"])
    assert result.exit_code == 0 and result.output == f"{command}, version {version('handiffuser')}\n"
    assert f'{command} = "handiffuser.commands:{command.replace("-", "_")}"' in PROJECT


def test_the_changelog_begins_with_this_version():
    releases = re.findall(
        r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M
    )
    assert f'version = "{releases[0][0]}"' in PROJECT
    assert releases == sorted(releases, reverse=True)


def test_the_changelog_groups_changes():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    groups = re.findall(r"^### (.+)$", text, re.M)
    assert set(groups) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    lines = [line for line in text.splitlines() if line.startswith("- ")]
    assert len(lines) > 30 and len(lines) == len(set(lines)), "a line stands there twice"


def test_continuous_integration_runs_what_a_developer_runs():
    assert "- run: .ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
    ruff = re.search(r"rev: v([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert ruff and tuple(map(int, ruff[1].split("."))) >= (0, 12)
