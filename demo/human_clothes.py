"""What the demo's people wear: a look, the surface that it makes of a body, and the colours of cloth, hair and eyes.

Shirt and trousers are one shell around the body. Where it ends (sleeves, collar) is cut sample by sample, so a sleeve
may have any length; above the waist the shell stands off a little farther, as a shirt over trousers does. Hair is a
cap grown from the scalp and, for long hair, MakeHuman's hair mesh. All are painted by their places at rest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F

from .human import CLOTHES, HAIR, NO_CHART, SKIN, load_human, traits_of
from .human_skin import ITA_CLASSES, eye_places, hairline, linear, noise, noise_at, skin_tone, vertex_skin

PATTERNS = ("plain", "stripes", "pinstripes", "checks", "dots", "two-tone", "heather")
NECKS = ("round", "v", "wide", "high", "shirt", "jacket")
HAIRCUTS = ("bald", "crop", "short", "full", "long", "bob", "bun")
# Where a sleeve ends, as parts of the arm from the shoulder (0) over the elbow (0.5) to the wrist (1).
SLEEVES = {"sleeveless": 0.04, "short": 0.28, "elbow": 0.5, "three-quarter": 0.72, "long": 0.95}
# How far a wide cuff hangs from the arm, metres, and from which sleeve on.
CUFFS = {"loose": 0.030, "bell": 0.060, "kimono": 0.110}
WIDE_FROM, WIDE_SHARE = 0.6, 0.16  # the share of women's and men's sleeves that are wide, of those long enough
NECK, SHOULDER, ELBOW, WRIST = 12, 16, 18, 20


@dataclass(frozen=True)
class Look:
    """How a person looks. Colours are display colours in 0..1."""

    skin: tuple[float, float, float] = (0.76, 0.6, 0.51)
    hair: tuple[float, float, float] = (0.16, 0.11, 0.08)
    haircut: str = "short"
    iris: tuple[float, float, float] = (0.35, 0.24, 0.15)
    shirt: tuple[float, float, float] = (0.3, 0.4, 0.55)
    second: tuple[float, float, float] = (0.85, 0.85, 0.82)  # of the pattern
    pattern: str = "plain"
    sleeve: float = 0.28  # how far it covers the arm, 0..1; see SLEEVES
    cuff: float = 0.0  # how far a wide sleeve hangs at its end, metres; see CUFFS
    neck: str = "round"
    trousers: tuple[float, float, float] = (0.16, 0.18, 0.25)
    shoes: tuple[float, float, float] = (0.15, 0.13, 0.12)
    smile: float = 0.0  # 0..1
    beard: float = 0.0  # 0..1
    lipstick: float = 0.0  # 0..1
    varnish: tuple[float, float, float] | None = None  # of the nails
    wrinkles: float = 1.0  # strength of skin's relief


@dataclass(frozen=True)
class Surface:
    """The mesh that every person is drawn from: the body's vertices, then the cap's. N vertices, F triangles."""

    source: ndarray  # [N] the body's vertex that a vertex comes from
    faces: ndarray  # [F,3]
    kind: ndarray  # [F]
    chart: ndarray  # [F]
    uv: ndarray  # [F,3,2] float32
    rest: ndarray  # [N,3] float32 metres
    cap: ndarray  # [N] bool
    above: ndarray  # [N] metres above the hairline


@lru_cache(maxsize=1)
def surface() -> Surface:
    """The surface, made once."""
    human = load_human()
    faces = human.arrays["f"]
    uv = np.concatenate([human.uv[:, [0, 1, 2]], human.uv[:, [0, 2, 3]]])
    chart = np.concatenate([human.chart, human.chart])
    kind = human.kind[faces[:, 0]]
    above = hairline(human.template.astype(float))
    head = (human.kind == SKIN) & (human.owner == 15)
    grown = (head & (above > -0.012))[faces].all(1) & (kind == SKIN)
    scalp = np.unique(faces[grown])
    number = np.full(len(human.template), -1)
    number[scalp] = len(human.template) + np.arange(len(scalp))
    source = np.concatenate([np.arange(len(human.template)), scalp])
    cap = np.arange(len(source)) >= len(human.template)
    count = int(grown.sum())
    return Surface(
        source=source,
        faces=np.concatenate([faces, number[faces[grown]]]),
        kind=np.concatenate([kind, np.full(count, HAIR)]),
        chart=np.concatenate([chart, np.full(count, NO_CHART)]),
        uv=np.concatenate([uv, np.zeros((count, 3, 2), np.float32)]),
        rest=human.template[source],
        cap=cap,
        above=above[source],
    )


@lru_cache(maxsize=1)
def _landmarks() -> dict[str, float]:
    joints = load_human().joints
    return {
        "neck": joints[NECK, 1] + 0.012,
        "shoulder": joints[SHOULDER, 0],
        "wrist": joints[WRIST, 0],
        "waist": joints[0, 1] + 0.05,
        "ankle": joints[7, 1] + 0.03,
    }


def sleeve_end(look: Look) -> float:
    """|x| at rest where the sleeve ends, metres."""
    at = _landmarks()
    return at["shoulder"] + look.sleeve * (at["wrist"] - at["shoulder"])


def _inside(rest: ndarray, look: Look) -> ndarray:
    """How far inside the shirt's outline a rest place is, metres (negative: outside)."""
    side, y, z = np.abs(rest[:, 0]), rest[:, 1], rest[:, 2]
    neck = _landmarks()["neck"]
    depth = {"round": 0.030, "v": 0.028, "wide": 0.045, "high": -0.012, "shirt": -0.004, "jacket": 0.0}[look.neck]
    collar = neck - depth - 0.25 * (z + 0.02).clip(0, 0.12) + 0.7 * (side - 0.085).clip(0, 0.1)
    if look.neck in ("v", "shirt", "jacket"):
        slope = {"v": 0.75, "shirt": 1.3, "jacket": 0.3}[look.neck]
        width = {"v": 0.062, "shirt": 0.042, "jacket": 0.05}[look.neck]
        collar = collar - slope * (width - side).clip(0, 1) * (z > 0.03)
    if look.neck == "wide":
        collar = collar - 0.5 * (0.09 - side).clip(0, 0.05)
    return np.minimum(collar - y, sleeve_end(look) - side)


