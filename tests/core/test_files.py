"""Files are whole or absent."""

from __future__ import annotations

import os

import pytest
from handiffuser.files import written


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
