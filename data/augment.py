"""Flips and crops of a picture together with its hands and its caption: numpy, one sample at a time.

    flipped = flip(sample)                              # the mirror image: left hands become right hands
    image, hands = fit_picture(picture(sample), sample.hands, (512, 512))   # centre crop, then resize

A mirror image of a left hand is a right hand, so hands, joints and the words left and right are swapped, rotations are
mirrored, and places change sign. A crop changes the camera or the placement; a resize changes neither, because both are
in halves of the picture's height.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from .samples import Sample, encode_png, picture

Hands = dict[str, np.ndarray]
Size = tuple[int, int]  # height, width in pixels
Box = tuple[float, float, float, float]  # left, top, width, height in pixels

# The other side's joint of each of the 21 body joints (SMPL's order without the pelvis).
OTHER_JOINT = (1, 0, 2, 4, 3, 5, 7, 6, 8, 10, 9, 11, 13, 12, 14, 16, 15, 18, 17, 20, 19)
_MIRROR = np.array([1.0, -1.0, -1.0], np.float32)  # of an axis-angle by x -> -x: S R S, S = diag(-1, 1, 1)
_WORDS = re.compile(r"\b(left|right)(?=(?:most|wards?|hand(?:ed)?|s)?\b)", re.IGNORECASE)


def flip(sample: Sample) -> Sample:
    """The mirror image of a sample. Its betas stay: SMPL's shapes are symmetric (nearly, in the licensed bodies)."""
    image = None if sample.image is None else encode_png(np.ascontiguousarray(picture(sample)[:, ::-1]))
    return replace(
        sample,
        prompts=[flip_words(prompt) for prompt in sample.prompts],
        hands=None if sample.hands is None else flip_hands(sample.hands),
        image=image,
        meta=_flip_labels(sample.meta),
    )


def flip_hands(hands: Hands) -> Hands:
    """The arrays of `samples.HANDS`, [..., shape], mirrored. Several people stay in order from left to right."""

    def mirrored(vectors: np.ndarray) -> np.ndarray:
        turned = vectors.reshape(*vectors.shape[:-1], -1, 3) * _MIRROR
        return turned.reshape(vectors.shape)

    out = dict(hands)
    out["global_orient"] = mirrored(hands["global_orient"])
    body = mirrored(hands["body_pose"])
    out["body_pose"] = body.reshape(*body.shape[:-1], 21, 3)[..., OTHER_JOINT, :].reshape(body.shape)
    out["left_hand_pose"] = mirrored(hands["right_hand_pose"])
    out["right_hand_pose"] = mirrored(hands["left_hand_pose"])
    if "placement" in hands:
        out["placement"] = hands["placement"][..., ::-1, :] * np.array([1, -1, 1, 1], np.float32)
    if "camera" in hands:
        out["camera"] = hands["camera"] * np.array([1, -1, 1], np.float32)
    if "visibility" in hands:
        out["visibility"] = hands["visibility"][..., ::-1]
    if "joints_2d" in hands:
        swapped = hands["joints_2d"][..., ::-1, :, :]
        out["joints_2d"] = np.stack([1 - swapped[..., 0], swapped[..., 1]], -1)
    if hands["global_orient"].ndim == 2:
        out = {name: value[::-1] for name, value in out.items()}
    return {name: np.ascontiguousarray(value) for name, value in out.items()}


def flip_words(text: str) -> str:
    """Swaps left and right, also in leftmost, right-handed, Right: not in copyright, upright or bright.

    It knows words alone: "the right way" becomes "the left way".
    """

    def other(found: re.Match[str]) -> str:
        word = found.group()
        swapped = "right" if word.lower() == "left" else "left"
        return swapped.upper() if word.isupper() else swapped.capitalize() if word[0].isupper() else swapped

    return _WORDS.sub(other, text)


def _flip_labels(meta: dict[str, Any]) -> dict[str, Any]:
    labels = meta.get("labels")
    return meta if not labels else {**meta, "labels": {name: flip_words(word) for name, word in labels.items()}}


def centre_box(size: Size, wanted: Size) -> Box:
    """The largest box in the middle of a picture that has the shape of the wanted size (height, width)."""
    scale = min(size[0] / wanted[0], size[1] / wanted[1])
    height, width = scale * wanted[0], scale * wanted[1]
    return (size[1] - width) / 2, (size[0] - height) / 2, width, height


def crop_hands(hands: Hands, size: Size, box: Box) -> Hands:
    """Hands [..., shape] of a picture of this size (height, width), in a box that may reach beyond the picture.

    With H the picture's height and h the box's, a point at view coordinate v (y up, +-1 over the height) is at
    k v + d in the box, k = H / h; a camera s (X + t) becomes k s (X + t + d / (k s)).
    """
    (height, width), (left, top, w, h) = size, box
    k = height / h
    shift = np.array([(width - 2 * left - w) / h, (2 * top + h - height) / h], np.float32)
    out = dict(hands)
    if "placement" in hands:
        place = hands["placement"].copy()
        shown = place[..., 0] > 0.5  # an absent hand keeps its neutral place
        place[..., 1:3] = np.where(shown[..., None], k * place[..., 1:3] + shift, place[..., 1:3])
        place[..., 3] = np.where(shown, place[..., 3] + np.log(k), place[..., 3])
        out["placement"] = place.astype(np.float32)
    if "camera" in hands:
        scale = k * hands["camera"][..., :1]
        out["camera"] = np.concatenate([scale, hands["camera"][..., 1:] + shift / scale], -1).astype(np.float32)
    if "joints_2d" in hands:
        pixels = hands["joints_2d"] * np.array([width, height], np.float32)
        out["joints_2d"] = ((pixels - np.array([left, top])) / np.array([w, h])).astype(np.float32)
    return out


def crop_picture(image: np.ndarray, box: Box, wanted: Size) -> np.ndarray:
    """The box of uint8 [H, W, 3], resized (Lanczos, with antialiasing) to the wanted size (height, width)."""
    left, top, w, h = box
    if image.shape[:2] == wanted and box == (0, 0, wanted[1], wanted[0]):
        return image
    edges = (left, top, left + w, top + h)
    return np.asarray(Image.fromarray(image).resize(wanted[::-1], Image.Resampling.LANCZOS, box=edges))


def fit_picture(image: np.ndarray, hands: Hands | None, wanted: Size) -> tuple[np.ndarray, Hands | None]:
    """The middle of a picture at the wanted size (height, width), and its hands there."""
    size: Size = image.shape[:2]  # type: ignore[assignment]
    box = centre_box(size, wanted)
    return crop_picture(image, box, wanted), None if hands is None else crop_hands(hands, size, box)
