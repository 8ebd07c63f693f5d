"""`hd-data`: makes datasets (the demo's, or from others' annotations), checks them, shows them, and caches latents."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..commands import run

if TYPE_CHECKING:
    from ..models.smplh import SMPLH

console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)


LOG_EVERY = 30.0  # seconds between lines, without a terminal


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows the share done and the time left: a bar on a terminal, else a line every LOG_EVERY seconds."""
    if not console.is_terminal:
        last = [-LOG_EVERY]

        def say(done: int, total: int) -> None:
            if time.monotonic() - last[0] >= LOG_EVERY or done == total:
                last[0] = time.monotonic()
                console.print(f"{what}: {done} of {total}")

        yield say
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="handiffuser", prog_name="hd-data")
def commands() -> None:
    """Makes, converts, checks and shows datasets. The format: docs/data.md."""


@commands.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--scenes", type=click.IntRange(1), default=24_000, show_default=True)
@click.option(
    "--world",
    type=click.Choice(["hands", "arms", "human"]),
    default="hands",
    show_default=True,
    help="hands: hands and forearms, as the shipped demo paints them. arms: the same scenes with real hands. "
    "human: people.",
)
@click.option("--size", type=click.IntRange(16, 1024), help="Pixels a side. [default: 256; for hands 128]")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True)
@click.option("--both", type=click.FloatRange(0, 1), default=0.15, show_default=True,
              help="Share of two-hand scenes; with people: of the scenes with hand gestures.")  # fmt: skip
@click.option(
    "--leave-out",
    type=click.FloatRange(0, 0.9),
    default=0.05,
    show_default=True,
    help="Share of wordings that leave out view, skin or background; 0.3 for stage 1.",
)
@click.option("--things", type=click.FloatRange(0, 1), default=0.0, show_default=True,
              help="With people: share of scenes with a thing in a hand.")  # fmt: skip
@click.option("--pairs", type=click.FloatRange(0, 1), default=0.0, show_default=True,
              help="With people: share of scenes with two people who touch.")  # fmt: skip
@click.option("--processes", type=click.IntRange(1), default=2, show_default=True, help="One thread each.")
def demo(
    out: Path,
    scenes: int,
    world: str,
    size: int | None,
    seed: int,
    both: float,
    leave_out: float,
    things: float,
    pairs: float,
    processes: int,
) -> int:
    """Renders scenes of the demo world into the dataset OUT. Run it again to go on.

    The worlds arms and human also write their body, OUT/body.npz, which `hd-data check` and `hd-data look` use.
    """
    from ..demo.dataset import make

    size = size or (128 if world == "hands" else 256)
    choice: dict[str, Any] = {
        "size": size,
        "seed": seed,
        "both": both,
        "leave_out": leave_out,
        "things": things,
        "pairs": pairs,
    }
    with progress("scenes") as show:
        make(out, scenes, **choice, processes=processes, world=world, on_progress=show)
    console.print(f"{out} holds at least {scenes} scenes. Look at it: hd-data look {out} --output page.html")
    return 0


@commands.command()
@click.argument("checkpoint")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--body", type=click.Path(path_type=Path), help="SMPL-H .npz; the checkpoint's own by default.")
@click.option("--no-pictures", is_flag=True, help="Compute only prompts and hands, for stage 1.")
@click.option("--flipped", is_flag=True, help="Compute those of the mirror images, in another cache.")
@click.option("--bf16", is_flag=True, help="Encode in bfloat16: fast on GPUs, and on CPUs with AMX.")
@click.option("--people", type=click.Choice(["most-visible", "each"]), default="most-visible", show_default=True,
              help="Which people of a picture to train on.")  # fmt: skip
