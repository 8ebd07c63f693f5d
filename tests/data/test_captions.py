"""Captions are read as they were written, or refused by name; a moment gets those that hold then."""

from __future__ import annotations

import pytest
from handiffuser.data.captions import Caption, holding, read_captions
from handiffuser.schema import MisfitError

TEXT = "a “left” hand, naïve\r\n\r\n two hands \n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_that_tell_themselves_are_read(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes(TEXT.encode(encoding))
    assert read_captions(tmp_path / "a.txt") == [Caption("a “left” hand, naïve"), Caption("two hands")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (TEXT.encode("cp1252"), r"a.txt must be UTF-8, fails at byte 3. Save it as UTF-8"),
        ("a hand".encode("utf-16-le"), "NUL bytes"),
        ("手".encode("gbk"), "must be UTF-8"),
        (b"\xff\xfea", "must be UTF-16-LE"),
        (b"", "into a.txt"),
        (b" \n\n", "into a.txt"),
        (None, "into a.txt"),
    ],
)
def test_others_are_named(tmp_path, content, words):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(MisfitError, match=words):
        read_captions(tmp_path / "a.txt")


def test_a_moment_gets_what_holds_then(tmp_path):
    (tmp_path / "a.txt").write_text("walks#a/DET#0.0#0.0\nwaves#a#2.0#4.0\nnever#a#5.0#1.0\nsits#a#nan#nan\n#1 sign\n")
    captions = read_captions(tmp_path / "a.txt")
    assert holding(captions, 1) == ["walks", "sits", "#1 sign"]
    assert holding(captions, 2) == holding(captions, 3.9) == ["walks", "waves", "sits", "#1 sign"]
    assert holding(captions, 4) == holding(captions, 1)
