"""Measures where the demo loses quality, on five sets of pictures of the same held-out prompts.

    renders                   what the world looks like: the ceiling
    through-the-vae           the same, encoded and decoded
    true-hands                stage 2 on the renders' own hands
    generated-hands-rendered  stage 1's hands, drawn by the renderer
    full-pipeline             both stages

    python studies/rows.py OUT --count 96 --judge runs/report/judge

Palms, backs and sides come equally often, and gestures as equally as they can be seen from there. Every set is a folder
that `hd-eval` takes, too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from handiffuser import shipped
from handiffuser.commands import run
from handiffuser.data.cli import progress
from handiffuser.data.samples import Sample, encode_png, members, picture
from handiffuser.demo.dataset import samples_of
from handiffuser.demo.render import demo_body
from handiffuser.demo.scenes import Scene
from handiffuser.evaluation import measure, painting, pictures
from handiffuser.evaluation.cli import finish, say
from handiffuser.evaluation.eager import Torch
from handiffuser.evaluation.run import instruments
from handiffuser.evaluation.tables import spread, title
from handiffuser.files import written
from handiffuser.hands import POSES
from handiffuser.rotations import axis_angle_to_matrix
from handiffuser.training.sample import decode, encode
from handiffuser.training.stages import images_to_float
from judge import Judged
from report import held_out_scenes
from rich.console import Console
from rich.table import Table

SEED = 20_270_000
ROWS = ("renders", "through-the-vae", "true-hands", "generated-hands-rendered", "full-pipeline")
SHOWN = ("detection_rate", "hand_confidence", "handedness", "pck_5", "pck_10", "pck_20", "judge_gesture", "judge_side",
         "fid", "kid", "fid_h", "kid_h")  # fmt: skip
BATCH = 32


def key_of(number: int) -> str:
    return f"held-out-{number:04d}"


def save(folder: Path, samples: Sequence[Sample]) -> None:
    """Writes plain files in the sample format, the .json last, so that the files that it names are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for sample in samples:
        for suffix, content in sorted(members(sample).items(), key=lambda member: member[0] == "json"):
            with written(folder / f"{sample.key}.{suffix}") as temporary:
                temporary.write_bytes(content)


def draw(scenes: Mapping[str, Scene], folder: Path, size: int) -> list[Sample]:
    """Scenes by key, rendered into a folder as samples with their own hands, prompts and labels."""
    samples: list[Sample] = []
    keys, body = list(scenes), demo_body()
    for start in range(0, len(keys), BATCH):
        some = keys[start : start + BATCH]
        part = [scenes[key] for key in some]
        samples += samples_of(part, [[scene.prompt] for scene in part], some, body, size)
    save(folder, samples)
    return samples


def paint(painter: painting.Painter, renders: Path, way: str, count: int) -> Path:
    """Paints the first `count` prompts of a folder of renders, beside it. Keeps pictures that exist.

    way: "true-hands" paints the renders' own hands, "full-pipeline" those of stage 1.
    """
    given = renders.parent / "given-hands" if way == "true-hands" else None
    requests = painting.wanted(renders, None, count, given, 0, say)
    folder = renders.parent / way
    with progress(f"painting {folder}") as show:
        return painting.make(painter, requests, folder, say, show).folder


def look_with(
    tools: measure.Instruments, folder: Path, keys: Collection[str], labels: dict[str, dict[str, str]] | None = None
) -> measure.Seen:
    """Looks at those pictures of a folder. labels: by key, for pictures that have none of their own."""
    with progress(f"looking at {folder}") as show:
        shown = pictures.read_pictures(folder, None, say, keys)
        return measure.look(shown, tools, len(keys), show, labels=labels)


def load_tools(judge_folder: Path | None, no_detector: bool = False, threads: int | None = 1) -> measure.Instruments:
    """Detector and judge."""
    options = {"clip_folder": None, "threads": threads, "no_detector": no_detector, "crops": "asked", "weights": None,
               "min_crop": 32}  # fmt: skip
    return replace(instruments(options), judge=None if judge_folder is None else Judged(judge_folder))


