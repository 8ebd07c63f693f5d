"""Measures how far a checkpoint generalises: groups of scenes beyond its training, each beside its renders.

    usual        held-out prompts, palms, backs and sides equally often: the base of all others
    known-pairs  two hands that do different things, as training has them
    new-pairs    two hands whose gestures never stood together in training
    wordings-... the scenes of `usual` in sentences that training's grammar cannot make: the words that it knows in
                 another order, relative clauses, polite requests, another name for the gesture
    between      fingers between two gestures, in the middle third of the way
    mirrored     the mirror image. Left and right hands come equally often in the demo's world, so this checks that the
                 model did not learn one side better
    turned-30    wrists 30 degrees beyond the farthest that training bends them, about any axis
    turned-60    the same, 60 degrees
    edited       one finger dragged elsewhere by its tip, as on the page of hd-serve; the rest stays as it was

    python studies/beyond.py OUT --count 96 --judge runs/report/judge

Renders are the ceiling of each group. Beside them are pictures painted from the same hands (stage 2 alone) and, for
groups that change words, from the prompt (both stages). Except in pairs, scene i of a group is scene i of `usual` with
a change, painted from the same noise. Poses between gestures and edited poses keep the prompt of their gesture, so
words and hands differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from handiffuser import editing
from handiffuser.commands import run
from handiffuser.data.cli import progress
from handiffuser.demo.dataset import labels_of
from handiffuser.demo.gestures import GESTURES, NAMES, pose, rotation
from handiffuser.demo.prompts import SKINS, VIEWS, Spec, allowed_views, is_held_out, write_prompt
from handiffuser.demo.scenes import MIRROR, WRIST, Scene, forward_joints, frame
from handiffuser.errors import EvaluationError
from handiffuser.evaluation.cli import finish, writable
from handiffuser.evaluation.distances import MEAN_DRAWS, mean, resampled
from handiffuser.evaluation.hands import hand_size
from handiffuser.evaluation.measure import Instruments, Seen, columns, settings
from handiffuser.evaluation.pictures import Show
from handiffuser.grammar import with_article
from handiffuser.hands import POSES
from handiffuser.models.smplh import HAND_JOINTS
from handiffuser.rotations import axis_angle_to_matrix, matrix_to_axis_angle
from report import held_out_scenes
from rich.console import Console
from rich.table import Table
from rows import SEED, draw, key_of, load_painter, load_tools, look_with, paint

Rows = dict[str, dict[str, dict[str, Any]]]

SIDES = ("left", "right")
BEND = 16.2  # degrees: the farthest that training bends a wrist, 14 about one axis and 8 about another
NEW = 8.0  # degrees, on the mean of 15 joints: training's own poses lie nearer to their gesture than that
MOVED = 0.25  # hand sizes in the picture: an edit must move a fingertip at least so far
JOINT_MOVED = 0.1  # hand sizes: joints that an edit moves less do not count
TRIES = 200
FULL = ("renders", "true-hands", "full-pipeline")
TITLES = {  # column of the table -> its heading
    "detection_rate": "hands found",
    "hand_confidence": "hand confidence",
    "hands_as_asked": "as many hands as asked for",  # neither fewer nor more, of pictures
    "handedness": "side right",
    "pck_10": "joints within 10 %",
    "follows": "joints nearer to the edit",  # than to where they were; of those found that the edit moved
    "judge_gesture": "judge: gesture",  # of the one hand, or the left
    "judge_both": "judge: both gestures",
    "judge_swapped": "judge: swapped",  # each hand does what the other should
    "judge_side": "judge: side",
    "judge_view": "judge: view",
    "judge_skin": "judge: skin",
    "judge_background": "judge: backdrop",
}

# --- wordings: {who} is "a tan left hand"; all else is as training says it ---

WORDINGS: dict[str, tuple[str, ...]] = {
    "order": (  # words that training knows, and no others
        "{view}, {phrase}, in front of {background}: the {side} hand with skin {tone}",
        "{background} behind the hand, {side}, {tone}, {view}, {phrase}",
        "{phrase}, {view}, {tone} skin, {background} wall, {side} hand",
    ),
    "clauses": (
        "a hand that is {phrase}, which is the {side} one, has {tone} skin and is {view}, while the background is "
        "{background}",
        "there is the {side} hand of somebody whose skin is {tone}, who has it {phrase}, {view}, and everything "
        "behind it is {background}",
        "The wall, which is {background}, stands behind a {side} hand. What it does: {phrase}. It is {view}, and its "
        "skin is {tone}.",
    ),
    "polite": (
        "Could you please paint the {tone} {side} hand of my friend, {phrase}, {view}, with a background that is "
        "{background}?",
        "please draw me one {tone} hand {phrase}. It must be the {side} one, {view}. Make the background {background}, "
        "thank you!",
        "HELLO, I WOULD NEED A PICTURE WHERE THE {side} HAND IS {phrase}, {view}, {tone} SKIN, {background} "
        "BACKGROUND, THANKS",
    ),
    "synonyms": ("{who} {synonym}, {view}, {background} background",),
}
SYNONYMS = {  # of words that training knows, but for a few
    "fist": "with all fingers closed",
    "open_hand": "flat and open",
    "spread_fingers": "with the five fingers spread out",
    "pointing": "with one finger raised",
    "victory": "signing V for victory",
    "three_fingers": "with three fingers raised",
    "four_fingers": "with four fingers raised",
    "thumbs_up": "with its thumb raised",
    "thumbs_down": "with its thumb pointing down",
    "ok_sign": "signing OK",
    "call_me": "with the thumb and the pinky stretched out",
    "horns": "with index finger and pinky raised",
    "love_you": "with thumb, index finger and pinky raised",
    "pinky_up": "with the little finger raised",
    "finger_gun": "forming a gun",
    "pinch": "with thumb and index finger pinched together",
    "claw": "with the fingers curved like a claw",
    "cupped_hand": "forming a cupped palm",
    "crossed_fingers": "with index and middle finger crossed",
    "vulcan": "giving the salute of a vulcan",
    "c_shape": "curved into the letter C",
    "three_with_thumb": "with the thumb and two fingers out",
    "tucked_thumb": "forming the letter B",
    "pinched_fingers": "with all fingertips pinched together",
}


def reworded(scene: Scene, kind: str, number: int, rng: np.random.Generator) -> Scene:
    """The scene with another prompt, which says all that training's says. number: chooses the sentence."""
    spec = scene.spec

    def one_of(options: tuple[str, ...]) -> str:
        return options[rng.integers(len(options))]

    tone = one_of(SKINS[spec.skin][1])
    words = {"tone": tone, "side": spec.side, "phrase": one_of(GESTURES[spec.gesture].phrases),
             "synonym": SYNONYMS[spec.gesture], "view": one_of(VIEWS[spec.view]), "background": spec.background,
             "who": with_article(f"{tone} {spec.side} hand")}  # fmt: skip
    template = WORDINGS[kind][number % len(WORDINGS[kind])]
    text = template.format(**words)
    return replace(scene, prompt=text.upper() if template.startswith("HELLO") else text)


