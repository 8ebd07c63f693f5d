"""Where the demo loses quality: five sets of pictures of the same held-out prompts, from the ceiling to the pipeline.

    renders                   what the world looks like: the ceiling
    through-the-vae           the same, encoded and decoded
    true-hands                stage 2 on the renders' own hands
    generated-hands-rendered  stage 1's hands, drawn by the renderer
    full-pipeline             both stages

    python -m handiffuser.evaluation.rows OUT --count 96 --judge runs/report/judge

Palms, backs and sides come equally often, and gestures as equally as they can be seen from there. Every set is a folder
that `hd-eval` takes, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from .. import demo
from ..commands import run
from ..data.cli import progress
from ..data.samples import Sample, encode_png, members, picture
from ..demo.dataset import samples_of
from ..demo.render import demo_body
from ..demo.report import held_out_scenes
from ..runtime.hands import axis_angle_to_matrix
from ..training.sample import decode, encode
from ..training.stages import images_to_float
from . import measure, pictures
from .cli import finish, say
from .eager import Torch
from .run import instruments
from .tables import spread, title

SEED = 20_270_000
ROWS = ("renders", "through-the-vae", "true-hands", "generated-hands-rendered", "full-pipeline")
SHOWN = ("detection_rate", "hand_confidence", "handedness", "pck_5", "pck_10", "pck_20", "judge_gesture", "judge_side",
         "fid", "kid", "fid_h", "kid_h")  # fmt: skip
BATCH = 32


def key_of(number: int) -> str:
    return f"held-out-{number:04d}"


def save(folder: Path, samples: Sequence[Sample]) -> None:
    """Plain files in the sample format, the .json last: what it names is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for sample in samples:
        for suffix, content in sorted(members(sample).items(), key=lambda member: member[0] == "json"):
            path = folder / f"{sample.key}.{suffix}"
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            temporary.write_bytes(content)
            temporary.replace(path)


@torch.no_grad()
def make_rows(checkpoint: Path, out: Path, count: int) -> dict[str, Path]:
    """The five folders. What is painted already is kept."""
    scenes, body = held_out_scenes(count, SEED), demo_body()
    options = {"body": None, "threads": 1, "device": "cpu"}
    painter = Torch(checkpoint, options)
    size = painter.checkpoint.image_size[0]
    renders: list[Sample] = []
    for start in range(0, count, BATCH):
        part = scenes[start : start + BATCH]
        keys = [key_of(start + i) for i in range(len(part))]
        renders += samples_of(part, [[scene.prompt] for scene in part], keys, body, size)
    save(out / "renders", renders)
    through = []
    for start in range(0, count, BATCH):
        some = renders[start : start + BATCH]
        images = images_to_float(torch.from_numpy(np.stack([picture(sample) for sample in some])))
        decoded = decode(painter.checkpoint, encode(painter.checkpoint, images)).numpy()
        through += [replace(s, image=encode_png(image)) for s, image in zip(some, decoded, strict=True)]
    save(out / "through-the-vae", through)
    folders = {name: out / name for name in ROWS}
    for name, given in (("true-hands", out / "given-hands"), ("full-pipeline", None)):
        requests = pictures.wanted(out / "renders", None, None, given, 0, say)
        with progress(name) as show:
            folders[name] = pictures.make(painter, requests, out / name, say, show).folder
    drawn = []
    for start in range(0, count, BATCH):
        part, hands = [], []
        for number in range(start, min(start + BATCH, count)):
            with np.load(folders["full-pipeline"] / f"{key_of(number)}.hands.npz") as file:
                hands.append({name: file[name] for name in file.files if name != "prompt"})
            names = ("global_orient", "body_pose", "left_hand_pose", "right_hand_pose")
            vectors = np.concatenate([hands[-1][name].reshape(-1, 3) for name in names])
            rotations = axis_angle_to_matrix(vectors).astype(np.float32)
            part.append(
                replace(scenes[number], rotations=rotations, betas=hands[-1]["betas"], camera=hands[-1]["camera"])
            )
        keys = [key_of(start + i) for i in range(len(part))]
        drawn += samples_of(part, [[scene.prompt] for scene in part], keys, body, size)
    save(folders["generated-hands-rendered"], drawn)
    return folders


def compare(folders: dict[str, Path], tools: measure.Instruments, look: Callable[..., measure.Seen]) -> dict[str, Any]:
    """Row -> its figures, all beside the renders."""
    renders = look(folders["renders"], tools)
    labels = dict(zip(renders.keys, renders.labels, strict=True))
    rows = {}
    for name, folder in folders.items():
        seen = renders if name == "renders" else look(folder, tools, labels=labels)
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
    torch.set_num_threads(1)
    options = {"clip_folder": None, "judge_folder": judge_folder, "threads": 1, "no_detector": False,
               "crops": "asked", "weights": None, "min_crop": 32}  # fmt: skip
    tools = instruments(options)
    folders = make_rows(demo.resolve(checkpoint, "checkpoint"), out, count)

    def look(folder: Path, tools: measure.Instruments, **more: Any) -> measure.Seen:
        with progress(f"looking at {folder}") as show:
            shown = pictures.read_pictures(folder, None, say)
            return measure.look(shown, tools, count, show, **more)

    rows = compare(folders, tools, look)
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
