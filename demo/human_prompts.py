"""Captions of the demo's people, as people caption pictures: each thing said or left open, in many wordings.

spec = Spec((Someone("thumbs_up", "right", person="woman", smiling=True, shirt="red", pattern="stripes"),),
            "bust", "garden")
write_caption(spec, np.random.default_rng(0))     # "a smiling woman in a striped shirt giving a thumbs up"
says(spec, "thumbs up")                           # True: it may be asked for in these words
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import numpy as np

from ..grammar import ADJECTIVES, NOUNS, PHRASES, VIEWS
from .human_gestures import HANDS
from .human_poses import BODY_POSES
from .human_words import CUFF_WORDS, HANDS_TOGETHER, THING_WORDS, TOGETHER
from .wording import All, Maybe, Node, One, Shuffled, matches, write

GESTURES = tuple(name for name in HANDS if name not in ("flat", "prayer", "half_heart", "grip"))
POSES = tuple(BODY_POSES)
FRAMINGS = ("close-up", "bust", "half body")
PLACES = {  # of backdrops.KINDS
    "wall": ("in front of a {colour} wall", "against a {colour} wall", "before a {colour} wall"),
    "gradient": (),
    "studio": ("in a studio", "in a photo studio"),
    "room": ("in a room", "at home", "indoors", "in a living room"),
    "office": ("in an office", "at work", "at the office", "indoors"),
    "garden": ("in a garden", "in a park", "outdoors", "outside", "in front of trees", "in the garden"),
    "street": ("in the street", "on a city street", "in a city", "outdoors", "outside"),
    "beach": ("on the beach", "at the beach", "by the sea", "outdoors", "on a beach"),
    "night": ("at night", "at night in the city", "with lights in the background"),
}
PLAIN = ("wall", "gradient", "studio")  # places that have a colour
TONES = {  # of SKINS, before "hand" and before "woman"
    "pale": ("pale", "very light", "fair-skinned", "pale-skinned"),
    "light": ("light", "white", "light-skinned"),
    "tan": ("tan", "tanned", "olive-skinned"),
    "brown": ("brown", "medium brown", "brown-skinned"),
    "dark": ("dark", "dark brown", "dark-skinned"),
    "deep": ("very dark", "black", "very dark-skinned"),
}
PERSONS = {"woman": ("woman", "woman", "lady"), "man": ("man", "man", "guy"), "person": ("person",)}
OWN = {"woman": "her", "man": "his", "person": "their"}
UP = {"up": ("palm up", "with the palm up", "palm facing up")}
CLOTH = {"plain": "", "stripes": "striped", "pinstripes": "pinstriped", "checks": "checked", "dots": "dotted",
         "two-tone": "two-tone", "heather": ""}  # fmt: skip

# More phrases that follow "a hand", beside PHRASES.
MORE: dict[str, tuple[str, ...]] = {
    "open_hand": ("showing the palm",),
    "pointing": ("pointing", "counting one", "holding up one finger"),
    "victory": ("doing a peace sign", "showing two fingers", "holding up two fingers", "counting two"),
    "three_fingers": ("counting three",),
    "four_fingers": ("counting four",),
    "spread_fingers": ("counting five", "holding up five fingers"),
    "thumbs_up": ("doing a thumbs up", "showing a thumbs up"),
    "thumbs_down": ("doing a thumbs down",),
    "ok_sign": ("doing the OK sign", "making an okay sign"),
    "finger_heart": ("making a heart with thumb and index finger",),
}
MORE_NOUNS = {
    "open_hand": ("open palm",),
    "victory": ("peace sign", "victory sign", "V sign"),
    "finger_heart": ("finger heart",),
    "horns": ("rock sign", "horns sign"),
    "ok_sign": ("OK sign", "okay sign", "OK gesture"),
}
EASY = ("open_hand", "spread_fingers", "relaxed")  # hands that are just hands: captions may say no gesture
UNTRUE = ("curved as if holding a cup", "hanging loosely")  # no cups here, and hands are held up
FOR_PEOPLE = frozenset(  # how phrases begin that follow "a woman", too
    ("making", "giving", "showing", "doing", "holding", "pointing", "signing", "shooting", "raising", "counting",
     "pinching", "with", "crossing", "bunching", "forming", "cupping")
)  # fmt: skip

# What follows "a woman", with {own} for her, his or their; and what stands for the hands alone.
ACTS: dict[str, tuple[str, ...]] = {
    "waving": ("waving", "waving hello", "waving goodbye", "waving at the camera", "waving {own} hand"),
    "shrug": ("shrugging", "shrugging {own} shoulders", "with a shrug"),
    "hands_on_hips": ("with {own} hands on {own} hips", "with hands on hips", "standing with hands on hips"),
    "arms_crossed": ("with arms crossed", "with crossed arms", "crossing {own} arms", "with folded arms"),
    "hand_on_cheek": ("with {own} hand on {own} cheek", "touching {own} cheek", "with a hand on the cheek"),
    "hand_on_chin": ("with {own} hand on {own} chin", "touching {own} chin", "with a hand on the chin", "thinking"),
    "praying": ("praying", "with praying hands", "with {own} hands together in prayer", "with hands pressed together"),
    "clapping": ("clapping", "clapping {own} hands", "applauding"),
    "heart": ("making a heart with {own} hands", "making a heart with both hands", "making a hand heart",
              "forming a heart with {own} hands"),
}  # fmt: skip
ONE_ARM = {
    "waving": ("waving with one hand",),
    "hands_on_hips": ("with one hand on {own} hip", "with a hand on the hip"),
}
BOTH_ARMS = {"waving": ("waving with both hands", "waving both hands")}
HAND_ACTS: dict[str, tuple[str, ...]] = {
    "waving": ("a waving hand", "a hand waving", "waving hand", "waving"),
    "hand_on_cheek": ("a hand on a cheek", "a hand touching a cheek"),
    "hand_on_chin": ("a hand on a chin", "a hand touching a chin"),
    "praying": ("praying hands", "hands in prayer", "two hands pressed together", "hands folded in prayer", "praying"),
    "clapping": ("clapping hands", "two hands clapping", "hands clapping", "clapping"),
    "heart": ("heart hands", "two hands making a heart", "hands forming a heart", "a heart made with two hands",
              "hand heart"),
}  # fmt: skip


@dataclass(frozen=True)
class Someone:
    """A person and what can be said of it; "" and False: nothing.

    gesture: one of GESTURES or POSES, "holding", or one of TOGETHER, done by the hands of `side` (left, right, both or
    none, ""); `other`: the right hand's gesture where two hands differ; thing: of THING_WORDS, `tint`: its colour.
    view: palm, back, side or up. person: woman, man or person. age: young or old.
    skin: of SKINS. hair: a colour, `haircut`: of HAIRCUTS. shirt: a colour, pattern: of PATTERNS, sleeve: of SLEEVES,
    cuff: of CUFFS, or "".
    """

    gesture: str
    side: str
    view: str = ""
    other: str = ""
    person: str = "person"
    age: str = ""
    skin: str = ""
    hair: str = ""
    haircut: str = ""
    shirt: str = ""
    pattern: str = "plain"
    sleeve: str = ""
    cuff: str = ""
    neck: str = ""
    smiling: bool = False
    beard: bool = False
    varnish: bool = False
    thing: str = ""
    tint: str = ""


@dataclass(frozen=True)
class Spec:
    """What a picture shows: one person or two (left to right), framing of FRAMINGS, place of PLACES, and the colour
    of a plain place; together: of TOGETHER, where two people touch."""

    people: tuple[Someone, ...]
    framing: str
    place: str
    colour: str = ""
    together: str = ""


def _one(options) -> One:
    return One(*dict.fromkeys(options))


def _phrases(gesture: str) -> tuple[str, ...]:
    both = (*PHRASES.get(gesture, HANDS[gesture].phrases), *MORE.get(gesture, ()))
    return tuple(phrase for phrase in both if phrase not in UNTRUE)


def _nouns(gesture: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*NOUNS.get(gesture, ()), *MORE_NOUNS.get(gesture, ()))))


def _plural(noun: str) -> str:
    return noun if noun.endswith("s") else noun + "s"


# --- parts of captions ---


def _view(one: Someone) -> Node:
    """How the hands are seen."""
    if not one.view:
        return ""
    words = (VIEWS | UP)[one.view]
    if one.side == "both":
        words = tuple(w.replace("of the hand", "of the hands").replace("palm up", "palms up") for w in words)
    return Maybe(All(One("", ","), _one(words)))


def _background(spec: Spec) -> Node:
    colours = ("grey", "gray") if spec.colour == "grey" else (spec.colour,)
    ways: list[str] = []
    if spec.place in PLAIN and spec.colour:
        for c in colours:
            ways += [f"on a {c} background", f"{c} background", f"against a {c} background", f"{c} backdrop"]
            ways += [way.format(colour=c) for way in PLACES[spec.place]]
    else:
        ways += list(PLACES[spec.place])
    return Maybe(All(One("", ","), _one(ways))) if ways else ""


def _tone(one: Someone) -> Node:
    return Maybe(_one(TONES[one.skin])) if one.skin else ""


def _lead(framing: str) -> Node:
    usual = ("a photo of", "photo of", "a picture of", "an image of", "a photograph of")
    own = {
        "close-up": ("close-up of", "a close-up of", "close up of", "a close-up photo of"),
        "bust": ("portrait of", "a portrait of", "a portrait photo of"),
        "half body": ("a half-length portrait of", "a half-body photo of", "a half-length photo of"),
    }[framing]
    return One("", _one(usual), _one(own), weights=(5, 2, 3))


def _hand(one: Someone) -> Node:
    """Hands alone: "a dark left hand making a fist", "two open hands", "a woman's hand pointing"."""
    if one.thing:
        return _holding_hand(one)
    if one.gesture in HAND_ACTS:
        return _one(HAND_ACTS[one.gesture])
    tone, doing = _tone(one), _one(_phrases(one.gesture))
    act = Maybe(doing, 0.8) if one.gesture in EASY else doing
    nails: Node = Maybe("with painted nails", 0.5) if one.varnish else ""
    if one.cuff:
        sleeves = ("in a wide sleeve", "with a wide sleeve", f"in a {CUFF_WORDS[one.cuff][0]} sleeve")
        nails = All(nails, Maybe(_one(sleeves), 0.3))
    owner: list[Node] = [f"a {word}'s" for word in PERSONS[one.person][:2]]
    if one.age:
        owner.append(f"{'an old' if one.age == 'old' else 'a young'} {PERSONS[one.person][0]}'s")
    if one.other:
        pairs = [(s, g) for s, g in (("left", one.gesture), ("right", one.other))]
        parts = [All("a", tone, f"{side} hand", _one(_phrases(gesture))) for side, gesture in pairs]
        first, second = (_one(_phrases(gesture)) for _, gesture in pairs)
        return One(
            All(parts[0], One("and", ",", "next to"), parts[1]),
            All(parts[1], One("and", ",", "next to"), parts[0]),
            All("two", tone, "hands , one", first, ", the other", second),
            All("two", tone, "hands , the left one", first, ", the right one", second),
        )
    if one.side == "both":
        ways: list[Node] = [All(One("two", "both", "a pair of", ""), tone, "hands", act, nails)]
        ways.append(All(_one(owner), "hands", act))
        ways += [All("two", tone, _plural(noun)) for noun in _nouns(one.gesture)]
        if one.gesture in ADJECTIVES:
            adjective, noun = ADJECTIVES[one.gesture]
            ways.append(All("two", tone, adjective, noun + "s"))
        return One(*ways)
    side = Maybe(one.side)
    ways = [
        All(One("a", "the", ""), One(All(tone, side), All(side, tone)), "hand", act, nails),
        All(_one(owner), side, "hand", act, nails),
    ]
    if one.gesture in ADJECTIVES:
        adjective, noun = ADJECTIVES[one.gesture]
        ways.append(All("a", tone, side, adjective, noun))
    if nouns := _nouns(one.gesture):
        bare = _one(nouns)
        article = "" if one.gesture in ("thumbs_up", "thumbs_down") else "a"
        ways.append(All(article, tone, bare))
        ways.append(All("a", bare, "with a", tone, side, "hand"))
    return One(*ways)


def _thing(one: Someone) -> Node:
    """ "a red cup"."""
    tint = One(*(("grey", "gray") if one.tint == "grey" else (one.tint,)))
    return All("a", Maybe(tint, 0.4) if one.tint else "", _one(THING_WORDS[one.thing]))


def _holding_hand(one: Someone) -> Node:
    """A hand that holds a thing: "a woman's right hand holding a book"."""
    thing, side = _thing(one), Maybe(one.side)
    hand = One(All(One("a", "the", ""), _tone(one), side, "hand"),
               All(_one(f"a {word}'s" for word in PERSONS[one.person][:2]), side, "hand"))  # fmt: skip
    return One(All(hand, One("holding", "with"), thing), All(thing, One("in", "held in"), hand), weights=(4, 1))


def _holding(one: Someone, own: str) -> Node:
    thing, hand = _thing(one), All(own, Maybe(one.side), "hand")
    return One(All("holding", thing, Maybe(All("in", hand), 0.3)), All("with", thing), All("with", thing, "in", hand),
               All("holding up", thing))  # fmt: skip


def _filled(text: str, **parts: Node) -> Node:
    """A wording with its {names} replaced by parts."""
    return All(
        *(parts[piece[1:-1]] if piece.startswith("{") else piece.strip() for piece in re.split(r"(\{\w+\})", text))
    )


def _together(spec: Spec, brief: bool = False) -> Node:
    """Two people who touch; brief: without clothes."""
    left, right = spec.people
    thing = _thing(left) if left.thing else ""
    if spec.framing == "close-up":
        return One(*(_filled(text, thing=thing) for text in HANDS_TOGETHER[spec.together]))
    orders = [(left, right), (right, left)]
    if spec.together == "arm_around":
        orders = [pair for pair in orders if pair[0].side]
    people = {("man", "man"): "men", ("woman", "woman"): "women"}.get((left.person, right.person), "people")
    who = _one((people, "people"))
    ways = []
    for a, b in orders:
        nodes = [All("a", _one(PERSONS[one.person])) if brief else _person(one, brief=True) for one in (a, b)]
        ways += [_filled(text, a=nodes[0], b=nodes[1], people=who, thing=thing, own=OWN[a.person])
                 for text in TOGETHER[spec.together]]  # fmt: skip
    return One(*ways)


def _person(one: Someone, brief: bool = False) -> Node:
    """ "a smiling young woman with long brown hair in a striped shirt"; brief: beside another one."""
    skinned = [tone for tone in TONES[one.skin] if tone.endswith("skinned")] if one.skin else []
    skin = Maybe(_one(skinned), 0.25) if skinned else ""
    age = (
        Maybe(One("young", weights=(1,)) if one.age == "young" else _one(("old", "elderly", "older")))
        if one.age
        else ""
    )
    smile = Maybe(_one(("smiling", "happy", "friendly"))) if one.smiling else ""
    who = One(_one(PERSONS[one.person]), "person", weights=(5, 1))
    before = All("a", smile, age, skin, who)
    if brief:
        return All(before, Maybe(_clothes(one), 0.4))
    with_: list[Node] = [_clothes(one)]
    if one.hair and one.haircut != "bald":
        length = {"crop": "short", "short": "short", "long": "long", "full": "", "bob": "", "bun": ""}[one.haircut]
        ways: list[Node] = [All(f"with {length}".strip(), one.hair, "hair")]
        if one.haircut in ("bob", "bun"):
            ways.append(f"with a {one.haircut}")
        with_.append(Maybe(_one(ways), 0.3))
    elif one.haircut == "bald":
        with_.append(Maybe(One("with a bald head", "without hair"), 0.4))
    if one.beard:
        with_.append(Maybe("with a beard", 0.5))
    return All(before, Shuffled(*(Maybe(part) for part in with_)))


def _clothes(one: Someone) -> Node:
    if not one.shirt:
        return ""
    garment = {"jacket": ("jacket",), "high": ("sweater", "turtleneck", "shirt")}.get(one.neck, ("shirt", "top"))
    if one.sleeve in ("sleeveless", "short") and one.neck in ("round", "v", "wide"):
        garment = ("shirt", "T-shirt", "top")
    if one.cuff:
        garment = ("kimono", "robe") if one.cuff == "kimono" else ("shirt", "top", "blouse", "robe")
    sleeve = "sleeveless" if one.sleeve == "sleeveless" else ""
    pattern = CLOTH[one.pattern]
    colour = _one(("grey", "gray")) if one.shirt == "grey" else one.shirt
    kinds: list[Node] = [colour]
    if pattern:
        kinds += [pattern, All(colour, pattern)]
    if one.cuff:
        words = CUFF_WORDS[one.cuff]
        after = All(One(*kinds, ""), _one(garment), Maybe(All("with", _one(words), "sleeves"), 0.6))
        before = All(_one(f"{word}-sleeved" for word in words), _one(garment))
        return All(One("in", "wearing"), "a", One(after, before, weights=(3, 1)))
    return All(One("in", "wearing"), "a", Maybe(sleeve, 0.5), One(*kinds), _one(garment))


def _act(one: Someone, own: str = "") -> Node:
    """What a person does: "giving a thumbs up with her right hand"."""
    own = own or OWN[one.person]
    if one.thing:
        return _holding(one, own)
    if one.gesture in ACTS:
        extra = (ONE_ARM if one.side != "both" else BOTH_ARMS).get(one.gesture, ())
        ways = (*ACTS[one.gesture], *extra)
        if one.gesture == "hands_on_hips" and one.side != "both":
            ways = extra
        return _one(way.format(own=own) for way in ways)
    if one.other:
        left, right = _one(_phrases(one.gesture)), _one(_phrases(one.other))
        return One(All(f"with {own} left hand", left, f"and {own} right hand", right),
                   All("with one hand", left, "and the other", right))  # fmt: skip
    phrases = _phrases(one.gesture)
    doing = [phrase for phrase in phrases if phrase.split()[0] in FOR_PEOPLE]
    which = f"{own} {one.side} hand" if one.side != "both" else "both hands"
    ways_: list[Node] = [All("with", One("one hand", which) if one.side != "both" else which, _one(phrases))]
    if doing:
        after = Maybe(All("with", One(which, "one hand") if one.side != "both" else which), 0.4)
        ways_ += [All(_one(doing), "" if phrase.startswith("with") else after) for phrase in doing for _ in range(2)]
    if nouns := _nouns(one.gesture):
        many = one.side == "both" and one.gesture not in ("pointing", "open_hand", "cupped_hand", "fist", "claw")
        if many:
            ways_.append(All(One("making", "giving", "showing"), "two", _one(map(_plural, nouns))))
    return One(*ways_)


def caption(spec: Spec) -> Node:
    """All wordings of a picture, but for those of few words."""
    end = _background(spec)
    if spec.together:
        return All(Maybe(_lead(spec.framing), 0.5), _together(spec), end)
    if len(spec.people) == 2:
        lead = _lead(spec.framing) if spec.framing == "half body" else Maybe("a photo of", 0.3)
        return All(lead, _two(*spec.people), end)
    one = spec.people[0]
    person = All(_person(one), _act(one), Maybe(_view(one), 0.3))
    if spec.framing == "close-up":
        hand = All(_hand(one), _view(one))
        subject = One(hand, person, weights=(4, 1))
        return One(All(_lead(spec.framing), subject, end), All(subject, end, ", close-up"), weights=(6, 1))
    return All(_lead(spec.framing), person, end)


def _two(left: Someone, right: Someone) -> Node:
    people = {("man", "man"): "men", ("woman", "woman"): "women"}.get((left.person, right.person), "people")
    each = [All(_person(one, brief=True), _act(one)) for one in (left, right)]
    joint = One("and", "next to", "beside")
    ways: list[Node] = [All(each[0], joint, each[1]), All(each[1], joint, each[0])]
    acts = [_act(one, "their") for one in (left, right)]
    ways.append(All(f"two {people} , one", acts[0], One(", the other", ", one", "and one"), acts[1]))
    ways.append(All(f"two {people} , the one on the left", acts[0], ", the one on the right", acts[1]))
    if left.gesture == right.gesture and left.side == right.side and not (left.other or right.other):
        ways += [All(f"two {people}", acts[0])] * 2
    return One(*ways)


def short(spec: Spec) -> Node:
    """Wordings of few words, which leave nearly all open: "hands", "thumbs up", "a person waving"."""
    if spec.together:
        hands = [_filled(text, thing=_thing(spec.people[0]) if spec.people[0].thing else "")
                 for text in HANDS_TOGETHER.get(spec.together, ())]  # fmt: skip
        return One(_together(spec, brief=True), *hands)
    if len(spec.people) == 2:
        left, right = spec.people
        alike = left.gesture == right.gesture and left.side == right.side and not (left.other or right.other)
        return One("two people", All("two people", _act(left, "their")) if alike else "people")
    one = spec.people[0]
    ways: list[Node] = []
    if one.thing:
        thing = All("a", _one(THING_WORDS[one.thing]))
        ways += [All(One("a hand", "hand"), "holding", thing), All("holding", thing), All("a hand with", thing)]
    if spec.framing == "close-up":
        two = one.side == "both" or one.gesture in ("praying", "clapping", "heart")
        ways.append(One("hands", "two hands", "a pair of hands") if two else One("hand", "a hand", "human hand"))
        if one.gesture in HAND_ACTS:
            ways += [_one(HAND_ACTS[one.gesture])] * 2
    if not one.other and one.gesture in GESTURES:
        if one.side == "both":
            adjectives = [ADJECTIVES[one.gesture]] if one.gesture in ADJECTIVES else []
            ways += [f"two {_plural(noun)}" for noun in _nouns(one.gesture)]
            ways += [f"two {adjective} {noun}s" for adjective, noun in adjectives]
        if one.side != "both" or one.gesture in ("thumbs_up", "thumbs_down"):
            ways += [_one(_nouns(one.gesture))] * 2 if _nouns(one.gesture) else []
        if one.side != "both":
            ways.append(All(One("a hand", "hand", "one hand"), _one(_phrases(one.gesture))))
    if spec.framing != "close-up" or one.gesture in ACTS:
        ways.append(
            All(One("a person", "person", "someone", _one(f"a {word}" for word in PERSONS[one.person][:2])), _act(one))
        )
        ways.append(_act(one))
    if spec.framing == "bust":
        ways.append(All(One("a portrait of", "portrait of"), "a", PERSONS[one.person][0]))
    return One(*ways)


def write_caption(spec: Spec, rng: np.random.Generator, leave_out: float = 0.35, brief: float = 0.1) -> str:
    """One wording of a picture. leave_out: how often each thing that may be left out is; brief: share of `short`."""
    grammar = short(spec) if rng.random() < brief else caption(spec)
    text = write(grammar, rng, leave_out)
    if rng.random() < 0.25:
        text = text[0].upper() + text[1:] + ("." if rng.random() < 0.5 else "")
    return text


def says(spec: Spec, text: str) -> bool:
    """Whether a picture may be captioned so."""
    return matches(short(spec), text) or matches(caption(spec), text)


# --- what is kept for tests ---


def is_held_out(text: str) -> bool:
    """About one caption in ten of at least five words, by a stable hash of its words: never trained on."""
    words = text.strip().rstrip(".").lower()
    return len(words.split()) >= 5 and _hash(words) % 10 == 0


def is_held_out_spec(spec: Spec) -> bool:
    """About one in fifteen combinations of a gesture and a place, and one in ten of two hands that differ or of two
    people's gestures: such pictures are never trained on."""
    names = sorted({n for one in spec.people for n in (f"{one.gesture} {one.thing}".strip(), one.other) if n})
    if len(names) > 1:
        return _hash(" ".join(names)) % 10 == 0
    return _hash(f"{names[0]} {spec.place}") % 15 == 0


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
