"""Skin of the demo's people: what a hand and a face look like close by, baked once into small textures.

A texture says nothing of a person. Its channels are lightness, redness, palm, crease, nail, lips, brow, lash and beard,
the scalp's place, and the height of the surface in millimetres; the renderer mixes them with a skin tone.
Everything is computed at rest places in millimetres, so left and right hands share a texture, and so do the face's
halves.

Skin tones are sampled by ITA, the individual typology angle (Chardon et al. 1991): atan2(L* - 50, b*) in CIELAB, over
the six classes from "very light" (above 55 degrees) to "dark" (below -30), each as likely as the others.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F

from ..models.smplh import TIP_VERTICES
from .hand_mesh import FRAMES
from .human import EYE, HAND_CHART, HEAD_CHART, SKIN, Human, load_human

HAND_SIZE, HEAD_SIZE = 1024, 512  # texels a side
CHANNELS = ("tone", "red", "palm", "crease", "nail", "lips", "brow", "lash", "beard", "scalp", "height")
ITA_CLASSES = ((55.0, 70.0), (41.0, 55.0), (28.0, 41.0), (10.0, 28.0), (-30.0, 10.0), (-62.0, -30.0))  # degrees


def linear(colour: ndarray | tuple) -> ndarray:
    """Display colours in 0..1 -> light."""
    return np.asarray(colour, float) ** 2.2


def skin_tone(ita: float, rng: np.random.Generator | None = None) -> ndarray:
    """A skin colour [3] (display, 0..1) of an individual typology angle in degrees.

    Measured skin lies close to a curve in CIELAB: dark skin is redder and less yellow than skin in the middle. L* is
    taken from that curve, and b* so that the angle is met exactly."""
    lightness = np.interp(ita, [-65, -30, 10, 28, 41, 55, 70], [23, 36, 51, 59, 65, 71, 79])
    red = np.interp(ita, [-65, -30, 10, 41, 70], [9, 12, 14, 12, 9])
    if rng is not None:
        red += rng.normal(0, 1.0)
    if abs(ita) < 12 or abs(lightness - 50) < 4:  # near L* = 50 the angle says little about b*: choose it first
        yellow = np.interp(ita, [-30, 10, 28], [16, 19, 19])
        lightness = 50 + yellow * np.tan(np.radians(ita))
    else:
        yellow = (lightness - 50) / np.tan(np.radians(ita))
    return lab_to_display(np.array([lightness, red, yellow]))


def ita_of(colour: ndarray) -> float:
    """The individual typology angle of a display colour [3], degrees."""
    light = np.asarray(colour, float) ** 2.2 @ TO_XYZ.T / WHITE
    f = np.where(light > 216 / 24389, np.cbrt(light), (24389 / 27 * light + 16) / 116)
    return float(np.degrees(np.arctan2(116 * f[1] - 16 - 50, 200 * (f[1] - f[2]))))


TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])  # of sRGB light
WHITE = np.array([0.9505, 1.0, 1.089])  # D65


def lab_to_display(lab: ndarray) -> ndarray:
    """CIELAB (D65) -> display colour in 0..1, with a plain exponent of 2.2."""
    y = (lab[0] + 16) / 116
    f = np.array([y + lab[1] / 500, y, y - lab[2] / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * WHITE
    return (np.linalg.inv(TO_XYZ) @ xyz).clip(0.002, 1) ** (1 / 2.2)


# --- noise ---


@lru_cache(maxsize=1)
def _volume() -> Tensor:
    """Random values at the corners of 64 x 64 x 64 unit cubes, the first ones again at the ends: it repeats."""
    values = torch.rand(64, 64, 64, generator=torch.Generator().manual_seed(0))
    return F.pad(values[None, None], (0, 1, 0, 1, 0, 1), "circular")


def noise(p: ndarray) -> ndarray:
    """`noise_at` for arrays."""
    return noise_at(torch.from_numpy(np.asarray(p, np.float32))).numpy()


def noise_at(p: Tensor) -> Tensor:
    """Value noise [N] in 0..1 at places [N,3]: a random value at each corner of unit cubes, smooth between them."""
    at = p.remainder(64)
    low = at.floor()
    t = at - low
    at = (low + t * t * (3 - 2 * t)) / 32 - 1
    return F.grid_sample(_volume(), at[None, None, None], align_corners=True)[0, 0, 0, 0]


def smoothstep(low: float, high: float, x: ndarray) -> ndarray:
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


# --- baking ---


def _texels(human: Human, chart: int, size: int) -> tuple[ndarray, ndarray, ndarray]:
    """Which texels of a chart are covered (flat ids [N]), and the rest place and normal there ([N,3] each), of the
    left half."""
    mine = np.flatnonzero(human.chart[: len(human.quads) // 2] == chart)
    quads, uv = human.quads[mine], human.uv[mine]
    triangles = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
    corner = np.concatenate([uv[:, [0, 1, 2]], uv[:, [0, 2, 3]]]).astype(float) * size - 0.5
    values = np.concatenate([human.template, rest_normals(human)], 1)
    picture, seen = np.zeros((size * size, 6)), np.zeros(size * size, bool)
    for triangle, (a, b, c) in zip(triangles, corner, strict=True):
        low = np.floor(np.min([a, b, c], 0)).astype(int).clip(0)
        high = np.ceil(np.max([a, b, c], 0)).astype(int).clip(max=size - 1)
        x, y = np.meshgrid(np.arange(low[0], high[0] + 1), np.arange(low[1], high[1] + 1))
        area = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
        if abs(area) < 1e-9:
            continue
        w0 = ((b[0] - x) * (c[1] - y) - (b[1] - y) * (c[0] - x)) / area
        w1 = ((c[0] - x) * (a[1] - y) - (c[1] - y) * (a[0] - x)) / area
        w = np.stack([w0, w1, 1 - w0 - w1], -1)
        inside = w.min(-1) > -0.5 * np.sqrt(0.5) / max(np.sqrt(abs(area)), 1)  # a seam's texels, too
        at = (y * size + x)[inside]
        picture[at] = w[inside] @ values[triangle]
        seen[at] = True
    ids = np.flatnonzero(seen)
    place, normal = picture[ids, :3], picture[ids, 3:]
    return ids, place, normal / np.linalg.norm(normal, axis=1, keepdims=True).clip(1e-9)


@lru_cache(maxsize=1)
def _rest_normals() -> ndarray:
    human = load_human()
    v, f = human.template.astype(float), human.arrays["f"]
    face = np.cross(v[f[:, 1]] - v[f[:, 0]], v[f[:, 2]] - v[f[:, 0]])
    out = np.stack([sum(np.bincount(f[:, i], face[:, c], len(v)) for i in range(3)) for c in range(3)], 1)
    return out / np.linalg.norm(out, axis=1, keepdims=True).clip(1e-12)


def rest_normals(human: Human) -> ndarray:
    """[V,3] unit normals at rest."""
    return _rest_normals()


def _fingers(human: Human) -> tuple[ndarray, ndarray, ndarray]:
    """Left finger joints (index, middle, little, ring, thumb; three each) at rest in mm, their bones' directions and
    where the nail's side looks: [15,3] each."""
    joints = human.joints * 1000
    places, along, back = [], [], []
    for block, finger in enumerate((1, 2, 4, 3, 0)):
        for b in range(3):
            j = 22 + 3 * block + b
            end = joints[j + 1] if b < 2 else human.template[TIP_VERTICES[finger]] * 1000
            a = (end - joints[j]) / np.linalg.norm(end - joints[j])
            n = FRAMES[finger, 1] - a * (a @ FRAMES[finger, 1])
            places.append(joints[j])
            along.append(a)
            back.append(n / np.linalg.norm(n))
    return np.array(places), np.array(along), np.array(back)


