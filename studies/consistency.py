"""Compares two students with few runs of the UNet: `hd-train distill`, and latent consistency as published.

    python studies/consistency.py OUT --teacher CHECKPOINT --data WORLD --judge runs/report/judge

    jumps          ours: one DDIM step leads from one state of the teacher's trajectory to a later one
    consistency    Luo et al. 2023 (arXiv 2310.04378): noised data, and the state after one guided DDIM step of the
                   teacher, must give the same clean picture; sampled with `--solver lcm`

Both students begin as the teacher and take equally many steps of equally many pictures at the same learning rate, with
guidance folded in. Then they, the teacher, and the teacher in as few runs paint the true hands of the same held-out
prompts from the same noise, exported, as hd-run does. The same command continues an interrupted run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import torch
from handiffuser.commands import run
from handiffuser.data.latents import encode_prompts
from handiffuser.errors import TrainingError
from handiffuser.evaluation import measure, painting, pictures
from handiffuser.evaluation.cli import finish, say
from handiffuser.evaluation.tables import spread, title
from handiffuser.export.bundle import export_bundle
from handiffuser.models.checkpoint import Checkpoint
from handiffuser.training.distill import VALIDATION_TRAJECTORIES, becomes_student, few_steps
from handiffuser.training.draws import Draws
from handiffuser.training.loop import Stage, fit
from handiffuser.training.recipe import DistillPlan, Recipe
from handiffuser.training.run import Run
from handiffuser.training.sample import CUES
from handiffuser.training.stages import Inputs, alphas_cumprod, conditions
from report import held_out_scenes
from rich.console import Console
from rich.table import Table
from rows import SEED, draw, key_of, load_painter, load_tools, look_with, paint
from torch import Tensor, nn

DATA, TIME, GRID = 0.5, 10.0, 50  # of the paper: σ_data, what timesteps are multiplied with, and steps of the teacher
HUBER = 0.001
SHOWN = ("detection_rate", "hand_confidence", "handedness", "pck_5", "pck_10", "judge_gesture", "judge_view")


class ConsistencyLoss(nn.Module):
    """The distance of what the student makes of two neighbours on a trajectory. The later one's is not trained."""

    alphas: Tensor
    empty: Tensor

    def __init__(self, student: Checkpoint, teacher: Checkpoint, guidance: float, empty: Tensor) -> None:
        super().__init__()
        self.unet, self.text_hand_encoder = student.unet.requires_grad_(True), student.text_hand_encoder
        self.teacher, self.guidance, self.kind = teacher.unet, guidance, teacher.scheduler["prediction_type"]
        self.register_buffer("empty", empty, persistent=False)
        self.register_buffer("alphas", alphas_cumprod(teacher.scheduler), persistent=False)

    def clean_and_noise(self, output: Tensor, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """x0 and epsilon as the network's output has them, each [n, C, h, w]."""
        alpha = self.alphas[timestep].view(-1, 1, 1, 1)
        signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
        if self.kind == "v_prediction":
            return signal * x - sigma * output, sigma * x + signal * output
        return (x - sigma * output) / signal, output

    def consistent(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """f(x, t) = c_skip x + c_out x0, equation 9."""
        clean, _ = self.clean_and_noise(self.unet(x, timestep, context).sample.float(), x, timestep)
        time = (TIME * timestep).view(-1, 1, 1, 1)
        return DATA**2 / (time**2 + DATA**2) * x + time / (time**2 + DATA**2).sqrt() * clean

    def forward(self, ids: Tensor, hands: dict[str, Tensor], x: Tensor, timestep: Tensor, earlier: Tensor) -> Tensor:
        """x: [n, C, h, w], noised to `timestep` [n]. earlier: [n], where the teacher's step leads."""
        with torch.no_grad():
            context = self.text_hand_encoder(ids, **hands)
            blank = {**hands, "visibility": torch.zeros_like(hands["visibility"])}
            without = self.text_hand_encoder(self.empty.expand(len(ids), -1), **blank)
            twice = torch.cat([x, x]), torch.cat([timestep, timestep]), torch.cat([without, context])
            bare, given = self.teacher(*twice).sample.float().chunk(2)
            clean, noise = self.clean_and_noise(bare + self.guidance * (given - bare), x, timestep)
            alpha = self.alphas[earlier].view(-1, 1, 1, 1)
            target = self.consistent(alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, earlier, context)
        error = self.consistent(x, timestep, context) - target
        return ((error.square() + HUBER**2).sqrt() - HUBER).mean()


def consistency_inputs(teacher: Checkpoint, plan: DistillPlan, empty: Tensor) -> Inputs:
    """The data noised to one of GRID timesteps, and the timestep before. rows: as of stage 2."""
    alphas = alphas_cumprod(teacher.scheduler)
    stride = len(alphas) // GRID
    scale, shift = teacher.vae.config.scaling_factor, teacher.vae.config.shift_factor or 0.0

    def inputs(rows: dict[str, Tensor], draws: Draws) -> Sequence[Any]:
        ids, hands = conditions(rows, draws, empty, plan)
        clean = (rows["mean"].float() - shift) * scale
        timestep = (1 + (draws.spread() * GRID).long().clamp_max(GRID - 1)) * stride - 1
        alpha = alphas[timestep].view(-1, 1, 1, 1)
        x = alpha.sqrt() * clean + (1 - alpha).sqrt() * draws.normal(*clean.shape[1:])
        return ids, hands, x, timestep, (timestep - stride).clamp_min(0)

    return inputs


def consistency_student(work: Run, plan: DistillPlan, folder: Path) -> Checkpoint:
    """The student of `plan.runs` runs, trained in `folder` with the rows of a run."""
    teacher, student = work.checkpoint(students=False), work.checkpoint(students=False)
    cache = work.latents(teacher, "pictures")
    rows = cache.usable[~work.held[cache.samples[cache.usable]]]
    empty = encode_prompts([""], teacher.tokenizer, teacher.special_tokens)[0]
    loss = ConsistencyLoss(student, teacher, teacher.defaults["guidance"], empty)
    plan = msgspec.structs.replace(plan, drop_text=0.0, drop_both=0.0)
    stage = Stage(
        "consistency", loss, lambda some: cache.rows(some, ("mean", "ids", *CUES)),
        consistency_inputs(teacher, plan, empty), rows[:-VALIDATION_TRAJECTORIES], rows[-VALIDATION_TRAJECTORIES:],
        data=work.digest, fixed=[loss.teacher, loss.text_hand_encoder],
    )  # fmt: skip
    fit(stage, plan, folder)
    becomes_student(student, plan.runs[-1])
    student.defaults = {**student.defaults, "solver": "lcm"}
    return student


def sharpness(images: np.ndarray) -> float:
    """The mean square of differences of neighbours, of pictures [N, H, W, 3]."""
    down, across = np.diff(images, axis=1), np.diff(images, axis=2)
    return float((down**2).mean() + (across**2).mean())


def beside(images: np.ndarray, teacher: np.ndarray) -> dict[str, float]:
    """How near pictures [N, H, W, 3] of 0..255 are to the teacher's: mean PSNR in dB, and sharpness as its share."""
    error = ((images - teacher) ** 2).mean((1, 2, 3)).clip(1e-9)
    psnr = float((10 * np.log10(255**2 / error)).mean())
    return {"psnr": round(psnr, 2), "sharpness": round(sharpness(images) / sharpness(teacher), 3)}


def painter_of(checkpoint: Checkpoint, out: Path, name: str) -> painting.Painter:
    """PyTorch, which needs no export; or engines where a solver adds noise, which diffusers draws differently."""
    if checkpoint.defaults["solver"] in ("lcm", "ddpm"):
        bundle = out / "bundles" / name
        if not (bundle / "manifest.json").is_file():
            export_bundle(checkpoint, bundle)
        options = {"device": "cpu", "threads": 1, "batch_size": 4, "backend": "onnxruntime"}
        return painting.Engines(str(bundle), options, say)
    folder = out / "checkpoints" / name
    if not (folder / "model_index.json").is_file():
        checkpoint.save(folder)
    return load_painter(str(folder))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--teacher", required=True, type=click.Path(path_type=Path), help="A checkpoint that samples guided.")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="What to train on: hd-data demo WORLD.")
@click.option("--runs", type=click.IntRange(1), default=4, show_default=True, help="Of the UNet.")
@click.option("--steps", type=click.IntRange(1), default=600, show_default=True, help="Of each student.")
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True)
@click.option("--trajectories", type=click.IntRange(1), default=1024, show_default=True, help="Of the jumps' bank.")
@click.option("--count", type=click.IntRange(1), default=240, show_default=True, help="Held-out prompts.")
@click.option("--judge", "judge_folder", type=click.Path(path_type=Path), help="The demo's judge.")
@click.option("--no-detector", is_flag=True, help="Only what needs no MediaPipe.")
@click.option("--output", "-o", type=click.Path(path_type=Path), metavar="FILE.json", help="The JSON document, too.")
def command(
    out: Path, teacher: Path, data: Path, runs: int, steps: int, batch: int, trajectories: int, count: int,
    judge_folder: Path | None, no_detector: bool, output: Path | None,
) -> int:  # fmt: skip
    """Trains both students at the same budget and judges what they paint. OUT keeps all of it."""
    tools = load_tools(judge_folder, no_detector)
    asked = {"runs": runs, "steps": steps, "batch": batch, "trajectories": trajectories, "data": str(data),
             "teacher": str(teacher)}  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    known = out / "asked.json"
    if known.exists() and json.loads(known.read_text()) != asked:
        raise TrainingError(f"{out} holds students of another budget, teacher or dataset. Name another folder.")
    settings = {"runs": (runs,), "steps": steps, "batch": batch, "trajectories": trajectories,
                "warmup": min(100, steps // 6)}  # fmt: skip
    recipe = Recipe.load("demo").changed("distill", settings)
    work = Run(out / "jumps", data, msgspec.structs.replace(recipe, prompts=()), teacher)
    work.prepare()
    known.write_text(json.dumps(asked))
    work.train("distill")
    guided = Checkpoint.load(teacher)
    few = {**guided.defaults, "steps": runs, "guidance": 1.0}
    made = {
        "teacher": guided,
        f"teacher-in-{runs}": replace(guided, scheduler=few_steps(guided.scheduler), defaults=few),
        "jumps": work.checkpoint(),
        "consistency": consistency_student(work, recipe.distill, out / "consistency"),
    }
    scenes = {key_of(number): scene for number, scene in enumerate(held_out_scenes(count, SEED))}
    draw(scenes, out / "renders", guided.image_size[0])
    seen = look_with(tools, out / "renders", list(scenes))
    labels = dict(zip(seen.keys, seen.labels, strict=True))
    rows: dict[str, Any] = {}
    painted: dict[str, np.ndarray] = {}
    for name, checkpoint in made.items():
        painter = painter_of(checkpoint, out, name)
        folder = paint(painter, out / "renders", "true-hands", count)
        painter.close()
        read = pictures.read_pictures(folder, None, say, list(scenes))
        shown = {one.key: one.image for one in read if one is not None}
        painted[name] = np.stack([shown[key] for key in scenes]).astype(np.float32)
        figures = measure.figures(look_with(tools, folder, list(scenes), labels), seen)["metrics"]
        rows[name] = {**figures, "beside the teacher": beside(painted[name], painted["teacher"])}
    names = [name for name in SHOWN if any(name in row for row in rows.values())]
    shown_as = Table(title=f"{steps} steps of {batch}, {count} held-out prompts, true hands")
    for column in ("", "PSNR, dB", "sharpness", *(title(name).split(" (")[0] for name in names)):
        shown_as.add_column(column)
    for name, found in rows.items():
        near = [f"{value:g}" for value in found["beside the teacher"].values()]
        shown_as.add_row(name, *near, *(spread(metric, found[metric]) if metric in found else "" for metric in names))
    Console(highlight=False, soft_wrap=True, width=200).print(shown_as)
    finish({**asked, "prompts": count, "rows": rows, "settings": measure.settings(tools, "renders")}, output)
    return 0


if __name__ == "__main__":
    run("consistency", command, "Stopped. The same command goes on.")
