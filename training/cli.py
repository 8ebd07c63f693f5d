"""`hd-train`: trains the demo again, whole or one stage of it, and writes its checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ..demo import resolve
from ..errors import HanDiffuserError
from .demo import PLANS, SCENES, STAGES, Run, assemble, picture_data, train
from .loop import console, finished, run_processes


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
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
def main(
    folder: Path,
    output: Path | None,
    only: tuple[str, ...],
    steps: int | None,
    learning_rate: float | None,
    scenes: int,
    config: str,
    start: str | None,
    processes: int,
) -> None:
    """Trains the demo: judge, vae, prior, encoder, pictures; then reports on 480 held-out prompts."""
    try:
        begin = resolve(start, "checkpoint") if start is not None else None
        run = Run(folder, scenes, config, begin)
        run.data(run.start())
        given = {"steps": steps, "learning_rate": learning_rate}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        for stage in only or (*STAGES, "report"):
            if stage == "report":
                from .evaluate import report

                report(run, processes=processes)
                continue
            if finished(folder / stage, changes.get("steps", PLANS[stage].steps)):
                console.print(f"{stage}: done already")
                continue
            if stage in ("encoder", "pictures"):
                picture_data(run, run.trained())  # once, before the processes part
            run_processes(train, processes, folder, stage, changes, scenes, config, begin)
        if output is not None:
            assemble(run, output)
    except (HanDiffuserError, OSError) as error:
        console.print(f"hd-train: {error}", style="red")
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on from the last saved step.")
        sys.exit(130)


if __name__ == "__main__":
    main()
