"""Where MediaPipe puts its 21 points on a hand, beside the joints of a rig: constant offsets in the bones' frames.

    python studies/convention.py --scenes 300 --write     # writes detection/mediapipe.json

Renders of the demo's people are shown to the detector. Its points lie elsewhere than joints do: nearer to the palm at
knuckles, short of the finger ends. One offset a joint, in sizes of the hand, is fitted by least squares on scenes of
one seed, for left hands (right hands are mirror images). Scenes of the other seed tell what it brings.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from handiffuser.demo.human_dataset import scene_of
from handiffuser.demo.human_scenes import draw, in_picture
from handiffuser.detection.convention import FILE, bone_frames, hand_length
from handiffuser.detection.detect import MediaPipe
from handiffuser.evaluation.hands import Asked, match
from handiffuser.kinematics import world
from handiffuser.models.smplh import HAND_JOINTS

SIDES = ("left", "right")


def rows_of(seed: int, count: int) -> list[dict]:
    """A row for each hand that is to be seen: what the detector made of it, and the bones' frames in the picture."""
    rows = []
    with_time = time.process_time()
    detector = MediaPipe()
    for number in range(count):
        scene, _ = scene_of(seed, number)
        image = draw(scene)
        asked, frames, owners = [], [], []
        for i, pose in enumerate(scene.poses):
            turns = world(pose.rotations)
            for side in range(2):
                if not scene.present[i, side]:
                    continue
                joints = pose.joints[list(HAND_JOINTS[side])]
                asked.append(Asked(SIDES[side], in_picture(joints, scene.camera)))
                # How a step of one hand's length along each axis of each bone moves in the picture, [21,2,3].
                way = bone_frames(turns, side)[:, :2] * hand_length(joints) * 0.5 * scene.camera.s
                frames.append(way * np.array([1.0, -1.0])[:, None])
                one = scene.spec.people[i]
                named = one.side in (SIDES[side], "both") and one.gesture not in ("arms_crossed", "hands_on_hips")
                owners.append((one.gesture, named, len(scene.poses)))
        if not asked:
            continue
        for hand, frame, owner in zip(match(asked, detector(image), image.shape), frames, owners, strict=True):
            rows.append({"framing": scene.spec.framing if owner[2] == 1 else "two people", "gesture": owner[0],
                         "named": owner[1], "hand": hand, "frame": frame})  # fmt: skip
    detector.close()
    print(f"seed {seed}: {count} scenes, {time.process_time() - with_time:.0f} CPU s with the detector", flush=True)
    return rows


def residuals(rows: list[dict], offsets: np.ndarray | None = None) -> np.ndarray:
    """Detected minus expected places of found hands, in sizes of the hand, [N,21,2]."""
    out = []
    for row in rows:
        hand = row["hand"]
        if hand.found is not None:
            expected = hand.asked.joints
            if offsets is not None:
                expected = expected + np.einsum("jcd,jd->jc", row["frame"], offsets)
            out.append((hand.found.joints - expected) / np.ptp(hand.asked.joints, axis=0).max())
    return np.array(out)


def fit(rows: list[dict]) -> np.ndarray:
    """[21,3] offsets in lengths of the hand. Hands that the detector got wrong weigh little (Huber)."""
    found = [row for row in rows if row["hand"].found is not None]
    offsets = np.zeros((21, 3))
    for _ in range(8):
        apart = np.linalg.norm(residuals(found, offsets), axis=2)  # [N,21]
        weight = 1 / np.maximum(apart, 0.03)
        for j in range(21):
            a, b = [], []
            for row, w in zip(found, weight[:, j], strict=True):
                size = np.ptp(row["hand"].asked.joints, axis=0).max()
                a.append(row["frame"][j] * w**0.5 / size)
                b.append((row["hand"].found.joints[j] - row["hand"].asked.joints[j]) * w**0.5 / size)
            a.append(0.1 * np.eye(3))  # what no picture tells stays nothing
            b.append(np.zeros(3))
            offsets[j] = np.linalg.lstsq(np.concatenate(a), np.concatenate(b), rcond=None)[0]
    return offsets


def shares(rows: list[dict], offsets: np.ndarray | None = None) -> tuple[float, float]:
    apart = np.linalg.norm(residuals(rows, offsets), axis=2)
    return (apart <= 0.05).mean(), (apart <= 0.1).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scenes", type=int, default=300, help="of each seed")
    parser.add_argument("--seeds", type=int, nargs=2, default=(101, 102), help="of the fit and of the test")
    parser.add_argument("--write", action="store_true", help="into detection/mediapipe.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    first, second = (rows_of(seed, arguments.scenes) for seed in arguments.seeds)
    offsets = fit(first)
    groups: dict[str, list[dict]] = defaultdict(list)
    for row in second:
        if row["named"]:
            groups[row["framing"]].append(row)
            groups["all"].append(row)
        else:
            groups["not named"].append(row)
    print("hands of the test seed | N | found | score | side | joints within 5 / 10 % | with offsets")
    for name, rows in groups.items():
        found = [row["hand"] for row in rows if row["hand"].found is not None]
        side = np.mean([hand.found.side == hand.asked.side for hand in found])
        score = np.mean([row["hand"].score for row in rows])
        plain, moved = shares(rows), shares(rows, offsets)
        print(f"{name} | {len(rows)} | {len(found) / len(rows):.1%} | {score:.3f} | {side:.1%} | "
              f"{plain[0]:.3f} / {plain[1]:.3f} | {moved[0]:.3f} / {moved[1]:.3f}")  # fmt: skip
    missed = defaultdict(int)
    for row in groups["all"]:
        missed[row["gesture"]] += row["hand"].found is None
    print("missed:", {name: count for name, count in sorted(missed.items(), key=lambda item: -item[1]) if count})
    print(np.round(offsets, 3).tolist())
    if arguments.write:
        text = json.loads(FILE.read_text())
        text["fitted on"] = f"{len(first)} hands of renders, seed {arguments.seeds[0]}"
        text["offsets"] = np.round(offsets, 4).tolist()
        Path(FILE).write_text(json.dumps(text) + "\n")


if __name__ == "__main__":
    main()