def _height(human: Human, p: ndarray) -> ndarray:
    """Height of the hand's skin in mm at rest places [N,3] in mm: grain, wrinkles of the joints, lines of the palm."""
    out = 0.05 * noise(p * 1.3) + 0.14 * noise(p * 0.55) + 0.3 * noise(p * 0.16) - 0.25
    wave = 1.6 * (noise(p * 0.25 + (7, 0, 0)) - 0.5) + 0.5 * (noise(p * 0.9 + (0, 3, 0)) - 0.5)
    places, along, back = _fingers(human)
    for k in range(15):
        d = p - places[k]
        far = np.linalg.norm(d, axis=1)
        near = np.flatnonzero(far < 22)
        d, far = d[near], far[near]
        u, b = d @ along[k] + wave[near], d @ back[k]
        fade = smoothstep(22, 11, far)
        if k % 3:  # above a joint: a fan of wrinkles
            strength = (1.0 if k % 3 == 1 else 0.7) * fade * smoothstep(1, 4, b)
            out[near] -= strength * 0.6 * np.exp(-u * u / 26) * (0.5 + 0.5 * np.cos(2.1 * u))
        if k == 12:
            continue
        strength = (1.0 if k % 3 else 0.55) * fade * smoothstep(-1, -4, b)
        u = u - (0.0 if k % 3 else 9.0)  # the crease at a finger's root lies beyond the knuckle
        out[near] -= strength * (0.75 * np.exp(-((u - 0.9) ** 2) / 0.8) + 0.5 * np.exp(-((u + 1.6) ** 2) / 0.8))
    # Lines of the palm: along the fingers and towards the thumb, from the middle finger's knuckle.
    middle = places[3]
    a, c = p[:, 0] - (middle[0] - 88), p[:, 2] - middle[2]
    palm = (p[:, 1] < middle[1] - 6) & (a > 5) & (a < 95)
    wave = 1.2 * (noise(p * 0.2) - 0.5)
    d = a - (66 + 0.20 * c - 0.012 * (c + 10) ** 2) + wave
    out -= palm * (c > -48) * 0.65 * np.exp(-d * d / 1.3) * smoothstep(14, 6, c)
    d = a - (58 + 0.38 * c - 0.004 * c * c) + wave
    out -= palm * (c < 26) * 0.6 * np.exp(-d * d / 1.2) * smoothstep(-36, -20, c)
    d = np.sqrt((a - 26) ** 2 + (c - 34) ** 2) - 38 + wave
    out -= palm * (c < 28) * 0.75 * np.exp(-d * d / 1.5)
    return out