def load_painter(checkpoint: str) -> Torch:
    """A checkpoint, or the demo's, in PyTorch on one thread."""
    return Torch(shipped.resolve(checkpoint, "checkpoint"), {"body": None, "threads": 1, "device": "cpu"})


@torch.no_grad()
def make_rows(painter: Torch, out: Path, count: int) -> dict[str, Path]:
    """The five folders. Pictures that exist are kept."""
    scenes = {key_of(number): scene for number, scene in enumerate(held_out_scenes(count, SEED))}
    size = painter.checkpoint.image_size[0]
    renders = draw(scenes, out / "renders", size)
    through = []
    for start in range(0, count, BATCH):
        some = renders[start : start + BATCH]
        images = images_to_float(torch.from_numpy(np.stack([picture(sample) for sample in some])))
        decoded = decode(painter.checkpoint, encode(painter.checkpoint, images)).numpy()
        through += [replace(s, image=encode_png(image)) for s, image in zip(some, decoded, strict=True)]
    save(out / "through-the-vae", through)
    folders = {name: out / name for name in ROWS}
    for way in ("true-hands", "full-pipeline"):
        folders[way] = paint(painter, out / "renders", way, count)
    drawn = {}
    for key, scene in scenes.items():
        with np.load(folders["full-pipeline"] / f"{key}.hands.npz") as file:
            hands = {name: file[name] for name in file.files if name != "prompt"}
        vectors = np.concatenate([hands[name].reshape(-1, 3) for name in POSES])
        rotations = axis_angle_to_matrix(vectors).astype(np.float32)
        drawn[key] = replace(scene, rotations=rotations, betas=hands["betas"], camera=hands["camera"])
    draw(drawn, folders["generated-hands-rendered"], size)
    return folders


def compare(folders: dict[str, Path], tools: measure.Instruments, count: int) -> dict[str, Any]:
    """Row -> its figures, all beside the renders."""
    keys = [key_of(number) for number in range(count)]
    renders = look_with(tools, folders["renders"], keys)
    labels = dict(zip(renders.keys, renders.labels, strict=True))
    rows = {}
    for name, folder in folders.items():
        seen = renders if name == "renders" else look_with(tools, folder, keys, labels)
        figures = measure.figures(seen, None if name == "renders" else renders)
        rows[name] = {"metrics": figures["metrics"], "groups": figures["groups"]}
    return rows


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--checkpoint", default="demo", show_default=True)
@click.option("--count", type=click.IntRange(6), default=480, show_default=True, help="Prompts.")
@click.option("--judge", "judge_folder", type=click.Path(path_type=Path), help="The demo's judge.")
@click.option("--output", "-o", type=click.Path(path_type=Path), metavar="FILE.json", help="The JSON document, too.")
def command(out: Path, checkpoint: str, count: int, judge_folder: Path | None, output: Path | None) -> int:
    """Makes the five sets of pictures in OUT and measures them. The same command again goes on."""
    tools = load_tools(judge_folder)
    rows = compare(make_rows(load_painter(checkpoint), out, count), tools, count)
    console = Console(highlight=False, soft_wrap=True, width=180)  # five columns of figures
    table = Table(title=f"{count} held-out prompts, palms, backs and sides equally often")
    for column in ("", *rows):
        table.add_column(column.replace("-", " "))
    for name in SHOWN:
        if any(name in row["metrics"] for row in rows.values()):
            found = (row["metrics"].get(name) for row in rows.values())
            table.add_row(title(name).split(" (")[0], *(spread(name, entry) if entry else "" for entry in found))
    console.print(table)
    if tools.extractor.warning:
        console.print(tools.extractor.warning)
    finish({"rows": rows, "prompts": count, "settings": measure.settings(tools, "renders")}, output)
    return 0


if __name__ == "__main__":
    run("rows", command, "Stopped. The same command goes on.")