def cuts(look: Look) -> tuple[ndarray, ndarray]:
    """What shows of the surface: [F] bool, and [F,3] metres within the outline at each corner of a triangle."""
    mesh, human = surface(), load_human()
    faces, kind = mesh.faces, mesh.kind
    cut = np.ones(faces.shape, np.float32)
    inside = _inside(mesh.rest, look)
    cloth = kind == CLOTHES
    cut[cloth] = inside[faces[cloth]]
    owner = human.owner[mesh.source[faces[:, 0]]]
    deep = 0.16 if look.cuff else 0.022  # one looks into a wide sleeve
    on_arm = np.abs(mesh.rest[faces[:, 0], 0]) > _landmarks()["shoulder"] + 0.06
    covered = (kind == SKIN) & (inside[faces].min(1) > np.where(on_arm, deep, 0.022)) & (owner != 15)
    shown = ~covered
    cap = mesh.cap[faces[:, 0]]
    cut[cap] = mesh.above[faces[cap]]
    mane = (kind == HAIR) & ~cap
    if look.haircut in ("long", "bob"):
        eye = eye_places()
        rest = mesh.rest[faces[mane]]
        face_free = np.maximum(rest[..., 1] - (eye[1] + 0.055), eye[2] - 0.045 - rest[..., 2])
        lowest = rest[..., 1] - (_landmarks()["neck"] + (0.03 if look.haircut == "bob" else -0.03))
        cut[mane] = np.minimum(face_free, lowest)
    else:
        shown &= ~mane
    if look.haircut == "bald":
        shown &= ~cap
    return shown, cut


