"""The pictures of the demo world, in many wordings.

A `Spec` gives hand, gesture, view, skin and background; `write_prompt` words it in one of many English forms.

    write_prompt(Spec("left", "victory", "palm", "dark", "blue"), np.random.default_rng(0))
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from ..grammar import ADJECTIVES, BACKGROUNDS, NOUNS, SIDES, SKINS, VIEWS, with_article
from .gestures import GESTURES, NAMES

# Relative frequency of gestures whose fingers hide each other, or that resemble one another.
WORDINGS = 4  # prompts for each picture: training learns words from those that change while the picture stays
HARD = {"fist": 1.5, "thumbs_up": 2.0, "thumbs_down": 2.0, "claw": 1.5, "cupped_hand": 1.5, "c_shape": 1.5,
        "pinched_fingers": 1.5, "ok_sign": 1.5, "pinch": 1.5}  # fmt: skip

EITHER = ("thumbs_up", "thumbs_down")  # gestures whose nouns fit one hand or two


@dataclass(frozen=True)
class Spec:
    """The content of a picture.

    side: in SIDES. gesture: in gestures.NAMES. view: in VIEWS, or empty for another view, which prompts leave out.
    skin: in SKINS. background: in BACKGROUNDS. other: the right hand's gesture where two hands differ; `gesture` is
    then the left hand's.
    """

    side: str
    gesture: str
    view: str
    skin: str
    background: str
    other: str = ""

    def gesture_of(self, side: int) -> str:
        """The gesture of the left (0) or the right hand (1)."""
        return self.other if side and self.other else self.gesture

    def view_of(self, side: int) -> str:
        """The view of the left (0) or the right hand (1): the picture's, or the only one its gesture allows."""
        views = allowed_views(self.gesture_of(side), self.side)
        return self.view if self.view in views else views[0]


def allowed_views(gesture: str, side: str) -> tuple[str, ...]:
    """The views that show a gesture. Two hands with the thumbs up or down, or that point at each other, have only the
    view whose forearms come from outside."""
    views = GESTURES[gesture].views
    if side == "both":
        spin = GESTURES[gesture].spin
        views = tuple(v for v in views if v != "side")
        if abs(spin) > 60:
            views = ("back",) if spin > 0 else ("palm",)
    return views


def is_held_out_pair(one: str, other: str) -> bool:
    """About one pair of different gestures in ten, by a stable hash of their names: never trained on together."""
    key = " ".join(sorted((one, other))).encode()
    return one != other and int.from_bytes(hashlib.sha256(key).digest()[:4], "big") % 10 == 0


def sample_spec(rng: np.random.Generator, both: float = 0.15, differ: float = 0.5, even: bool = False) -> Spec:
    """A random Spec. both: share of two-hand pictures; differ: share of those with two different gestures.

    even: every gesture and every view comes equally often; otherwise gestures that are hard to draw come more often.
    Held-out pairs never come.
    """
    side = "both" if rng.random() < both else SIDES[rng.integers(2)]
    weights = np.array([1.0 if even else HARD.get(name, 1.0) for name in NAMES])
    weights /= weights.sum()
    gesture = NAMES[rng.choice(len(NAMES), p=weights)]
    other = ""
    if side == "both" and rng.random() < differ:
        while other in ("", gesture) or is_held_out_pair(gesture, other):
            other = NAMES[rng.choice(len(NAMES), p=weights)]
    views = allowed_views(gesture, side)
    view = views[rng.integers(len(views))]
    skin, background = (list(names)[rng.integers(len(names))] for names in (SKINS, BACKGROUNDS))
    return Spec(side, gesture, view, skin, background, other)


def _pick(rng: np.random.Generator, options):
    return options[rng.integers(len(options))]


def _one_hand(gesture: str, side: str, tone: str, rng: np.random.Generator) -> str:
    """One of two hands that differ: "a left hand making a fist", "a right fist"."""
    phrase = _pick(rng, GESTURES[gesture].phrases)
    who = [tone, side] if rng.random() < 0.5 else [side, tone]
    if gesture in NOUNS and rng.random() < 0.5:
        return with_article(" ".join(w for w in (*who, _pick(rng, NOUNS[gesture])) if w))
    return with_article(" ".join(w for w in (*who, "hand", phrase) if w))


