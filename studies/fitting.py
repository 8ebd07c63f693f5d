"""How good are hands that are fitted to MediaPipe's points, and how well does it know?

    python -m studies.fitting --hands 200 --world hands          # the demo's hands; or people
    python -m studies.fitting --hands 60 --world hands --true    # of true points, without the detector
    python -m studies.fitting --world spoiled --write            # also writes the weights of `sureness`

Renders at 256 pixels, of seeds that the convention's offsets were not fitted on; `spoiled` are pictures of `spoiled.py`
whose hand should do what it tries to. A fit counts as right where its side is and its joints are within TURNED degrees
on average. `--write` fits the logistic regression of `sureness`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from handiffuser.contract import HAND_JOINTS
from handiffuser.data.hands import joints_at_rest
from handiffuser.data.samples import picture
from handiffuser.demo.dataset import samples_of
from handiffuser.demo.human import human_body
from handiffuser.demo.human_dataset import scene_of
from handiffuser.demo.human_scenes import draw, in_picture
from handiffuser.demo.render import demo_body
from handiffuser.demo.scenes import sample_scene
from handiffuser.detection.convention import FILE, ONCE, Convention, signs
from handiffuser.detection.detect import Found, MediaPipe
from handiffuser.detection.fit import EXACT, Fitted
from handiffuser.detection.hands import closer, fitted
from handiffuser.detection.poses import Poses
from handiffuser.evaluation.hands import Asked, match
from handiffuser.evaluation.pictures import asked_hands
from handiffuser.fingers import SIDES
from handiffuser.kinematics import world
from handiffuser.rotations import axis_angle_to_matrix

from .spoiled import make

SEEDS = {"hands": 7001, "people": 7002, "spoiled": 555}  # `studies/convention.py` has others
TURNED = 15.0  # degrees a joint, on average
UNTOLD = ("arms_crossed", "hands_on_hips")  # poses whose hands no caption tells


@dataclass
class Truth:
    """A hand of a render."""

    asked: Asked
    gesture: str
    turn: np.ndarray  # [3, 3] of the wrist in the world
    fingers: np.ndarray  # [15, 3, 3]


def hands(number: int, size: int) -> tuple[np.ndarray, list[Truth]]:
    """A picture of the demo's hands."""
    scene = sample_scene(np.random.default_rng((SEEDS["hands"], number)))
    (sample,) = samples_of([scene], [[scene.prompt]], ["a"], demo_body(), size)
    image, turns = picture(sample), world(scene.rotations)
    found = []
    for asked in asked_hands(sample, image, None):
        side = SIDES.index(asked.side)
        fingers = scene.rotations[22 + 15 * side : 37 + 15 * side].astype(np.float64)
        found.append(Truth(asked, scene.spec.gesture_of(side), turns[20 + side], fingers))
    return image, found


def people(number: int, size: int) -> tuple[np.ndarray, list[Truth]]:
    """A picture of the demo's people, and those of their hands that its caption names."""
    scene, _ = scene_of(SEEDS["people"], number)
    found = []
    for pose, one, present in zip(scene.poses, scene.spec.people, scene.present, strict=True):
        turns = world(pose.rotations)
        for side, name in enumerate(SIDES):
            if not present[side] or one.side not in (name, "both") or one.gesture in UNTOLD:
                continue
            places = in_picture(pose.joints[list(HAND_JOINTS[side])], scene.camera)
            gesture = one.other if side and one.side == "both" and one.other else one.gesture
            fingers = pose.rotations[22 + 15 * side : 37 + 15 * side].astype(np.float64)
            found.append(Truth(Asked(name, places), gesture, turns[20 + side], fingers))
    return (draw(scene, size), found) if found else (np.zeros((1, 1, 3), np.uint8), [])


def spoiled(number: int, size: int) -> tuple[np.ndarray, list[Truth]]:
    """A picture with a spoiled or a good hand, and what it should be; none where it does something else well."""
    case = make(number, SEEDS["spoiled"])
    if case.kind == "gesture":
        return case.picture, []
    asked = Asked(case.side, case.hand.joints_2d / case.picture.shape[1::-1])
    return case.picture, [Truth(asked, case.gesture, case.hand.turn, axis_angle_to_matrix(case.hand.fingers))]