def _bake_hand(human: Human, size: int) -> tuple[ndarray, ndarray]:
    ids, place, normal = _texels(human, HAND_CHART, size)
    p = place * 1000
    places, along, _ = _fingers(human)
    patches, spots, grains = noise(p * 0.035), noise(p * 0.13 + (5, 0, 0)), noise(p * 0.5 + (9, 0, 0))
    tone = 0.16 * (patches - 0.5) + 0.17 * (spots - 0.5) + 0.16 * (grains - 0.5)
    red = 0.9 * (spots - 0.5) + 0.5 * (patches - 0.5)
    palm = smoothstep(0.45, -0.55, normal[:, 1]) * smoothstep(places[12, 0] - 45, places[12, 0] + 5, p[:, 0])
    red += 0.3 * palm
    for k in range(15):
        d = ((p - places[k]) ** 2).sum(1)
        red += np.where(palm < 0.5, 0.55, 0.12) * np.exp(-d / (60 if k % 3 else 110))
        if k % 3 == 2:  # a finger's end
            red += 0.5 * np.exp(-((p - places[k] - 20 * along[k]) ** 2).sum(1) / 150)
    height = _height(human, p)
    row, column = (np.stack(np.divmod(ids, size)) + 0.5) / size
    mask = human.nails
    nail = _bilinear(mask, row, column)
    nail = smoothstep(0.25, 0.6, nail)
    crease = np.clip(-height, 0, 0.8) * (1 - nail)
    height = height * (1 - nail) + 0.12 * nail
    zero = np.zeros_like(tone)
    return ids, np.stack([tone, red, palm, crease, nail, zero, zero, zero, zero, zero - 1, height])


def _bilinear(picture: ndarray, row: ndarray, column: ndarray) -> ndarray:
    at = torch.from_numpy(np.stack([column, row], -1)[None, None] * 2 - 1).float()
    return F.grid_sample(torch.from_numpy(picture)[None, None], at, align_corners=False)[0, 0, 0].numpy()


@lru_cache(maxsize=1)
def eye_places() -> ndarray:
    """Centre [3] and radius of the left eye at rest, metres: [4]."""
    human = load_human()
    eye = human.template[(human.kind == EYE) & (human.template[:, 0] > 0)].astype(float)
    a = np.concatenate([2 * eye, np.ones((len(eye), 1))], 1)  # least squares sphere
    x = np.linalg.lstsq(a, (eye**2).sum(1), rcond=None)[0]
    return np.array([*x[:3], np.sqrt(x[3] + x[:3] @ x[:3])])


def hairline(place: ndarray) -> ndarray:
    """How far a rest place [N,3] of the head lies above and behind the hairline, metres; negative on face and ears."""
    eye = eye_places()
    side, up, front = np.abs(place[:, 0]), place[:, 1] - eye[1], place[:, 2] - eye[2]
    line = 0.058 - 10 * (side - 0.030).clip(0, 0.02) ** 2 + 0.5 * (front + 0.005).clip(-0.03, 0.1)
    temple = np.interp(-front, [0.030, 0.045, 0.060, 0.100, 0.130], [0.041, 0.000, -0.022, -0.055, -0.078])
    above = up - np.where(front < -0.030, temple, line)
    ear = np.sqrt(((up + 0.016) / 0.045) ** 2 + ((front + 0.078) / 0.036) ** 2)
    return np.minimum(above, 0.04 * (ear - 1))


