"""The words and phrases of the demo's prompts. `demo.prompts` writes sentences of them.

is_demo(manifest.words)                              # whether a bundle was trained on this world alone
unknown_uses("a right hand holding a cup")           # {"curved as if holding a cup": ["holding", "cup"]}
print(overview())                                    # what `hd-run demo --list-words` shows
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from difflib import get_close_matches
from functools import cache

SIDES = ("left", "right", "both")
VIEWS = {
    "palm": ("palm to the viewer", "seen from the palm side", "palm facing the camera", "palm view",
             "showing the palm"),
    "back": ("back of the hand to the viewer", "seen from the back", "seen from behind", "back view",
             "showing the back of the hand"),
    "side": ("seen from the side", "from the side", "side view", "in profile"),
}  # fmt: skip
SKINS = {  # the back of the hand, 0..1 sRGB, and what people call it
    "pale": ((0.93, 0.76, 0.67), ("pale", "fair", "very light")),
    "light": ((0.86, 0.65, 0.53), ("light", "light-toned", "white")),
    "tan": ((0.75, 0.54, 0.40), ("tan", "tanned", "olive")),
    "brown": ((0.58, 0.39, 0.27), ("brown", "medium brown", "light brown")),
    "dark": ((0.42, 0.27, 0.19), ("dark", "dark brown", "dark-toned")),
    "deep": ((0.29, 0.18, 0.135), ("deep", "very dark", "black")),
}
BACKGROUNDS = {
    "white": (0.95, 0.95, 0.94),
    "grey": (0.55, 0.56, 0.58),
    "black": (0.09, 0.09, 0.10),
    "red": (0.76, 0.14, 0.15),
    "orange": (0.96, 0.52, 0.08),
    "yellow": (0.96, 0.84, 0.22),
    "green": (0.20, 0.58, 0.30),
    "blue": (0.18, 0.38, 0.78),
    "purple": (0.46, 0.24, 0.62),
    "pink": (0.95, 0.50, 0.70),
}

# Gesture -> the phrases that follow "a hand".
PHRASES: dict[str, tuple[str, ...]] = {
    "fist": ("making a fist", "closed in a fist", "clenched into a fist"),
    "open_hand": ("open with the fingers together", "held flat", "showing a flat open hand"),
    "spread_fingers": ("with spread fingers", "with all five fingers spread", "showing five"),
    "pointing": ("pointing with the index finger", "pointing up", "with the index finger raised"),
    "victory": ("making a peace sign", "showing a victory sign", "making a V sign"),
    "three_fingers": ("showing three fingers", "with index, middle and ring finger raised", "holding up three fingers"),
    "four_fingers": (
        "showing four fingers",
        "holding up four fingers",
        "with four spread fingers and the thumb tucked in",
    ),
    "thumbs_up": ("giving a thumbs up", "with the thumb up", "making a thumbs up sign"),
    "thumbs_down": ("giving a thumbs down", "with the thumb down", "making a thumbs down sign"),
    "ok_sign": ("making an OK sign", "showing the OK gesture", "signing okay"),
    "call_me": ("making a shaka sign", "making a call me sign", "with thumb and little finger stretched out"),
    "horns": ("making the sign of the horns", "showing devil horns", "making a rock sign"),
    "love_you": ("making the I love you sign", "signing I love you", "showing the ILY sign"),
    "pinky_up": ("raising the little finger", "with the pinky up", "making a pinky promise"),
    "finger_gun": ("making a finger gun", "pointing like a gun", "shooting with a finger gun"),
    "pinch": ("pinching with thumb and index finger", "making a pinch", "pinching"),
    "claw": ("making a claw", "like a claw", "with clawed fingers"),
    "cupped_hand": ("cupped", "cupping the palm", "with a cupped palm"),
    "crossed_fingers": ("with crossed fingers", "crossing the fingers", "with fingers crossed for luck"),
    "vulcan": ("giving the vulcan salute", "making a vulcan salute", "making the live long and prosper sign"),
    "c_shape": ("making a C shape", "curved as if holding a cup", "forming the letter C"),
    "three_with_thumb": (
        "showing thumb, index and middle finger",
        "counting three with the thumb",
        "with thumb, index and middle finger out",
    ),
    "tucked_thumb": (
        "with the fingers together and the thumb tucked",
        "signing the letter B",
        "held flat with the thumb folded in",
    ),
    "pinched_fingers": (
        "with pinched fingers",
        "bunching the fingertips",
        "making the Italian pinched fingers gesture",
    ),
}

# Gestures with an adjective: the adjective, and the noun that it goes with.
ADJECTIVES = {"open_hand": ("open", "hand"), "fist": ("clenched", "fist"), "cupped_hand": ("cupped", "hand")}

# Nouns that can stand for a hand and what it does.
NOUNS = {
    "fist": ("fist", "clenched fist"), "open_hand": ("open hand", "flat hand"), "thumbs_up": ("thumbs up",),
    "thumbs_down": ("thumbs down",), "victory": ("peace sign", "victory sign", "V sign"), "ok_sign": ("OK sign",),
    "call_me": ("shaka sign", "call me sign"), "horns": ("rock sign",), "love_you": ("I love you sign",),
    "finger_gun": ("finger gun",), "pinch": ("pinch",), "claw": ("claw",), "cupped_hand": ("cupped hand",),
    "vulcan": ("vulcan salute",), "c_shape": ("C shape",), "pointing": ("pointing hand",),
}  # fmt: skip

SAMPLES = (
    "a right hand making a fist, blue background",
    "two open hands",
    "a dark left hand giving a thumbs up, seen from the side",
    "a peace sign with a pale right hand, palm to the viewer, on a green background",
    "a left hand pointing and a right fist",
)
# Words that join others, and words that mean enough alone: both may stand anywhere.
JOINING = frozenset(re.findall(r"\w+", "a an the and of in on with to for from as if like into all"))
FILLING = JOINING.union(
    re.findall(
        r"\w+",
        "making giving showing signing held seen facing photo picture image two both one other pair next left right "
        "hand hands skin toned very medium",
    )
)
MAX_WORDS_NAMED = 12  # words that a warning names
NEAR = 0.8  # difflib's ratio from which on one word may be a slip for the other
LETTERS = re.compile(r"[^\W\d_]+")


def strangers(
    prompt: str, known: Collection[str], is_demo: bool = False, end: int | None = None
) -> tuple[list[str], dict[str, list[str]]]:
    """The words of a prompt that are not `known`, and for the demo its `unknown_uses`. end: the model reads so many
    characters; a word that the end cuts is left out."""
    if end is not None:
        ends = [found.end() for found in LETTERS.finditer(prompt) if found.end() <= end]
        prompt = prompt[: max(ends, default=0)]
    return [word for word in words_of(prompt) if word not in known], unknown_uses(prompt) if is_demo else {}


def sentence(new: list[str], uses: dict[str, list[str]], known: Collection[str]) -> str:
    """The warning about `strangers`; "" without any."""

    def shown(word: str) -> str:
        near = get_close_matches(word, known, 1, NEAR)
        return f"{word!r} (near: {near[0]!r})" if near else repr(word)

    said = []
    if new:
        more = f" and {len(new) - MAX_WORDS_NAMED} more" if len(new) > MAX_WORDS_NAMED else ""
        said.append(f"This model was not trained on {', '.join(map(shown, new[:MAX_WORDS_NAMED]))}{more}.")
    for phrase, words in uses.items():
        said.append(f"This model knows {', '.join(map(repr, words))} only as in {phrase!r}.")
    return " ".join((*said, "These words may do anything, or nothing.")) if said else ""


def is_demo(words: Collection[str]) -> bool:
    """Whether a model that was trained on these words was trained on nothing but the demo's prompts."""
    return bool(words) and vocabulary().issuperset(words)


