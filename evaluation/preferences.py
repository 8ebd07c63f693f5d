"""Counts what raters answered: which side wins, whether the place on the screen matters, whether raters agree.

    document = count([read_answers(path) for path in paths])
    print(*sentences(document), sep="\\n")

In the exact binomial test a pair counts once, by the majority of its raters: two raters of one pair are not two
independent pairs. "Cannot tell" is not a vote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from scipy.stats import binomtest
from statsmodels.stats.inter_rater import cohens_kappa

from ..errors import EvaluationError
from ..schema import MisfitError, fit, one_of, read_json, whole
from .pairs import FORMAT, QUESTIONS, a_is_left

Short = Annotated[str, Meta(min_length=1, max_length=200, description="a short text")]
CHANCE = 0.05  # below it a test says that chance alone would be rare


class Answer(msgspec.Struct):
    """One click."""

    question: Annotated[str, one_of(*QUESTIONS)]
    pair: Short
    answer: Annotated[str, one_of("left", "right", "same")]
    seconds: Annotated[float, Meta(ge=0, description="a number from 0")] = 0.0


class Answers(msgspec.Struct):
    """A file that the page saved."""

    hd_eval_answers: Annotated[int, whole(FORMAT, FORMAT)]
    study: Short
    a: Short
    b: Short
    pairs: Annotated[int, whole(1, 1_000_000)]
    rater: Short
    answers: Annotated[list[Answer], Meta(max_length=2_000_000)]


def read_answers(path: Path) -> Answers:
    """Raises EvaluationError for a file that the page did not save."""
    try:
        return fit(read_json(path), Answers)
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read: {error.strerror or error}.") from error
    except MisfitError as error:
        raise EvaluationError(
            f"{path} must be a file of answers that the page saved: {error} Save the answers from the page again."
        ) from None


def count(files: Sequence[Answers]) -> dict[str, Any]:
    """All statistics by question. Raises EvaluationError for answers of different studies, or of one rater twice."""
    first = files[0]
    for other in files[1:]:
        if other.study != first.study:
            raise EvaluationError(
                f"{other.rater}'s answers belong to another study ({other.a} and {other.b}) than {first.rater}'s. "
                "Count each study alone."
            )
    twice = [name for name, number in Counter(file.rater for file in files).items() if number > 1]
    if twice:
        raise EvaluationError(f"{twice[0]} has two files of answers. Give the later one alone.")
    document: dict[str, Any] = {"study": first.study, "a": first.a, "b": first.b, "pairs": first.pairs,
                                "raters": [file.rater for file in files], "questions": {}}  # fmt: skip
    for question in QUESTIONS:
        # For each rater: pair -> (what was chosen, which side). The last answer counts.
        votes: list[dict[str, tuple[str, str]]] = []
        for file in files:
            mine: dict[str, tuple[str, str]] = {}
            for answer in file.answers:
                if answer.question == question:
                    left = "a" if a_is_left(first.study, question, answer.pair) else "b"
                    right = "b" if left == "a" else "a"
                    chosen = {"left": left, "right": right, "same": "same"}[answer.answer]
                    mine[answer.pair] = chosen, answer.answer
            votes.append(mine)
        document["questions"][question] = _question(votes)
    return document


def _question(votes: Sequence[dict[str, tuple[str, str]]]) -> dict[str, Any]:
    by_pair: dict[str, list[str]] = {}
    for mine in votes:
        for pair, (chosen, _) in mine.items():
            by_pair.setdefault(pair, []).append(chosen)
    all_votes = [vote for mine in votes for vote in mine.values()]
    wins = Counter(_majority(chosen) for chosen in by_pair.values())
    sides = Counter(side for _, side in all_votes)
    table = [[chosen.count(word) for word in ("a", "b", "same")] for chosen in by_pair.values() if len(chosen) > 1]
    return {
        "answers": len(all_votes),
        "cannot_tell": sum(chosen == "same" for chosen, _ in all_votes),
        "pairs_won": {"a": wins["a"], "b": wins["b"], "neither": wins[""]},
        "win_rate_a": proportion(wins["a"], wins["a"] + wins["b"]),
        "left_chosen": proportion(sides["left"], sides["left"] + sides["right"]),
        "agreement": agreement(votes, np.array(table)),
    }


def _majority(chosen: Sequence[str]) -> str:
    """ "a", "b", or "" where neither has more votes."""
    a, b = chosen.count("a"), chosen.count("b")
    return "a" if a > b else "b" if b > a else ""


def proportion(wins: int, total: int) -> dict[str, Any]:
    """A share with Wilson's interval of 95 %, and the p of the exact two-sided binomial test against a half."""
    if not total:
        return {"value": None, "low": None, "high": None, "n": 0, "p": 1.0}
    test = binomtest(wins, total)
    low, high = test.proportion_ci(method="wilson")
    return {"value": wins / total, "low": float(low), "high": float(high), "n": total, "p": float(test.pvalue)}


