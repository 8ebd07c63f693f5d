"""Files are whole or absent."""

from __future__ import annotations

import os

import pytest
from handiffuser.files import lock, written


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "a.json"
    with written(path, durable=True) as temporary:
        temporary.write_text("whole")
        assert not path.exists() and temporary.parent == tmp_path
    assert path.read_text() == "whole" and [*tmp_path.iterdir()] == [path]


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), written(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_others_may_read_it(tmp_path):
    before = os.umask(0o022)
    try:
        with written(tmp_path / "a") as temporary:
            temporary.touch(mode=0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_a_lock_that_its_owner_removed_is_not_taken(tmp_path, monkeypatch):
    """Another process opened the file just before: with its lock, two runs would hold two files."""
    fcntl = pytest.importorskip("fcntl")
    path = tmp_path / "lock"
    take = fcntl.flock

    def late(file, how):
        path.unlink()
        take(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(BlockingIOError):
        lock(path)
    monkeypatch.undo()
    with lock(path):
        assert path.exists()
