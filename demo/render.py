"""A small renderer for hands: a z-buffer in plain torch, deterministic, a few milliseconds a picture on one CPU thread.

It draws only hands and forearms. It sorts triangles into size classes and rasterises each class as dense blocks of
pixels; an integer minimum over (depth, triangle) finds the nearest triangle. It shades each covered pixel once. A pixel
is darker the farther it lies behind its neighbourhood, which separates the fingers of a fist.

    python -m handiffuser.demo.render sheet.png [SIZE [SEED]]     # every gesture, view and side
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.smplh import SMPLH
from .body import build_body, vertex_colours

if TYPE_CHECKING:
    from .scenes import Scene

BLOCKS = (4, 8, 16, 32, 64, 4096)  # size classes of triangles, pixels
FACE_BITS = 13  # of the 31 bits of a z-buffer key; the rest is depth


def demo_body() -> SMPLH:
    """The licence-free body, made in memory."""
    return SMPLH(build_body())


_demo_body = lru_cache(maxsize=1)(demo_body)


def hand_faces(body: SMPLH) -> tuple[Tensor, Tensor]:
    """Faces of hands and forearms [F, 3] and their sides [F] (0 left, 1 right): all three vertices have their largest
    weight at the elbow, the wrist or a finger joint of that side."""
    owner = body.weights.argmax(1)
    left = (owner == 18) | (owner == 20) | ((owner >= 22) & (owner < 37))
    right = (owner == 19) | (owner == 21) | (owner >= 37)
    on_left, on_right = left[body.faces].all(1), right[body.faces].all(1)
    keep = on_left | on_right
    return body.faces[keep], on_right[keep].long()


def _normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Area-weighted vertex normals [B,V,3]."""
    a, b, c = (vertices[:, faces[:, i]] for i in range(3))
    face = torch.linalg.cross(b - a, c - a)
    out = torch.zeros_like(vertices)
    for i in range(3):
        out.index_add_(1, faces[:, i], face)
    return F.normalize(out, dim=2)


