"""Draws the demo's people: whole persons, as many as a picture has, in plain torch on one CPU thread.

A picture is drawn at twice its size: a z-buffer with keys of 64 bits says which triangle each sample shows, a second
one, seen from the lamp, says what lies in shadow. Skin takes its colour and its wrinkles from baked textures
(`human_skin.py`), clothes and hair are painted by their rest places (`human_clothes.py`). Light bleeds red within the
skin, and what lies behind its neighbourhood is darkened.

    picture = render([person], Camera(s, tx, ty), Lamp(), background)      # uint8 [256,256,3]

Things in hands (`Held`) are drawn with the people: they cast shadows, and hide what lies behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F

from .human import CLOTHES, EYE, HAIR, HAND_CHART, HEAD_CHART, NO_CHART, SKIN, load_human
from .human_clothes import Look, cuts, eye_colour, hair_colour, mesh_of, rest_skin, shirt_colour, surface
from .human_skin import CHANNELS, linear, noise_at, textures
from .things import Mesh, ThingLook

FACE_BITS = 20  # of the 63 bits of a z-buffer key
DEPTH_STEPS = 2**30
THING = 4  # beside the kinds of human.KINDS
BLOCKS = (3, 6, 12, 24, 48, 96, 4096)  # size classes of triangles, samples
TILE = 1 << 21  # samples of triangles' boxes that are tested at once


@dataclass(frozen=True)
class Camera:
    """Weak perspective: x = 0.5 + 0.5 s (X + tx), y = 0.5 - 0.5 s (Y + ty) as fractions of the picture."""

    s: float
    tx: float
    ty: float


@dataclass(frozen=True)
class Lamp:
    """Where light comes from. `direction` points to the lamp; colours are light, about 1."""

    direction: tuple[float, float, float] = (0.4, 0.6, 1.0)
    colour: tuple[float, float, float] = (1.0, 0.98, 0.94)
    sky: tuple[float, float, float] = (0.42, 0.43, 0.46)
    ground: tuple[float, float, float] = (0.22, 0.21, 0.20)


@dataclass(frozen=True)
class Person:
    """One person to draw. vertices [V,3]: the posed body, metres; `head` [3,3]: how the head is turned, for the
    smile. joints: only what follows these joints is drawn; all if None."""

    vertices: ndarray
    look: Look = field(default_factory=Look)
    head: ndarray = field(default_factory=lambda: np.eye(3))
    joints: frozenset[int] | None = None


@dataclass(frozen=True)
class Held:
    """A thing to draw: a mesh of `things.py` at vertices [N,3] metres (mirrored: its faces are wound the other way
    round), and how it looks."""

    mesh: Mesh
    vertices: ndarray
    look: ThingLook
    mirrored: bool = False


def rasterise(xy: Tensor, depth: Tensor, faces: Tensor, cut: Tensor, drawn: Tensor, width: int, height: int):
    """The nearest triangle of each sample.

    xy [N,2] in samples; depth [N], smaller is nearer, within 0..1; faces [F,3]; cut [F,3]; drawn [F] bool. Returns the
    covered samples (flat ids [S]), the triangle of each [S], and its barycentric weights [S,3]."""
    p = xy[faces]
    a, b, c = p.unbind(1)
    area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    low, high = p.amin(1).ceil(), p.amax(1).floor()
    low, high = low.clamp_min(0), torch.minimum(high, torch.tensor([width - 1.0, height - 1.0]))
    span = high - low + 1
    drawn = drawn & (area.abs() > 1e-6) & (span.amin(1) > 0) & (cut.amax(1) > 0)
    ids = drawn.nonzero()[:, 0]  # most triangles of a close-up lie outside of it
    faces, cut, area, low, high, span = (x[ids] for x in (faces, cut, area, low, high, span))
    a, b, c = p[ids].unbind(1)
    rows = []
    for u, v in ((b, c), (c, a), (a, b)):
        x, y = u[:, 1] - v[:, 1], v[:, 0] - u[:, 0]
        rows.append(torch.stack([x, y, -(x * u[:, 0] + y * u[:, 1])], -1))
    planes = torch.stack(rows, 1) / area[:, None, None]
    extra = torch.stack([depth[faces] * (DEPTH_STEPS - 1), cut], 1)  # [F,2,3]
    level = extra @ planes  # (x, y, 1) -> depth, cut
    whole = cut.amin(1) > 0
    size = span.amax(1)
    buffer = torch.full((width * height,), 2**62, dtype=torch.int64)
    previous = 0
    for block in BLOCKS:
        chosen = ((size > previous) & (size <= block)).nonzero()[:, 0]
        previous = block
        side = min(block, max(width, height))
        for part in chosen.split(max(1, TILE // side**2)):
            step = torch.arange(side, dtype=torch.float32)
            x, y = low[part, 0, None] + step, low[part, 1, None] + step
            plane = planes[part]
            inside = (x[:, None, :] <= high[part, 0, None, None]) & (y[:, :, None] <= high[part, 1, None, None])
            for i in range(3):
                row = plane[:, i, 1, None] * y + plane[:, i, 2, None]
                inside &= row[:, :, None] >= -plane[:, i, 0, None, None] * x[:, None, :]
            which, dy, dx = inside.nonzero(as_tuple=True)
            face = part[which]
            px, py = low[face, 0] + dx, low[face, 1] + dy
            if not bool(whole[part].all()):
                cuts_ = level[face, 1]
                seen = cuts_[:, 0] * px + cuts_[:, 1] * py + cuts_[:, 2] > 0
                face, px, py = face[seen], px[seen], py[seen]
            deep = level[face, 0]
            value = (deep[:, 0] * px + deep[:, 1] * py + deep[:, 2]).clamp(0, DEPTH_STEPS - 1)
            at = (py * width + px).long()
            buffer.scatter_reduce_(0, at, value.long() * 2**FACE_BITS + face, "amin")
    covered = (buffer < 2**62).nonzero()[:, 0]
    face = buffer[covered] & (2**FACE_BITS - 1)
    x, y = (covered % width).float(), (covered // width).float()
    plane = planes[face]
    weights = plane[..., 0] * x[:, None] + plane[..., 1] * y[:, None] + plane[..., 2]
    return covered, ids[face], weights


def _normals(place: Tensor, faces: Tensor) -> Tensor:
    a, b, c = (place[faces[:, i]] for i in range(3))
    face = torch.linalg.cross(b - a, c - a)
    out = torch.zeros_like(place)
    for i in range(3):
        out.index_add_(0, faces[:, i], face)
    return F.normalize(out, dim=1)


@lru_cache(maxsize=1)
def _tables() -> dict[str, Tensor]:
    """The surface as tensors."""
    mesh, human = surface(), load_human()
    normal_faces = torch.from_numpy(human.arrays["f"])
    return {
        "faces": torch.from_numpy(mesh.faces),
        "kind": torch.from_numpy(mesh.kind.astype(np.int64)),
        "chart": torch.from_numpy(mesh.chart),
        "uv": torch.from_numpy(mesh.uv),
        "paint": torch.cat([torch.from_numpy(mesh.rest), rest_skin()], 1),  # [N, 3 + C]
        "body": normal_faces,
        "smile": torch.from_numpy(human.smile),
    }


def render(
    people: Sequence[Person],
    camera: Camera,
    lamp: Lamp,
    background: Tensor,
    size: int = 256,
    seed: int = 0,
    things: Sequence[Held] = (),
) -> Tensor:
    """Draws people, and the things that they hold, before a background.

    background [H,W,3] float: display colours in 0..1, any resolution. seed: of the sensor's grain. Returns uint8
    [size,size,3]."""
    side = 2 * size
    table = _tables()
    places, shown, edges = [], [], []
    for person in people:
        vertices = torch.from_numpy(np.asarray(person.vertices, np.float32))
        smile = table["smile"] @ torch.from_numpy(np.asarray(person.head, np.float32)).T
        places.append(mesh_of(vertices, _normals(vertices, table["body"]), person.look, smile))
        visible, edge = _cuts(person.look, person.joints)
        shown.append(visible)
        edges.append(edge)
    count, triangles = len(places[0]), len(table["faces"])
    faces_ = [table["faces"] + i * count for i in range(len(people))]
    kinds, first = [table["kind"].repeat(len(people))], len(people) * triangles
    for held in things:
        mesh = torch.from_numpy(held.mesh.faces[:, ::-1].copy() if held.mirrored else held.mesh.faces)
        faces_.append(mesh + sum(map(len, places)))
        places.append(torch.from_numpy(np.asarray(held.vertices, np.float32)))
        shown.append(torch.ones(len(mesh), dtype=torch.bool))
        edges.append(torch.ones(len(mesh), 3))
        kinds.append(torch.full((len(mesh),), THING))
    place, seen, cut, kind, faces = (torch.cat(x) for x in (places, shown, edges, kinds, faces_))
    normal = _normals(place, faces)

    x = (0.5 + 0.5 * camera.s * (place[:, 0] + camera.tx)) * side - 0.5
    y = (0.5 - 0.5 * camera.s * (place[:, 1] + camera.ty)) * side - 0.5
    p = torch.stack([x, y], 1)[faces]
    a, b, c = p.unbind(1)
    towards = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0]) < 0
    drawn = seen & (towards | (kind == CLOTHES) | (kind == HAIR))
    near, far = place[:, 2].max(), place[:, 2].min()
    depth = (near - place[:, 2]) / (near - far).clamp_min(1e-6)
    covered, face, weights = rasterise(torch.stack([x, y], 1), depth, faces, cut, drawn, side, side)
    picture = _backdrop(background, size)
    if len(covered):
        corners = faces[face]
        attributes = torch.cat([normal, place], 1)
        at = torch.einsum("sk,skc->sc", weights, attributes[corners])
        n, where = at[:, :3], at[:, 3:]
        n = torch.where(towards[face][:, None], n, -n)
        pixel = 2 / (camera.s * side)  # metres of a sample
        lit = _shadow(place, faces, cut, seen, where, n, lamp, camera)
        body = face < first
        colour, height, gloss = _paint(people, table, torch.where(body, face // triangles, -1), face % triangles,
                                       corners % count, weights, pixel)  # fmt: skip
        for held in things:
            mine = ((face >= first) & (face < first + len(held.mesh.faces))).nonzero()[:, 0]
            colour[mine], gloss[mine] = _paint_thing(held, face[mine] - first, weights[mine])
            first += len(held.mesh.faces)
        n = _relief(F.normalize(n, dim=1), where[:, 2], height, covered, side, pixel)
        skin = kind[face] == SKIN
        picture = _shade(picture, covered, where, n, colour, gloss, skin, lit, lamp, side, pixel)
    picture = picture.clamp_min(0)
    picture = (picture / (1 + 0.12 * picture) * 1.06).clamp(0, 1) ** (1 / 2.2)
    grain = torch.randn(picture.shape, generator=torch.Generator().manual_seed(seed))
    return ((picture + 0.005 * grain).clamp(0, 1) * 255 + 0.5).to(torch.uint8).permute(1, 2, 0).contiguous()


def _paint_thing(held: Held, face: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Colour [S,3] (light) and gloss [S,2] of samples of a thing, by face [S] and barycentric weights [S,3]."""
    corners = torch.from_numpy(held.mesh.vertices).float()[torch.from_numpy(held.mesh.faces)[face]]
    part = torch.from_numpy(held.mesh.part)[face]
    colours = torch.from_numpy(linear(np.array(held.look.colours))).float()
    rest = torch.einsum("sk,skc->sc", weights, corners)
    grain = noise_at(rest * torch.tensor(held.look.grain)) - 0.5
    colour = colours[part] * (1 + held.look.rough * grain)[:, None]
    return colour, torch.tensor(held.look.gloss)[part]