# --- poses. A new scene keeps all that the change leaves alone: skin, background, light, body, noise ---


def side_of(scene: Scene) -> int:
    return SIDES.index(scene.spec.side)


def fingers_of(side: int) -> slice:
    """Which of the 52 joints are a hand's fingers."""
    return POSES[f"{SIDES[side]}_hand_pose"]


def degrees_apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Angles between rotations [..., 3, 3]: [...] degrees, to a few hundredths."""
    return np.degrees(np.arccos((((a * b).sum((-2, -1)) - 1) / 2).clip(-1, 1)))  # the trace of aᵀ b


@cache
def gestures(side: int) -> np.ndarray:
    """Finger rotations of every gesture, [24, 15, 3, 3]."""
    return np.stack([pose(name, side) for name in NAMES])


def strangeness(fingers: np.ndarray, side: int) -> float:
    """How far finger rotations [15, 3, 3] are from the nearest gesture: degrees, on the mean of the joints."""
    return float(degrees_apart(fingers, gestures(side)).mean(-1).min())


def framed(scene: Scene, rng: np.random.Generator) -> Scene | None:
    """The scene with a camera as training would choose it for these hands; None where none will do."""
    camera = frame(scene.rotations, scene.betas, scene.present, rng)
    return None if camera is None else replace(scene, camera=camera.astype(np.float32))


def first_of(attempt: Callable[[], Scene | None], what: str) -> Scene:
    """The first scene that succeeds. Raises EvaluationError after TRIES attempts."""
    for _ in range(TRIES):
        if (scene := attempt()) is not None:
            return scene
    raise EvaluationError(f"No scene could be made of: {what}.")


def blend(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
    """Rotations a share of the way from a to b, each along the shortest arc (slerp): all [N, 3, 3]."""
    way = matrix_to_axis_angle(a.transpose(0, 2, 1) @ b)
    return np.asarray(a @ axis_angle_to_matrix(share * way), np.float32)


def between(scene: Scene, rng: np.random.Generator) -> Scene:
    """Fingers in the middle third of the way to another gesture, at which no gesture lies."""
    side, rotations = side_of(scene), scene.rotations.copy()
    names = [n for n in NAMES if n != scene.spec.gesture and scene.spec.view in allowed_views(n, scene.spec.side)]

    def attempt() -> Scene | None:
        other = names[rng.integers(len(names))]
        mixed = blend(scene.rotations[fingers_of(side)], pose(other, side, rng), rng.uniform(1 / 3, 2 / 3))
        rotations[fingers_of(side)] = mixed
        if strangeness(mixed, side) < NEW:
            return None
        return framed(replace(scene, rotations=rotations, spec=replace(scene.spec, gesture="")), rng)

    return first_of(attempt, f"{scene.prompt}, between two gestures")


def held_out_prompt(spec: Spec, rng: np.random.Generator) -> str:
    """A prompt of training's grammar that says everything, and that training never saw."""
    while not is_held_out(prompt := write_prompt(spec, rng, leave_out=0.0)):
        pass
    return prompt


