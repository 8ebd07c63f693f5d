"""`hd-eval` measures how good hands in pictures are, what deployment cost, and which of two sets people prefer.

hd-eval out --report page.html
hd-eval demo --against renders --count 96
hd-eval --reference demo demo --against renders
hd-eval pairs out-a out-b --output page.html

The last line of stdout is one JSON document. The tables above it are for people.
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
from ..files import written

FORMAT = 1  # of the JSON document
FILE = click.Path(path_type=Path)

notes = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


class Commands(click.Group):
    """A group with a default command: hd-eval out is hd-eval measure out."""

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
@click.option("--against", type=FILE, metavar="FOLDER", help="Pictures to compare with, for FID and KID; "
              "plain photographs suffice. A bundle or checkpoint paints the prompts of this folder.")  # fmt: skip
@click.option("--reference", metavar="WHAT", help="A bundle or checkpoint to compare WHAT with: it paints the same "
              "prompts. The word demo means the shipped checkpoint here.")  # fmt: skip
@click.option("--prompts", metavar="FILE", help="A .txt or .jsonl file of prompts to paint.")
@click.option("--count", type=click.IntRange(2), help="Paint only the first prompts.  [default: all]")
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Seed of the first picture. Each next picture adds 1.",
)
@click.option("--given-hands", is_flag=True, help="Paint the hands of --against with stage 2 alone.")
@click.option("--pictures", type=FILE, default=Path("hd-eval-pictures"), show_default=True, metavar="FOLDER",
              help="Keeps painted pictures. A second run continues from there.")  # fmt: skip
@click.option("--weights", type=FILE, metavar="FILE", help="Inception V3 for FID and KID: .safetensors or TorchScript.")
@click.option("--clip", "clip_folder", type=FILE, metavar="FOLDER", help="A CLIP model, for the CLIP score.")
@click.option("--no-detector", is_flag=True, help="Measure only what works without MediaPipe.")
@click.option("--crops", type=click.Choice(["asked", "found"]), default="asked", show_default=True,
              help="FID-H and KID-H crop around the requested joints, or around the detected ones.")  # fmt: skip
@click.option(
    "--min-crop", type=click.IntRange(1), default=32, show_default=True, help="Smallest side of a crop in pixels."
)
@click.option("--body", type=FILE, help="SMPL-H .npz file.  [default: the checkpoint's, else the demo's]")
@click.option("--backend", type=click.Choice(CHOICES), default="auto", show_default=True)
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads.  [default: all cores]")
@click.option("--batch-size", type=click.IntRange(1, 4096), default=8, show_default=True)
@click.option("--output", "-o", type=FILE, metavar="FILE.json", help="Write the JSON document to a file, too.")
@click.option("--report", type=FILE, metavar="FILE.html", help="Write a page with tables, plots and hands.")
def measure(what: str, **options: Any) -> int:
    """Measures the pictures of WHAT: a folder that hd-run wrote, a bundle, a checkpoint, or demo.

    A folder of plain photographs gives FID, KID and the confidence of hands.

    A bundle or a checkpoint first paints the prompts of --against or --prompts, each with its own seed.
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
@click.option("--output", type=FILE, required=True, help="The page to write, .html.")
@click.option(
    "--count", type=click.IntRange(1), default=50, show_default=True, help="Number of random pairs on the page."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Chooses pairs and sides.")
def pairs(a: Path, b: Path, output: Path, count: int, seed: int) -> int:
    """Writes a page that asks which of two pictures is better. The page hides their source and draws sides at random.

    A and B are folders with pictures of the same prompts or keys. The page opens from disk and needs no server. Each
    rater saves a file; `hd-eval preferences` counts these files.
    """
    writable(output, "--output")
    from .pairs import page_of

    with notes.status("reading"):
        text, number = page_of(a, b, count, seed, say)
    write(output, text)
    notes.print(
        f"{output} holds {number} pairs. Open it, answer, save the answers, then run: hd-eval preferences FILE..."
    )
    return 0


@evaluate.command()
@click.argument("answers", type=FILE, nargs=-1, required=True)
@click.option("--output", "-o", type=FILE, metavar="FILE.json", help="Write the JSON document to a file, too.")
def preferences(answers: tuple[Path, ...], output: Path | None) -> int:
    """Counts the ANSWERS that raters saved: win rates, the effect of the side, and how far raters agree."""
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
    """Raises EvaluationError for a file that cannot be written, before any work starts."""
    from ..errors import EvaluationError

    if path is None:
        return
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise EvaluationError(
            f"{option} must be a file that can be written, got {path}. Name a file in a folder that you may write to."
        )


def write(path: Path, text: str) -> None:
    with written(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def finish(document: dict[str, Any], output: Path | None) -> None:
    text = json.dumps(document, allow_nan=False)
    if output is not None:
        write(output, text + "\n")
    print(text, flush=True)


def tables(document: dict[str, Any]) -> None:
    """Prints the document's tables on stdout."""
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
    """Entry point: prints errors as one sentence, without a traceback."""
    commands.run("hd-eval", evaluate, "Interrupted. Painted pictures are kept: the same command continues.")


if __name__ == "__main__":
    main()