@lru_cache(maxsize=16)
def _cuts(look: Look, joints: frozenset[int] | None) -> tuple[Tensor, Tensor]:
    shown, cut = cuts(look)
    if joints is not None:
        mesh = surface()
        shown &= np.isin(load_human().owner[mesh.source[mesh.faces]], list(joints)).any(1)
    return torch.from_numpy(shown), torch.from_numpy(cut)


def _backdrop(background: Tensor, size: int) -> Tensor:
    """[H,W,3] display colours -> [3,size,size] light."""
    picture = background.permute(2, 0, 1)[None].float()
    if picture.shape[-1] != size:
        picture = F.interpolate(picture, size=(size, size), mode="bilinear", align_corners=False)
    return picture[0].clamp(0, 1) ** 2.2


def _shadow(
    place: Tensor, faces: Tensor, cut: Tensor, shown: Tensor, where: Tensor, n: Tensor, lamp: Lamp, camera: Camera
) -> Tensor:
    """How much of the lamp each sample sees, [S] in 0..1."""
    side = 400
    to_lamp = F.normalize(torch.tensor(lamp.direction, dtype=torch.float32), dim=0)
    right = F.normalize(torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0]), to_lamp), dim=0)
    axes = torch.stack([right, torch.linalg.cross(to_lamp, right), to_lamp])
    seen = where @ axes.T  # only what the picture shows receives shadows
    low, high = seen[:, :2].amin(0) - 0.01, seen[:, :2].amax(0) + 0.01
    scale = side / (high - low).max()
    from_lamp = place @ axes.T
    xy = (from_lamp[:, :2] - low) * scale - 0.5
    near, far = from_lamp[:, 2].max(), from_lamp[:, 2].min()
    span = (near - far).clamp_min(1e-6)
    at, face, weights = rasterise(xy, (near - from_lamp[:, 2]) / span, faces, cut, shown, side, side)
    level = torch.full((side * side,), -1e3)
    level[at] = (weights * from_lamp[:, 2][faces[face]]).sum(1)
    level = level.view(1, 1, side, side)
    slope = (n @ to_lamp).abs().clamp(0.25, 1)
    bias = 0.0022 + 1.6 / scale / slope
    xy = (seen[:, :2] - low) * scale - 0.5
    spread = max(1.0, float(0.0035 * scale))
    blocked = torch.zeros(len(where))
    for k in range(12):  # a disc of samples
        radius, angle = spread * ((k + 0.5) / 12) ** 0.5, 2.399963 * k
        x = (xy[:, 0] + radius * float(np.cos(angle)) + 0.5).long().clamp(0, side - 1)
        y = (xy[:, 1] + radius * float(np.sin(angle)) + 0.5).long().clamp(0, side - 1)
        blocked += level.view(-1)[y * side + x] > seen[:, 2] + bias
    return 1 - blocked / 12