def degrees(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The angle between rotations [..., 3, 3]."""
    return np.degrees(np.arccos(((np.einsum("...ij,...ij->...", a, b) - 1) / 2).clip(-1, 1)))


class Knowing(MediaPipe):
    """A detector that is told the truth: how good the fit alone is."""

    truths: list[Truth]

    def __call__(self, image: np.ndarray) -> list[Found]:
        self.convention = Convention.true(EXACT)
        return [Found(one.asked.side, 0.99, one.asked.joints) for one in self.truths]


def rows(kind: str, count: int, size: int, true: bool) -> Iterator[dict]:
    """A row for each hand: whether it was found, and how far its fit is from the truth. true: of true points."""
    rest = joints_at_rest(human_body() if kind == "people" else demo_body())
    made = {"hands": hands, "people": people, "spoiled": spoiled}[kind]
    detector, number, done = Knowing() if true else MediaPipe(), 0, 0
    known = set(Poses.load().names)
    while done < count:
        image, truths = made(number, size)
        number += 1
        if isinstance(detector, Knowing):
            detector.truths = truths
        matched = match([one.asked for one in truths], detector(image), image.shape) if truths else []
        for truth, pair in zip(truths, matched, strict=True):
            done += 1
            if pair.found is None:
                yield {"found": False}
                continue
            found = pair.found if true else closer(image, pair.found, detector)
            seen = fitted(found, image.shape[:2], rest, detector)
            assert isinstance(seen.hand, Fitted)
            side = seen.side == truth.asked.side
            joints = degrees(axis_angle_to_matrix(seen.hand.fingers), truth.fingers).mean()
            named = next((name for name in seen.hand.gestures if name), "") == truth.gesture
            yield {"found": True, "side": side, "joints": joints if side else np.nan, "named": named,
                   "wrist": degrees(seen.hand.turn, truth.turn) if side else np.nan, "sure": seen.sureness,
                   "right": side and joints <= TURNED, "told": truth.gesture in known,
                   "signs": signs(found.score, seen.hand.residual, seen.hand.degrees.mean(),
                                  ONCE if found.apart is None else found.apart)}  # fmt: skip
    detector.close()


def regression(found: list[dict]) -> np.ndarray:
    """The weights [5] of `convention.sureness` by Newton's method, with a weak pull to 0."""
    table, right = np.stack([row["signs"] for row in found]), np.array([row["right"] for row in found], float)
    weights = np.zeros(table.shape[1])
    for _ in range(50):
        chance = 1 / (1 + np.exp(-table @ weights))
        slope = table.T @ (right - chance) - 0.1 * weights
        weights += np.linalg.solve((table * (chance * (1 - chance))[:, None]).T @ table + 0.1 * np.eye(5), slope)
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hands", type=int, default=200, help="of each world")
    parser.add_argument("--world", nargs="+", choices=list(SEEDS), default=["hands"])
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--true", action="store_true", help="of true points, without the detector")
    parser.add_argument("--write", action="store_true", help="the weights of sureness, into detection/mediapipe.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    table = [row for kind in arguments.world for row in rows(kind, arguments.hands, arguments.size, arguments.true)]
    found = [row for row in table if row["found"]]
    print(f"{arguments.world}: {len(table)} hands, {len(found) / len(table):.1%} found, "
          f"{time.process_time() - started:.0f} CPU s")  # fmt: skip
    for name in ("joints", "wrist"):
        values = [row[name] for row in found]
        print(f"{name}: {np.nanmean(values):.1f} degrees, median {np.nanmedian(values):.1f}")
    for name in ("side", "right"):
        print(f"{name}: {np.mean([row[name] for row in found]):.1%}")
    told = [row["named"] for row in found if row["told"]]
    print(f"gesture: {np.mean(told):.1%} of {len(told)} that have a name in poses.npz")
    said, right = (np.array([row[name] for row in found], float) for name in ("sure", "right"))
    for low, high in ((0, 0.5), (0.5, 0.7), (0.7, 0.85), (0.85, 0.95), (0.95, 1.01)):
        here = (said >= low) & (said < high)
        if here.any():
            print(f"sure {low:.2f} to {min(high, 1):.2f}: {here.sum()} hands, {right[here].mean():.1%} right")
    if arguments.write:
        held = json.loads(FILE.read_text())
        held["sureness"] = {"fitted on": f"{len(found)} hands of renders ({arguments.world})",
                            "weights": np.round(regression(found), 3).tolist()}  # fmt: skip
        FILE.write_text(json.dumps(held) + "\n")


if __name__ == "__main__":
    main()
