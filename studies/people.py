"""Measures a checkpoint of the demo's people on held-out scenes: what each stage loses. One person's gestures by
framing, things in a hand by thing, two people who touch by what they do.

    renders           what the world looks like: the ceiling
    through-the-vae   the same, encoded and decoded
    true-hands        stage 2 on the renders' own hands
    full-pipeline     both stages

    python studies/people.py OUT --checkpoint CHECKPOINT --count 96
    python studies/people.py OUT --checkpoint CHECKPOINT --rows renders,through-the-vae      # the autoencoder alone
    python studies/people.py OUT --kind pairs --rows renders          # the ceiling alone: needs no checkpoint

Only hands that a scene is about count: of a pair those that touch, not those that hang. Every set is a folder that
`hd-eval` takes, too.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from handiffuser.commands import run
from handiffuser.data.cli import progress
from handiffuser.data.dataset import Index
from handiffuser.data.samples import Sample, encode_png, picture
from handiffuser.demo.human import load_human
from handiffuser.demo.human_dataset import sample_of, scene_of
from handiffuser.errors import EvaluationError
from handiffuser.evaluation import measure
from handiffuser.evaluation.cli import finish
from handiffuser.evaluation.tables import spread, title
from handiffuser.models.checkpoint import Checkpoint, decode
from handiffuser.training.sample import encode
from handiffuser.training.stages import images_to_float
from rich.console import Console
from rich.table import Table
from rows import load_painter, load_tools, look_with, paint, save

SEED = 20_280_000
BROAD = (0.1811, 0.1848)  # waist by stature: thirds of 300 adults
KINDS = {"people": "framing", "things": "thing", "pairs": "together"}  # kind of scene: the label that makes groups
GROUPS = ("skin", "age", "build")  # of the one whose hand it is; all kinds
BUILDS = ("slim", "medium", "heavy")
ROWS = ("renders", "through-the-vae", "true-hands", "full-pipeline")
SHOWN = ("detection_rate", "hand_confidence", "handedness", "pck_5_marks", "pck_10_marks", "psnr")
BATCH = 8


def draw(folder: Path, count: int, size: int, kind: str = "people") -> list[Sample]:
    """The first `count` held-out scenes of a kind, rendered into a folder. Pictures that exist are kept.

    Of one person, the combination of gesture and place is held out, too. Things and pairs have too few of them: there
    the seed alone is. Raises EvaluationError for a folder with scenes of another kind."""
    samples: list[Sample] = []
    index = Index.open(folder) if any(folder.glob("*.json")) else None
    known = {} if index is None else {index.entry(i).key: i for i in range(len(index))}
    number = 0
    with progress(f"drawing {folder}") as show:
        while len(samples) < count:
            key, number = f"held-out-{number:05d}", number + 1
            if index is not None and key in known:
                found = index.sample(known[key])
                assert isinstance(found, Sample), found
                if (other := kind_of(found)) != kind:
                    raise EvaluationError(f"OUT must have scenes of {kind}, got some of {other}. Name another folder.")
                samples.append(found)
                continue
            shares = {} if kind == "people" else {kind: 1.0}
            scene, captions = scene_of(SEED, number - 1, held_out=kind == "people", **shares)
            if kind == "pairs" or len(scene.poses) == 1:
                samples.append(sample_of(scene, captions, key, size))
                save(folder, samples[-1:])
            show(len(samples), count)
    return samples


def kind_of(sample: Sample) -> str:
    """Of KINDS: what a scene shows."""
    labels = dict(sample.meta["labels"])
    return next((kind for kind in ("pairs", "things") if KINDS[kind] in labels), "people")


def build_of(betas: np.ndarray) -> str:
    """Of BUILDS: by how broad the waist is beside the stature, a third of adults each."""
    shape = load_human().template + load_human().arrays["shapedirs"] @ np.asarray(betas, float)
    waist = load_human().owner == 3
    return BUILDS[int(np.searchsorted(BROAD, np.ptp(shape[waist, 0]) / np.ptp(shape[:, 1])))]


def meant(seen: measure.Seen, samples: list[Sample]) -> tuple[measure.Seen, list[dict[str, str]]]:
    """The hands that scenes are about, and of each hand the skin, age and build of its owner."""
    by_key = {sample.key: sample for sample in samples}
    which, notes, place = [], [], dict[int, int]()
    for number, (hand, owner) in enumerate(zip(seen.hands, seen.owners, strict=True)):
        sample = by_key[seen.keys[owner]]
        assert hand.asked is not None and sample.hands is not None
        visible = np.argwhere(np.reshape(sample.hands["visibility"], (-1, 2)) > 0.5)  # person by person
        person, _ = visible[place.get(owner, 0)]
        place[owner] = place.get(owner, 0) + 1
        said, prefix = dict(sample.meta["labels"]), ("", "second ")[person]
        if said.get(f"{prefix}side", "") not in (hand.asked.side, "both"):
            continue
        betas = np.reshape(sample.hands["betas"], (-1, 10))[person]
        which.append(number)
        notes.append({"skin": said[f"{prefix}skin"], "age": said.get(f"{prefix}age", "between"),
                      "build": build_of(betas)})  # fmt: skip
    return part(seen, which), notes


def part(seen: measure.Seen, which: list[int]) -> measure.Seen:
    """The same look at some of its hands."""
    hands, owners, tones = ([list(x)[i] for i in which] for x in (seen.hands, seen.owners, seen.tones))
    return replace(seen, hands=hands, owners=owners, tones=tones, asked=len(which))


@torch.no_grad()
def through_the_vae(checkpoint: Checkpoint, renders: list[Sample], folder: Path) -> dict[str, float]:
    """Writes encoded and decoded pictures; returns each one's PSNR in dB, by key."""
    psnr = {}
    for start in range(0, len(renders), BATCH):
        some = renders[start : start + BATCH]
        images = torch.from_numpy(np.stack([picture(sample) for sample in some]))
        decoded = decode(checkpoint, encode(checkpoint, images_to_float(images)))
        error = (decoded.float() - images.float()).square().mean((1, 2, 3)).clamp_min(1e-3)
        psnr |= {s.key: float(value) for s, value in zip(some, 10 * (255**2 / error).log10(), strict=True)}
        save(folder, [replace(s, image=encode_png(image)) for s, image in zip(some, decoded.numpy(), strict=True)])
    return psnr


