"""Computes all metrics of a set of pictures, each with its count, its settings and an interval of 95 %.

    seen = look(pictures, instruments)                 # one pass: detections, features, crops
    document = figures(seen, look(others, instruments, detect=False))

Pictures are read one at a time. Only the few that the report shows are kept.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..data.look import skin_tone, tone_name
from ..detection.detect import Detector
from .clip import Clip
from .distances import DRAWS, MEAN_DRAWS, Kernel, frechet, frechet_draws, gap, interval, mean, resampled
from .features import Extractor
from .hands import LEAST, MARGIN, PCK, Hand, crop, match
from .pictures import Show, Shown

BATCH = 32  # pictures of one call of the extractor
KEPT = 12  # best hands, and worst hands, that the report shows
GROUPS = ("gesture", "side", "view", "skin")
GROUPED = ("detection_rate", "hand_confidence", "pck_10", "handedness")
LEAST_GROUP = 10  # hands: smaller groups are left out
# Metric -> (title, whether more is better).
NAMES: dict[str, tuple[str, bool]] = {
    "detection_rate": ("hands found", True),
    "hand_confidence": ("hand confidence (misses 0)", True),
    "pck_5": ("joints within 5 % of the hand's size (misses 0)", True),
    "pck_10": ("joints within 10 % (misses 0)", True),
    "pck_20": ("joints within 20 % (misses 0)", True),
    "pck_5_marks": ("joints within 5 % in the detector's convention (misses 0)", True),
    "pck_10_marks": ("joints within 10 % in the detector's convention (misses 0)", True),
    "distance": ("mean distance of a joint, hand sizes (of those found)", False),
    "handedness": ("side right (of those found)", True),
    "extra_hands": ("hands too many, a picture", False),
    "fid": ("FID", False),
    "kid": ("KID", False),
    "fid_h": ("FID-H", False),
    "kid_h": ("KID-H", False),
    "clip_score": ("CLIP score", True),
}
SHARES = (
    "detection_rate",
    "hand_confidence",
    "pck_5",
    "pck_10",
    "pck_20",
    "pck_5_marks",
    "pck_10_marks",
    "handedness",
)  # from 0 to 1


@dataclass
class Instruments:
    """The tools that look at pictures. A tool that is None leaves its metrics out."""

    detector: Detector | None
    extractor: Extractor
    clip: Clip | None = None
    judge: Callable[[np.ndarray, dict[str, str]], dict[str, float]] | None = (
        None  # image, labels -> 1 where right, else 0
    )
    crops: str = "asked"  # around the "asked" joints, or around the "found" ones
    least: int = LEAST


@dataclass
class Kept:
    """A hand for the report."""

    quality: float
    key: str
    prompt: str
    image: np.ndarray
    hand: Hand


@dataclass
class Seen:
    """What `look` found in a set of pictures. hands[k] belongs to picture owners[k]."""

    keys: list[str] = field(default_factory=list)
    labels: list[dict[str, str]] = field(default_factory=list)
    hands: list[Hand] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    tones: list[str] = field(default_factory=list)  # of each hand; "" where the picture does not show it
    extra: list[int] = field(default_factory=list)  # of each picture
    clip: list[float] = field(default_factory=list)
    judged: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # label -> (picture, right or not)
    features: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    crop_features: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    crop_owners: list[int] = field(default_factory=list)
    best: list[Kept] = field(default_factory=list)
    worst: list[Kept] = field(default_factory=list)
    asked: int = 0  # hands that pictures say they show
    detected: bool = True

    def crop_keys(self) -> list[str]:
        return [self.keys[owner] for owner in self.crop_owners]


def look(
    pictures: Iterable[Shown | None], tools: Instruments, count: int, show: Show, detect: bool = True,
    labels: dict[str, dict[str, str]] | None = None,
) -> Seen:  # fmt: skip
    """Looks at each picture once. detect: False where the caller needs only distances to these pictures.

    labels: by key, for pictures that have none of their own.
    """
    detector = tools.detector if detect or tools.crops == "found" else None
    seen, whole, crops = Seen(detected=detector is not None), _Batch(tools.extractor), _Batch(tools.extractor)
    ranked: list[tuple[float, int, Kept]] = []
    lowest: list[tuple[float, int, Kept]] = []
    for number, shown in enumerate(pictures):
        show(number + 1, count)
        if shown is None:
            continue
        picture = len(seen.keys)
        seen.keys.append(shown.key)
        seen.labels.append(shown.labels or (labels or {}).get(shown.key, {}))
        found = detector(shown.image) if detector is not None else []
        hands = match(shown.hands, found, shown.image.shape)
        seen.asked += len(shown.hands)
        seen.extra.append(len(found) - sum(hand.found is not None for hand in hands) if shown.hands else 0)
        whole.add(shown.image)
        for hand in hands:
            place = hand.found if tools.crops == "found" else (hand.asked or hand.found)
            seen.hands.append(hand)
            seen.owners.append(picture)
            seen.tones.append(_tone(shown, hand))
            if place is not None:
                crops.add(crop(shown.image, place.joints, least=tools.least))
                seen.crop_owners.append(picture)
            if detector is not None and detect:
                kept = Kept(quality(hand), shown.key, shown.prompt, shown.image, hand)
                number = len(seen.hands)
                _keep(ranked, (kept.quality, -number, kept))
                _keep(lowest, (-kept.quality, -number, kept))
        if detect and tools.clip is not None:
            seen.clip.append(tools.clip(shown.image, shown.prompt))
        if detect and tools.judge is not None:
            for name, right in tools.judge(shown.image, seen.labels[-1]).items():
                seen.judged.setdefault(name, []).append((picture, right))
    seen.features, seen.crop_features = whole.close(), crops.close()
    most = min(KEPT, len(seen.hands) // 2)  # so that a hand is not in both lists
    seen.best, seen.worst = (
        [entry[2] for entry in sorted(heap, reverse=True, key=lambda entry: entry[:2])[:most]]
        for heap in (ranked, lowest)
    )
    return seen


class _Batch:
    """Collects pictures for one call of the extractor."""

    def __init__(self, extractor: Extractor) -> None:
        self.extractor, self.waiting, self.done = extractor, list[np.ndarray](), list[np.ndarray]()

    def add(self, image: np.ndarray) -> None:
        self.waiting.append(image)
        if len(self.waiting) == BATCH:
            self._take()

    def _take(self) -> None:
        self.done.append(self.extractor(self.waiting))
        self.waiting = []

    def close(self) -> np.ndarray:
        if self.waiting:
            self._take()
        return np.concatenate(self.done) if self.done else np.zeros((0, 0), np.float32)


def _keep(heap: list[tuple[float, int, Kept]], entry: tuple[float, int, Kept]) -> None:
    if len(heap) < KEPT:
        heapq.heappush(heap, entry)
    elif entry[:2] > heap[0][:2]:
        heapq.heapreplace(heap, entry)


def quality(hand: Hand) -> float:
    """The rank of a hand: sure and near hands score high, wrong sides lower, misses lowest."""
    if hand.found is None:
        return -2.0
    far = 0.0 if hand.distances is None else float(hand.distances.mean())
    wrong = hand.asked is not None and hand.asked.side != hand.found.side
    return hand.found.score - 2 * far - wrong


def _tone(shown: Shown, hand: Hand) -> str:
    """The requested skin tone, else the one that the picture shows at the joints."""
    if "skin" in shown.labels:
        return shown.labels["skin"]
    place = hand.asked or hand.found
    if place is None:
        return ""
    height, width = shown.image.shape[:2]
    angle = skin_tone(shown.image, place.joints * (width, height))
    return "" if angle is None else tone_name(angle)


# --- figures ---


def columns(seen: Seen) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Metric -> its values [K] and their pictures [K], for each metric that is a mean over hands or pictures."""
    owners, pictures = np.array(seen.owners, int), np.arange(len(seen.keys))
    out: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    if seen.detected:
        out["detection_rate"] = np.array([hand.found is not None for hand in seen.hands], float), owners
        out["hand_confidence"] = np.array([hand.score for hand in seen.hands]), owners
        if seen.asked:
            asked = np.array([hand.asked is not None for hand in seen.hands])
            both = np.array([hand.distances is not None for hand in seen.hands])
            for share in PCK:
                near = [0.0 if h.distances is None else float((h.distances <= share).mean()) for h in seen.hands]
                out[f"pck_{100 * share:.0f}"] = np.array(near)[asked], owners[asked]
            marked = np.array([hand.asked is not None and hand.asked.marks is not None for hand in seen.hands])
            for share in PCK[:2] if marked.any() else ():
                near = [0.0 if h.marked is None else float((h.marked <= share).mean()) for h in seen.hands]
                out[f"pck_{100 * share:.0f}_marks"] = np.array(near)[marked], owners[marked]
            far = [float(h.distances.mean()) for h in seen.hands if h.distances is not None]
            out["distance"] = np.array(far), owners[both]
            right = [h.asked.side == h.found.side for h in seen.hands if h.asked and h.found]
            out["handedness"] = np.array(right, float), owners[both]
            known = np.isin(pictures, owners[asked])
            out["extra_hands"] = np.array(seen.extra, float)[known], pictures[known]
    if seen.clip:
        out["clip_score"] = np.array(seen.clip), pictures
    for name, pairs in seen.judged.items():
        out[f"judge_{name}"] = np.array([right for _, right in pairs]), np.array([picture for picture, _ in pairs])
    return out