@click.option("--cache", type=click.Path(path_type=Path), help="Keep the cache here, not in FOLDER.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
def latents(
    checkpoint: str,
    folder: Path,
    body: Path | None,
    no_pictures: bool,
    flipped: bool,
    bf16: bool,
    people: str,
    cache: Path | None,
    device: str,
) -> int:
    """Computes latents, token ids and hand features of FOLDER for CHECKPOINT (or the word demo), once.

    The cache lies in FOLDER. Another VAE, tokenizer, body or size has another cache.
    """
    with console.status("reading"):
        from ..models.checkpoint import Checkpoint
        from ..shipped import resolve
        from .latents import LatentCache, make_latents

        loaded = Checkpoint.load(resolve(checkpoint, "checkpoint"))
    choice = {
        "pictures": not no_pictures,
        "body": body,
        "people": people,
        "flipped": flipped,
        "bf16": bf16,
        "cache": cache,
    }
    with progress("latents") as show:
        make_latents(loaded, folder, show, device=device, **choice)  # type: ignore[arg-type]
    made = LatentCache.open(loaded, folder, **choice)  # type: ignore[arg-type]
    for bad in made.left_out:
        console.print(f"left out: {bad}")
    left_out = sum(bool(bad.key) for bad in made.left_out)  # the rest are shards
    console.print(f"{len(made.usable)} rows to train on, {left_out} samples left out.")
    return 0


@commands.command()
@click.argument("form", metavar="FORMAT", type=click.Choice(["amass", "motion-x", "mano", "interhand", "captions"]))
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--texts", type=click.Path(path_type=Path), help="Folder of captions, or HumanML3D's.  [default: beside the files]"
)
@click.option("--every", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True,
              help="Seconds between the frames to take of a sequence.")  # fmt: skip
@click.option("--frame", type=click.Choice(["person", "hands"]), default="person", show_default=True,
              help="What fills the frame of a sequence, which has no pictures.")  # fmt: skip
@click.option("--turn", type=click.FloatRange(0, 180), default=30.0, show_default=True,
              help="Largest turn of people from the camera in degrees, in a sequence.")  # fmt: skip
@click.option("--hand-mean", type=click.Path(path_type=Path),
              help=".npz with hands_meanl and hands_meanr, for fingers relative to MANO's mean hand.")  # fmt: skip
@click.option("--body", type=click.Path(path_type=Path), help="SMPL-H .npz; the demo's by default.")
@click.option("--per-shard", type=click.IntRange(1), default=1000, show_default=True)
def convert(
    form: str,
    source: Path,
    out: Path,
    texts: Path | None,
    every: float,
    frame: str,
    turn: float,
    hand_mean: Path | None,
    body: Path | None,
    per_shard: int,
) -> int:
    """Converts SOURCE to the dataset OUT. Run it again to go on. It names bad samples and leaves them out.

    mano: hands that HaMeR or WiLoR estimated. captions: pictures with texts beside, as for kohya's trainers.
    docs/data.md says where files must lie.
    """
    with console.status("reading"):
        from .convert import FORMATS, Options
        from .samples import write_shards

        options = Options(_body(body), texts, every, frame, turn, hand_mean)
    done = [0, -LOG_EVERY]

    def count(key: str) -> None:
        done[0] += 1
        if time.monotonic() - done[1] >= LOG_EVERY:
            done[1] = time.monotonic()
            console.print(f"{done[0]} samples, {key}")

    bad = write_shards(FORMATS[form](source, options), out, per_shard, count)
    for one in bad:
        console.print(f"left out: {one}")
    console.print(f"{done[0]} samples in {out}, {len(bad)} left out. Check it: hd-data check {out}")
    return 0 if done[0] else 1


