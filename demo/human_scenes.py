"""Scenes of the demo's people: who is in the picture, what they do, and a camera that shows what the caption names.

A scene is drawn again until every hand that its captions name lies inside the picture and is not hidden. Other hands
count as seen where most of them is in the picture.

    scene = sample_scene(np.random.default_rng((1, 0)))
    picture = draw(scene)                     # uint8 [256, 256, 3]
    scene.spec, scene.present                 # what can be said of it; [P, 2] bool, hands that are to be seen
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from colorsys import rgb_to_hsv
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from ..grammar import SKINS
from ..models.hand_features import MIN_IN_FRAME
from ..models.smplh import HAND_JOINTS
from .backdrops import backdrop
from .human import load_human, traits_of
from .human_clothes import CUFFS, HAIR_COLOURS, SLEEVES, Look, sample_look
from .human_gestures import HANDS
from .human_holding import PoseError, hold, places_of
from .human_pairs import pose_pair
from .human_poses import (
    BODY_POSES,
    HANGING,
    LEFT,
    RIGHT,
    TWO_HANDED,
    Figure,
    Pose,
    frame,
    hand_ids,
    raised,
    sample_pose,
)  # fmt: skip
from .human_prompts import FRAMINGS, GESTURES, PLACES, PLAIN, POSES, Someone, Spec, is_held_out_spec
from .human_render import Camera, Held, Lamp, Person, rasterise, render
from .human_skin import ITA_CLASSES, ita_of
from .human_words import TOGETHER
from .prompts import HARD
from .things import THINGS, sample_thing, thing_mesh

FRAMING_SHARES = (0.45, 0.27, 0.28)  # of FRAMINGS: faces and bodies are seen as well, hands stay large
TWO_PEOPLE = 0.06  # share of scenes, half of all busts and half bodies being enough for them
CLOSE = ("waving", "hand_on_cheek", "hand_on_chin", "praying", "clapping", "heart")  # poses that a close-up can show
PALMS_UP = ("open_hand", "spread_fingers", "cupped_hand", "relaxed")
ONLY = {"finger_heart": ("palm",)}  # views by which a gesture can be told, where HANDS names more
TURNED = ("thumbs_up", "thumbs_down")  # held as they are: no view is said
INSIDE = 0.02  # of the picture, free around the joints of a hand that is named
TOGETHER_BY = 0.18  # metres that each of two hands in a close-up moves to the middle
SEEN = 0.6  # share of such a hand that nothing hides
COVERED = 0.3  # the same where hands cover each other
HELD = 0.1  # the same of hands that hold each other: of one hand in a handshake the fingers are seen alone
HOLDING = ("handshake", "holding_hands")
HIDING = ("arms_crossed", "hands_on_hips")  # captions name arms and hips; hands may be hidden
KINDS = ("people", "things", "pairs")
PAIR_SHARES = (0.45, 0.25, 0.30)  # of FRAMINGS
TOGETHER_SHARES = (0.24, 0.24, 0.24, 0.24, 0.04)  # of TOGETHER: an arm around shoulders takes seconds to pose
SIDES = ("left", "right")
THING_SHOWN = 0.22  # metres from a wrist: so much of a thing is in the picture
SMALL = 96  # pixels in which hidden hands are looked for
# Up to which hue, in degrees, what it is called.
HUES = ((14, "red"), (44, "orange"), (68, "yellow"), (162, "green"), (194, "turquoise"), (255, "blue"), (300, "purple"),
        (345, "pink"), (361, "red"))  # fmt: skip
HAIR_NAMES = ("black", "black", "brown", "brown", "blond", "red", "grey")  # of human_clothes.HAIR_COLOURS


class UnfitError(Exception):
    """Why a drawn scene does not show what its captions name."""


@dataclass(frozen=True)
class Scene:
    """One picture to be. P people; `present` [P,2] bool: whose left and right hands are to be seen."""

    spec: Spec
    poses: tuple[Pose, ...]
    looks: tuple[Look, ...]
    camera: Camera
    background: Tensor
    lamp: Lamp
    present: ndarray
    grain: int
    things: tuple[Held, ...] = ()


def sample_scene(
    rng: np.random.Generator,
    both: float = 0.2,
    held_out: bool | None = False,
    rejected: Counter[str] | None = None,
    framing: str | None = None,
    kind: str = "people",
) -> Scene:
    """A random scene.

    kind: of KINDS: people with gestures and poses, people with things in a hand, or pairs who touch. both: share of
    two-hand gestures among hand gestures. held_out: True: only combinations that are kept for tests;
    False: none of them; None: either. rejected: counts what was drawn again, by its reason. framing: one of FRAMINGS.
    """
    while True:
        spec = _sample_spec(rng, both, framing) if kind == "people" else _sample_touch(rng, kind, framing)
        if held_out is not None and is_held_out_spec(spec) != held_out:
            continue
        try:
            return _pose(spec, rng)
        except (UnfitError, PoseError) as reason:
            if rejected is not None:
                rejected[str(reason)] += 1


def draw(scene: Scene, size: int = 256) -> ndarray:
    """The picture, uint8 [size,size,3]."""
    people = [Person(pose.vertices, look, pose.head) for pose, look in zip(scene.poses, scene.looks, strict=True)]
    return render(people, scene.camera, scene.lamp, scene.background, size, scene.grain, scene.things).numpy()


# --- what is shown ---


def _sample_spec(rng: np.random.Generator, both: float, framing: str | None) -> Spec:
    """Framing, place and gestures; looks are told when the people are there."""
    framing = framing or FRAMINGS[rng.choice(3, p=FRAMING_SHARES)]
    share = TWO_PEOPLE / (1 - FRAMING_SHARES[0])
    count = 2 if framing != "close-up" and rng.random() < share else 1
    place = tuple(PLACES)[rng.integers(len(PLACES))]
    people = tuple(_sample_gesture(rng, framing, both) for _ in range(count))
    return Spec(people, framing, place)


def _sample_touch(rng: np.random.Generator, kind: str, framing: str | None) -> Spec:
    """A person who holds a thing, or two people who touch."""
    place = tuple(PLACES)[rng.integers(len(PLACES))]
    if kind == "things":
        framing = framing or FRAMINGS[rng.choice(3, p=FRAMING_SHARES)]
        thing = THINGS[rng.integers(len(THINGS))]
        return Spec((Someone("holding", ("left", "right")[rng.integers(2)], thing=thing),), framing, place)
    together = tuple(TOGETHER)[rng.choice(len(TOGETHER), p=TOGETHER_SHARES)]
    framing = framing or FRAMINGS[rng.choice(3, p=PAIR_SHARES)]
    return Spec((Someone(together, ""), Someone(together, "")), framing, place, together=together)


def _sample_gesture(rng: np.random.Generator, framing: str, both: float) -> Someone:
    poses = CLOSE if framing == "close-up" else POSES
    if rng.random() < (0.15 if framing == "close-up" else 0.4):
        name = poses[rng.integers(len(poses))]
        side = "both" if name in TWO_HANDED or name == "shrug" else ("left", "right")[rng.integers(2)]
        if name in ("waving", "hands_on_hips") and framing != "close-up" and rng.random() < 0.4:
            side = "both"
        return Someone(name, side)
    weights = np.array([HARD.get(name, 1.0) for name in GESTURES])
    weights /= weights.sum()
    name = GESTURES[rng.choice(len(GESTURES), p=weights)]
    side = "both" if rng.random() < both else ("left", "right")[rng.integers(2)]
    other = ""
    if side == "both" and rng.random() < 0.5:
        other = GESTURES[rng.choice(len(GESTURES), p=weights)]
        other = "" if other == name else other
    names = [n for n in (name, other) if n]
    views = [v for v in ("palm", "back", "side") if all(v in ONLY.get(n, HANDS[n].views) for n in names)]
    if all(n in PALMS_UP for n in names):
        views.append("up")
    share = np.array([{"palm": 5, "back": 3, "side": 2, "up": 3}[v] for v in views])
    view = views[rng.choice(len(views), p=share / share.sum())]
    return Someone(name, side, "" if any(n in TURNED for n in names) else view, other)


# --- people ---


def _pose(spec: Spec, rng: np.random.Generator) -> Scene:
    """Poses the people of a spec and frames them. Raises UnfitError."""
    betas = [rng.normal(0, 0.8, 10).clip(-2, 2) for _ in spec.people]
    looks = tuple(sample_look(rng, b) for b in betas)
    things: tuple[Held, ...] = ()
    if spec.together:
        spec, poses, things = _touching(spec, betas, rng, looks)
    elif spec.people[0].thing:
        poses, things = _with_thing(spec, betas[0], rng)
    else:
        poses = [_person(one, b, rng, spec.framing) for one, b in zip(spec.people, betas, strict=True)]
        if len(poses) == 2:
            poses = _side_by_side(poses, rng)
    sides = [_sides(one) for one in spec.people]
    extra = np.concatenate([_near_hand(held, poses, sides) for held in things]) if things else None
    camera = frame(np.stack([pose.joints for pose in poses]), spec.framing, rng, sides, extra)
    present = _present(spec, poses, sides, camera, things)
    background, lamp = backdrop(spec.place, rng)
    if things:
        tint = name_of(np.array(things[0].look.colours[0])) if spec.people[0].thing != "stick" else ""
        spec = replace(spec, people=tuple(replace(one, tint=tint) for one in spec.people))
    people = tuple(_described(*parts) for parts in zip(spec.people, looks, betas, strict=True))
    colour = name_of(background.mean((0, 1)).numpy()) if spec.place in PLAIN else ""
    spec = replace(spec, people=people, colour=colour)
    return Scene(spec, tuple(poses), looks, camera, background, lamp, present, int(rng.integers(2**31)),
                 things)  # fmt: skip


def _sides(one: Someone) -> tuple[int, ...]:
    return {"left": (LEFT,), "right": (RIGHT,), "both": (LEFT, RIGHT), "": ()}[one.side]


def _person(one: Someone, betas: ndarray, rng: np.random.Generator, framing: str) -> Pose:
    if one.gesture in BODY_POSES:
        return sample_pose(one.gesture, betas, rng, one.side)
    figure = Figure(betas, rng)
    figure.stand(rng.normal(0, 10))
    for side in (LEFT, RIGHT):
        figure.place(side, HANGING)
    together = one.side == "both" and framing == "close-up"
    for side in _sides(one):
        arm = raised(one.other if side and one.other else one.gesture, one.view, rng)
        if together:  # before the chest, side by side
            x, y, z = arm.wrist
            arm = replace(arm, wrist=(x - TOGETHER_BY, y - 0.06, z + 0.02))
        figure.place(side, arm)
    return figure.pose()


def _with_thing(spec: Spec, betas: ndarray, rng: np.random.Generator) -> tuple[list[Pose], tuple[Held, ...]]:
    one, figure = spec.people[0], Figure(betas, rng)
    figure.stand(rng.normal(0, 10))
    for side in (LEFT, RIGHT):
        figure.place(side, HANGING)
    (side,) = _sides(one)
    grasp = hold(figure, side, one.thing, rng)
    mesh = thing_mesh(one.thing, grasp.size)
    where = places_of(figure, side, grasp, mesh.vertices)
    return [figure.pose()], (Held(mesh, where, sample_thing(one.thing, rng), side == RIGHT),)


def _touching(
    spec: Spec, betas: Sequence[ndarray], rng: np.random.Generator, looks: Sequence[Look]
) -> tuple[Spec, list[Pose], tuple[Held, ...]]:
    """Poses two people who touch, and says whose hands do."""
    pair = pose_pair(spec.together, (betas[0], betas[1]), rng, looks)
    people = tuple(replace(one, side="".join(SIDES[side] for side in mine), thing=pair.thing)
                   for one, mine in zip(spec.people, pair.sides, strict=True))  # fmt: skip
    things: tuple[Held, ...] = ()
    if pair.grasp is not None and pair.where is not None:
        mesh = thing_mesh(pair.thing, pair.grasp.size)
        things = (Held(mesh, pair.where, sample_thing(pair.thing, rng), pair.sides[0] == (RIGHT,)),)
    return replace(spec, people=people), list(pair.poses), things


def _near_hand(held: Held, poses: Sequence[Pose], sides: Sequence[tuple[int, ...]]) -> ndarray:
    """The part of a thing that a camera should show: what lies near the hands."""
    hands = [pose.joints[20 + side] for pose, mine in zip(poses, sides, strict=True) for side in mine]
    far = np.min([np.linalg.norm(held.vertices - hand, axis=1) for hand in hands], axis=0)
    return held.vertices[far < THING_SHOWN]


def _side_by_side(poses: Sequence[Pose], rng: np.random.Generator) -> list[Pose]:
    """The first person on the left of the picture, the second on the right; they do not touch."""
    gap, depth = rng.uniform(0.0, 0.08), rng.uniform(-0.08, 0.08)
    left, right = poses
    step = np.array([gap + left.vertices[:, 0].max() - right.vertices[:, 0].min(), 0, depth], np.float32)
    moved = replace(right, vertices=right.vertices + step, joints=right.joints + step)
    return [left, moved]


# --- what is seen ---


def in_picture(joints: ndarray, camera: Camera) -> ndarray:
    """Places [...,2] of joints [...,3] in [0, 1] of the picture, y down."""
    view = 0.5 * camera.s * (joints[..., :2] + np.array([camera.tx, camera.ty]))
    return np.stack([0.5 + view[..., 0], 0.5 - view[..., 1]], -1)


def _present(
    spec: Spec,
    poses: Sequence[Pose],
    sides: Sequence[tuple[int, ...]],
    camera: Camera,
    things: Sequence[Held] = (),
) -> ndarray:
    """Which hands are to be seen, [P,2] bool. Raises UnfitError where a hand that is named is not."""
    inside = np.zeros((len(poses), 2))
    for i, pose in enumerate(poses):
        for side in (LEFT, RIGHT):
            places = in_picture(pose.joints[list(HAND_JOINTS[side])], camera)
            inside[i, side] = ((places > 0) & (places < 1)).all(-1).mean()
            if side in sides[i] and not ((places > INSIDE) & (places < 1 - INSIDE)).all():
                raise UnfitError("outside")
        _apart(spec.people[i], pose)
    seen, of_things = seen_shares([pose.vertices for pose in poses], camera, things)
    if (of_things < COVERED).any():
        raise UnfitError("hidden")
    present = (inside >= MIN_IN_FRAME) & (seen >= COVERED)
    for i, one in enumerate(spec.people):
        close = one.gesture in TWO_HANDED or one.thing or spec.together
        least = 0 if one.gesture in HIDING else COVERED if close else SEEN
        if spec.together in HOLDING:
            least = HELD
            present[i, list(sides[i])] = True
        if any(seen[i, side] < least for side in sides[i]):
            raise UnfitError("hidden")
    if spec.framing == "close-up" and any(
        inside[i, side] > 0.2 and side not in sides[i] for i in range(len(poses)) for side in (LEFT, RIGHT)
    ):
        raise UnfitError("another hand")
    return present


def _apart(one: Someone, pose: Pose) -> None:
    """Two hands with gestures of their own do not lie over each other. Raises UnfitError."""
    if one.side == "both" and one.gesture in GESTURES:
        left, right = (pose.joints[list(HAND_JOINTS[side])] for side in (LEFT, RIGHT))
        if left[:, 0].min() - right[:, 0].max() < 0.02:
            raise UnfitError("over each other")


@lru_cache(maxsize=1)
def _hand_faces() -> tuple[Tensor, Tensor]:
    """The body's triangles [F,3], and whose they are [F]: 0 left hand, 1 right hand, 2 the rest."""
    faces = load_human().arrays["f"]
    hand = np.full(len(load_human().template), 2)
    for side in (LEFT, RIGHT):
        hand[hand_ids(side)] = side
    return torch.from_numpy(faces).long(), torch.from_numpy(hand[faces[:, 0]])


