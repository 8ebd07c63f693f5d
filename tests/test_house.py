"""The house stays in order: rooms import downwards, files and functions stay short, English stays plain.

`python studies/house.py` prints what these tests compare. The exceptions below may only shrink: when you shorten a file
or a function, take it out.
"""

from __future__ import annotations

import house
import pytest

# Exceptions, which may only shrink: (module, what it imports), file -> lines, file:function -> lines.
CIRCLES: list[set[str]] = []
UPWARD: set[tuple[str, str]] = set()
LONG_FILES: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {}
# Pattern -> how often it may stand in what a person reads.
STUMBLES: dict[str, int] = {
    "is no": 5,
    "are none": 0,
    "nobody": 0,
    "whoever": 0,
    "anew": 0,
    "lest": 0,
    "of which, of whom": 0,
    "sentences over 25 words": 0,
}


def test_it_reads_the_whole_package():
    assert set(house.lines()) == set(house.MAY_IMPORT) and sum(house.lines().values()) > 10_000
    assert "handiffuser.runtime.cli" in house.modules() and "handiffuser.contract" in house.modules()


def test_no_circles():
    assert [circle for circle in house.circles() if set(circle) not in CIRCLES] == []


def test_no_upward_imports():
    assert house.upward() - UPWARD == set()


def test_no_long_files():
    assert [(name, n) for name, n in house.long_files() if n > LONG_FILES.get(name, 0)] == []


def test_no_long_functions():
    assert [(name, n) for name, n in house.long_functions() if n > LONG_FUNCTIONS.get(name, 0)] == []


@pytest.fixture(scope="module")
def stumbles():
    return house.stumbles()


@pytest.mark.parametrize("pattern", STUMBLES)
def test_english_gets_plainer(pattern, stumbles):
    found = stumbles[pattern]
    assert found <= STUMBLES[pattern], f"{pattern!r} stands {found} times. Write the new sentence without it."


def test_every_pattern_has_a_ceiling(stumbles):
    assert set(STUMBLES) == set(stumbles) > house.PATTERNS.keys()


def test_a_circle_is_found(monkeypatch):
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}
    monkeypatch.setattr(house, "graph", lambda lazy=True: edges)
    assert house.circles() == [["b", "c"]]


def test_an_upward_import_is_found(monkeypatch, tmp_path):
    """Also one inside a function; a command may do that, and no other module."""
    for room in ("core", "engines", "runtime"):
        (tmp_path / room).mkdir()
    late = "def load():\n    from ..runtime import loop\n"
    (tmp_path / "runtime" / "loop.py").write_text("from .. import errors\nfrom ..engines import late\n")
    (tmp_path / "core" / "errors.py").write_text("")
    (tmp_path / "engines" / "late.py").write_text(late)
    (tmp_path / "engines" / "cli.py").write_text(late)
    monkeypatch.setattr(house, "ROOT", tmp_path)
    assert house.upward() == {("handiffuser.engines.late", "handiffuser.runtime.loop")}
