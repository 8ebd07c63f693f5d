"""Measures what each hand cue, and each way to condition the UNet, brings: variants trained alike, by `hd-eval`.

    cues           all eight sets of joints, rotations, vertices (the paper tried three), with the positional kernel
    frame          rotations as the camera sees them, instead of relative to parents
    conditioning   joint encoder; hand tokens put behind the text encoder's output; text only; hands only; each with and
                   without the positional kernel

    python studies/ablations.py OUT --data WORLD --judge runs/report/judge

As the paper begins with Stable Diffusion, every variant begins with a model that can draw and read: the shipped demo's
UNet and the text part of its encoder. Its parts for hand tokens and places begin untrained. All variants see the same
samples in the same order (`hd-train`'s stage `pictures`, the demo's recipe, `--steps` of it), and paint the true hands
of the same held-out prompts from the same noise. "Hands only" is trained and asked with the words "a hand". The same
command continues an interrupted run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import click
import msgspec
import torch
from handiffuser import shipped
from handiffuser.commands import run
from handiffuser.data.cli import progress
from handiffuser.data.samples import Bad, Sample, read, write_shards
from handiffuser.errors import TrainingError
from handiffuser.evaluation import measure, painting, pictures
from handiffuser.evaluation.cli import finish, say, write
from handiffuser.evaluation.eager import Torch
from handiffuser.evaluation.page import plot, table
from handiffuser.evaluation.tables import spread, title
from handiffuser.models.checkpoint import Checkpoint
from handiffuser.models.configs import CONFIGS, CUES
from handiffuser.models.position_kernel import PositionKernel
from handiffuser.models.text_hand_encoder import TextHandEncoder
from handiffuser.training.recipe import Recipe
from handiffuser.training.run import Run
from report import held_out_scenes
from rich.console import Console
from rich.table import Table
from rows import SEED, draw, key_of, load_tools, look_with, save

WORDLESS = "a hand"
PAINTED = {"steps": 6, "solver": "ddim", "guidance": 1.5}
RATE = 6e-4  # half of the recipe's: the UNet does not begin from nothing
SHOWN = ("detection_rate", "hand_confidence", "pck_10", "handedness", "judge_gesture", "judge_side", "judge_view",
         "judge_skin", "fid_h", "kid_h")  # fmt: skip


class Variant(NamedTuple):
    """What a UNet is told."""

    cues: tuple[str, ...] = CUES
    kernel: bool = True
    joint: bool = True
    words: bool = True
    frame: str = "parent"


SETS = [cues for number in range(4) for cues in combinations(CUES, number)]
VARIANTS: dict[str, Variant] = {
    **{"+".join(cues) or "no-cue": Variant(cues) for cues in SETS},
    "camera-rotations": Variant(frame="camera"),
    "joint-encoder-without-kernel": Variant(kernel=False),
    "behind-the-encoder": Variant(joint=False),
    "behind-the-encoder-without-kernel": Variant(joint=False, kernel=False),
    "text-only-without-kernel": Variant((), kernel=False),  # with it: no-cue
    "hands-only": Variant(words=False),
    "hands-only-without-kernel": Variant(words=False, kernel=False),
}


def start_of(variant: Variant, folder: Path, size: int = 128, seed: int = 0) -> Path:
    """The checkpoint that a variant begins with, saved once. size: pixels a side."""
    if (folder / "model_index.json").is_file():
        return folder
    base = Checkpoint.load(shipped.checkpoint_path())
    torch.manual_seed(seed)
    known = base.text_hand_encoder
    frequencies = CONFIGS["demo"].frequencies if variant.kernel else ()
    told = {"cues": list(variant.cues), "frequencies": list(frequencies), "joint": variant.joint,
            "rotation_frame": variant.frame}  # fmt: skip
    # Not `from_config`: that leaves out what the saved configuration did not name.
    encoder = TextHandEncoder(**{name: value for name, value in known.config.items() if name[0] != "_"} | told)
    for part in ("embeddings", "layers", "final_layer_norm"):
        getattr(encoder, part).load_state_dict(getattr(known, part).state_dict())
    encoder.basis.copy_(known.basis)  # so that all read the same cache of hands
    kernel = PositionKernel.for_unet(base.unet, frequencies) if frequencies else None
    if kernel is not None:
        kernel.focus()
    parts = {"text_hand_encoder": encoder, "position_kernel": kernel, "image_size": (size, size)}
    replace(base, **parts, defaults={**base.defaults, **PAINTED}).save(folder)
    return folder


def wordless(folder: Path, out: Path) -> Path:
    """The same dataset with the words "a hand" for every prompt."""

    def samples() -> Iterator[Sample | Bad]:
        for sample in read(folder):
            yield sample if isinstance(sample, Bad) else replace(sample, prompts=[WORDLESS])

    if not (out / "done").exists():
        shutil.rmtree(out, ignore_errors=True)  # half of a dataset would be one, too
        write_shards(samples(), out)
        (out / "done").touch()
    return out


def train(name: str, out: Path, data: Path, recipe: Recipe, size: int) -> Path:
    """Trains a variant, or what is left of it; its checkpoint."""
    finished = out / name / "checkpoint"
    if not (finished / "model_index.json").is_file():
        run = Run(out / name / "run", data, recipe, start_of(VARIANTS[name], out / name / "start", size))
        run.prepare()
        run.train("pictures")
        run.save(finished)
    return finished


def judged(
    checkpoint: Path, renders: Path, seen: measure.Seen, tools: measure.Instruments, out: Path
) -> dict[str, Any]:
    """The figures of a checkpoint that paints the renders' hands."""
    painter = Torch(checkpoint, {"body": None, "threads": None, "device": "auto"})
    requests = painting.wanted(renders, None, None, renders.parent / f"{renders.name}-hands", 0, say)
    with progress(f"painting with {checkpoint.parent.name}") as show:
        made = painting.make(painter, requests, out, say, show)
    labels = dict(zip(seen.keys, seen.labels, strict=True))
    return measure.figures(look_with(tools, made.folder, made.keys, labels), seen)["metrics"]