def seen_shares(vertices: Sequence[ndarray], camera: Camera, things: Sequence[Held] = ()) -> tuple[ndarray, ndarray]:
    """How much of each hand [P,2] and of each thing [K] nothing else hides, within the picture: 0..1; 0 outside."""
    body, hand = _hand_faces()
    places = torch.from_numpy(np.concatenate([*vertices, *(held.vertices for held in things)])).float()
    count, nothing = len(vertices[0]), 2 * len(vertices) + len(things)
    faces = [body + i * count for i in range(len(vertices))]
    owners = [torch.where(hand < 2, hand + 2 * i, nothing) for i in range(len(vertices))]
    first = len(vertices) * count
    for number, held in enumerate(things):
        faces.append(torch.from_numpy(held.mesh.faces).long() + first)
        owners.append(torch.full((len(held.mesh.faces),), 2 * len(vertices) + number))
        first += len(held.vertices)
    every, owner = torch.cat(faces), torch.cat(owners)
    xy = torch.from_numpy(in_picture(places.numpy(), camera)).float() * SMALL - 0.5
    depth = (places[:, 2].max() - places[:, 2]) / (places[:, 2].max() - places[:, 2].min()).clamp_min(1e-6)
    cut = torch.ones(len(every), 3)
    _, face, _ = rasterise(xy, depth, every, cut, torch.ones(len(every), dtype=torch.bool), SMALL, SMALL)
    shown = torch.bincount(owner[face], minlength=nothing + 1)
    out = np.zeros(nothing)
    for number in range(nothing):
        mine = owner == number
        _, face, _ = rasterise(xy, depth, every[mine], cut[mine], torch.ones(int(mine.sum()), dtype=torch.bool),
                               SMALL, SMALL)  # fmt: skip
        out[number] = float(shown[number]) / len(face) if len(face) else 0.0
    return out[: 2 * len(vertices)].reshape(-1, 2), out[2 * len(vertices) :]