def outside(vertices: ndarray, normals: ndarray, look: Look) -> tuple[ndarray, ndarray]:
    """What a picture shows of a posed body [V,3] with normals [V,3]: places [N,3] and triangles [F,3] of one surface,
    clothes where there are some, else skin, without hair."""
    mesh = surface()
    place = mesh_of(torch.from_numpy(vertices).float(), torch.from_numpy(normals).float(), look, torch.zeros(1)).numpy()
    inside = _inside(mesh.rest, look)[mesh.faces]
    bare = (mesh.kind == SKIN) & ((inside < 0).any(1) | (load_human().owner[mesh.source[mesh.faces[:, 0]]] == 15))
    return place, mesh.faces[bare | ((mesh.kind == CLOTHES) & (inside > 0).all(1))]


THICK = {"bald": 0.0, "crop": 0.004, "short": 0.011, "full": 0.024, "long": 0.012, "bob": 0.014, "bun": 0.008}


def mesh_of(vertices: Tensor, normals: Tensor, look: Look, smile: Tensor) -> Tensor:
    """Where a person's surface is: [N,3] from the posed body [V,3], its normals [V,3] and the smile's way [V,3]."""
    stand_off, source = _stand_off(look)
    vertices = vertices + look.smile * smile
    place = vertices[source] + torch.from_numpy(stand_off)[:, None] * normals[source]
    return _hung(place, vertices, normals[source], look) if look.cuff else place


@lru_cache(maxsize=64)
def _cuff(sleeve: float) -> tuple[tuple[Tensor, ...], ...]:
    """Of each arm: the shell's vertices along a wide sleeve [K], and how wide it is there (0 at the elbow, 1 at its
    end). Then the body's vertices around elbow and wrist."""
    human, mesh, at = load_human(), surface(), _landmarks()
    elbow, side = human.joints[ELBOW, 0], mesh.rest[:, 0]
    end = at["shoulder"] + sleeve * (at["wrist"] - at["shoulder"])
    begin = min(elbow - 0.09, end - 0.12)
    out = []
    for sign in (1.0, -1.0):
        ids = np.flatnonzero((human.kind[mesh.source] == CLOTHES) & (sign * side > begin))
        share = ((sign * side[ids] - begin) / (end - begin)).clip(0, 1.1)
        rings = [np.flatnonzero(np.abs(sign * human.template[:, 0] - x) < 0.025) for x in (elbow, at["wrist"])]
        rings = [ring[human.kind[ring] == CLOTHES] for ring in rings]
        out.append(tuple(torch.from_numpy(x) for x in (ids, share.astype(np.float32) ** 1.5, *rings)))
    return tuple(out)


def _hung(place: Tensor, vertices: Tensor, normals: Tensor, look: Look) -> Tensor:
    """The surface [N,3] with wide sleeves. The upper side lies on the arm, and the lower one hangs. The sleeve of an
    arm that is held up slides to the elbow and stands off all around."""
    place = place.clone()
    for ids, share, elbow, wrist in _cuff(round(look.sleeve, 2)):
        along = F.normalize(vertices[wrist].mean(0) - vertices[elbow].mean(0), dim=0)
        down = torch.tensor([0.0, -1.0, 0.0])
        slide = down @ along  # 1: the forearm hangs, -1: it is held up
        hang = down - slide * along  # shorter, the steeper the forearm is
        out = normals[ids] - (normals[ids] @ along)[:, None] * along
        low = 0.5 + 0.5 * (out @ (hang / hang.norm().clamp_min(1e-3)))  # 0 on the upper side, 1 on the lower one
        level = float(hang.norm())
        width = look.cuff * share[:, None]
        radial = out * width * (0.12 * level + 0.55 * (1 - level))
        # Held up, the sleeve slides to the elbow; hanging, it ends where it is.
        slid = along * (-0.55 * width * float((-slide).clamp(0, 1)))
        place[ids] += radial + hang * (width * low[:, None]) + slid
    return place