def _two_hands(spec: Spec, tone: str, rng: np.random.Generator) -> str:
    """Two hands that differ: "a left fist and a right peace sign", "two hands, one open, one pointing".

    Some wordings do not assign the gestures to the hands.
    """
    pairs = [("left", spec.gesture), ("right", spec.other)]
    if rng.random() < 0.5:
        pairs.reverse()
    if rng.random() < 0.7:
        one, two = (_one_hand(gesture, side, tone, rng) for side, gesture in pairs)
        lead = _pick(rng, ("", "", "", "two hands, ", "two hands: "))
        return f"{lead}{one}{_pick(rng, (' and ', ' and ', ', ', ' next to '))}{two}"
    who = " ".join(w for w in (_pick(rng, ("two", "both", "a pair of")), tone, "hands") if w)
    one, two = (_pick(rng, GESTURES[gesture].phrases) for _, gesture in pairs)
    if rng.random() < 0.5:
        return f"{who}, one {one}, {_pick(rng, ('one', 'the other', 'the other one'))} {two}"
    (first, _), (second, _) = pairs
    return f"{who}, the {first} one {one}, the {second} one {two}"


def _subject(spec: Spec, tone: str, rng: np.random.Generator, side: bool = True) -> str:
    """The hand and its gesture: "a tan left hand making a fist", "a peace sign with both hands".

    side: whether to state it; else "a fist", "a tan hand pointing", or "thumbs up", which fits one hand or two.
    """
    if spec.other:
        return _two_hands(spec, tone, rng)
    if not side:
        nouns = NOUNS.get(spec.gesture, ())
        if spec.gesture in EITHER and (spec.side == "both" or rng.random() < 0.5):
            return " ".join(w for w in (tone, _pick(rng, nouns)) if w)
        if spec.side != "both":
            if nouns and rng.random() < 0.6:
                return with_article(" ".join(w for w in (tone, _pick(rng, nouns)) if w))
            who = " ".join(w for w in (tone, "hand", _pick(rng, GESTURES[spec.gesture].phrases)) if w)
            return _pick(rng, (with_article(who), with_article(who), f"the {who}", who))
    phrase = _pick(rng, GESTURES[spec.gesture].phrases)
    noun, adjective = "hand", ""
    if spec.gesture in ADJECTIVES and rng.random() < 0.35:
        adjective, noun, phrase = *ADJECTIVES[spec.gesture], ""

    def hand(*words: str) -> str:
        return " ".join(w for w in words if w)

    if spec.side == "both":
        count = _pick(rng, ("two", "both", "two", "a pair of"))
        who = hand(count, tone, adjective, noun + "s")
    else:
        order = [tone, spec.side, adjective] if rng.random() < 0.75 else [spec.side, tone, adjective]
        who = hand(*order, noun)
        who = _pick(rng, (with_article(who), with_article(who), with_article(who), f"the {who}", who))
    verb, _, rest = phrase.partition(" ")
    if verb in ("making", "giving", "showing") and rest.startswith(("a ", "an ", "the ")) and rng.random() < 0.2:
        return f"{rest} with {who}"
    return hand(who, phrase)


def write_prompt(spec: Spec, rng: np.random.Generator, leave_out: float = 0.35) -> str:
    """One wording of `spec`, always with the gesture. leave_out: probability to leave out each of view, skin and
    background; half of it for the side."""
    side = rng.random() >= leave_out / 2
    view, skin, background = (rng.random(3) >= leave_out).tolist()
    tone = _pick(rng, SKINS[spec.skin][1]) if skin else ""
    extras = []
    if skin and rng.random() < 0.4:
        extras.append(_pick(rng, (f"{tone} skin", f"with {tone} skin")))
        tone = ""
    # Prompts leave out the view where one of two hands shows its palm and the other its back.
    if view and spec.view and spec.view_of(0) == spec.view_of(1):
        words = _pick(rng, VIEWS[spec.view])
        extras.append(words.replace("of the hand", "of the hands") if spec.side == "both" else words)
    if background:
        colour = _pick(rng, ("grey", "gray")) if spec.background == "grey" else spec.background
        extras.append(_pick(rng, (f"{colour} background", f"on {with_article(colour)} background", f"against {colour}",
                                  f"in front of {with_article(colour)} wall", f"{colour} backdrop")))  # fmt: skip
    subject = _subject(spec, tone, rng, side)
    prefix = _pick(rng, ("",) * 6 + ("a photo of ", "a picture of ", "photo of ", "an image of ", "close-up of "))
    extras = [extras[i] for i in rng.permutation(len(extras))]
    if extras and rng.random() < 0.12:  # "blue background, a left hand making a fist"
        parts = [*extras, subject]
    else:
        parts = [prefix + subject, *extras]
    text, commas = parts[0], rng.random() < 0.7
    for part in parts[1:]:
        clause = part.split()[0] in ("with", "on", "in", "against", "seen", "from", "showing")
        text += (" " if clause and not commas else ", ") + part
    if rng.random() < 0.25:
        text = text[0].upper() + text[1:] + ("." if rng.random() < 0.5 else "")
    return text


def is_held_out(prompt: str) -> bool:
    """About one prompt in ten, by a stable hash of its text (case and full stop aside): never trained on."""
    key = prompt.strip().rstrip(".").lower().encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big") % 10 == 0
