"""What the demo is known to know: its own prompts give no warning, other meanings do."""

from __future__ import annotations

import numpy as np
import pytest
from handiffuser import shipped
from handiffuser.contract import Manifest
from handiffuser.demo.prompts import sample_spec, write_prompt
from handiffuser.grammar import SAMPLES, is_demo, overview, sentence, strangers, unknown_uses, vocabulary, words_of


def test_its_own_prompts_are_known():
    rng = np.random.default_rng(0)
    prompts = [write_prompt(sample_spec(rng, both=0.4), rng) for _ in range(1500)]
    for prompt in (*prompts, *SAMPLES):
        assert strangers(prompt, vocabulary(), True) == ([], {}), prompt
    assert is_demo(words_of(" ".join(prompts)))


def test_the_shipped_bundle_is_the_demo_s():
    assert is_demo(Manifest.load(shipped.bundle_path(), verify=False).words)
    assert not is_demo([]) and not is_demo(["fist", "umbrella"])


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a right hand holding a cup", {"holding", "cup"}),
        ("a hand showing the middle finger", {"middle", "finger"}),
        ("a hand showing two fingers", {"fingers"}),
        ("a blue hand", {"blue"}),
        ("a blue left hand on a green background", {"blue"}),
        ("three hands", {"three"}),
        ("a hand holding a gun", {"holding", "gun"}),
        ("a rock in a left hand", {"rock"}),
        ("a hand curved as if holding a cup, blue background", set()),
        ("a hand in a fist", set()),
        ("Thumbs up!", set()),
        ("left hand, fingers spread, white background", set()),
    ],
)
def test_known_words_in_an_unknown_meaning(prompt, words):
    found = unknown_uses(prompt)
    assert {word for some in found.values() for word in some} == words
    assert all(set(some) <= set(words_of(phrase)) for phrase, some in found.items())


def test_a_phrase_has_the_right_article():
    assert unknown_uses("an orange wall") == {"in front of an orange wall": ["orange", "wall"]}
    assert unknown_uses("a blue wall") == {"in front of a blue wall": ["blue", "wall"]}


def test_one_sentence_a_prompt_with_near_words():
    new, uses = strangers("a rigth hand holding an umbrella", {"a", "right", "hand", "holding", "an"}, True)
    said = sentence(new, uses, ["right", "hand"])
    assert "'rigth' (near: 'right')" in said and "'umbrella'." in said and "only as in 'holding up" in said
    assert sentence([], {}, ["right"]) == ""
    assert "and 3 more" in sentence([f"word{c}" for c in "abcdefghijklmno"], {}, [])


def test_a_word_that_was_cut_off_is_not_named():
    prompt = "a fist and an umbrella"
    assert strangers(prompt, {"a", "fist", "and", "an"}, end=prompt.index("rella"))[0] == []
    assert strangers(prompt, {"a", "fist", "and", "an"})[0] == ["umbrella"]


def test_the_overview_names_every_word_that_carries_meaning():
    shown = set(words_of(overview()))
    assert vocabulary() - shown <= {
        "next",
        "one",
        "image",
        "photo",
        "picture",
        "very",
        "front",
        "close",
        "fists",
        "backdrop",
    }
