"""The demo world as a dataset: one-thread processes render scenes into shards, and go on after a stop.

    hd-data demo demo-data --scenes 24000
    make("demo-data", scenes=24_000, seed=1, processes=2)

Scene i does not depend on the number of scenes. Held-out prompts (prompts.is_held_out) never enter the dataset.
The world "arms" draws the same scenes on the human body, see `arms.py`. The world "human" holds people, see
`human_dataset.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from ..commands import undisturbed
from ..data.check import begin_worker
from ..data.files import BODY
from ..data.samples import Bad, Sample, encode_png, load, picture_size, scan, write_shard
from ..errors import DatasetError
from ..hands import POSES
from ..models.hand_features import pack, placement_of
from ..models.smplh import HAND_JOINTS, SMPLH
from ..rotations import matrix_to_axis_angle
from . import arms
from .gestures import NAMES
from .human import human_body, make_body
from .prompts import BACKGROUNDS, SIDES, SKINS, VIEWS, WORDINGS, Spec, is_held_out, sample_spec, write_prompt
from .render import demo_body, render_scenes
from .scenes import PLAIN, Anatomy, Scene, sample_scene

# A picture's labels and their classes. "gesture" is of the one hand, or of the left one; "other" is of the right hand
# of two.
LABELS = {
    "gesture": NAMES,
    "side": SIDES,
    "skin": tuple(SKINS),
    "background": tuple(BACKGROUNDS),
    "view": tuple(VIEWS),
    "other": NAMES,
}
SHARD, PEOPLE_SHARD = 500, 100  # scenes: a stop loses a minute's work of a process at most
BATCH = 32  # scenes rendered together
Job = tuple[Path, int, range, int, float, float, str, float, float]


def make(
    folder: str | Path,
    scenes: int,
    *,
    size: int = 128,
    seed: int = 1,
    both: float = 0.15,
    leave_out: float = 0.05,
    processes: int = 2,
    world: str = "hands",
    things: float = 0.0,
    pairs: float = 0.0,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes `scenes` scenes as shards; keeps the shards that the folder has.

    world: "hands" (plain forearms before a colour), "arms" (the same of the human body) or "human" (people). The latter
    two write their body, `body.npz`.
    size: pixels a side. both: share of two-hand scenes. leave_out: share of a scene's further wordings without view,
    skin or background; half of that share is without the side. on_progress: called with (scenes done, scenes in all).
    things, pairs: with people, shares of the scenes with a thing in a hand, and of those with two people who touch; the
    other scenes stay the same.
    Raises DatasetError where the folder holds another dataset, or cannot be written.
    """
    folder = Path(folder)
    if world != "human" and (things or pairs):
        raise DatasetError(f"things and pairs must be 0 in the world of {world}. Take the world human.")
    if things + pairs > 1:
        raise DatasetError(f"things and pairs must be at most 1 together, got {things + pairs:g}. Lower one of them.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatasetError(f"{folder} cannot be made: {error.strerror or error}. Name another folder.") from error
    shard = SHARD if world == "hands" else min(SHARD, PEOPLE_SHARD)
    parts = (range(start, min(start + shard, scenes)) for start in range(0, scenes, shard))
    jobs: list[Job] = [
        (folder / f"{number:05d}.tar", seed, part, size, both, leave_out, world, things, pairs)
        for number, part in enumerate(parts)
    ]
    todo = [job for job in jobs if not _done(*job[:7])]
    if world != "hands":
        try:
            make_body(folder / BODY)
        except OSError as error:
            raise DatasetError(
                f"{folder / BODY} cannot be written: {error.strerror or error}. Run the command again to go on."
            ) from error
    done = scenes - sum(len(job[2]) for job in todo)
    if on_progress is not None:
        on_progress(done, scenes)
    if not todo:
        return

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(done, scenes)

    processes = min(processes, len(todo))
    if processes == 1:
        torch.set_num_threads(1)
        for job in todo:
            tell(_shard(job))
        return
    # multiprocessing's Pool waits for ever for a process that was killed.
    with ProcessPoolExecutor(processes, get_context("spawn"), begin_worker) as pool:
        try:
            with undisturbed():
                shards = [pool.submit(_shard, job) for job in todo]
            for made in as_completed(shards):
                tell(made.result())
        except BrokenProcessPool:
            raise DatasetError(
                "The system killed a process that renders, most often for lack of memory. Run the command again to "
                "go on, with fewer --processes."
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def labels_of(spec: Spec) -> dict[str, str]:
    """A picture's labels in the words of LABELS, without "other" for one hand and without "view" for two hands with
    different views."""
    labels = {key: value for key, value in asdict(spec).items() if value}
    if spec.side == "both":
        labels["other"] = spec.gesture_of(1)
        if spec.view_of(0) != spec.view_of(1):
            del labels["view"]
        else:
            labels["view"] = spec.view_of(0)
    return labels


def class_numbers(labels: Mapping[str, str]) -> list[int]:
    """Class numbers in the order of LABELS, -1 for a missing label."""
    return [list(names).index(labels[label]) if label in labels else -1 for label, names in LABELS.items()]


def scene_of(
    seed: int, number: int, both: float = 0.15, leave_out: float = 0.05, anatomy: Anatomy = PLAIN
) -> tuple[Scene, list[str]]:
    """Scene `number` of a seed, and WORDINGS prompts for it, its own first, none of them held out.

    The other prompts state nearly all: a colour that a prompt leaves out teaches no word, and its error, which training
    cannot reduce, drowns the rest. Stage 1 sees no colours: there they may leave out as much as people do.
    """
    rng = np.random.default_rng((seed, number))
    scene = None
    while scene is None:
        with contextlib.suppress(RuntimeError):  # a few scenes of two hands cannot be framed
            scene = sample_scene(rng, sample_spec(rng, both), anatomy=anatomy)
    while is_held_out(scene.prompt):
        scene = replace(scene, prompt=write_prompt(scene.spec, rng))
    prompts = [scene.prompt]
    while len(prompts) < WORDINGS:
        prompt = write_prompt(scene.spec, rng, leave_out)
        if not is_held_out(prompt):
            prompts.append(prompt)
    return scene, prompts


@torch.no_grad()
def samples_of(
    scenes: Sequence[Scene],
    prompts: Sequence[list[str]],
    keys: Sequence[str],
    body: SMPLH,
    size: int,
    render: Callable[[Sequence[Scene], SMPLH, int], torch.Tensor] = render_scenes,
) -> list[Sample]:
    """Rendered scenes as samples, with their hands as SMPL-H arrays. render: draws them on the body."""

    def stack(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(scene, name) for scene in scenes]))

    camera = stack("camera")
    _, joints = body(stack("rotations"), stack("betas"))
    placement = placement_of(joints, camera, stack("present")).numpy()
    seen = 0.5 + 0.5 * camera[:, None, None, :1] * (joints[:, HAND_JOINTS, :2] + camera[:, None, None, 1:])
    joints_2d = torch.stack([seen[..., 0], 1 - seen[..., 1]], -1).numpy()
    images = render(scenes, body, size).numpy()
    out = []
    for i, scene in enumerate(scenes):
        vectors = matrix_to_axis_angle(scene.rotations).astype(np.float32)  # [52, 3]
        hands = {name: vectors[joints_of].reshape(-1) for name, joints_of in POSES.items()}
        hands |= {
            "betas": scene.betas,
            "placement": placement[i],
            "camera": scene.camera,
            "visibility": scene.present.astype(np.float32),
            "joints_2d": joints_2d[i],
        }
        meta = {"source": "handiffuser demo", "licence": "Apache-2.0", "labels": labels_of(scene.spec)}
        out.append(Sample(keys[i], list(prompts[i]), hands, encode_png(images[i]), meta))
    return out