def figures(seen: Seen, against: Seen | None) -> dict[str, Any]:
    """The document's "metrics", "groups" and "hands"."""
    weights = resampled(np.random.default_rng(0), len(seen.keys), MEAN_DRAWS)
    metrics = {name: mean(values, owners, weights) for name, (values, owners) in columns(seen).items()}
    if against is not None:
        metrics |= distances(seen, against)
    return {
        "pictures": len(seen.keys),
        "hands_asked_for": seen.asked,
        "metrics": {name: value for name, value in metrics.items() if value is not None},
        "groups": groups(seen, weights) if seen.detected else [],
        "curve": curve(seen) if seen.detected and seen.asked else [],
        "hands": [
            {
                "key": seen.keys[owner],
                "asked": hand.asked.side if hand.asked else None,
                "found": hand.found.side if hand.found else None,
                "score": round(hand.score, 4),
                "distance": None if hand.distances is None else round(float(hand.distances.mean()), 4),
            }
            for hand, owner in zip(seen.hands, seen.owners, strict=True)
            if seen.detected
        ],
    }


def curve(seen: Seen) -> list[tuple[float, float]]:
    """PCK by its limit: (share of the hand's size, share of the requested joints within it)."""
    asked = [hand for hand in seen.hands if hand.asked is not None]
    apart = np.concatenate([h.distances if h.distances is not None else np.full(21, np.inf) for h in asked])
    return [(float(limit), round(float((apart <= limit).mean()), 4)) for limit in np.linspace(0, 0.4, 41).round(2)]


