"""Weights and breaks: the web UI's own examples, and what users type by accident."""

from __future__ import annotations

import pytest
from handiffuser.errors import RequestError
from handiffuser.prompts import foreign, marked, parse, words


@pytest.mark.parametrize(
    ("prompt", "part"),
    [
        # The examples of the web UI's parser.
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
             ("sky", 1.4641), (".", 1.1)],
        ),
        # Accidents.
        ("unbalanced) text] :-) 10:30", [("unbalanced) text] :-) 10:30", 1)]),
        ("[(a] b)", [("a", 1), (" b", 1.1)]),
        ("(a:0) (b:-1.5) (c: +.5 )", [("a", 0), (" ", 1), ("b", -1.5), (" ", 1), ("c", 0.5)]),
        ("(a:1e0)", [("a", 1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("((a:2):2)", [("a", 4)]),
        ("() [] (:1.3)", [("  ", 1)]),
        (r"a\\b \c", [(r"a\b c", 1)]),
        ("(一只手:1.3) ✌️(👍🏽)", [("一只手", 1.3), (" ✌️", 1), ("👍🏽", 1.1)]),
    ],
)  # fmt: skip
def test_weights(prompt, part):
    (found,) = parse(prompt)
    wanted = [pair for pair in part if "".join(text for text, _ in part).strip()]
    assert [text for text, _ in found] == [text for text, _ in wanted]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in wanted])
    assert words(prompt) == "".join(text for text, _ in wanted)
    assert marked(prompt) == (words(prompt) != prompt)


def test_breaks():
    assert parse("a  BREAK (b\nBREAK c) d") == ((("a", 1),), (("b", 1.1),), (("c", 1.1), (" d", 1)))
    assert parse("BREAK a BREAK BREAK b BREAK") == ((("a", 1),), (("b", 1),))
    assert parse("BREAK") == parse("") == ((),)
    assert parse("BREAKFAST break") == ((("BREAKFAST break", 1),),)
    assert words("(a:1.2) BREAK b") == "a b"


def test_too_much_is_refused():
    with pytest.raises(RequestError, match=r"negative_prompt must have weights from -10 to 10, got 1e\+09 for 'a'"):
        parse("(a:1e9)", "negative_prompt")
    for prompt in ("(a:1e999)", "(a:-11)", "(" * 30 + "a"):
        with pytest.raises(RequestError, match="prompt must have weights"):
            parse(prompt)
    with pytest.raises(RequestError, match="prompt must have at most 1,000 brackets"):
        parse("(" * 1001)
    assert len(parse("(a) " * 400)[0]) == 800 and parse("a:b " * 20_000)


@pytest.mark.parametrize(
    ("prompt", "mark"),
    [("a [cat|dog]", "[cat|dog]"), ("[cat:dog:0.5] b", "[cat:dog:0.5]"), ("[cat::10]", "[cat::10]"), ("a AND b", "AND"),
     ("[a] (b:1.3) AND_ [c:d] hand", "")],
)  # fmt: skip
def test_marks_without_meaning(prompt, mark):
    assert foreign(prompt) == mark
