"""Regions of a crop, as boolean masks [H, W]: where a hand will be, where the old one is, and what lies behind it.

    new = silhouette(points, radii, shape)          # the hand that will be painted
    old, skin = old_hand(crop, points)              # the one that is there, with a sixth finger or none at all
    behind = prefill(crop, old, skin)               # the crop without it
    colours, alpha = matte(painted, new)            # a painted hand without what lies behind it

Points are pixels [21, 2]: wrist, then four of each finger, as everywhere. Needs OpenCV, which comes with MediaPipe.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

BONES = [(0 if joint % 4 == 1 else joint - 1, joint) for joint in range(1, 21)]
PALM = (0, 1, 5, 9, 13, 17)
WRIST_CUT = -0.04  # sizes of the hand behind the wrist, where a hand ends and the arm begins
ALIKE = 24.0  # a colour's distance from the skin's median in Lab, lightness counted LIGHTNESS times
LIGHTNESS = 0.45
NEARBY, REACH = 0.3, 0.9  # sizes of the hand around it: where all that is alike belongs to it, and what hangs together
NAIL, UNLIKE = 0.12, 14.0  # sizes of the hand around its skin, where what is so unlike the ground is a nail
HALO = 0.03  # of the crop around a painted hand: there may be a glow
LEAKED = 2.5  # times what is nearby: then the colour runs out into the ground
GROUND, RARE = 6, 0.02  # colours of the ground, and the share of its pixels that a colour has at least
TIP = 0.3  # of a finger's last bone, that its end lies beyond the detector's point
SWEEPS = 10  # over each size of a picture whose hole is filled
ROUGH = 3  # pixels around a hand whose colours are mixed with it
CLEAR = (20.0, 60.0)  # levels between hand and background: below, colours do not tell them apart, and above they do
GROUNDED = 0.6  # how unlike the skin the ground is at least, in ALIKE


def size_of(points: np.ndarray) -> float:
    """The longer side of a hand's box, pixels, at least 1."""
    return float(max(np.ptp(points, axis=0).max(), 1.0))


def radii(vertices: np.ndarray, joints: np.ndarray, scale: float) -> np.ndarray:
    """How thick each of the 20 bones of BONES is: float64 [20], pixels.

    vertices [V, 3], joints [21, 3]: metres. scale: pixels a metre. The radius of a bone is the median distance of the
    vertices that have it as their nearest and lie within 4 cm.
    """
    a, b = joints[[i for i, _ in BONES]], joints[[j for _, j in BONES]]
    near = vertices[np.linalg.norm(vertices[:, None] - joints, axis=-1).min(1) < 0.05]
    along = b - a
    share = np.einsum("vbc,bc->vb", near[:, None] - a, along) / np.maximum((along**2).sum(1), 1e-12)
    distance = np.linalg.norm(near[:, None] - (a + share.clip(0, 1)[..., None] * along), axis=-1)
    nearest = distance.argmin(1)
    found = [distance[(nearest == bone) & (distance[:, bone] < 0.04), bone] for bone in range(len(BONES))]
    return np.array([scale * float(np.median(each)) if len(each) else scale * 0.009 for each in found])


def silhouette(points: np.ndarray, thick: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The hand without its arm: fingers as thick as `radii` says, and the palm between them."""
    drawn = np.zeros(shape, np.uint8)
    for (i, j), radius in zip(BONES, thick, strict=True):
        cv2.line(drawn, _fixed(points[i]), _fixed(points[j]), 1, max(round(2 * radius), 1), shift=4)
    palm = np.round(points[list(PALM)] * 16).astype(np.int32)
    cv2.fillConvexPoly(drawn, cv2.convexHull(palm), 1, shift=4)
    return drawn > 0


def old_hand(crop: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What has the colour of the hand's middle, and is near it or hangs together with it: also fingers that no detector
    reports, and those of another gesture. Beyond the wrist the arm begins, which is left out. And all that has the
    hand's colour, the arm as well."""
    size = size_of(points)
    thin, thick = (_lines(points, crop.shape[:2], width) for width in (1, max(round(0.05 * size), 2)))
    lab = cv2.cvtColor(crop, cv2.COLOR_RGB2LAB).astype(np.float32) * (LIGHTNESS, 1, 1)
    if not thin.any():
        return thick, thick
    hull = np.zeros(crop.shape[:2], np.uint8)
    cv2.fillConvexPoly(hull, cv2.convexHull(np.round(points).astype(np.int32)), 1)
    hand, ahead = hull > 0, along(points, crop.shape[:2]) > WRIST_CUT
    away = np.linalg.norm(lab - np.median(lab[thin], 0), axis=-1)
    ground = _to_ground(lab, ahead & (away > GROUNDED * ALIKE) & ~dilate(hand, round(NEARBY * size)))
    alike = (away < ALIKE) & (away < ground)
    near = (away < ALIKE) & dilate(hand, round(NEARBY * size))
    near = cleaned(near | thick) & ahead
    together = hanging(cleaned(alike | thick) & ahead & dilate(hand, round(REACH * size)), thin)
    region = near | together if together.sum() < LEAKED * near.sum() else near
    tips = dilate(region, round(NAIL * size)) & (ground > UNLIKE) & ahead
    return region | hanging(cleaned(region | tips), region), alike


def nearer(points: np.ndarray, others: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Where the bones of another hand are nearer than those of this one: each pixel of two hands belongs to one.

    Detectors put the points of finger tips before their ends, so the last bones are longer here."""
    own = _away(points, shape)
    out = np.zeros(shape, bool)
    for other in others:
        out |= _away(other, shape) < own
    return out


def _away(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Pixels from each place to the nearest bone, float32 [H, W]; infinite for a hand beyond the crop."""
    longer = points.copy()
    longer[4::4] += TIP * (points[4::4] - points[3::4])
    lines = _lines(longer, shape, 1)
    if not lines.any():
        return np.full(shape, np.inf, np.float32)
    return cv2.distanceTransform((~lines).astype(np.uint8), cv2.DIST_L2, 5)


def cleaned(mask: np.ndarray) -> np.ndarray:
    """The mask without single pixels and cracks."""
    mask = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    return cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8)) > 0