@cache
def vocabulary() -> frozenset[str]:
    """Every word that a prompt of the demo may hold, in lower case."""
    tones = (name for _, names in SKINS.values() for name in names)
    return FILLING.union(*map(words_of, (*tones, *SIDES, *_phrases())))


@cache
def _uses() -> dict[str, list[tuple[frozenset[str], str]]]:
    """Word -> (the words that give it its meaning together, the phrase of the grammar that holds them)."""
    free = FILLING.union(*(words_of(name) for _, names in SKINS.values() for name in names))
    uses: dict[str, list[tuple[frozenset[str], str]]] = {}
    for phrase in _phrases():
        together = frozenset(words_of(phrase)) - free
        for word in together:
            uses.setdefault(word, []).append((together, phrase))
    return uses


def _phrases() -> Iterator[str]:
    """The phrases that prompts are made of."""
    for phrases in (*PHRASES.values(), *NOUNS.values(), *VIEWS.values()):
        yield from phrases
    for adjective, noun in ADJECTIVES.values():
        yield from (f"{adjective} {noun}", f"{adjective} {noun}s")
    yield from ("fists", "close-up")
    for colour in (*BACKGROUNDS, "gray"):
        wall = with_article(f"{colour} wall")
        yield from (f"{colour} background", f"{colour} backdrop", f"in front of {wall}", f"against {colour}")