def _bake_head(human: Human, size: int) -> tuple[ndarray, ndarray]:
    ids, place, _ = _texels(human, HEAD_CHART, size)
    p = place * 1000
    eye = eye_places() * 1000
    patches, spots, grains = noise(p * 0.04), noise(p * 0.13 + (5, 0, 0)), noise(p * 0.6 + (9, 0, 0))
    tone = 0.14 * (patches - 0.5) + 0.10 * (spots - 0.5) + 0.08 * (grains - 0.5)
    row, column = (np.stack(np.divmod(ids, size)) + 0.5) / size
    lips = smoothstep(0.25, 0.7, _bilinear(human.lips, row, column))
    x, y, z = p[:, 0], p[:, 1] - eye[1], p[:, 2] - eye[2]
    front = smoothstep(-8, 0, z)
    red = 0.6 * (spots - 0.5) + 0.6 * np.exp(-((x - eye[0]) ** 2 + (y + 36) ** 2) / 22**2) * front
    red += 0.5 * np.exp(-(x**2 + (y + 38) ** 2) / 14**2) * front  # the nose
    across = x - eye[0]
    arch = 20.0 + 3.0 * smoothstep(-16, 6, across) - 5.0 * smoothstep(8, 24, across)
    width = 4.4 - 2.2 * smoothstep(0, 24, across)
    brow = np.exp(-(((y - arch) / width) ** 2)) * smoothstep(27, 19, across) * smoothstep(-22, -15, across) * front
    brow *= 0.55 + 0.6 * noise(p * (1.4, 0.8, 1.0))
    from_ball = np.linalg.norm(p - eye[:3], axis=1) - eye[3]
    lash = smoothstep(2.6, 0.6, from_ball) * front * np.where(y > -1, 1.0, 0.35)
    line = np.interp(z, [-75, -40, 0, 25], [10, -22, -43, -40]) + 4 * (noise(p * 0.15) - 0.5)
    beard = smoothstep(-1, 7, line - y) * smoothstep(-104, -84, y) * (1 - lips)
    beard *= 0.5 + 0.6 * noise(p * (1.5, 0.9, 1.5))
    height = 0.05 * noise(p * 1.3) + 0.08 * noise(p * 0.55) - 0.06
    zero = np.zeros_like(tone)
    scalp = hairline(place) + 0.006 * (noise(p * 0.12) - 0.5) + 0.003 * (noise(p * 0.6) - 0.5)
    return ids, np.stack([tone, red, zero, zero, zero, lips, brow.clip(0, 1), lash, beard.clip(0, 1), scalp, height])


def _fill(ids: ndarray, values: ndarray, size: int) -> Tensor:
    """Texels as a picture [C,S,S]; what no face covers takes the mean of its covered neighbours, outwards."""
    picture = torch.zeros(len(values) + 1, size * size)
    picture[:-1, ids], picture[-1, ids] = torch.from_numpy(values).float(), 1.0
    picture = picture.view(1, -1, size, size)
    for _ in range(8):
        near = F.avg_pool2d(picture, 3, 1, 1)
        empty = picture[:, -1:] == 0
        known = near[:, -1:].clamp_min(1e-6)
        picture = torch.where(empty & (near[:, -1:] > 0), near / known, picture)
    return picture[0, :-1]


@lru_cache(maxsize=1)
def textures() -> tuple[list[Tensor], list[Tensor]]:
    """The hand's and the head's textures, each as levels [C,S,S] of half the size of the one before."""
    human = load_human()
    out = []
    for bake, size in ((_bake_hand, HAND_SIZE), (_bake_head, HEAD_SIZE)):
        levels = [_fill(*bake(human, size), size)]
        for _ in range(4):
            levels.append(F.avg_pool2d(levels[-1][None], 2)[0])
        out.append(levels)
    return out[0], out[1]


@lru_cache(maxsize=1)
def vertex_skin() -> Tensor:
    """The channels of CHANNELS at vertices [V,C], for the skin that no texture covers."""
    human = load_human()
    p = human.template.astype(float) * (1000, 1000, 1000)
    p[:, 0] = np.abs(p[:, 0])
    out = np.zeros((len(p), len(CHANNELS)), np.float32)
    patches, spots = noise(p * 0.035), noise(p * 0.13 + (5, 0, 0))
    out[:, 0] = 0.16 * (patches - 0.5) + 0.12 * (spots - 0.5)
    out[:, 1] = 0.9 * (spots - 0.5) + 0.5 * (patches - 0.5)
    out[:, CHANNELS.index("scalp")] = np.where((human.kind == SKIN) & (human.owner == 15), hairline(p / 1000), -1)
    return torch.from_numpy(out)
