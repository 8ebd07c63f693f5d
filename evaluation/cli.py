"""`hd-eval`: how good the hands in pictures are, what deployment cost, and which of two makers people prefer.

hd-eval out --report page.html
hd-eval demo --against renders --count 96
hd-eval --reference demo demo --against renders
hd-eval pairs out-a out-b --output page.html

The last line of stdout is one JSON document; what stands above it is for reading.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from .. import commands
from ..data.cli import progress
from ..engines.backends import CHOICES, DEVICES

FORMAT = 1  # of the JSON document
FILE = click.Path(path_type=Path)

notes = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


class Commands(click.Group):
    """A group whose first command is meant where none is named: hd-eval out is hd-eval measure out."""

    def parse_args(self, context: click.Context, words: list[str]) -> list[str]:
        return super().parse_args(context, self._named(words))

    def resolve_command(self, context: click.Context, words: list[str]) -> Any:
        return super().resolve_command(context, self._named(words))

    def _named(self, words: list[str]) -> list[str]:
        own = {*self.commands, "-h", "--help", "--version"}
        return words if not words or words[0] in own else ["measure", *words]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="handiffuser", prog_name="hd-eval")
def evaluate() -> None:
    """Judges pictures by their hands. `hd-eval WHAT` is `hd-eval measure WHAT`."""


@evaluate.command()
@click.argument("what")
@click.option("--against", type=FILE, metavar="FOLDER", help="Pictures to compare with, for FID and KID: plain "
              "photographs do. Or samples, whose prompts are painted where WHAT is no folder of pictures.")  # fmt: skip
@click.option("--reference", metavar="WHAT", help="A bundle or checkpoint that paints the same prompts: what did WHAT "
              "cost? The word demo is the shipped checkpoint here.")  # fmt: skip
@click.option("--prompts", metavar="FILE", help="A .txt or .jsonl file of prompts to paint.")
@click.option("--count", type=click.IntRange(2), help="Paint the first so many prompts.  [default: all]")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the first picture; the next has the next."
)
@click.option("--given-hands", is_flag=True, help="Paint the hands of --against instead of stage 1's: stage 2 alone.")
@click.option("--pictures", type=FILE, default=Path("hd-eval-pictures"), show_default=True, metavar="FOLDER",
              help="Where what is painted is kept. A second run goes on from there.")  # fmt: skip
@click.option("--weights", type=FILE, metavar="FILE", help="Inception V3 for FID and KID: .safetensors or TorchScript.")
@click.option("--clip", "clip_folder", type=FILE, metavar="FOLDER", help="A CLIP model, for the CLIP score.")
@click.option("--no-detector", is_flag=True, help="Only what needs no MediaPipe.")
@click.option("--crops", type=click.Choice(["asked", "found"]), default="asked", show_default=True,
              help="FID-H and KID-H around the joints that were asked for, or that were found.")  # fmt: skip
@click.option(
    "--min-crop", type=click.IntRange(1), default=32, show_default=True, help="Pixels of a crop's side at least."
)
@click.option("--body", type=FILE, help="SMPL-H .npz; the checkpoint's or the demo's by default.")
@click.option("--backend", type=click.Choice(CHOICES), default="auto", show_default=True)
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads.  [default: all cores]")
@click.option("--batch-size", type=click.IntRange(1, 4096), default=8, show_default=True)
@click.option("--output", "-o", type=FILE, metavar="FILE.json", help="The JSON document, too.")
@click.option("--report", type=FILE, metavar="FILE.html", help="A page with tables, plots and hands.")
def measure(what: str, **options: Any) -> int:
    """Measures the pictures of WHAT: a folder in the sample format (what hd-run writes), a bundle, a checkpoint, demo.
    A folder of plain photographs does for what needs no annotation: FID, KID and the confidence of hands.

    A bundle or a checkpoint paints first: the prompts of --against or of --prompts, each with a seed of its own.
    """
    started = time.process_time()
    for name in ("output", "report"):
        writable(options[name], f"--{name}")
    from . import run

    with notes.status("loading"):
        tools = run.instruments(options)
    document = {"hd_eval": FORMAT, "what": what, **run.work(what, options, tools, say, progress)}
    pictures = document.pop("shown")
    document["cpu_seconds"] = round(time.process_time() - started, 1)
    tables(document)
    if options["report"] is not None:
        from .report import page

        write(options["report"], page(document, *pictures))
        notes.print(f"The report is in {options['report']}.")
    finish(document, options["output"])
    return 0


@evaluate.command()
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@click.option("--output", type=FILE, required=True, help="The page, .html.")
@click.option(
    "--count", type=click.IntRange(1), default=50, show_default=True, help="Pairs on the page, drawn at random."
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Another seed, other pairs and sides."
)
def pairs(a: Path, b: Path, output: Path, count: int, seed: int) -> int:
    """Writes a page that asks which of two pictures is better: blind, and sides at random.

    A and B are folders with pictures of the same prompts or keys. The page opens from disk and needs no server. Whoever
    answers saves a file; `hd-eval preferences` counts those.
    """
    writable(output, "--output")
    from .pairs import page_of

    with notes.status("reading"):
        text, number = page_of(a, b, count, seed, say)
    write(output, text)
    notes.print(f"{number} pairs are in {output}. Open it, answer, save the answers, and: hd-eval preferences FILE...")
    return 0


@evaluate.command()
@click.argument("answers", type=FILE, nargs=-1, required=True)
@click.option("--output", "-o", type=FILE, metavar="FILE.json", help="The JSON document, too.")
def preferences(answers: tuple[Path, ...], output: Path | None) -> int:
    """Counts the ANSWERS that raters saved: win rates with an exact test, effect of the side, agreement of raters."""
    writable(output, "--output")
    from .preferences import count, read_answers, sentences

    document = {"hd_eval": FORMAT, **count([read_answers(path) for path in answers])}
    for sentence in sentences(document):
        click.echo(sentence)
    finish(document, output)
    return 0


def say(sentence: str) -> None:
    notes.print(f"hd-eval: {sentence}", style="yellow")


def writable(path: Path | None, option: str) -> None:
    """What can go wrong cheaply goes wrong first. Raises EvaluationError for a file that cannot be written."""
    from ..errors import EvaluationError

    if path is None:
        return
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise EvaluationError(f"{option} {path} cannot be written. Name a file in a folder that you may write to.")


def write(path: Path, text: str) -> None:
    """Written beside and renamed."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def finish(document: dict[str, Any], output: Path | None) -> None:
    text = json.dumps(document, allow_nan=False)
    if output is not None:
        write(output, text + "\n")
    print(text, flush=True)


def tables(document: dict[str, Any]) -> None:
    """What is for reading, on stdout."""
    from .tables import GROUP_COLUMNS, group_rows, metric_rows
    from .tables import console as make_console

    console = make_console()
    table = Table(title=f"{document['what']}: {document['pictures']} pictures")
    columns, rows = metric_rows(document)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    beyond = group_rows(document, beyond_chance=True)
    if beyond:
        table = Table(title="Groups that differ from all others beyond chance")
        for column in GROUP_COLUMNS:
            table.add_column(column)
        for row in beyond:
            table.add_row(*row)
        console.print(table)
    for sentence in document["notes"]:
        console.print(sentence, markup=False)


def main() -> None:
    """Entry point: one sentence and an exit code instead of a traceback."""
    commands.run("hd-eval", evaluate, "Interrupted. What was painted is kept: the same command goes on.")


if __name__ == "__main__":
    main()