def figures(
    folders: dict[str, Path], renders: list[Sample], psnr: dict[str, float], tools: Any, by: str = "framing"
) -> dict[str, Any]:
    """Group -> row -> metric: groups of pictures by a label of scenes, then of hands by GROUPS."""
    labels = {sample.key: dict(sample.meta["labels"]) for sample in renders}
    seen = {name: meant(look_with(tools, folder, list(labels), labels), renders) for name, folder in folders.items()}
    out: dict[str, Any] = {}
    for group in dict.fromkeys(said[by] for said in labels.values()):
        keys = [key for key, said in labels.items() if said[by] == group]
        rows = {name: _metrics(look, [labels[look.keys[owner]][by] == group for owner in look.owners])
                for name, (look, _) in seen.items()}  # fmt: skip
        if "through-the-vae" in rows:
            rows["through-the-vae"]["psnr"] = {"value": float(np.mean([psnr[key] for key in keys])), "n": len(keys)}
        out[group] = {"by": by, "pictures": len(keys), "rows": rows}
    for name in GROUPS:
        for group in sorted({note[name] for _, notes in seen.values() for note in notes}):
            rows = {row: _metrics(look, [note[name] == group for note in notes]) for row, (look, notes) in seen.items()}
            out[f"{name}: {group}"] = {"by": name, "pictures": len(renders), "rows": rows}
    return out


def _metrics(seen: measure.Seen, wanted: list[bool]) -> dict[str, Any]:
    return measure.figures(part(seen, np.flatnonzero(wanted).tolist()), None)["metrics"]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--checkpoint", help="Needed for all rows but renders.")
@click.option("--kind", type=click.Choice(tuple(KINDS)), default="people", show_default=True)
@click.option("--count", type=click.IntRange(2), default=96, show_default=True, help="Scenes.")
@click.option("--rows", "names", default=",".join(ROWS), show_default=True, help="Sets to make; renders always.")
@click.option("--output", "-o", type=click.Path(path_type=Path), metavar="FILE.json", help="The JSON document, too.")
def command(out: Path, checkpoint: str | None, kind: str, count: int, names: str, output: Path | None) -> int:
    """Makes the sets of pictures in OUT and measures them. The same command again goes on."""
    wanted = ["renders", *(name for name in names.split(",") if name != "renders")]
    if unknown := [name for name in wanted if name not in ROWS]:
        raise EvaluationError(f"--rows must name sets of {', '.join(ROWS)}, got {unknown[0]}.")
    if checkpoint is None and wanted != ["renders"]:
        raise EvaluationError(f"--checkpoint must be given for {wanted[1]}, got none. Give one, or --rows renders.")
    torch.set_num_threads(1)
    painter, tools = load_painter(checkpoint) if checkpoint else None, load_tools(None)
    size = painter.checkpoint.image_size[0] if painter else 256
    renders = draw(out / "renders", count, size, kind)
    folders, psnr = {"renders": out / "renders"}, dict[str, float]()
    if painter and "through-the-vae" in wanted:
        folders["through-the-vae"] = out / "through-the-vae"
        psnr = through_the_vae(painter.checkpoint, renders, folders["through-the-vae"])
    for way in wanted:
        if painter and way in ("true-hands", "full-pipeline"):
            folders[way] = paint(painter, out / "renders", way, count)
    found = figures(folders, renders, psnr, tools, KINDS[kind])
    console = Console(highlight=False, soft_wrap=True, width=160)
    for framing, group in found.items():
        hands = group["rows"]["renders"].get("detection_rate", {"n": 0})["n"]
        table = Table(title=f"{framing}: {hands} hands of {group['pictures']} held-out scenes")
        for column in ("", *group["rows"]):
            table.add_column(column.replace("-", " "))
        for name in SHOWN:
            entries = [row.get(name) for row in group["rows"].values()]
            if name == "psnr" and any(entries):
                table.add_row("PSNR, dB", *(f"{entry['value']:.1f}" if entry else "" for entry in entries))
            elif any(entries):
                table.add_row(title(name).split(" (")[0], *(spread(name, entry) if entry else "" for entry in entries))
        console.print(table)
    finish({"groups": found, "kind": kind, "settings": measure.settings(tools, "renders")}, output)
    return 0


if __name__ == "__main__":
    run("people", command, "Stopped. The same command goes on.")
