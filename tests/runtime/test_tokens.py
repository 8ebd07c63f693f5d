"""Tokens: begin, at most 75, end, padding; and the part that was cut."""

from __future__ import annotations

import json

import pytest
from handiffuser import BundleError
from handiffuser.grammar import words_of
from handiffuser.tokens import PromptTokenizer
from tokenizers import AddedToken, Tokenizer


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


def test_a_placeholder_of_several_vectors(tmp_path, toy_bundle, special):
    """All of its tokens stand in its place, as in training, and are cut with the rest of a prompt."""
    raw = Tokenizer.from_file(str(toy_bundle / "tokenizer.json"))
    raw.add_tokens([AddedToken(token, normalized=True) for token in ("<cat>", "<cat>_1", "<cat>_2", "<dog>")])
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = PromptTokenizer(tmp_path / "tokenizer.json", special)
    first, second, third, dog = (raw.token_to_id(token) for token in ("<cat>", "<cat>_1", "<cat>_2", "<dog>"))
    ids, dropped = tokenizer.encode("<cat><dog>")
    assert ids[:6].tolist() == [special["bos"], first, second, third, dog, special["eos"]] and dropped == ""
    ids, dropped = tokenizer.encode("<cat>" * 25 + "<dog> x")
    assert ids[-2] == third and dropped == "<dog> x"
    ids, dropped = tokenizer.encode("<dog>" * 74 + "<cat> y")
    assert ids[-2] == first and dropped == "<cat> y"
    latents = pytest.importorskip("handiffuser.data.latents")
    for prompt in ("<cat> <dog>", "<cat>" * 30, "a <Cat> fist"):
        assert latents.encode_prompts([prompt], raw, special)[0].tolist() == tokenizer.encode(prompt)[0].tolist()