def with_article(words: str) -> str:
    """The words after "a" or "an", by their first letter."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def unknown_uses(prompt: str) -> dict[str, list[str]]:
    """Words that the grammar knows only in phrases that the prompt lacks: such a phrase -> these words.

    The words of a phrase may stand in any order, with JOINING words and at most one other between them.
    """
    uses = _uses()
    sequence = [word for word in LETTERS.findall(prompt.casefold()) if word not in JOINING]
    covered: set[int] = set()
    for start in range(len(sequence)):
        for together, _ in uses.get(sequence[start], ()):
            window = range(start, min(start + len(together) + 1, len(sequence)))
            found = [at for at in window if sequence[at] in together]
            if together.issubset(sequence[at] for at in found):
                covered.update(found)
    left = list(dict.fromkeys(word for at, word in enumerate(sequence) if at not in covered and word in uses))
    out: dict[str, list[str]] = {}
    while left:  # the phrase that explains most of them comes first
        phrases = {phrase: together for word in left for together, phrase in uses[word]}
        best = max(phrases, key=lambda phrase: len(phrases[phrase].intersection(left)))
        out[best] = [word for word in left if word in phrases[best]]
        left = [word for word in left if word not in phrases[best]]
    return out


def words_of(text: str) -> list[str]:
    """The words of a text, in order, each once: letters alone, in lower case."""
    return list(dict.fromkeys(LETTERS.findall(text.casefold())))


def overview() -> str:
    """What prompts of the demo may say, in groups."""
    lines = ["Gestures, after `a left hand`, or as nouns (`a fist`):"]
    for gesture, phrases in PHRASES.items():
        lines.append(f"  {gesture.replace('_', ' ')}: {', '.join((*phrases, *NOUNS.get(gesture, ())))}")
    groups = {
        "Sides": ("left", "right", "both hands", "two hands", "a pair of hands", "the other"),
        "Views": [phrase for phrases in VIEWS.values() for phrase in phrases],
        "Skin": [f"{name}" for _, names in SKINS.values() for name in names],
        "Backgrounds (`blue background`, `against blue`, `in front of a blue wall`)": (*BACKGROUNDS, "gray"),
    }
    lines += [f"{name}:\n  {', '.join(entries)}" for name, entries in groups.items()]
    lines.append("Sample sentences:")
    return "\n".join((*lines, *(f"  {sentence}" for sentence in SAMPLES)))