@lru_cache(maxsize=64)
def _stand_off_of(haircut: str, sleeve: float) -> tuple[ndarray, Tensor]:
    mesh, human = surface(), load_human()
    out = np.zeros(len(mesh.rest), np.float32)
    at = _landmarks()
    rest = mesh.rest
    cloth = human.kind[mesh.source] == CLOTHES
    loose = 0.003 + 0.006 * np.clip((rest[:, 1] - at["waist"]) / 0.02, 0, 1)
    side = np.abs(rest[:, 0])
    loose += 0.005 * np.clip((side - 0.2) / 0.1, 0, 1) * np.clip((0.95 - sleeve) / 0.3, 0, 1)  # short sleeves are wide
    out[cloth] = loose[cloth]
    lump = noise(rest * (28, 28, 28)) * 0.7 + noise(rest * (70, 40, 70)) * 0.3
    height = THICK[haircut] * (0.65 + 0.7 * lump) * np.clip(mesh.above / 0.022, 0.06, 1) ** 0.7
    top = np.clip((rest[:, 1] - (eye_places()[1] + 0.05)) / 0.06, 0, 1)
    if haircut == "bun":
        knot = rest - (0, eye_places()[1] + 0.045, rest[mesh.cap, 2].min())
        height = height + 0.032 * np.exp(-(((knot**2).sum(1) / 0.036**2) ** 2))
    out[mesh.cap] = (height * (0.75 + 0.5 * top) + 0.0012)[mesh.cap]
    return out, torch.from_numpy(mesh.source)


def _stand_off(look: Look) -> tuple[ndarray, Tensor]:
    return _stand_off_of(look.haircut, round(look.sleeve, 2))


# --- colours: light, not display ---


def _colour(value: tuple[float, ...]) -> Tensor:
    return torch.from_numpy(linear(value)).float()


def _stripes(x: Tensor, period: float, share: float = 0.5) -> Tensor:
    """1 on a stripe, 0 beside it, with soft edges."""
    t = (x / period).remainder(1.0)
    edge = 0.06
    return ((t / edge).clamp(0, 1) * ((share - t) / edge).clamp(0, 1)).clamp(0, 1)


def shirt_colour(rest: Tensor, look: Look) -> tuple[Tensor, Tensor]:
    """Colour [S,3] and height [S] (metres) of cloth at rest places [S,3]."""
    at = _landmarks()
    side, y = rest[:, 0].abs(), rest[:, 1]
    on_arm = side > at["shoulder"] + 0.02
    along = torch.where(on_arm, side, y)  # stripes go around body and sleeves
    across = torch.where(on_arm, y + 0.5 * rest[:, 2], rest[:, 0])
    first, second = _colour(look.shirt), _colour(look.second)
    weave = noise_at(rest * 900) - 0.5
    folds = noise_at(rest * torch.tensor([24.0, 9.0, 24.0])) + 0.5 * noise_at(rest * torch.tensor([55.0, 26.0, 55.0]))
    pattern = look.pattern
    if pattern == "stripes":
        mix = _stripes(along, 0.045)
    elif pattern == "pinstripes":
        mix = _stripes(across, 0.022, 0.16)
    elif pattern == "checks":
        mix = 0.5 * _stripes(along, 0.05) + 0.5 * _stripes(across, 0.05)
    elif pattern == "dots":
        u, v = (along / 0.03).remainder(1.0) - 0.5, (across / 0.03).remainder(1.0) - 0.5
        mix = ((0.075 - u * u - v * v) / 0.02).clamp(0, 1)
    elif pattern == "two-tone":
        mix = on_arm.float()
    elif pattern == "heather":
        mix = 0.5 * noise_at(rest * torch.tensor([400.0, 90.0, 400.0]))
    else:
        mix = torch.zeros_like(y)
    front = rest[:, 2] > 0.05
    if look.neck == "jacket":  # open over a shirt of the second colour
        opening = 0.018 + 0.16 * (y - at["neck"] + 0.27).clamp(0, 1)
        mix = torch.where(front & (side < opening) & (y < at["neck"] + 0.02), torch.ones_like(mix), mix)
    colour = first + (second - first) * mix[:, None]
    shade = 1 + 0.18 * weave
    if look.neck in ("shirt", "jacket"):  # a seam and its buttons, or the jacket's edge
        line = 0.014 if look.neck == "shirt" else opening
        shade = shade * (1 - 0.35 * (front & ((side - line).abs() < 0.0022)).float())
        buttons = ((y / 0.075).remainder(1.0) - 0.5) * 0.075
        button = front & (buttons**2 + rest[:, 0] ** 2 < 0.0052**2) & (look.neck == "shirt")
        colour = torch.where(button[:, None], 0.25 + 0.5 * colour, colour)
    end = sleeve_end(look)
    hem = ((side - end + 0.018).abs() < 0.0016) | ((y - at["waist"] - 0.014).abs() < 0.0016)
    shade = shade * (1 - 0.25 * hem.float())
    low = y < at["waist"]
    colour = torch.where(low[:, None], _colour(look.trousers), colour)
    seam = low & ((rest[:, 0].abs() < 0.0025) & front & (y > at["waist"] - 0.16))
    shade = shade * (1 - 0.35 * seam.float())
    colour = torch.where((y < at["ankle"])[:, None], _colour(look.shoes), colour)
    return colour * shade[:, None], 0.0034 * folds + 0.00006 * weave