@commands.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--body", type=click.Path(path_type=Path), help="SMPL-H .npz; FOLDER/body.npz or the demo's by default.")
@click.option("--min-size", type=click.IntRange(0), default=64, show_default=True, help="Pixels of the shorter side.")
@click.option("--fix", is_flag=True, help="Move bad samples into FOLDER/aside. It deletes nothing.")
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True, help="One thread each.")
def check(folder: Path, body: Path | None, min_size: int, fix: bool, processes: int) -> int:
    """Prints a line for each problem in FOLDER. The exit code is 1 if it finds any.

    It finds unreadable samples and pictures, missing or misshapen arrays, NaN, keys that come twice, small pictures,
    hands outside the picture, poses that contradict joints_2d, and captions that name the other hand.
    """
    with console.status("reading"):
        from .check import check as look_through
        from .check import set_aside

        loaded = _body(body or _own(folder))
    with progress("shards") as show:
        report = look_through(folder, loaded, min_size=min_size, processes=processes, on_progress=show)
    for problem in report.problems:
        click.echo(problem)
    counts = report.counts
    more = sum(count for name, count in counts.items() if name.startswith("hands ") and int(name[6:]) > 2)
    console.print(
        f"{counts['samples']} samples, {counts['pictures']} pictures; with no hand {counts['hands 0']}, with one "
        f"{counts['hands 1']}, with two {counts['hands 2']}, with more {more}; {counts['people']} people."
        + (f" The hands of {counts['unknown']} are not annotated." if counts["unknown"] else "")
    )
    if counts["dropped"]:
        console.print(
            f"A checkpoint of one person learns the most visible one of each picture: {counts['dropped']} of "
            f"{counts['people']} people are dropped. hd-train --num-people 2 takes two, and hd-data latents --people "
            "each takes all, one by one."
        )
    kinds = Counter(problem.kind for problem in report.problems)
    console.print("Problems: " + (", ".join(f"{kind} {n}" for kind, n in kinds.most_common()) or "none."))
    if fix and report.problems:
        console.print(f"{set_aside(folder, report.problems)} files moved to {folder / 'aside'}.")
        return 0
    return 1 if report.problems else 0


@commands.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The page, .html.")
@click.option("--body", type=click.Path(path_type=Path), help="SMPL-H .npz; FOLDER/body.npz or the demo's by default.")
@click.option("--shown", type=click.IntRange(1), default=60, show_default=True, help="Random samples on the sheet.")
@click.option(
    "--counted", type=click.IntRange(1), default=2000, show_default=True, help="Random samples in the histograms."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Another seed, other samples.")
def look(folder: Path, output: Path, body: Path | None, shown: int, counted: int, seed: int) -> int:
    """Writes a page that shows FOLDER: skeletons over pictures, captions, and histograms of sizes, bends and skin."""
    with console.status("reading"):
        from .look import look as write_page

        body = body or _own(folder)
        loaded = _body(body)
    name = body.name if body is not None else "the demo's body"
    with progress("samples") as show:
        write_page(folder, output, loaded, shown=shown, counted=counted, seed=seed, body_name=name, on_progress=show)
    console.print(f"Open {output}")
    return 0


@commands.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--body", type=click.Path(path_type=Path), help="SMPL-H .npz; FOLDER/body.npz or the demo's by default.")
def poses(folder: Path, out: Path, body: Path | None) -> int:
    """Writes what the hands of FOLDER do into OUT, an .npz of gestures and their spread.

    `hd-run --image` reads it as BUNDLE/poses.npz: then the hands of a photograph look like the model's own.
    """
    with console.status("reading"):
        from .poses import poses_of

        loaded = _body(body or _own(folder))
    with progress("samples") as show:
        found = poses_of(folder, loaded, show)
    found.save(out)
    console.print(f"{out} knows {len(found.names) - 1} gestures.")
    return 0


def _own(folder: Path) -> Path | None:
    """The body that lies in a dataset."""
    from .files import BODY

    return folder / BODY if (folder / BODY).is_file() else None


def _body(path: Path | None) -> SMPLH:
    """The user's body, or the demo's: with the same placement, joints of all bodies nearly coincide."""
    from ..models.smplh import SMPLH

    if path is not None:
        return SMPLH.load(path)
    from ..demo.render import demo_body

    return demo_body()


def main() -> None:
    run("hd-data", commands, "Stopped. Run the same command again to go on.")


if __name__ == "__main__":
    main()
