"""Measures what deployment cost: a reference and a candidate paint the same prompts and seeds.

    document = compare(reference, candidate, against)      # each a Seen of the same prompts
    document["verdict"]

Both draw the same noise, so only the engines make a difference. A difference is the candidate's figure minus the
reference's. Both are resampled together, so the difficulty of a prompt drops out of the interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.dataset import Index
from ..data.samples import Bad, picture
from ..errors import EvaluationError
from ..schema import MisfitError
from .distances import COVERS, DRAWS, MEAN_DRAWS, Kernel, frechet, interval, mean, resampled, shares
from .measure import NAMES, SHARES, Seen, columns, own_rows

SAME = 99.0  # dB for equal pictures


def compare(reference: Seen, candidate: Seen, against: Seen | None) -> dict[str, Any]:
    """The document's "differences": metric -> {"reference", "candidate", "value", "low", "high", "n"}.

    Raises EvaluationError without a common picture.
    """
    common = sorted(set(reference.keys) & set(candidate.keys))
    if not common:
        raise EvaluationError(
            "Reference and candidate must have a picture in common, got none. Paint the same prompts with both."
        )
    places = [{key: number for number, key in enumerate(seen.keys)} for seen in (reference, candidate)]
    rows = [np.array([place[key] for key in common]) for place in places]
    weights = resampled(np.random.default_rng(0), len(common), MEAN_DRAWS)
    out: dict[str, Any] = {}
    spreads: dict[str, np.ndarray] = {}
    ours, theirs = (_common(columns(seen), row) for seen, row in zip((reference, candidate), rows, strict=True))
    for name in ours.keys() & theirs.keys():
        (a, pictures_a), (b, pictures_b) = ours[name], theirs[name]
        if not len(a) or not len(b):
            continue
        draws = shares(b, pictures_b, weights) - shares(a, pictures_a, weights)
        sides = {"reference": float(a.mean()), "candidate": float(b.mean())}
        out[name] = {**sides, **interval(sides["candidate"] - sides["reference"], draws), "n": len(b)}
        spreads[name] = draws
    if against is not None:
        own = own_rows(common, against.keys)
        found = _distances(reference.features[rows[0]], candidate.features[rows[1]], against.features, own)
        for name, (entry, draws) in found.items():
            out[name], spreads[name] = entry, draws
    for name, entry in out.items():  # Bonferroni: one in twenty leaves 0 out by chance
        strict = interval(entry["value"], spreads[name], name == "fid", 1 - (1 - COVERS) / len(out))
        entry["beyond_chance"] = strict["low"] > 0 or strict["high"] < 0
    return {name: out[name] for name in (*NAMES, *sorted(out.keys() - NAMES.keys())) if name in out}


def _common(
    found: dict[str, tuple[np.ndarray, np.ndarray]], rows: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The values of the pictures `rows` alone, renumbered by their place in `rows`."""
    largest = max((int(owners.max()) for _, owners in found.values() if len(owners)), default=0)
    place = np.full(max(largest, int(rows.max())) + 1, -1)
    place[rows] = np.arange(len(rows))
    return {
        name: (values[place[owners] >= 0], place[owners][place[owners] >= 0])
        for name, (values, owners) in found.items()
    }


def _distances(
    a: np.ndarray, b: np.ndarray, others: np.ndarray, own: list[int]
) -> dict[str, tuple[dict[str, Any], np.ndarray]]:
    """Differences of FID and KID to the same pictures, and their draws.

    a, b: [N, D], with the same prompts row by row. own: for each row the row of `others` with its prompt, or -1.
    """
    if min(len(a), len(others)) < 2:
        return {}
    rng = np.random.default_rng(0)
    sides = {"reference": frechet(a, others), "candidate": frechet(b, others)}
    draws = []
    for _ in range(DRAWS):
        rows, other = rng.integers(len(a), size=len(a)), rng.integers(len(others), size=len(others))
        draws.append(frechet(b[rows], others[other]) - frechet(a[rows], others[other]))
    spread = np.array(draws)
    fid = {**sides, **interval(sides["candidate"] - sides["reference"], spread, spread=True), "n": len(a)}
    first, second = Kernel(a, others, own), Kernel(b, others, own)
    sides, drawn = {"reference": first.value(), "candidate": second.value()}, second.draws() - first.draws()
    kid = {**sides, **interval(sides["candidate"] - sides["reference"], drawn), "n": len(a)}
    return {"fid": (fid, spread), "kid": (kid, drawn)}