def hair_colour(rest: Tensor, look: Look) -> tuple[Tensor, Tensor]:
    """Colour [S,3] and height [S] (metres) of hair at rest places [S,3]."""
    strands = noise_at(rest * torch.tensor([650.0, 60.0, 650.0]))
    locks = noise_at(rest * torch.tensor([120.0, 22.0, 120.0]))
    shade = 0.45 + 0.6 * strands + 0.5 * locks
    return _colour(look.hair) * shade[:, None], 0.0007 * strands + 0.0022 * locks


def eye_colour(rest: Tensor, look: Look) -> Tensor:
    """Colour [S,3] of the eyeballs at rest places [S,3]."""
    x, y, z, radius = eye_places()
    d = ((rest[:, 0].abs() - x) ** 2 + (rest[:, 1] - y) ** 2).sqrt()
    d = torch.where(rest[:, 2] > z, d, torch.ones_like(d))
    white, iris = _colour((0.80, 0.78, 0.76)), _colour(look.iris)
    ring = ((d - 0.42 * radius) / 0.0008).clamp(0, 1)[:, None]
    colour = iris * (1 - 0.5 * ((d / radius - 0.33) / 0.08).clamp(0, 1))[:, None]
    colour = colour + (white - colour) * ring
    pupil = ((0.19 * radius - d) / 0.0006).clamp(0, 1)[:, None]
    return colour * (1 - pupil) + 0.01 * pupil


def rest_skin() -> Tensor:
    """The skin's channels at the surface's vertices [N,C]."""
    return vertex_skin()[torch.from_numpy(surface().source)]


# --- people as they come ---

HAIR_COLOURS = ((0.07, 0.06, 0.055), (0.13, 0.09, 0.07), (0.25, 0.16, 0.10), (0.40, 0.27, 0.16), (0.62, 0.48, 0.30),
                (0.45, 0.20, 0.10), (0.62, 0.61, 0.60))  # black to blond, red, grey  # fmt: skip
TROUSERS = ((0.16, 0.19, 0.28), (0.12, 0.12, 0.13), (0.42, 0.36, 0.28), (0.3, 0.32, 0.35))
# Of HAIRCUTS, of women and of men.
HAIRCUT_SHARES = ((0.01, 0.03, 0.10, 0.16, 0.32, 0.22, 0.16), (0.12, 0.26, 0.36, 0.17, 0.06, 0.02, 0.01))
IRISES = ((0.20, 0.12, 0.07), (0.30, 0.19, 0.10), (0.30, 0.36, 0.22), (0.28, 0.42, 0.52), (0.40, 0.44, 0.48))


