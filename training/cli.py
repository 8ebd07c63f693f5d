"""`hd-train`: a checkpoint from Stable Diffusion to begin with, and the demo trained again, whole or a stage of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..commands import run
from ..demo import resolve
from ..errors import HanDiffuserError
from ..models.checkpoint import MODEL_INDEX
from .demo import PLANS, SCENES, STAGES, Run, assemble, picture_data, train
from .loop import console, finished, run_processes


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="handiffuser", prog_name="hd-train")
def commands() -> None:
    """Makes checkpoints: from Stable Diffusion, or the demo from nothing."""


@commands.command()
@click.argument("source", metavar="SD_FOLDER", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True, help="Of what starts at random: hand prior, hand tokens.")
def init(source: Path, out: Path, seed: int) -> int:
    """Makes the checkpoint OUT from Stable Diffusion 1.x or 2.x (SD_FOLDER, in diffusers' layout), untrained.

    Without hands (hd-run --no-hands) it makes the pictures that SD_FOLDER makes; hands enter as training opens their
    gate. Nothing is fetched. The body is the demo's, a free one; hd-export --body takes yours.
    """
    if (out / MODEL_INDEX).exists():
        raise HanDiffuserError(f"{out} is a checkpoint already. Name another folder, or remove it first.")
    with console.status("reading"):
        from .init import from_stable_diffusion

        checkpoint = from_stable_diffusion(source, seed=seed)
    with console.status("writing"):
        checkpoint.save(out)
    height, width = checkpoint.image_size
    console.print(f"{out} makes pictures of {height} x {width}. Export it: hd-export {out} BUNDLE --precision fp16")
    return 0


@commands.command("demo")
@click.option("--run", "folder", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True,
              help="Where data, states and samples are kept. An interrupted run goes on from there.")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), help="Write the checkpoint folder here at the end.")
@click.option("--only", type=click.Choice([*STAGES, "report"]), multiple=True, help="These stages alone.")
@click.option("--steps", type=click.IntRange(1), help="Train the chosen stages for this many steps instead.")
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True),
              help="Highest rate of the chosen stages; a third of the usual suits --start.")  # fmt: skip
@click.option("--scenes", type=click.IntRange(1), default=SCENES, show_default=True, help="Size of the data.")
@click.option("--config", type=click.Choice(["demo", "tiny"]), default="demo", show_default=True)
@click.option("--start", help="Train on from this checkpoint (or the word demo) instead of from nothing.")
@click.option("--processes", type=click.IntRange(1), default=2, show_default=True, help="One thread each.")
def train_demo(
    folder: Path,
    output: Path | None,
    only: tuple[str, ...],
    steps: int | None,
    learning_rate: float | None,
    scenes: int,
    config: str,
    start: str | None,
    processes: int,
) -> int:
    """Trains the demo: judge, vae, prior, encoder, pictures; then reports on 480 held-out prompts."""
    begin = resolve(start, "checkpoint") if start is not None else None
    demo = Run(folder, scenes, config, begin)
    demo.data(demo.start())
    given = {"steps": steps, "learning_rate": learning_rate}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for stage in only or (*STAGES, "report"):
        if stage == "report":
            from .evaluate import report

            report(demo, processes=processes)
            continue
        if finished(folder / stage, changes.get("steps", PLANS[stage].steps)):
            console.print(f"{stage}: done already")
            continue
        if stage in ("encoder", "pictures"):
            picture_data(demo, demo.trained())  # once, before the processes part
        run_processes(train, processes, folder, stage, changes, scenes, config, begin)
    if output is not None:
        assemble(demo, output)
    return 0


def main() -> None:
    run("hd-train", commands, "Stopped. The same command goes on from the last saved step.")


if __name__ == "__main__":
    main()
