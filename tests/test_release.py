"""What a release is made of: notes out of the changelog, and a workflow that names files which are there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"


def notes(version: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / ".ci" / "notes", version], capture_output=True, text=True)


def test_the_notes_of_this_version():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
    found = notes(version)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert found.returncode == 0 and found.stdout.strip() in changelog
    assert found.stdout.startswith("### ") and "## [" not in found.stdout.replace("### ", "")


def test_a_tag_of_another_version_is_refused():
    found = notes("99.0")
    assert found.returncode == 1 and "The tag must be v" in found.stderr and "Traceback" not in found.stderr


def test_the_workflow_names_what_is_there():
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]
    assert jobs.keys() == {"package", "images", "publish"} and set(jobs["publish"]["needs"]) == {"package", "images"}
    for image in jobs["images"]["strategy"]["matrix"]["image"]:
        assert (ROOT / "docker" / f"{image}.Dockerfile").is_file()
    written = [step for job in jobs.values() for step in job["steps"] if step.get("with", {}).get("push") is True]
    assert not written, "nothing is published without a tag"
    assert jobs["publish"]["if"] == "github.ref_type == 'tag'"