def sample_look(rng: np.random.Generator, betas: ndarray | None = None) -> Look:
    """A random look. Skin tones are spread evenly over the classes of ITA; hair and eyes go with them, and haircut,
    beard and grey hair with the body of `betas` [10]."""
    low, high = ITA_CLASSES[rng.integers(len(ITA_CLASSES))]
    ita = rng.uniform(low, high)
    tone = skin_tone(ita, rng)
    male, old = (0.5, 0.3) if betas is None else traits_of(betas)
    fair = ita > 28
    weights = np.array([3, 4, 3, 2, 2, 1, 0]) if fair else np.array([6, 3, 0.6, 0.1, 0.05, 0.1, 0])
    weights[6] = weights.sum() * np.clip(2.2 * old - 0.55, 0.02, 3)
    hair = np.array(HAIR_COLOURS[rng.choice(7, p=weights / weights.sum())]) * rng.uniform(0.85, 1.15)
    eyes = np.array([2, 3, 1.5, 2, 1]) if fair else np.array([6, 3, 0.3, 0.1, 0.05])

    def cloth() -> tuple[float, float, float]:
        grey = rng.random() < 0.35
        value = rng.uniform(0.12, 0.92)
        colour = np.full(3, value) if grey else value * (1 - rng.uniform(0.25, 0.85) * (1 - _hue(rng)))
        return tuple(np.clip(colour + rng.normal(0, 0.02, 3), 0.04, 0.95))

    sleeve = list(SLEEVES.values())[rng.choice(5, p=[0.08, 0.34, 0.12, 0.12, 0.34])]
    varnish = None
    if rng.random() < (0.3 if male < 0.5 else 0.02):
        varnish = ((0.7, 0.08, 0.12), (0.85, 0.45, 0.55), (0.15, 0.1, 0.15), (0.45, 0.12, 0.35))[rng.integers(4)]
    look = Look(
        skin=tuple(tone),
        hair=tuple(hair.clip(0.03, 0.9)),
        haircut=HAIRCUTS[rng.choice(7, p=HAIRCUT_SHARES[int(male > 0.5)])],
        iris=IRISES[rng.choice(5, p=eyes / eyes.sum())],
        shirt=cloth(),
        second=cloth(),
        pattern=PATTERNS[rng.choice(7, p=[0.42, 0.16, 0.07, 0.12, 0.07, 0.07, 0.09])],
        sleeve=float(np.clip(sleeve + rng.normal(0, 0.03), 0.03, 0.96)),
        neck=NECKS[rng.choice(6, p=[0.32, 0.16, 0.10, 0.12, 0.18, 0.12])],
        trousers=tuple(np.array(TROUSERS[rng.integers(4)]) * rng.uniform(0.8, 1.2)),
        smile=float(rng.choice([0.0, rng.uniform(0.3, 1.0)])),
        beard=float(male > 0.6) * float(rng.choice([0.0, rng.uniform(0.3, 0.95)], p=[0.6, 0.4])),
        lipstick=float(male < 0.5) * float(rng.choice([0.0, rng.uniform(0.3, 0.9)], p=[0.6, 0.4])),
        varnish=varnish,
        wrinkles=float(rng.uniform(0.7, 1.3)),
    )
    return _with_cuff(look, rng.spawn(1)[0])  # numbers of its own: other looks stay as they were


def _with_cuff(look: Look, rng: np.random.Generator) -> Look:
    """The look, now and then with wide sleeves; a kimono's fronts cross."""
    if look.sleeve < WIDE_FROM or rng.random() > WIDE_SHARE:
        return look
    kind = tuple(CUFFS)[rng.integers(len(CUFFS))]
    pattern = look.pattern if look.pattern in ("plain", "stripes", "two-tone", "heather") else "plain"  # others stretch
    neck = "v" if kind == "kimono" else look.neck if look.neck in ("round", "v", "wide") else "round"
    sleeve = float(rng.uniform(0.78, 0.92))
    return replace(look, sleeve=sleeve, neck=neck, pattern=pattern, cuff=float(CUFFS[kind] * rng.uniform(0.88, 1.12)))


def _hue(rng: np.random.Generator) -> ndarray:
    hue = rng.uniform(0, 6)
    return np.clip([abs(hue - 3) - 1, 2 - abs(hue - 2), 2 - abs(hue - 4)], 0, 1)