def psnr(reference: Path, candidate: Path, keys: set[str]) -> dict[str, Any]:
    """Mean PSNR in dB over the pictures of these keys, with its interval, n, and the number of equal pictures.

    An equal picture counts SAME. Raises EvaluationError for pictures of different sizes.
    """
    indexes = [Index.open(folder) for folder in (reference, candidate)]
    places = [{index.entry(i).key: i for i in range(len(index))} for index in indexes]
    values = []
    for key in sorted(keys):
        samples = [index.sample(place[key]) for index, place in zip(indexes, places, strict=True)]
        try:
            a, b = (picture(sample).astype(np.float64) for sample in samples if not isinstance(sample, Bad))
        except (MisfitError, ValueError):
            continue  # `look` reported them
        if a.shape != b.shape:
            raise EvaluationError(f"{key} has {a.shape[1]} x {a.shape[0]} pixels in {reference}, and {b.shape[1]} x "
                                  f"{b.shape[0]} in {candidate}: these are not the same pictures.")  # fmt: skip
        error = float(np.mean((a - b) ** 2))
        values.append(min(10 * math.log10(255**2 / error), SAME) if error else SAME)
    weights = resampled(np.random.default_rng(0), max(len(values), 1), MEAN_DRAWS)
    found = mean(np.array(values), np.arange(len(values)), weights)
    return {**(found or {}), "equal": sum(value == SAME for value in values)}


def verdict(differences: dict[str, Any], fidelity: dict[str, Any]) -> str:
    """One sentence: which figures are worse or better beyond chance, or how much worse they could be at most.

    `compare` corrects for the number of figures (Bonferroni).
    """

    def said(names: Sequence[str]) -> str:
        return ", ".join(f"{_name(name)} {change(name, differences[name])}" for name in names)

    worse, better = list[str](), list[str]()
    for name, entry in differences.items():
        more = NAMES.get(name, ("", True))[1]
        if entry["beyond_chance"]:
            (better if (entry["value"] > 0) == more else worse).append(name)
    pictures = f"Pictures differ by {fidelity['value']:.1f} dB" if fidelity.get("n") else "No picture could be compared"
    if fidelity.get("n") and fidelity["equal"] == fidelity["n"]:
        pictures = "All pictures are the same"
    if worse:
        also = f"; better: {said(better)}" if better else ""
        return f"{pictures}, and the candidate is worse beyond chance: {said(worse)}{also}."
    if better:
        return f"{pictures}; nothing is worse beyond chance, and better are {said(better)}."
    if not any(entry["value"] for entry in differences.values()):
        return f"{pictures}, and all {len(differences)} figures are the same: deployment cost nothing."
    bound = differences.get("hand_confidence") or differences.get("pck_10")
    most = f" Hand confidence could be lower by {max(-bound['low'], 0):.3f} at most." if bound else ""
    return (
        f"{pictures}, and no figure differs beyond chance: deployment cost nothing that {len(differences)} figures "
        f"see.{most}"
    )


def _name(metric: str) -> str:
    return NAMES.get(metric, (metric.replace("_", " "), True))[0].split(" (")[0].split(", ")[0]


def change(name: str, entry: dict[str, Any]) -> str:
    """A share as "-1.2 (-2.0 to -0.4) points", another figure as a plain number."""
    share = name in SHARES or name.startswith("judge_")
    factor, digits, unit = (100, 1, " points") if share else (1, 4, "")
    value, low, high = (f"{factor * entry[key]:+.{digits}f}" for key in ("value", "low", "high"))
    return f"{value}{unit} ({low} to {high})"