def distances(seen: Seen, against: Seen) -> dict[str, Any]:
    """FID and KID of the pictures, FID-H and KID-H of their hands' crops. Each needs 2 or more on both sides.

    Where both sets have the same prompts in the same order, their rows are resampled together.
    """
    out: dict[str, Any] = {}
    for suffix, ours, theirs, keys, others in (
        ("", seen.features, against.features, seen.keys, against.keys),
        ("_h", seen.crop_features, against.crop_features, seen.crop_keys(), against.crop_keys()),
    ):
        same, rows = keys == others, own_rows(keys, others)
        if min(len(ours), len(theirs)) < 2:
            continue  # `run.lacking` says so
        n = {"n": len(ours), "n_against": len(theirs), "paired": same}
        draws = frechet_draws(ours, theirs, pairs=same)
        out[f"fid{suffix}"] = {**interval(frechet(ours, theirs), draws, spread=True, least=0.0), **n}
        estimate = Kernel(ours, theirs, rows)
        out[f"kid{suffix}"] = {**interval(estimate.value(), estimate.draws()), **n}
    return out


def own_rows(keys: Sequence[str], others: Sequence[str]) -> list[int]:
    """For each key its place among the others, or -1. Two hands with the same key get different places."""
    places: dict[str, list[int]] = {}
    for number, key in enumerate(others):
        places.setdefault(key, []).append(number)
    return [places[key].pop(0) if places.get(key) else -1 for key in keys]


def groups(seen: Seen, weights: np.ndarray) -> list[dict[str, Any]]:
    """Each group of hands beside all others: {"by", "group", "n", metric: {"value", "low", "high", "gap": {...}}}."""
    found = columns(seen)
    hand_of = {
        "detection_rate": np.ones(len(seen.hands), bool),
        "hand_confidence": np.ones(len(seen.hands), bool),
        "pck_10": np.array([hand.asked is not None for hand in seen.hands]),
        "handedness": np.array([hand.distances is not None for hand in seen.hands]),
    }
    out: list[dict[str, Any]] = []
    for by in GROUPS:
        words = np.array([_group(seen, by, number) for number in range(len(seen.hands))])
        names = [name for name in dict.fromkeys(words.tolist()) if name and (words == name).sum() >= LEAST_GROUP]
        if len(names) < 2:
            continue
        for name in names:
            entry: dict[str, Any] = {"by": by, "group": name, "n": int((words == name).sum())}
            for metric in GROUPED:
                if metric not in found:
                    continue
                values, owners = found[metric]
                member = (words == name)[hand_of[metric]]
                if member.sum() < LEAST_GROUP or (~member).sum() < LEAST_GROUP:
                    continue
                inside, outside = (mean(values[m], owners[m], weights) for m in (member, ~member))
                assert inside is not None and outside is not None
                entry[metric] = dict(inside)
                if len(names) > 2 or name == names[0]:  # of two groups the second has the same gap
                    entry[metric]["gap"] = gap(inside, outside)
            out.append(entry)
    return out


def _group(seen: Seen, by: str, number: int) -> str:
    hand, labels = seen.hands[number], seen.labels[seen.owners[number]]
    if by == "side" and hand.asked is not None:
        return hand.asked.side
    return labels.get(by) or (seen.tones[number] if by == "skin" else "")


def settings(tools: Instruments, against: str | None) -> dict[str, Any]:
    """How it was measured, for every table."""
    out: dict[str, Any] = {
        "intervals": f"95 %: of shares Wilson's, of means {MEAN_DRAWS} resamplings of the pictures, of FID 1.96 "
        f"standard deviations of {DRAWS} resamplings, of gaps between groups Newcombe's",
        "KID": "unbiased, over all pairs, (x·y / D + 1)³",
        "paired": "pictures of the same prompts are resampled together, and KID leaves their own pairs out",
        "crops": f"{MARGIN} times the box of the joints {tools.crops}, at least {tools.least} pixels",
        "extractor": {"name": tools.extractor.name, **tools.extractor.settings},
    }
    if tools.detector is not None:
        out["detector"] = {"name": tools.detector.name, **tools.detector.settings}
    if against is not None:
        out["against"] = against
    if tools.clip is not None:
        out["clip"] = tools.clip.settings
    return out
