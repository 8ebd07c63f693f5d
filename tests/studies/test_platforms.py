"""The table of wheels: which of PyPI's files a system installs."""

from __future__ import annotations

import platforms
import pytest
from packaging.utils import parse_wheel_filename
from packaging.version import Version

FILES = (
    "torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl",
    "torch-2.13.0-cp311-none-macosx_11_0_arm64.whl",
    "torch-1.9.0-cp39-cp39-win_amd64.whl",
    "msgspec-0.20.0-cp310-abi3-win_amd64.whl",
    "click-8.2.0-py3-none-any.whl",
    "diffusers-0.40.0-py2.py3-none-any.whl",
)


@pytest.mark.parametrize(
    ("file", "python", "systems"),
    [
        (FILES[0], "3.11", {"Linux x86-64"}),
        (FILES[0], "3.12", set()),
        (FILES[1], "3.11", {"macOS ARM64"}),
        (FILES[3], "3.13", {"Windows x86-64"}),  # the stable interface holds for later ones
        (FILES[3], "3.9", set()),
        (FILES[4], "3.11", set(platforms.SYSTEMS)),
        (FILES[5], "3.11", set(platforms.SYSTEMS)),
    ],
)
def test_which_system_takes_a_wheel(file, python, systems):
    tags = parse_wheel_filename(file)[3]
    found = {
        n for n, (pattern, _) in platforms.SYSTEMS.items() if any(platforms.fits(t, python, pattern) for t in tags)
    }
    assert found == systems


def test_an_extra_lacks_what_has_no_allowed_wheel(monkeypatch):
    def wheels(package):
        found: dict[Version, list] = {}
        for file in FILES:
            name, version, _, tags = parse_wheel_filename(file)
            if name == package:
                found.setdefault(version, []).extend(tags)
        return found

    monkeypatch.setattr(platforms, "wheels", wheels)
    line = [platforms.Requirement("torch>=2.11"), platforms.Requirement("psutil; sys_platform == 'win32'")]
    monkeypatch.setattr(platforms, "requirements", lambda extra: line)
    assert platforms.lacking("train", "Windows x86-64", "3.11") == ["psutil", "torch"], "torch 1.9 is too old"
    assert platforms.lacking("train", "macOS ARM64", "3.11") == []


def test_the_page_has_a_row_for_each_extra():
    page = (platforms.ROOT / "docs" / "platforms.md").read_text(encoding="utf-8")
    default = next(option for option in platforms.command.params if option.name == "extras").default
    assert all(f"| `{extra}` |" in page for extra in default.split(","))
    assert all(name in page for name in platforms.SYSTEMS)