def agreement(votes: Sequence[dict[str, tuple[str, str]]], table: np.ndarray) -> dict[str, Any] | None:
    """How far raters agree beyond chance: Cohen's kappa (1960) of two raters, Fleiss' (1971) of more.

    1 means that they always agree, 0 that they agree as often as chance does. table: of the pairs that two or more
    raters answered, how many votes each of a, b and "cannot tell" got [K, 3]. The interval comes from resampling pairs.
    None where there are fewer than two such pairs.
    """
    if len(table) < 2:
        return None
    two = len(votes) == 2
    if two:
        both = sorted(votes[0].keys() & votes[1].keys())
        words = ["a", "b", "same"]
        codes = np.array([[words.index(mine[pair][0]) for mine in votes] for pair in both])
        value, of = cohen(codes), codes
    else:
        value, of = fleiss(table), table
    rng = np.random.default_rng(0)
    draws = [(cohen if two else fleiss)(of[rng.integers(len(of), size=len(of))]) for _ in range(1000)]
    known = [draw for draw in draws if draw is not None]
    if value is None or not known:
        return None
    low, high = np.quantile(known, [0.025, 0.975])
    name = "Cohen's kappa" if two else "Fleiss' kappa"
    return {"name": name, "value": value, "low": float(low), "high": float(high), "pairs": len(of)}


def cohen(codes: np.ndarray) -> float | None:
    """codes: [K, 2] choices of two raters, 0 to 2. None where both gave the same word each time: chance explains it."""
    if (codes == codes[0, 0]).all():
        return None
    table = np.bincount(3 * codes[:, 0] + codes[:, 1], minlength=9).reshape(3, 3)
    return float(cohens_kappa(table, return_results=False))


def fleiss(table: np.ndarray) -> float | None:
    """table: [K, words] votes, two or more in each row.

    Rows may have different numbers of raters, which statsmodels' `fleiss_kappa` does not take. A rater may save half of
    the answers.
    """
    raters = table.sum(1)
    agreed = float(((np.square(table).sum(1) - raters) / (raters * (raters - 1))).mean())
    chance = float(np.square(table.sum(0) / table.sum()).sum())
    return None if chance >= 1 else (agreed - chance) / (1 - chance)


def sentences(document: dict[str, Any]) -> list[str]:
    """The statistics in words."""
    a, b, raters = document["a"], document["b"], len(document["raters"])
    if a == b:
        a, b = f"the first {a}", f"the second {b}"
    out = [f"{document['pairs']} pairs of {a} and {b}, {raters} rater{'s' * (raters != 1)}."]
    for question, found in document["questions"].items():
        won, rate, left = found["pairs_won"], found["win_rate_a"], found["left_chosen"]
        if not rate["n"]:
            out.append(f"{question}: no rater chose a picture.")
            continue
        result = (
            "the pictures do not differ beyond chance"
            if rate["p"] >= CHANCE
            else f"{a if rate['value'] > 0.5 else b} is preferred"
        )
        out.append(
            f"{question}: {a} wins {won['a']} pairs, {b} {won['b']}, neither {won['neither']}: "
            f"{100 * rate['value']:.1f} % ({100 * rate['low']:.1f} to {100 * rate['high']:.1f}), exact binomial test "
            f"p = {rate['p']:.3g}: {result}."
        )
        effect = "the side has no effect" if left["p"] >= CHANCE else "the side has an effect, whatever it shows"
        share = "-" if left["value"] is None else f"{100 * left['value']:.1f} %"
        out.append(
            f"{question}: the left picture was chosen in {share} of {left['n']} choices, p = {left['p']:.3g}: {effect}."
        )
        if agreed := found["agreement"]:
            beyond = "raters agree beyond chance" if agreed["low"] > 0 else "raters do not agree beyond chance"
            out.append(
                f"{question}: {agreed['name']} {agreed['value']:.2f} ({agreed['low']:.2f} to {agreed['high']:.2f}) "
                f"on {agreed['pairs']} pairs: {beyond}."
            )
    return out