def _rasterise(xy: Tensor, z: Tensor, faces: Tensor, visible: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Nearest front face per pixel.

    xy [B,V,2] in pixels, z [B,V] with larger nearer, visible [B,F]. Returns the face of each pixel
    [B,side,side] (-1 where there is none) and the faces' planes [B,F,3,3]: rows turn (x, y, 1) into
    barycentric weights."""
    batch, count = len(xy), len(faces)
    if count > 2**FACE_BITS:
        raise ValueError(f"faces must be at most {2**FACE_BITS}, got {count}.")
    p = xy[:, faces]  # [B,F,3,2]
    a, b, c = p.unbind(2)
    area = (b[..., 0] - a[..., 0]) * (c[..., 1] - a[..., 1]) - (b[..., 1] - a[..., 1]) * (c[..., 0] - a[..., 0])
    rows = []
    for u, v in ((b, c), (c, a), (a, b)):
        x, y = u[..., 1] - v[..., 1], v[..., 0] - u[..., 0]
        rows.append(torch.stack([x, y, -(x * u[..., 0] + y * u[..., 1])], -1))
    safe = torch.where(area.abs() < 1e-9, torch.ones_like(area), area)
    planes = torch.stack(rows, 2) / safe[..., None, None]

    near, far = z.amax(1, keepdim=True), z.amin(1, keepdim=True)
    behind = (near - z) / (near - far).clamp_min(1e-6) * (2 ** (30 - FACE_BITS) - 1)  # 0 is nearest
    depth = (planes * behind[:, faces][..., None]).sum(2)  # [B,F,3]: (x, y, 1) -> depth

    low, high = p.amin(2).ceil().clamp_min(0), p.amax(2).floor().clamp_max(side - 1)
    extent = (high - low + 1).amin(2), (high - low + 1).amax(2)
    drawn = visible & (area < -1e-6) & (extent[0] > 0)  # y points down: front faces wind the other way round
    buffer = torch.full((batch * side * side,), 2**31 - 1, dtype=torch.int32)
    previous = 0
    for block in BLOCKS:
        chosen = drawn & (extent[1] > previous) & (extent[1] <= block)
        image, face = chosen.nonzero(as_tuple=True)
        previous = block
        if len(face) == 0:
            continue
        size = min(block, side)
        step = torch.arange(size, dtype=torch.float32)
        start = low[image, face]
        x, y = start[:, 0, None] + step, start[:, 1, None] + step  # [N,size]
        plane, level = planes[image, face], depth[image, face]
        inside = (x[:, None, :] < side) & (y[:, :, None] < side)
        for i in range(3):
            row = (plane[:, i, 1, None] * y + plane[:, i, 2, None])[:, :, None]
            inside &= row >= -plane[:, i, 0, None, None] * x[:, None, :]
        which, dy, dx = inside.nonzero(as_tuple=True)
        px, py = start[which, 0] + dx, start[which, 1] + dy
        level = level[which]
        value = (level[:, 0] * px + level[:, 1] * py + level[:, 2]).clamp(0, 2 ** (30 - FACE_BITS) - 1)
        key = value.int() * 2**FACE_BITS + face[which].int()
        at = image[which] * (side * side) + (py * side + px).long()
        buffer.scatter_reduce_(0, at, key, "amin")
    hit = buffer != 2**31 - 1
    face = torch.where(hit, buffer % 2**FACE_BITS, -1)
    return face.view(batch, side, side).long(), planes


def _blur(x: Tensor, radius: int) -> Tensor:
    """Box mean over (2 radius + 1)² pixels of [A,B,S,S], zeros outside."""
    width = 2 * radius + 1
    x = F.avg_pool2d(x, (width, 1), 1, (radius, 0))
    return F.avg_pool2d(x, (1, width), 1, (0, radius))


def _occlusion(layers: Tensor, image: Tensor, row: Tensor, column: Tensor, depth: Tensor) -> Tensor:
    """The depth of covered pixels behind the mean of their covered neighbours, near and wide: [N], 0 in the open to 1.

    layers: [2, B, S, S], depth (0 for the background) and coverage, at half the resolution of rows and columns.
    """
    size = layers.shape[-1]
    out = torch.zeros_like(depth)
    for shift, radius, metres, strength in (
        (1, max(1, size // 85), 0.006, 0.45),
        (2, max(1, size // 55), 0.02, 0.55),
    ):
        mean = _blur(layers if shift == 1 else F.avg_pool2d(layers, 2), radius)
        mean = (mean[0] / mean[1].clamp_min(1e-6)).flatten()
        side = size >> (shift - 1)
        behind = mean[(image * side + (row >> shift)) * side + (column >> shift)] - depth
        out += strength * ((behind - 0.0006) / metres).clamp(0, 1)
    return out


def _light(normals: Tensor, colours: Tensor, light: Tensor) -> Tensor:
    """Lit vertex colours [B, V, 3]: sky, a lamp whose light bleeds around the skin, a dark outline, a little gloss."""
    lamp = light[:, None]
    facing = (normals * lamp).sum(-1, keepdim=True)
    wrap = torch.tensor([0.42, 0.28, 0.24])  # red bleeds the farthest
    diffuse = ((facing + wrap) / (1 + wrap)).clamp_min(0)
    half = F.normalize(lamp + torch.tensor([0.0, 0.0, 1.0]), dim=-1)
    gloss = 0.10 * (normals * half).sum(-1, keepdim=True).clamp_min(0) ** 24
    outline = 0.70 + 0.30 * normals[..., 2:].clamp(0, 1).sqrt()  # separates a finger from the one behind it
    return colours * (0.40 + 0.08 * normals[..., 1:2] + 0.66 * diffuse) * outline + gloss


def _backdrop(background: Tensor, size: int) -> Tensor:
    """[B,3] -> [3,B,size,size]: lighter towards the top, darker towards the corners."""
    t = torch.linspace(-1, 1, size)
    shade = 1.02 - 0.05 * t[:, None] - 0.09 * ((t[:, None] ** 2 + t[None] ** 2) / 2) ** 1.5
    return (background.T[..., None, None] * shade).clamp(0, 1)


def render(
    vertices: Tensor,
    faces: Tensor,
    colours: Tensor,
    camera: Tensor,
    background: Tensor,
    light: Tensor,
    size: int = 128,
    visible: Tensor | None = None,
) -> Tensor:
    """Draws posed meshes.

    vertices [B,V,3] metres; faces [F,3] (at most 8192); colours [B,V,3] in 0..1; camera [B,3] (s, tx, ty),
    weak perspective: x = 0.5 + 0.5 s (X + tx), y = 0.5 - 0.5 s (Y + ty) as fractions of the picture, seen
    along -z; background [B,3] in 0..1; light [B,3] unit vectors towards the light; visible [B,F] bool, all if
    None. Returns uint8 [B,size,size,3]."""
    side = 2 * size  # two samples a pixel each way, averaged at the end
    batch = len(vertices)
    if visible is None:
        visible = torch.ones(batch, len(faces), dtype=torch.bool)
    scale, tx, ty = camera[:, 0:1], camera[:, 1:2], camera[:, 2:3]
    x = (0.5 + 0.5 * scale * (vertices[..., 0] + tx)) * side - 0.5
    y = (0.5 - 0.5 * scale * (vertices[..., 1] + ty)) * side - 0.5
    face, planes = _rasterise(torch.stack([x, y], -1), vertices[..., 2], faces, visible, side)

    image, row, column = (face >= 0).nonzero(as_tuple=True)
    hit = face[image, row, column]
    lit = _light(_normals(vertices, faces), colours, light)
    table = torch.cat([lit, vertices[..., 2:]], -1).flatten(0, 1).T.contiguous()  # [4, B V]: red, green, blue, depth
    planes = planes.flatten(0, 1).flatten(1).T.contiguous()  # [9, B F]
    slot, shift = image * len(faces) + hit, image * vertices.shape[1]
    pixel = torch.zeros(4, len(hit))
    x, y = column.float(), row.float()
    for i in range(3):
        kx, ky, k = (planes[3 * i + j][slot] for j in range(3))
        pixel += (kx * x + ky * y + k) * table[:, faces[hit, i] + shift]

    flat = (image * side + row) * side + column
    layers = torch.zeros(2, batch * side * side)
    layers[0, flat], layers[1, flat] = pixel[3], 1.0
    layers = F.avg_pool2d(layers.view(2, batch, side, side), 2)
    dark = 1 - _occlusion(layers, image, row, column, pixel[3])
    hands = torch.zeros(3, batch * side * side)
    for i, depth in enumerate((0.62, 0.78, 0.80)):  # blood: shadows between fingers are red
        hands[i, flat] = (pixel[i] * (1 - depth + depth * dark)).clamp(0, 1)
    hands = F.avg_pool2d(hands.view(3, batch, side, side), 2)
    picture = hands + (1 - layers[1]) * _backdrop(background, size)
    return (picture * 255 + 0.5).to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def render_scenes(scenes: Sequence[Scene], body: SMPLH | None = None, size: int = 128, batch: int = 32) -> Tensor:
    """Poses and draws scenes -> uint8 [N, size, size, 3]. body: the demo's own by default, with its painted skin."""
    body = body or _demo_body()
    faces, side = hand_faces(body)
    used, faces = faces.unique(return_inverse=True)
    out = []
    for start in range(0, len(scenes), batch):
        part = scenes[start : start + batch]

        def gather(name: str, part: Sequence[Scene] = part) -> Tensor:
            return torch.from_numpy(np.stack([np.asarray(getattr(s, name)) for s in part]))

        with torch.no_grad():
            vertices, _ = body(gather("rotations"), gather("betas"))
            colours = torch.from_numpy(vertex_colours(gather("skin").numpy(), used))
            visible = gather("present")[:, side]
            vertices = vertices[:, used]
            view = gather("camera"), gather("background"), gather("light")
            out.append(render(vertices, faces, colours, *view, size, visible))
    return torch.cat(out)


def contact_sheet(path: str, size: int = 128, seed: int = 0) -> None:
    """Writes a picture of every gesture (rows) in every view and side (columns), with labels."""
    from PIL import Image, ImageDraw

    from .gestures import NAMES
    from .prompts import BACKGROUNDS, SKINS, Spec, allowed_views
    from .scenes import sample_scene

    columns = [*((s, v) for v in ("palm", "back", "side") for s in ("left", "right")), ("both", ""), ("both", "")]
    rng = np.random.default_rng(seed)
    scenes, cells = [], []
    for row, gesture in enumerate(NAMES):
        for column, (side, view) in enumerate(columns):
            views = [v for v in allowed_views(gesture, side) if v == view or not view]
            if views:
                view = views[column % len(views)]
                spec = Spec(side, gesture, view, list(SKINS)[rng.integers(6)], list(BACKGROUNDS)[rng.integers(10)])
                scenes.append(sample_scene(rng, spec))
                cells.append((row, column))
    pictures = render_scenes(scenes, size=size).numpy()
    sheet = Image.new("RGB", (110 + len(columns) * size, 16 + len(NAMES) * size), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (side, view) in enumerate(columns):
        draw.text((114 + column * size, 2), f"{side} {view}", "black")
    for row, gesture in enumerate(NAMES):
        draw.text((2, 16 + row * size + size // 2), gesture, "black")
    for (row, column), picture in zip(cells, pictures, strict=True):
        sheet.paste(Image.fromarray(picture), (110 + column * size, 16 + row * size))
    sheet.save(path)


if __name__ == "__main__":
    contact_sheet(sys.argv[1] if len(sys.argv) > 1 else "sheet.png", *map(int, sys.argv[2:]))