def mirrored(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene in a mirror: a left hand becomes a right one, in its prompt, too."""
    spec = replace(scene.spec, side=SIDES[1 - side_of(scene)])
    flip = np.array([1.0, -1.0, 1.0], np.float32)  # of (s, tx, ty); the light comes from the other side
    return replace(
        scene,
        prompt=held_out_prompt(spec, rng),
        spec=spec,
        rotations=(scene.rotations[editing.MIRROR[: len(scene.rotations)]] * MIRROR).astype(np.float32),
        camera=scene.camera * flip,
        present=scene.present[::-1].copy(),
        light=scene.light * flip[[1, 0, 2]],
    )


def turned(scene: Scene, rng: np.random.Generator, degrees: float) -> Scene:
    """The wrist turned by `degrees` more than training ever bends it, about an axis that can be any. The forearm stays,
    and the prompt says nothing of the view, which is another one then."""
    wrist, spec = WRIST[side_of(scene)], replace(scene.spec, view="")

    def attempt() -> Scene | None:
        axis = rng.normal(size=3)
        rotations = scene.rotations.copy()
        rotations[wrist] = rotation(axis / np.linalg.norm(axis), BEND + degrees)
        return framed(replace(scene, rotations=rotations, spec=spec, prompt=held_out_prompt(spec, rng)), rng)

    return first_of(attempt, f"{scene.prompt}, turned by {degrees} degrees")


def in_picture(scene: Scene, rotations: np.ndarray) -> np.ndarray:
    """Where the scene's joints are in the picture with these rotations: [62, 2] in [0, 1]."""
    s, tx, ty = scene.camera.astype(np.float64)
    seen = forward_joints(rotations, scene.betas)[:, :2]
    return 0.5 + 0.5 * s * (seen + np.array([tx, ty])) * (1, -1)


def edited(scene: Scene, rng: np.random.Generator) -> Scene | None:
    """One finger dragged by its tip to where it would be in a fist, or stretched: as hd-serve's page does it.

    None, of fewer than one in a hundred, where no finger gets far enough within the picture but to another gesture.
    """
    side = side_of(scene)
    before = in_picture(scene, scene.rotations)
    own = list(HAND_JOINTS[side])
    size = hand_size(before[own], (1, 1))
    vectors = matrix_to_axis_angle(scene.rotations)
    hands = {name: vectors[joints].reshape(-1) for name, joints in POSES.items()} | {
        "camera": scene.camera,
        "joints": forward_joints(scene.rotations, scene.betas),
        "joints_2d": before[np.array(HAND_JOINTS)],
    }
    ways = [(finger, end) for finger in range(5) for end in ("fist", "spread_fingers")]
    order = [(*ways[i], share) for share in (1.0, 0.6, 0.8, 0.4) for i in rng.permutation(len(ways))]

    def dragged(finger: int, end: str, share: float) -> Scene | None:
        """Dragged this share of the way; None where that leaves the picture, changes little, or makes a gesture."""
        chain, tip = list(HAND_JOINTS[side][1 + 4 * finger : 4 + 4 * finger]), HAND_JOINTS[side][4 + 4 * finger]
        goal = scene.rotations.copy()
        goal[chain] = pose(end, side)[np.array(chain) - fingers_of(side).start]
        way = share * (in_picture(scene, goal)[tip] - before[tip])
        if np.linalg.norm(way) < MOVED * size:
            return None
        drag = editing.Drag(SIDES[side], 4 + 4 * finger, *(before[tip] + way))
        found = editing.edit(hands, drags=[drag])
        turns = axis_angle_to_matrix(np.concatenate([found[name].reshape(-1, 3) for name in POSES]))
        rotations = scene.rotations.copy()
        rotations[chain] = turns[chain]
        after = in_picture(scene, rotations)
        outside = after[own].min() < 0 or after[own].max() > 1
        if outside or np.linalg.norm(after[tip] - before[tip]) < MOVED * size:
            return None
        if strangeness(rotations[fingers_of(side)], side) < NEW:
            return None
        return replace(scene, rotations=rotations, spec=replace(scene.spec, gesture=""))

    return next((new for way in order if (new := dragged(*way)) is not None), None)


PAIRS = {"known-pairs": "pairs", "new-pairs": "new pairs"}  # group -> kind of held_out_scenes
CHANGES: dict[str, Callable[[Scene, np.random.Generator], Scene | None]] = {
    "between": between,
    "mirrored": mirrored,
    "turned-30": partial(turned, degrees=30),
    "turned-60": partial(turned, degrees=60),
    "edited": edited,
}


def groups(count: int, show: Show = lambda done, total: None) -> dict[str, dict[str, Scene]]:
    """Group -> its scenes by key, the same whatever the number of scenes."""
    usual = held_out_scenes(count, SEED)
    lists: dict[str, list[Scene | None]] = {"usual": [*usual]}
    for name, kind in PAIRS.items():
        lists[name] = [*held_out_scenes(count, SEED, kind)]
    for kind in WORDINGS:
        lists[f"wordings-{kind}"] = [reworded(scene, kind, i, _rng(kind, i)) for i, scene in enumerate(usual)]
    for number, scene in enumerate(usual):
        for name, change in CHANGES.items():
            lists.setdefault(name, []).append(change(scene, _rng(name, number)))
        show(number + 1, count)
    return {
        name: {key_of(number): scene for number, scene in enumerate(scenes) if scene is not None}
        for name, scenes in lists.items()
    }


def _rng(name: str, number: int) -> np.random.Generator:
    return np.random.default_rng((SEED, number, *name.encode()))


def ways_of(group: str) -> tuple[str, ...]:
    """What is looked at of a group. Other words change no render."""
    if group.startswith("wordings"):
        return FULL[2:]
    return FULL if group == "usual" or group.endswith("pairs") else FULL[:2]


# --- figures ---


def follows(seen: Seen, after: dict[str, np.ndarray], before: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Of each hand found, the share of the edited finger's joints that are nearer to where the edit put them than to
    where they were: values [K] and their pictures [K]. after, before: key -> joints [21, 2] of the hand."""
    values, owners = [], []
    for hand, owner in zip(seen.hands, seen.owners, strict=True):
        key = seen.keys[owner]
        if key not in after:
            continue
        new, old = after[key], before[key]
        moved = np.linalg.norm(new - old, axis=-1) > JOINT_MOVED * hand_size(new, (1, 1))
        if hand.found is not None and moved.any():
            to_new, to_old = (np.linalg.norm(hand.found.joints - place, axis=-1)[moved] for place in (new, old))
            values.append(float((to_new < to_old).mean()))
            owners.append(owner)
    return np.array(values), np.array(owners, int)


def hands_as_asked(seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    """Whether as many hands were found as the prompt asks for: 1 or 0 of each picture [N], and the pictures [N]."""
    number = np.array(seen.extra, int)
    np.add.at(number, np.array(seen.owners, int), [hand.found is not None for hand in seen.hands])
    wanted = np.array([1 + (labels.get("side") == "both") for labels in seen.labels])
    return (number == wanted).astype(float), np.arange(len(number))


def reads_pairs(judge: Callable[[np.ndarray, dict[str, str]], dict[str, float]]) -> Any:
    """A judge that of two different hands says, too, whether both are right, and whether they have changed places."""

    def read(image: np.ndarray, labels: dict[str, str]) -> dict[str, float]:
        found = judge(image, labels)
        if "other" in found:
            other = judge(image, {"gesture": labels["other"], "other": labels["gesture"]})
            found["both"], found["swapped"] = (min(one["gesture"], one["other"]) for one in (found, other))
        return found

    return read


def figures(seen: Seen, edits: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] | None) -> dict[str, Any]:
    """Metric -> value, interval and n. edits: joints after and before, where the picture is of one or the other."""
    found = columns(seen)
    if seen.detected:
        found["hands_as_asked"] = hands_as_asked(seen)
        if edits is not None:
            found["follows"] = follows(seen, *edits)
    weights = resampled(np.random.default_rng(0), len(seen.keys), MEAN_DRAWS)
    entries = {name: mean(values, owners, weights) for name, (values, owners) in found.items()}
    return {name: entry for name, entry in entries.items() if entry is not None}


def joints_of(scenes: dict[str, Scene]) -> dict[str, np.ndarray]:
    """Key -> where the joints of the scene's one hand are in the picture, [21, 2]."""
    return {key: in_picture(s, s.rotations)[list(HAND_JOINTS[side_of(s)])] for key, s in scenes.items()}


def measured(scenes: dict[str, dict[str, Scene]], folders: dict[str, dict[str, Path]], tools: Instruments) -> Rows:
    """Group -> way -> its pictures and metrics. scenes: group -> key -> scene; folders: group -> way -> folder."""
    edits = joints_of(scenes["edited"]), joints_of(scenes["usual"])
    out: Rows = {}
    for group, ways in folders.items():
        labels = {key: labels_of(scene.spec) for key, scene in scenes[group].items()}
        for way, folder in ways.items():
            seen = look_with(tools, folder, list(labels), labels)
            # Pictures of the unchanged hands say how often a joint lies nearer to the edit by chance.
            mine = edits if group == "edited" or (group == "usual" and way != "full-pipeline") else None
            out.setdefault(group, {})[way] = {"pictures": len(seen.keys), "metrics": figures(seen, mine)}
    return out


def cell(name: str, entry: dict[str, float]) -> str:
    if name == "hand_confidence":
        return f"{entry['value']:.3f}\n{entry['low']:.3f}-{entry['high']:.3f}"
    value, low, high = (100 * entry[key] for key in ("value", "low", "high"))
    return f"{value:.1f} %\n{low:.1f}-{high:.1f}"


def table_of(rows: Rows, count: int) -> Table:
    found = {name for ways in rows.values() for row in ways.values() for name in row["metrics"]}
    shown = [name for name in TITLES if name in found]
    table = Table(title=f"Beyond the training, {count} scenes a group; below each figure its interval of 95 %")
    table.add_column("", no_wrap=True)
    for heading in ("N", *(TITLES[name] for name in shown)):
        table.add_column(heading)
    for group, ways in rows.items():
        for way, row in ways.items():
            metrics = row["metrics"]
            cells = [cell(name, metrics[name]) if name in metrics else "" for name in shown]
            first, last = way == next(iter(ways)), way == list(ways)[-1]
            name = f"{group if first else ''}\n  {way.replace('-', ' ')}".lstrip("\n")
            table.add_row(name, str(row["pictures"]), *cells, end_section=last)
    return table


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--checkpoint", default="demo", show_default=True)
@click.option("--count", type=click.IntRange(2, 9999), default=96, show_default=True, help="Scenes of each group.")
@click.option("--judge", "judge_folder", type=click.Path(path_type=Path), help="The demo's judge.")
@click.option("--no-detector", is_flag=True, help="By the judge alone.")
@click.option("--output", "-o", type=click.Path(path_type=Path), metavar="FILE.json", help="The JSON document, too.")
def command(
    out: Path, checkpoint: str, count: int, judge_folder: Path | None, no_detector: bool, output: Path | None
) -> int:
    """Makes pictures of scenes beyond the training in OUT and measures them. The same command again goes on."""
    if no_detector and judge_folder is None:
        raise EvaluationError("There is nothing to look with: give --judge FOLDER, or leave --no-detector out.")
    writable(output, "--output")
    tools = load_tools(judge_folder, no_detector)
    if tools.judge is not None:
        tools.judge = reads_pairs(tools.judge)
    painter = load_painter(checkpoint)
    with progress("scenes") as show:
        scenes = groups(count, show)
    folders: dict[str, dict[str, Path]] = {}
    for group, some in scenes.items():
        renders = out / group / "renders"
        draw(some, renders, painter.checkpoint.image_size[0])
        folders[group] = {
            way: renders if way == "renders" else paint(painter, renders, way, len(some)) for way in ways_of(group)
        }
    rows = measured(scenes, folders, tools)
    Console(highlight=False, soft_wrap=True, width=210).print(table_of(rows, count))
    finish({"groups": rows, "count": count, "settings": settings(tools, None)}, output)
    return 0


if __name__ == "__main__":
    run("beyond", command, "Stopped. The same command goes on.")
