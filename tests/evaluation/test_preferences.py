"""The preference page, and what its answers say: random answers show no preference, consistent ones show it."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest
from click.testing import CliRunner
from datasets import made_sample
from handiffuser.errors import EvaluationError
from handiffuser.evaluation.cli import evaluate
from handiffuser.evaluation.pairs import QUESTIONS, a_is_left, page_of
from handiffuser.evaluation.preferences import cohen, count, fleiss, proportion, read_answers, sentences
from rows import save
from statsmodels.stats.inter_rater import fleiss_kappa

DATA = re.compile(r"const data = (\{.*\});")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    for name, size in (("ours", (24, 24)), ("theirs", (20, 20))):
        save(root / name, [made_sample(i, size=size) for i in range(60)])
    return root / "ours", root / "theirs"


@pytest.fixture(scope="module")
def page(folders):
    text, number = page_of(*folders, 60, 0, pytest.fail)
    assert number == 60
    return text


def rater(page: str, path, name: str, choose, share: float = 1.0):
    """Answers as the page saves them. choose: (data, question, item) -> "left", "right" or "same"."""
    data = json.loads(DATA.search(page)[1])
    answers = [
        {"question": question, "pair": item["pair"], "answer": choose(data, question, item), "seconds": 1.5}
        for question in data["questions"]
        for item in data["items"][: round(share * len(data["items"]))]
    ]
    record = {"hd_eval_answers": 1, "study": data["study"], "a": data["a"], "b": data["b"],
              "pairs": len(data["items"]), "rater": name, "answers": answers}  # fmt: skip
    path.write_text(json.dumps(record))
    return path


def test_the_page_is_blind_and_stands_alone(page):
    data = json.loads(DATA.search(page)[1])
    assert set(data["questions"]) == {"plausibility", "relevance"}
    assert not re.search(r"(src|href)=\"?(http|//)", page) and "key-00" not in page
    left = {q: np.mean([a_is_left(data["study"], q, i["pair"]) for i in data["items"]]) for q in QUESTIONS}
    assert all(0.3 < share < 0.7 for share in left.values()), "sides are random"
    # The left picture is A where `preferences` says so: A's pictures have 24 pixels.
    from base64 import b64decode
    from io import BytesIO

    from PIL import Image

    for item in data["items"][:8]:
        for question, (shown, _) in item["sides"].items():
            width = Image.open(BytesIO(b64decode(shown.split(",")[1]))).width
            assert (width == 24) == a_is_left(data["study"], question, item["pair"])


def test_random_answers_say_nothing(page, tmp_path):
    """Three raters throw dice: the count finds no winner, no effect of the side and no agreement."""
    dice = random.Random(4)
    paths = [
        rater(page, tmp_path / f"{name}.json", name, lambda *_: dice.choice(("left", "right", "left", "right", "same")))
        for name in ("ann", "bob", "cy")
    ]
    document = count([read_answers(path) for path in paths])
    for found in document["questions"].values():
        assert found["answers"] == 180
        assert found["win_rate_a"]["p"] > 0.05 and found["left_chosen"]["p"] > 0.05
        assert found["win_rate_a"]["low"] < 0.5 < found["win_rate_a"]["high"]
        assert found["agreement"]["low"] < 0 < found["agreement"]["high"]
    said = " ".join(sentences(document))
    assert said.count("the pictures do not differ beyond chance") == 2 and said.count("raters do not agree") == 2
    assert said.count("the side has no effect") == 2


def test_a_real_preference_is_found_whatever_its_side(page, tmp_path):
    def likes_a(data, question, item):
        return "left" if a_is_left(data["study"], question, item["pair"]) else "right"

    paths = [rater(page, tmp_path / f"{name}.json", name, likes_a) for name in ("ann", "bob")]
    result = CliRunner().invoke(evaluate, ["preferences", *map(str, paths)], catch_exceptions=False)
    document = json.loads(result.stdout.splitlines()[-1])
    for found in document["questions"].values():
        assert found["win_rate_a"]["value"] == 1 and found["win_rate_a"]["p"] < 1e-9
        assert found["left_chosen"]["p"] > 0.05
    assert "ours is preferred" in result.stdout


def test_a_rater_that_always_takes_the_left_shows_an_effect_of_the_side(page, tmp_path):
    document = count([read_answers(rater(page, tmp_path / "l.json", "l", lambda *_: "left"))])
    for found in document["questions"].values():
        assert found["left_chosen"]["p"] < 1e-9 and found["win_rate_a"]["p"] > 0.01
        assert found["agreement"] is None
    assert "the side has an effect" in " ".join(sentences(document))


def test_half_the_answers_count(page, tmp_path):
    half = count([read_answers(rater(page, tmp_path / "h.json", "h", lambda *_: "same", 0.5))])
    assert half["questions"]["relevance"]["cannot_tell"] == 30
    assert "no rater chose" in " ".join(sentences(half))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("{", "not JSON"), ("[]", "answers that the page saved"), ('{"hd_eval_answers": 2}', "hd_eval_answers"),
     ('{"hd_eval_answers": 1, "study": "s", "a": "a", "b": "b", "pairs": 1, "rater": "r", "answers": '
      '[{"question": "plausibility", "pair": "p", "answer": "up"}]}', "answer")],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, content, sentence):
    path = tmp_path / "answers.json"
    path.write_text(content)
    with pytest.raises(EvaluationError, match=sentence):
        read_answers(path)


def test_other_studies_and_one_rater_twice_are_refused(page, tmp_path):
    one = read_answers(rater(page, tmp_path / "1.json", "ann", lambda *_: "left"))
    with pytest.raises(EvaluationError, match="ann has two files"):
        count([one, one])
    other = read_answers(tmp_path / "1.json")
    other.study, other.rater = "another", "bob"
    with pytest.raises(EvaluationError, match="another study"):
        count([one, other])


def test_folders_meet_by_prompt_or_not_at_all(tmp_path):
    for name, prefix in (("a", "x"), ("b", "y")):
        samples = [made_sample(i, size=(8, 8)) for i in range(3)]
        for sample in samples:
            sample.key = prefix + sample.key
        save(tmp_path / name, samples)
    assert page_of(tmp_path / "a", tmp_path / "b", 10, 0, print)[1] == 3
    save(tmp_path / "c", [made_sample(9, prompts=["something else"])])
    with pytest.raises(EvaluationError, match="in common"):
        page_of(tmp_path / "a", tmp_path / "c", 10, 0, print)


def test_tests_and_kappas_are_the_textbooks():
    found = [proportion(wins, total)["p"] for wins, total in ((8, 10), (5, 10), (0, 5), (0, 0))]
    assert found == pytest.approx([0.109375, 1, 0.0625, 1])
    wilson = proportion(8, 10)
    assert (wilson["low"], wilson["high"]) == pytest.approx((0.490, 0.943), abs=1e-3)
    # Fleiss 1971, as the encyclopedias have it: 10 subjects, 14 raters, 5 words.
    table = np.array([[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
                      [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]])  # fmt: skip
    assert fleiss(table) == pytest.approx(0.210, abs=1e-3)
    assert fleiss(table) == pytest.approx(fleiss_kappa(table))
    assert fleiss(np.array([[2, 0, 0], [0, 3, 0], [1, 1, 0]])) is not None, "rows with different numbers of raters"
    # Cohen: 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no is 0.4.
    codes = np.array([[0, 0]] * 20 + [[0, 1]] * 5 + [[1, 0]] * 10 + [[1, 1]] * 15)
    assert cohen(codes) == pytest.approx(0.4) and cohen(np.zeros((4, 2), int)) is None
