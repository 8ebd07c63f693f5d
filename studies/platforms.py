"""Which extras have wheels on which systems, by the tags of the files on PyPI.

    python studies/platforms.py                     # a table in Markdown, as in docs/platforms.md
    python studies/platforms.py --python 3.13

An extra counts as there when each package that it names has an allowed release with a wheel for the system. Packages
that those need in turn are not looked at.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from functools import cache
from pathlib import Path
from typing import Any

import click
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.tags import Tag
from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import Version

ROOT = Path(__file__).parent.parent
INDEX = "https://pypi.org/simple"
ACCEPT = "application/vnd.pypi.simple.v1+json"
# Name -> a pattern of wheels' platform tags, and what markers ask there.
SYSTEMS: dict[str, tuple[str, dict[str, str]]] = {
    "Linux x86-64": (r"(many)?linux.*_x86_64", {"sys_platform": "linux", "platform_machine": "x86_64"}),
    "Linux ARM64": (r"(many)?linux.*_aarch64", {"sys_platform": "linux", "platform_machine": "aarch64"}),
    "Windows x86-64": (r"win_amd64", {"sys_platform": "win32", "platform_machine": "AMD64"}),
    "Windows ARM64": (r"win_arm64", {"sys_platform": "win32", "platform_machine": "ARM64"}),
    "macOS ARM64": (r"macosx.*_(arm64|universal2)", {"sys_platform": "darwin", "platform_machine": "arm64"}),
    "macOS x86-64": (r"macosx.*_(x86_64|universal2|intel)", {"sys_platform": "darwin", "platform_machine": "x86_64"}),
}

# Packages that hold nothing but the name of another one -> that one.
BEHIND = {name: f"{name}-cu13-bindings" for name in ("tensorrt", "tensorrt-lean", "tensorrt-rtx")}

EXTRAS = "cpu,cuda,openvino,tensorrt-lean,tensorrt-rtx,export,train,detect,eval,serve,ray"


@cache
def wheels(package: str) -> dict[Version, list[Tag]]:
    """Release -> the tags of its wheels that were not withdrawn. Empty for a package that PyPI lacks."""
    asked = urllib.request.Request(f"{INDEX}/{BEHIND.get(package, package)}/", headers={"Accept": ACCEPT})
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            files = json.load(answer)["files"]
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
        return {}
    found: dict[Version, list[Tag]] = {}
    for file in files:
        if not file["filename"].endswith(".whl") or file.get("yanked"):
            continue
        try:
            _, version, _, tags = parse_wheel_filename(file["filename"])
        except InvalidWheelFilename:
            continue
        found.setdefault(version, []).extend(tags)
    return found


def fits(tag: Tag, python: str, platform: str) -> bool:
    """Whether CPython `python` ("3.11") installs a wheel with this tag on a platform."""
    minor = int(python.split(".")[1])
    stable = re.fullmatch(r"cp3(\d+)", tag.interpreter)
    interpreter = (
        tag.interpreter in ("py3", "py2.py3", f"py3{minor}")
        or tag.interpreter == f"cp3{minor}"
        or (tag.abi == "abi3" and stable is not None and int(stable[1]) <= minor)
    )
    return interpreter and (tag.platform == "any" or re.fullmatch(platform, tag.platform) is not None)


def extras_of(*names: str) -> list[str]:
    """Extras, and those that they bring."""
    ahead = list(names)
    for name in ahead:
        for line in project()["optional-dependencies"][name]:
            if (package := Requirement(line)).name == "handiffuser":
                ahead += sorted(package.extras - set(ahead))
    return ahead


def requirements(extra: str) -> list[Requirement]:
    """The packages of an extra, those of extras that it brings, and those of the bare package."""
    said = project()["optional-dependencies"]
    lines = [*project()["dependencies"], *(line for name in extras_of(extra) for line in said[name])]
    return [package for package in map(Requirement, lines) if package.name != "handiffuser"]


@cache
def project() -> dict[str, Any]:
    """The table `project` of pyproject.toml."""
    import tomllib  # from Python 3.11 on

    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def lacking(extra: str, system: str, python: str) -> list[str]:
    """The packages of an extra without a wheel for a system."""
    pattern, marks = SYSTEMS[system]
    environment = {**default_environment(), **marks, "python_version": python}
    names = []
    for package in requirements(extra):
        if package.marker and not package.marker.evaluate(environment):
            continue
        allowed = [version for version in wheels(package.name) if version in package.specifier]
        if not any(fits(tag, python, pattern) for version in allowed for tag in wheels(package.name)[version]):
            names.append(package.name)
    return sorted(set(names))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--python", default="3.11", show_default=True, help="CPython's version.")
@click.option("--extras", default=EXTRAS, show_default=True)
def command(python: str, extras: str) -> None:
    """Asks PyPI and prints the table."""
    print(f"| extra | {' | '.join(SYSTEMS)} |\n|{'---|' * (1 + len(SYSTEMS))}")
    for extra in extras.split(","):
        cells = [", ".join(f"no `{name}`" for name in lacking(extra, system, python)) or "yes" for system in SYSTEMS]
        print(f"| `{extra}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    command()