@torch.no_grad()
def scene_tensors(scenes: Sequence[Scene], size: int) -> dict[str, torch.Tensor]:
    """Rendered scenes for a judge: images uint8 [N, size, size, 3], params [N, 330], labels [N, 6] as in LABELS, -1
    for a missing label."""
    body = demo_body()

    def stack(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(scene, name) for scene in scenes]))

    rotations, betas = stack("rotations"), stack("betas")
    joints = torch.cat([body(r, b)[1] for r, b in zip(rotations.split(64), betas.split(64), strict=True)])
    numbers = [class_numbers(labels_of(s.spec)) for s in scenes]
    return {
        "images": render_scenes(scenes, body, size),
        "params": pack(rotations, betas, placement_of(joints, stack("camera"), stack("present"))),
        "labels": torch.tensor(numbers),
    }


def _key(seed: int, number: int, world: str = "hands") -> str:
    return f"{'demo' if world == 'hands' else world}-{seed}-{number:07d}"


def _shard(job: Job) -> int:
    path, seed, numbers, size, both, leave_out, world, things, pairs = job
    samples: list[Sample] = []
    if world == "human":
        from .human_dataset import sample_of
        from .human_dataset import scene_of as human_scene_of

        for number in numbers:
            scene, captions = human_scene_of(seed, number, both, leave_out, things=things, pairs=pairs)
            samples.append(sample_of(scene, captions, _key(seed, number, world), size))
        write_shard(path, samples)
        return len(numbers)
    on_arms = world == "arms"
    body, anatomy = (human_body(), arms.HUMAN) if on_arms else (demo_body(), PLAIN)
    render = arms.render_scenes if on_arms else render_scenes
    for start in range(0, len(numbers), BATCH):
        part = numbers[start : start + BATCH]
        scenes, prompts = zip(*(scene_of(seed, number, both, leave_out, anatomy) for number in part), strict=True)
        samples += samples_of(scenes, prompts, [_key(seed, number, world) for number in part], body, size, render)
    write_shard(path, samples)
    return len(numbers)


def _done(path: Path, seed: int, numbers: range, size: int, both: float, leave_out: float, world: str) -> bool:
    """Whether a shard exists with at least these scenes. Raises DatasetError for another dataset's shard."""
    if not path.exists():
        return False
    entries, problems = scan(path)
    if problems or not entries:
        return False  # damaged: `make` renders it again
    first = load(path.parent, entries[0])
    wanted = _key(seed, numbers[0], world), (size, size)
    if not isinstance(first, Bad) and (first.key, picture_size(first)) != wanted:
        raise DatasetError(f"{path.parent} must be empty or hold this dataset, got {first.key}. Name another folder.")
    return not isinstance(first, Bad) and len(entries) >= len(numbers)