def _paint(
    people: Sequence[Person],
    table: dict[str, Tensor],
    owner: Tensor,
    face: Tensor,
    corners: Tensor,
    weights: Tensor,
    pixel: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Colour [S,3] (light), height [S] (metres) and gloss [S,2] (strength, roughness) of samples."""  # fmt: skip
    colour, height = torch.zeros(len(face), 3), torch.zeros(len(face))
    gloss = torch.tensor([0.035, 0.45]).repeat(len(face), 1)
    kinds = table["kind"][face]
    for number, person in enumerate(people):
        for kind in range(4):
            mine = ((owner == number) & (kinds == kind)).nonzero()[:, 0]
            if len(mine) == 0:
                continue
            mixed = torch.einsum("sk,skc->sc", weights[mine], table["paint"][corners[mine]])
            rest = mixed[:, :3]
            if kind == SKIN:
                channels = _skin_channels(table, face[mine], weights[mine], rest, mixed[:, 3:], pixel)
                colour[mine], gloss[mine] = _skin_colour(channels, person.look)
                height[mine] = channels[:, CHANNELS.index("height")] * 0.001 * person.look.wrinkles
            elif kind == CLOTHES:
                colour[mine], height[mine] = shirt_colour(rest, person.look)
                gloss[mine] = torch.tensor([0.012, 0.8])
            elif kind == HAIR:
                colour[mine], height[mine] = hair_colour(rest, person.look)
                gloss[mine] = torch.tensor([0.022, 0.5])
            elif kind == EYE:
                colour[mine] = eye_colour(rest, person.look)
                gloss[mine] = torch.tensor([0.06, 0.15])
    return colour, height, gloss


def _skin_channels(
    table: dict[str, Tensor], face: Tensor, weights: Tensor, rest: Tensor, channels: Tensor, pixel: float
) -> Tensor:
    """[S,C]: textures where there is one, vertices elsewhere. The texture's level is that of the picture's scale."""
    chart = table["chart"][face]
    for which, levels, metres in zip((HAND_CHART, HEAD_CHART), textures(), (0.55, 0.37), strict=True):
        mine = (chart == which).nonzero()[:, 0]
        if len(mine) == 0:
            continue
        texel = metres / levels[0].shape[-1]  # metres of skin a texel, nearly
        level = levels[int(np.clip(round(np.log2(max(pixel / texel, 1))), 0, len(levels) - 1))]
        uv = (weights[mine][..., None] * table["uv"][face[mine]]).sum(1)
        got = F.grid_sample(level[None], uv[None, None] * 2 - 1, padding_mode="border", align_corners=False)
        channels[mine] = got[0, :, 0].T
    bare = chart == NO_CHART
    channels[bare, CHANNELS.index("height")] = 0.2 * noise_at(rest[bare] * 550) + 0.35 * noise_at(rest[bare] * 160)
    return channels


def _skin_colour(channels: Tensor, look: Look) -> tuple[Tensor, Tensor]:
    """Colour [S,3] (light) and gloss [S,2] of skin from its channels [S,C]."""
    tone, red, palm, crease, nail, lips, brow, lash, beard, scalp, _ = (c[:, None] for c in channels.unbind(1))
    skin, hair = (torch.from_numpy(linear(c)).float() for c in (look.skin, look.hair))
    base = skin + palm * (0.40 * (torch.tensor([0.66, 0.33, 0.245]) - skin))
    red = red + 1.1 * lips * (1 + look.lipstick)
    base = base * (1 + tone - 0.2 * lips) * (1 + red * torch.tensor([0.04, -0.13, -0.12]))
    base = base + lips * look.lipstick * 0.7 * (torch.tensor([0.45, 0.04, 0.06]) - base)
    base = base * (1 - crease * torch.tensor([0.40, 0.75, 0.75]))
    varnish = skin * 0.5 + 0.5 * torch.tensor([0.75, 0.40, 0.34])
    if look.varnish is not None:
        varnish = torch.from_numpy(linear(look.varnish)).float()
    base = base + nail * (varnish - base)
    base = base + 0.85 * brow * (hair * 0.8 - base)
    base = base * (1 - 0.8 * lash)
    base = base + look.beard * beard * (hair * 0.9 - base)
    if look.haircut != "bald":
        base = base + (0.9 * ((scalp + 0.001) / 0.007).clamp(0, 1)) * (hair - base)
    gloss = torch.cat([0.035 + 0.03 * nail + 0.02 * lips, 0.46 - 0.2 * nail - 0.1 * lips], 1)
    return base.clamp_min(0.002), gloss


def _relief(n: Tensor, z: Tensor, height: Tensor, covered: Tensor, side: int, pixel: float) -> Tensor:
    """Normals [S,3] tilted by a relief of `height` metres (Mikkelsen 2010, for a picture seen along -z)."""
    picture = torch.zeros(2, side * side)
    picture[0, covered], picture[1, covered] = height, z + 10
    picture = picture.view(2, side, side)
    slopes = []
    for axis in (2, 1):
        step = picture.diff(dim=axis)
        ok = step[1].abs() < 3 * pixel + 0.001  # not across an edge
        step = torch.where(ok, step[0], torch.zeros_like(step[0]))
        pad = (1, 1, 0, 0) if axis == 2 else (0, 0, 1, 1)
        step = F.pad(step, pad)
        first, second = (step[:, :-1], step[:, 1:]) if axis == 2 else (step[:-1], step[1:])
        slopes.append((0.5 * (first + second)).reshape(-1)[covered])
    # The surface's steps along the picture's x and y (down), in metres.
    nz = n[:, 2].clamp_min(0.25)
    zero, px = torch.zeros_like(nz), torch.full_like(nz, pixel)
    along_x = torch.stack([px, zero, -n[:, 0] / nz * pixel], 1)
    along_y = torch.stack([zero, -px, n[:, 1] / nz * pixel], 1)
    r1, r2 = torch.linalg.cross(along_y, n), torch.linalg.cross(n, along_x)
    det = (along_x * r1).sum(1, keepdim=True)
    tilt = torch.sign(det) * (slopes[0][:, None] * r1 + slopes[1][:, None] * r2)
    return F.normalize(det.abs() * n - tilt.clamp(-0.8 * pixel * pixel, 0.8 * pixel * pixel), dim=1)


def _shade(
    backdrop: Tensor,
    covered: Tensor,
    where: Tensor,
    n: Tensor,
    colour: Tensor,
    gloss: Tensor,
    skin: Tensor,
    lit: Tensor,
    lamp: Lamp,
    side: int,
    pixel: float,
) -> Tensor:
    """The picture in light, [3,size,size]."""  # fmt: skip
    to_lamp = F.normalize(torch.tensor(lamp.direction, dtype=torch.float32), dim=0)
    view = torch.tensor([0.0, 0.0, 1.0])
    half = F.normalize(to_lamp + view, dim=0)
    wrap = torch.where(skin[:, None], torch.tensor([0.28, 0.16, 0.12]), torch.tensor([0.1, 0.1, 0.1]))
    facing = (n @ to_lamp)[:, None]
    diffuse = ((facing + wrap) / (1 + wrap)).clamp_min(0)
    bleed = torch.where(skin, 0.25 * (1 - lit) * lit, torch.zeros_like(lit))
    through = torch.stack([lit + bleed, lit, lit], 1)
    up = 0.5 + 0.5 * n[:, 1:2]
    sky, ground = torch.tensor(lamp.sky, dtype=torch.float32), torch.tensor(lamp.ground, dtype=torch.float32)
    ambient = ground + up * (sky - ground) + (n[:, 2:] * 0.6 - facing * 0.7).clamp_min(0) * 0.14
    direct = 0.95 * torch.tensor(lamp.colour, dtype=torch.float32) * diffuse * through

    open_ = _occlusion(covered, where[:, 2], side, pixel)[:, None]
    # Light between skin and skin is red; cloth beside a hand only gets darker.
    tint = open_ ** torch.where(skin[:, None], torch.tensor([0.75, 1.05, 1.1]), torch.ones(3))
    light = ambient * tint + direct * (0.35 + 0.65 * tint)
    light = _bleed(light, covered, where[:, 2], skin, side, pixel)

    rough = gloss[:, 1]
    nh, nv = (n @ half).clamp_min(0), n[:, 2].clamp_min(0.05)
    a2 = rough**4
    spread = a2 / (np.pi * (nh * nh * (a2 - 1) + 1) ** 2)
    fresnel = gloss[:, 0] + (1 - gloss[:, 0]) * (1 - float(view @ half)) ** 5
    shine = spread * fresnel / (4 * nv.clamp_min(0.2)) * facing[:, 0].clamp_min(0) * lit * 2
    rim = gloss[:, 0] + (1 - gloss[:, 0]) * (1 - nv) ** 5 * 0.35
    shine = shine + 0.30 * rim * (0.4 + 0.6 * up[:, 0]) * (1 - 0.6 * rough)
    out = colour * light * 0.95 + (shine * (0.3 + 0.7 * open_[:, 0]))[:, None]

    layers = torch.zeros(4, side * side)
    layers[:3, covered], layers[3, covered] = out.T, 1.0
    layers = F.avg_pool2d(layers.view(4, 1, side, side), 2)[:, 0]
    return layers[:3] + (1 - layers[3]) * backdrop


def _occlusion(covered: Tensor, z: Tensor, side: int, pixel: float) -> Tensor:
    """How open each sample is, [S] in 0..1: it darkens by how far it lies behind the mean of its neighbourhood, at a
    finger's and at a head's scale."""
    layers = torch.zeros(3, side * side)
    layers[0, covered], layers[1, covered], layers[2, covered] = z, 1.0, z * z
    layers = layers.view(3, 1, side, side)
    rows, columns = covered // side, covered % side
    out = torch.ones(len(covered))
    for metres, depth, strength in ((0.006, 0.007, 0.42), (0.018, 0.02, 0.45), (0.06, 0.07, 0.35)):
        radius = metres / pixel  # in samples
        shift = max(1, int(np.log2(max(radius / 3, 2))))
        if radius < 2 or side >> shift < 8:
            continue
        small = F.avg_pool2d(layers, 1 << shift)
        width = 2 * max(1, round(radius / (1 << shift))) + 1
        mean = F.avg_pool2d(F.avg_pool2d(small, (width, 1), 1, (width // 2, 0)), (1, width), 1, (0, width // 2))
        mean, square = (mean[i] / mean[1].clamp_min(1e-6) for i in (0, 2))
        behind = _at(mean[0], rows, columns, shift) - z
        # A hand far before a chest does not darken it: there the neighbourhood is two surfaces.
        apart = _at((square - mean**2)[0].clamp_min(0), rows, columns, shift)
        share = strength / (1 + apart / (0.5 * depth) ** 2)
        out = out * (1 - share * ((behind - 0.1 * depth) / depth).clamp(0, 1))
    return out


def _at(picture: Tensor, rows: Tensor, columns: Tensor, shift: int) -> Tensor:
    """A small picture [h,w] at samples of the large one, bilinear."""
    size = torch.tensor([picture.shape[1], picture.shape[0]])
    at = (torch.stack([columns, rows], 1).float() + 0.5) / (1 << shift) / size * 2 - 1
    return F.grid_sample(picture[None, None], at[None, None], padding_mode="border", align_corners=False)[0, 0, 0]


def _bleed(light: Tensor, covered: Tensor, z: Tensor, skin: Tensor, side: int, pixel: float) -> Tensor:
    """Light [S,3] blurred within the skin, red the farthest (about 3 mm), at half the resolution."""
    if 0.003 / pixel < 1.5:
        return light
    layers = torch.zeros(5, side * side)
    layers[:3, covered] = light.T * skin
    layers[3, covered], layers[4, covered] = z * skin, skin.float()
    layers = F.avg_pool2d(layers.view(5, 1, side, side), 2)[:, 0]
    known = layers[4].clamp_min(1e-6)
    layers[:4] /= known
    blurred = layers
    for axis in (1, 2):
        total, weight = torch.zeros_like(blurred[:3]), torch.zeros_like(blurred[:3])
        for step in range(-4, 5):
            moved = blurred if step == 0 else torch.roll(blurred, step, axis)
            near = torch.exp(-(((moved[3] - blurred[3]) / 0.006) ** 2)) * moved[4]
            for c, metres in enumerate((0.0026, 0.0012, 0.0008)):
                spread = max(metres / (2 * pixel), 0.3)
                w = near * float(np.exp(-0.5 * (step / spread) ** 2))
                total[c] += w * moved[c]
                weight[c] += w
        blurred = torch.cat([total / weight.clamp_min(1e-6), blurred[3:]])
    rows, columns = covered // side, covered % side
    inside = skin & (_at(layers[4], rows, columns, 1) > 0.6)
    soft = torch.stack([_at(blurred[c], rows, columns, 1) for c in range(3)], 1)
    return torch.where(inside[:, None], soft, light)
