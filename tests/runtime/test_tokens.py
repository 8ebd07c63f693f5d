"""Tokens: begin, at most 75, end, padding; and the part that was cut."""

from __future__ import annotations

import json

import pytest
from handiffuser import BundleError
from handiffuser.grammar import words_of
from handiffuser.runtime.tokens import PromptTokenizer


@pytest.fixture
def special(toy_bundle) -> dict[str, int]:
    return json.loads((toy_bundle / "manifest.json").read_text())["tokenizer"]


@pytest.fixture
def tokenizer(toy_bundle, special) -> PromptTokenizer:
    return PromptTokenizer(toy_bundle / "tokenizer.json", special)


def test_short_prompt(tokenizer, special):
    ids, dropped = tokenizer.encode("a fist")
    assert ids.shape == (77,) and ids.dtype == "int64" and dropped == ""
    assert ids[0] == special["bos"] and ids[7] == special["eos"]
    assert (ids[8:] == special["pad"]).all()


def test_empty_prompt_is_the_unconditional_one(tokenizer, special):
    ids, dropped = tokenizer.encode("")
    assert ids[0] == special["bos"] and ids[1] == special["eos"] and dropped == ""


def test_exactly_full_drops_nothing(tokenizer, special):
    ids, dropped = tokenizer.encode("x" * 75)
    assert dropped == "" and ids[-1] == special["eos"]


def test_a_long_prompt_is_cut_and_the_rest_told(tokenizer, special):
    prompt = "x" * 75 + " the rest " * 2000
    ids, dropped = tokenizer.encode(prompt)
    assert len(ids) == 77 and ids[-1] == special["eos"]
    assert dropped == " the rest " * 2000


@pytest.mark.parametrize("prompt", ["✌️👍🏽", "一只手", "кулак", "يد", "a\0b\n\t", "e\u0301", "🫱" * 100])
def test_any_script(tokenizer, prompt):
    ids, dropped = tokenizer.encode(prompt)
    assert len(ids) == 77 and (dropped == "" or prompt.endswith(dropped))


def test_words_are_letters_in_lower_case_each_once():
    assert words_of("A V-sign, 2 Hände: a fist_palm ✌️") == ["a", "v", "sign", "hände", "fist", "palm"]


def test_a_broken_file_or_manifest(tmp_path, toy_bundle, special):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(BundleError, match="cannot be read as a tokenizer"):
        PromptTokenizer(path, special)
    path.write_text("{}")
    with pytest.raises(BundleError, match="cannot be read as a tokenizer"):
        PromptTokenizer(path, special)
    with pytest.raises(BundleError, match="lacks 'eos'"):
        PromptTokenizer(toy_bundle / "tokenizer.json", {"bos": 0})