def hanging(mask: np.ndarray, seed: np.ndarray) -> np.ndarray:
    """The pieces of the mask that the seed touches."""
    pieces = cv2.connectedComponents(mask.astype(np.uint8))[1]
    touched = np.unique(pieces[seed & mask])
    return np.isin(pieces, touched[touched > 0])


def _to_ground(lab: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """How far each pixel's colour is from the nearest of the ground's: float [H, W]."""
    pixels = lab[outside].astype(np.float32)
    if len(pixels) < 50:
        return np.full(lab.shape[:2], np.inf)
    cv2.setRNGSeed(0)
    rule = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 10, 1.0)
    some = pixels[:: max(len(pixels) // 2000, 1)]
    _, labels, centres = cv2.kmeans(some, GROUND, None, rule, 1, cv2.KMEANS_PP_CENTERS)  # type: ignore[call-overload]
    centres = centres[np.bincount(labels.ravel(), minlength=GROUND) >= RARE * len(some)]  # fewer may be nails
    return np.linalg.norm(lab[:, :, None] - centres, axis=-1).min(-1)


def along(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """How far each pixel lies from the wrist towards the knuckles: float [H, W], sizes of the hand."""
    to = points[[5, 9, 13, 17]].mean(0) - points[0]
    to = to / max(float(np.linalg.norm(to)), 1e-6)
    y, x = np.mgrid[: shape[0], : shape[1]]
    out: np.ndarray = ((x - points[0, 0]) * to[0] + (y - points[0, 1]) * to[1]) / size_of(points)
    return out


def prefill(crop: np.ndarray, hole: np.ndarray, skin: np.ndarray | None = None) -> np.ndarray:
    """The crop with its hole filled by what is around it, uint8 [H, W, 3]; see `membrane`. skin: what must not run into
    the hole, such as the arm and other hands."""
    if not hole.any():
        return crop
    known = ~hole if skin is None else ~hole & ~dilate(skin, ROUGH)
    filled = membrane(crop.astype(np.float32), known if known.any() else ~hole)
    return np.where(hole[..., None], (filled + 0.5).clip(0, 255).astype(np.uint8), crop)


def membrane(colours: np.ndarray, known: np.ndarray) -> np.ndarray:
    """float32 [H, W, 3]: what is known, and elsewhere a membrane that is stretched over it: each pixel is the mean of
    its neighbours (Laplace's equation), found at half the size first. A wall in even light stays one."""
    height, width = known.shape
    if known.all():
        return colours
    if min(height, width) <= 4:
        return np.where(known[..., None], colours, colours[known].mean(0) if known.any() else np.float32(128))
    half = ((width + 1) // 2, (height + 1) // 2)
    share = cv2.resize(known.astype(np.float32), half, interpolation=cv2.INTER_AREA)
    below = cv2.resize(colours * known[..., None], half, interpolation=cv2.INTER_AREA)
    below = membrane((below / np.maximum(share, 1e-6)[..., None]).astype(np.float32), share > 0)
    out = np.where(known[..., None], colours, cv2.resize(below, (width, height), interpolation=cv2.INTER_LINEAR))
    cross = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], np.float32) / 4
    for _ in range(SWEEPS):
        out = np.where(known[..., None], colours, cv2.filter2D(out, -1, cross, borderType=cv2.BORDER_REPLICATE))
    return out


def matte(painted: np.ndarray, body: np.ndarray, skin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A hand that was painted over some background: its colours uint8 [H, W, 3] without that, also beyond its border,
    and how much of each pixel it covers, float32 [H, W].

    body: where the hand and its arm are, to a pixel or two. skin: what has their colour. Each pixel of the border lies
    between the colours within and those behind (as in the matting equation, Porter and Duff 1984). Where these are
    alike, `body` decides."""
    seen = painted.astype(np.float32)
    back = membrane(seen, ~dilate(body, ROUGH) & ~dilate(skin, ROUGH))
    inner = erode(body, 2)
    middle = np.median(seen[inner], 0) if inner.any() else np.zeros(3, np.float32)
    core = inner & (np.linalg.norm(seen - middle, axis=-1) < 2 * np.linalg.norm(seen - back, axis=-1))
    front = membrane(seen, core)
    axis = front - back
    far = np.maximum(np.square(axis).sum(-1), 1.0)
    share = (((seen - back) * axis).sum(-1) / far).clip(0, 1)
    near = soft(closed(skin & dilate(body, 2), 2) | inner, 0.7)
    sure = ((np.sqrt(far) - CLEAR[0]) / (CLEAR[1] - CLEAR[0])).clip(0, 1)
    alpha = np.where(core, 1, sure * share + (1 - sure) * near) * soft(dilate(body, 2), 0.7)
    whole = core | (share > 0.95)
    return np.where(whole[..., None], painted, (front + 0.5).clip(0, 255).astype(np.uint8)), alpha.astype(np.float32)


def dilate(mask: np.ndarray, pixels: int) -> np.ndarray:
    return _morph(cv2.dilate, mask, pixels)


def erode(mask: np.ndarray, pixels: int) -> np.ndarray:
    return _morph(cv2.erode, mask, pixels)


def closed(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The mask without holes and cracks of up to twice as many pixels."""
    return erode(dilate(mask, pixels), pixels)


def depth(mask: np.ndarray, beyond: tuple[bool, bool, bool, bool]) -> np.ndarray:
    """How many pixels each pixel lies within the mask, float32 [H, W]. beyond: whether top, bottom, left and right of
    the crop are an edge of the picture; there the mask goes on, elsewhere it ends."""
    framed = np.pad(mask.astype(np.uint8), 1)
    inner = (slice(1, -1), slice(1, -1))
    edges: list[tuple[int | slice, int | slice]] = [np.s_[0, :], np.s_[-1, :], np.s_[:, 0], np.s_[:, -1]]
    replicated = np.pad(mask.astype(np.uint8), 1, mode="edge")
    for goes_on, edge in zip(beyond, edges, strict=True):
        if goes_on:
            framed[edge] = replicated[edge]
    distance: np.ndarray = cv2.distanceTransform(framed, cv2.DIST_L2, 5)[inner]
    return distance


def soft(mask: np.ndarray, sigma: float) -> np.ndarray:
    """The mask with a soft border, float32 [H, W]."""
    return cv2.GaussianBlur(mask.astype(np.float32), (0, 0), sigma)


def skin_shift(
    picture: np.ndarray, new: np.ndarray, like: np.ndarray, old: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How far the median colour of the hand `old` in the crop `like` is from that of the picture's hand `new`, [3] of
    Lab; and where skin is: all that has the colour of the new hand, its arm as well, bool [H, W]."""
    a, b = erode(new, 2), erode(old & new, 2)
    b = b if b.sum() >= 20 else erode(old, 2)
    there, wanted = (cv2.cvtColor(one, cv2.COLOR_RGB2LAB).astype(np.float32) for one in (picture, like))
    if a.sum() < 20 or b.sum() < 20:
        return np.zeros(3), new
    middle = np.median(there[a], 0)
    away = np.linalg.norm((there - middle) * (LIGHTNESS, 1, 1), axis=-1)
    ground = (away > GROUNDED * ALIKE) & ~dilate(new, round(HALO * len(new)))
    skin = (away < ALIKE) & (away < _to_ground(there * (LIGHTNESS, 1, 1), ground))
    shift: np.ndarray = (np.median(wanted[b], 0) - middle).clip((-70, -16, -16), (70, 16, 16))
    return shift, skin


def shifted(picture: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """A picture uint8 [H, W, 3] in colours that are `shift` away in Lab."""
    lab = cv2.cvtColor(picture, cv2.COLOR_RGB2LAB).astype(np.float32)
    return cv2.cvtColor((lab + shift).clip(0, 255).astype(np.uint8), cv2.COLOR_LAB2RGB)


def _morph(how: object, mask: np.ndarray, pixels: int) -> np.ndarray:
    if pixels < 1:
        return mask
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * pixels + 1, 2 * pixels + 1))
    return how(mask.astype(np.uint8), kernel) > 0  # type: ignore[operator]


def _lines(points: np.ndarray, shape: tuple[int, int], width: int) -> np.ndarray:
    drawn = np.zeros(shape, np.uint8)
    for i, j in BONES:
        cv2.line(drawn, _fixed(points[i]), _fixed(points[j]), 1, width, shift=4)
    return drawn > 0


def _fixed(point: np.ndarray) -> tuple[int, int]:
    return round(float(point[0]) * 16), round(float(point[1]) * 16)