def page(rows: dict[str, Any], document: dict[str, Any]) -> str:
    """A table, and a plot of each figure with its interval."""
    names = [name for name in SHOWN if any(name in row for row in rows.values())]
    cells = [[row, *(spread(n, found[n]) if n in found else "" for n in names)] for row, found in rows.items()]
    said = (
        f"{document['steps']} steps of {document['batch']} pictures of {document['size']} pixels each, "
        f"{document['prompts']} held-out prompts, true hands; bars span 95 % (of one training: another seed of it is "
        "another model)."
    )
    plots = []
    for name in names:

        def draw(axes: Any, name: str = name) -> None:
            for i, found in enumerate(rows.values()):
                if name in found:
                    axes.plot([found[name]["low"], found[name]["high"]], [i, i], color="#2f6690")
                    axes.plot(found[name]["value"], i, "o", color="#2f6690", markersize=5)
            axes.set_yticks(range(len(rows)), list(rows))
            axes.invert_yaxis()
            axes.set(title=title(name))

        plots.append(plot(draw, 1 + 0.28 * len(rows)))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Ablations</title><style>body { font: 15px/1.5 '
        "system-ui, sans-serif; margin: 2rem; } table { border-collapse: collapse; } td, th { padding: .25rem .6rem; "
        f"border-bottom: 1px solid #ddd; text-align: left; }}</style><h1>Ablations</h1><p>{said}</p>"
        f"{table(['', *map(title, names)], cells)}{''.join(plots)}</html>\n"
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(path_type=Path), help="What to train on: hd-data demo WORLD.")
@click.option("--steps", type=click.IntRange(1), default=120, show_default=True, help="Of every variant.")
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True)
@click.option("--size", type=click.IntRange(16, 512), default=128, show_default=True,
              help="Pixels a side, as the dataset has them: 64 trains twice as fast.")  # fmt: skip
@click.option("--count", type=click.IntRange(6), default=240, show_default=True, help="Held-out prompts.")
@click.option("--only", type=click.Choice(list(VARIANTS)), multiple=True, help="These variants alone.")
@click.option("--judge", "judge_folder", type=click.Path(path_type=Path), help="The demo's judge.")
@click.option("--no-detector", is_flag=True, help="Only what needs no MediaPipe.")
@click.option("--output", "-o", type=click.Path(path_type=Path), metavar="FILE.json", help="The JSON document, too.")
def command(
    out: Path, data: Path, steps: int, batch: int, size: int, count: int, only: tuple[str, ...],
    judge_folder: Path | None, no_detector: bool, output: Path | None,
) -> int:  # fmt: skip
    """Trains every variant at the same budget and judges what it paints. OUT keeps all of it, and ablations.html."""
    tools = load_tools(judge_folder, no_detector, threads=None)
    out.mkdir(parents=True, exist_ok=True)
    asked = {"steps": steps, "batch": batch, "size": size, "prompts": count, "data": str(data)}
    known = out / "asked.json"
    if known.exists() and json.loads(known.read_text()) != asked:
        raise TrainingError(f"{out} holds variants of another budget or dataset. Name another folder.")
    known.write_text(json.dumps(asked))
    recipe = Recipe.load("demo").changed(
        "pictures", {"steps": steps, "batch": batch, "warmup": min(100, steps // 10), "learning_rate": RATE}
    )
    recipe = msgspec.structs.replace(recipe, prompts=())
    scenes = held_out_scenes(count, SEED)
    renders = draw({key_of(number): scene for number, scene in enumerate(scenes)}, out / "renders", size)
    save(out / "renders-wordless", [replace(sample, prompts=[WORDLESS]) for sample in renders])
    seen = measure.look(
        pictures.read_pictures(out / "renders", None, say), tools, count, lambda done, total: None, detect=False
    )
    rows: dict[str, Any] = {}
    for name in only or VARIANTS:
        words = VARIANTS[name].words
        checkpoint = train(name, out, data if words else wordless(data, out / "wordless"), recipe, size)
        folder = out / ("renders" if words else "renders-wordless")
        rows[name] = judged(checkpoint, folder, seen, tools, out / name / "pictures")
        write(out / "ablations.html", page(rows, asked))
    console = Console(highlight=False, soft_wrap=True, width=200)
    shown = Table(title=f"{steps} steps of {batch}, {size} pixels, {count} held-out prompts, true hands")
    names = [name for name in SHOWN if any(name in row for row in rows.values())]
    for column in ("", *(title(name).split(" (")[0] for name in names)):
        shown.add_column(column)
    for name, found in rows.items():
        shown.add_row(name, *(spread(metric, found[metric]) if metric in found else "" for metric in names))
    console.print(shown)
    finish({**asked, "rows": rows, "settings": measure.settings(tools, "renders")}, output)
    return 0


if __name__ == "__main__":
    run("ablations", command, "Stopped. The same command goes on.")