# --- what is said ---


def name_of(colour: ndarray) -> str:
    """What people call a display colour [3] in 0..1: a word."""
    hue, saturation, value = rgb_to_hsv(*np.asarray(colour, float).clip(0, 1).tolist())
    if saturation < 0.16 or value < 0.14:
        return "black" if value < 0.22 else "grey" if value < 0.82 else "white"
    name = HUES[int(np.searchsorted([last for last, _ in HUES], 360 * hue))][1]
    if name in ("orange", "yellow") and saturation < 0.45:
        return "beige" if value > 0.55 else "brown"
    if name == "orange" and value < 0.68:
        return "brown"
    if name in ("red", "pink"):
        light = value > 0.7 and saturation < 0.6
        return "pink" if light else "purple" if name == "pink" and value < 0.45 else name
    return name


def _described(one: Someone, look: Look, betas: ndarray) -> Someone:
    """What can be said of a person by body and look. In between, sex and age are left open."""
    male, old = traits_of(betas)
    angle = ita_of(np.array(look.skin))
    tone = next((i for i, (low, _) in enumerate(ITA_CLASSES) if angle > low), len(ITA_CLASSES) - 1)
    hair = _hair_name(np.array(look.hair))
    sleeve = min(SLEEVES, key=lambda name: abs(SLEEVES[name] - look.sleeve))
    return replace(
        one,
        person="man" if male > 0.6 or look.beard else "woman" if male < 0.4 else "person",
        age="old" if old > 0.62 or (hair == "grey" and old > 0.45) else "young" if old < 0.27 else "",
        skin=tuple(SKINS)[tone],
        hair=hair,
        haircut=look.haircut,
        shirt=name_of(np.array(look.shirt)),
        pattern=look.pattern,
        sleeve=sleeve,
        cuff=min(CUFFS, key=lambda name: abs(CUFFS[name] - look.cuff)) if look.cuff else "",
        neck=look.neck,
        smiling=look.smile > 0.3,
        beard=look.beard > 0.5,
        varnish=look.varnish is not None,
    )


def _hair_name(colour: ndarray) -> str:
    shades = np.array(HAIR_COLOURS)
    apart = np.linalg.norm(shades / shades.sum(1, keepdims=True) - colour / colour.sum(), axis=1) * 3
    apart = apart + np.abs(np.log(shades.mean(1) / colour.mean())) * 0.5
    return HAIR_NAMES[int(apart.argmin())]


def labels_of(spec: Spec) -> dict[str, str]:
    """What can be said of a picture, a word each; of a second person with "second " before."""
    labels = {"framing": spec.framing, "background": spec.place, "people": str(len(spec.people))}
    if spec.colour:
        labels["background colour"] = spec.colour
    if spec.together:
        labels["together"] = spec.together
    for prefix, one in zip(("", "second "), spec.people, strict=False):
        names = ("gesture", "other", "thing", "side", "view", "person", "age", "skin", "hair", "haircut", "shirt",
                 "pattern", "sleeve", "cuff")  # fmt: skip
        said = {name: getattr(one, name) for name in names}
        labels |= {prefix + name: value for name, value in said.items() if value}
        labels |= {prefix + name: "yes" for name in ("smiling", "beard", "varnish") if getattr(one, name)}
    return labels
