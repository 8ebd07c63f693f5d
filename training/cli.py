"""`hd-train`: makes checkpoints from Stable Diffusion, and trains every stage on a dataset in `hd-run`'s format."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from .. import hub
from ..commands import run
from ..contract import MAX_PEOPLE
from ..errors import HanDiffuserError, TrainingError
from ..files import lock
from ..models.foreign import MODEL_INDEX, check_stable_diffusion, refuse_pointer
from ..shipped import resolve
from .loop import console
from .processes import run_processes
from .recipe import PLANS, STUDENTS, Recipe

if TYPE_CHECKING:
    from .run import Run

LOCK = ".hd-train.lock"  # in the run folder
HELP = {
    "vae": "Trains the autoencoder on the pictures of --data, for a checkpoint without a trained one.",
    "hand-prior": "Trains stage 1: prompts to SMPL-H hands. Needs no pictures.",
    "encoder": "Trains the Text+Hand encoder alone on the labels of --data, for a checkpoint without CLIP.",
    "pictures": "Trains stage 2: prompts and hands to pictures; all weights, or an adapter with --lora.",
    "distill": "Trains stage 2 to paint in few runs of its network, without guidance: --start is the teacher.",
    "distill-hands": "Trains stage 1 to find hands in few runs of its network: --start is the teacher.",
    "all": "Trains the recipe's stages, one after the other.",
}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="handiffuser", prog_name="hd-train")
def commands() -> None:
    """Makes checkpoints: from Stable Diffusion, and by training on a dataset (see hd-data).

    On several GPUs or machines: torchrun --nproc-per-node 8 -m handiffuser.training.cli -- pictures ...
    """


def _embeddings(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> list[tuple[Path, str | None]]:
    """ "cat.pt:<cat>" -> (path, "<cat>"); "cat.pt" -> (path, None)."""
    found: list[tuple[Path, str | None]] = []
    for value in values:
        path, colon, token = value.rpartition(":")
        whole = not colon or Path(value).exists()  # a path may contain a colon
        found.append((Path(value), None) if whole else (Path(path), token or None))
    return found


@commands.command()
@click.argument("source", metavar="STABLE_DIFFUSION")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--variant", type=click.Choice(["fp16", "bf16"]), help="Take these weights.  [default: float32, then what is there]"
)
@click.option(
    "--prediction-type",
    "prediction",
    type=click.Choice(["epsilon", "v_prediction"]),
    help="What the UNet of a single file predicts; 2.x files need it.",
)
@click.option(
    "--embedding",
    "added",
    multiple=True,
    callback=_embeddings,
    metavar="FILE[:TOKEN]",
    help="Textual inversion (.safetensors or .pt), under the placeholder TOKEN or its own; repeatable.",
)
@click.option("--seed", default=0, show_default=True, help="Of the random start of hand prior and hand tokens.")
def init(
    source: str,
    out: Path,
    variant: str | None,
    prediction: str | None,
    added: list[tuple[Path, str | None]],
    seed: int,
) -> int:
    """Makes the checkpoint OUT from STABLE_DIFFUSION 1.x or 2.x, untrained.

    STABLE_DIFFUSION is a folder in diffusers' layout, a single .safetensors file, or an id of the Hugging Face Hub
    (org/name or hf://org/name@revision), which is downloaded. Without hands (hd-run --no-hands) OUT makes the same
    pictures; training opens the gate for hands. The body is the demo's free one; hd-export --body takes yours.
    """
    if (out / MODEL_INDEX).exists():
        raise HanDiffuserError(
            f"{out} must be a new folder, got a checkpoint. Name another folder, or remove it first."
        )
    single = hub.parse(source) is None and Path(source).is_file()
    for flag, value, fits in (("--variant", variant, not single), ("--prediction-type", prediction, single)):
        if value is not None and not fits:
            what = "a single file, which has one" if single else "a folder or an id, whose scheduler says it"
            raise HanDiffuserError(f"{flag} must be left out for {what}, got {value}.")
    with contextlib.ExitStack() as stack:
        if single:
            folder = _unpacked(stack, Path(source), out, prediction)
        else:
            folder = _folder(source, variant)
        with console.status("reading"):
            check_stable_diffusion(folder)  # before PyTorch loads
            from .init import from_stable_diffusion, read_back

            checkpoint = from_stable_diffusion(folder, seed=seed, added=added, variant=variant)
    checkpoint.notes["from"] = _origin(source, folder)
    with console.status("writing"):
        checkpoint.save(out)
    words = checkpoint.tokenizer, checkpoint.special_tokens
    del checkpoint  # both at once would take twice the memory
    with console.status("reading it back"):
        checkpoint = read_back(out, *words)
    height, width = checkpoint.image_size
    if checkpoint.notes.get("placeholders"):
        console.print(f"In prompts: {' '.join(checkpoint.notes['placeholders'])}", markup=False)
    console.print(f"{out} makes pictures of {height} x {width}. Export it: hd-export {out} BUNDLE --precision fp16")
    return 0


@commands.command()
@click.argument("source", metavar="CHECKPOINT", type=click.Path(path_type=Path))
@click.argument("donor", metavar="FROM")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Pictures to compare autoencoders on.")
def grow(source: Path, donor: str, out: Path, data: Path) -> int:
    """Makes the checkpoint OUT: CHECKPOINT with all that FROM has learned and that fits.

    CHECKPOINT has the sizes, the words, the body and a trained autoencoder (hd-train vae). FROM, a checkpoint or the
    word demo, may have other words and other latents: its UNet goes on in the part of the new latents that is most like
    its own.
    """
    if (out / MODEL_INDEX).exists():
        raise HanDiffuserError(f"{out} must be a new folder, got a checkpoint. Name another folder, or remove it.")
    with console.status("reading"):
        from ..models.checkpoint import Checkpoint
        from .grow import grow as copy_what_fits
        from .run import Run

        checkpoint = Checkpoint.load(source)
        giver = Checkpoint.load(resolve(donor, "checkpoint"))
        images = Run(out, data, Recipe(), source).some_pictures(checkpoint.image_size)
    with console.status("comparing"):
        copy_what_fits(checkpoint, giver, images)
        checkpoint.save(out)
    console.print(f"{out} is written. Train it: hd-train all --start {out} --data {data} --output trained")
    return 0


def _folder(source: str, variant: str | None) -> Path:
    """A Stable Diffusion folder: the user's, or the Hub's copy for an id."""
    if hub.parse(source) is None:
        return Path(source)
    return hub.fetch(source, "stable-diffusion", variant, check_stable_diffusion)


def _unpacked(stack: contextlib.ExitStack, file: Path, out: Path, prediction: str | None) -> Path:
    """A single file as a folder beside OUT, until the stack closes."""
    refuse_pointer(file)
    from . import init  # noqa: F401 (it silences the libraries)
    from .single_file import to_folder

    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent)))
    with console.status("reading the single file"):
        return to_folder(file, folder, prediction)


def _origin(source: str, folder: Path) -> str:
    """Where a checkpoint comes from, for its notes: repository and commit, or the name of a folder or file."""
    id = hub.parse(source)
    return f"{id.repo}@{folder.name}" if id is not None else Path(source).resolve().name


OPTIONS = [
    click.option("--data", required=True, type=click.Path(path_type=Path), help="The dataset; see hd-data."),
    click.option("--start", help="Checkpoint to start from, or the word demo.  [default: the recipe's new one]"),
    click.option("--output", type=click.Path(path_type=Path), metavar="FOLDER|FILE.safetensors",
                 help="Write the checkpoint here at the end; a FILE gets the --lora adapter alone."),
    click.option("--recipe", default="sd15", show_default=True,
                 help="sd15, demo, demo-gpu, human, human-gpu, or your .toml file."),
    click.option("--num-people", type=click.IntRange(1, MAX_PEOPLE),
                 help="People of a picture at most.  [default: the recipe's, or as it starts]"),
    click.option("--mirrored/--no-mirrored", default=None,
                 help="Train both stages on mirror images, too, with left and right exchanged."),
    click.option("--run", "folder", type=click.Path(path_type=Path),
                 help="States, logs and samples; run again to go on.  [default: runs/ and the output's name]"),
    click.option("--processes", type=click.IntRange(1), help="Processes on a CPU.  [default: one a core]"),
    click.option("--half", is_flag=True, help="Write the checkpoint's weights in float16."),
    click.option("--steps", type=int, help="Steps of the optimizer."),
    click.option("--minutes", type=float, help="Minutes of training: it ends with the clock, at any speed."),
    click.option("--batch", type=int, help="Samples a step, for all processes together."),
    click.option("--learning-rate", type=float, help="The highest rate."),
    click.option("--precision", help="fp32, bf16 or fp16."),
    click.option("--accumulate", type=int, help="Parts of a batch, computed one after the other."),
    click.option("--gradient-checkpointing", is_flag=True, default=None, help="Less memory, more time."),
    click.option("--compile", is_flag=True, default=None, help="torch.compile."),
    click.option("--shard", is_flag=True, default=None, help="Spread weights and optimizer over processes (FSDP2)."),
    click.option("--workers", type=int, help="Processes that read samples ahead."),
    click.option("--seed", type=int, help="Seed of the order and the noise."),
    click.option("--set", "others", multiple=True, metavar="NAME=VALUE", help="Another entry of the stage's recipe."),
]  # fmt: skip


FLAGS = (
    "steps", "minutes", "batch", "learning_rate", "precision", "accumulate", "gradient_checkpointing", "compile",
    "shard", "workers", "seed", "lora", "runs",
)  # fmt: skip


def changed(recipe: Recipe, stages: tuple[str, ...], values: dict[str, Any]) -> Recipe:
    """The recipe with the flags' values, for each of these stages."""
    given = {name: values[name] for name in FLAGS if values.get(name) is not None}
    for entry in values["others"]:
        name, equals, text = entry.partition("=")
        if not equals:
            raise TrainingError(f"--set must be NAME=VALUE, got {entry}.")
        try:
            given[name.strip()] = msgspec.toml.decode(f"value = {text}")["value"]
        except msgspec.DecodeError:
            given[name.strip()] = text
    unknown = [name for name in given if not any(hasattr(recipe.plan(stage), name) for stage in stages)]
    if unknown:
        raise TrainingError(f"--set must name an entry of the recipe of {', '.join(stages)}, got {unknown[0]}.")
    for stage in stages:
        recipe = recipe.changed(stage, {name: v for name, v in given.items() if hasattr(recipe.plan(stage), name)})
    return recipe


def work(folder: Path, data: Path, recipe: Recipe, start: Path | None, stage: str) -> None:
    """One process's share of a stage."""
    from .run import Run

    Run(folder, data, recipe, start).train(stage, make=False)


def train(stage: str, **values: Any) -> int:
    """Trains a stage, or all of the recipe's."""
    from .run import Run

    recipe = Recipe.load(values["recipe"])
    if values["num_people"] is not None:
        recipe = msgspec.structs.replace(recipe, num_people=values["num_people"])
    if values["mirrored"] is not None:
        recipe = msgspec.structs.replace(recipe, mirrored=values["mirrored"])
    stages = recipe.stages if stage == "all" else (stage,)
    recipe = changed(recipe, stages, values)
    output, start = values["output"], values["start"]
    folder = values["folder"] or Path("runs") / (output.stem if output is not None else stage)
    begin = resolve(start, "checkpoint") if start is not None else None
    made = Run(folder, values["data"], recipe, begin)
    with alone(folder):
        _train(made, stages, values)
    return 0


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside the block, no other hd-train can use the run folder. Raises TrainingError where one does.

    The first of several processes holds the lock for all; the processes that it starts end with it.
    """
    if int(os.environ.get("RANK", "0")):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = lock(folder / LOCK)
    except BlockingIOError as error:
        raise TrainingError(
            f"Another hd-train uses {folder} ({error.strerror}). Wait for it, or name another --run."
        ) from None
    with held:
        yield


def _train(made: Run, stages: tuple[str, ...], values: dict[str, Any]) -> None:
    recipe, folder, begin, output = made.recipe, made.folder, made.start, values["output"]
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1  # by torchrun or accelerate
    if launched:
        import torch
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        with state.main_process_first():
            if state.is_main_process:
                made.prepare()
    else:
        made.prepare()
    for name in stages:
        if made.done(name):
            console.print(f"{name}: done already{made.otherwise(name)}")
            continue
        if launched:
            made.train(name, make=False)
        else:
            made.ready(name)
            run_processes(work, processes(values["processes"]), folder, values["data"], recipe, begin, name)
    if output is not None and int(os.environ.get("RANK", "0")) == 0:
        made.save(output, values["half"])
        console.print(
            f"{output} is written." if output.suffix else f"{output} is written. Export it: hd-export {output} BUNDLE"
        )


def processes(asked: int | None) -> int:
    """One on a GPU; on a CPU one for each core with one thread: far faster than one process of several threads."""
    import torch

    from ..cpu import usable_cores

    if torch.cuda.is_available():
        return 1
    return asked or usable_cores()


def _runs(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    if value is None:
        return None
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(
            f"must be whole numbers with commas, such as 4,2; got {value}", ctx, parameter
        ) from None


def _command(stage: str) -> None:
    def call(**values: Any) -> int:
        return train(stage, **values)

    call.__doc__ = HELP[stage]
    command: Any = call
    for option in reversed(OPTIONS):  # flags override the recipe
        command = option(command)
    if stage in STUDENTS:
        runs = click.option(
            "--runs", callback=_runs, metavar="N,...", help="Runs of the network, one student for each number."
        )
        command = runs(command)
    if stage in ("pictures", "distill", "all"):
        rank = click.option("--lora", type=int, metavar="RANK", help="Train an adapter of this rank alone.")
        command = rank(command)
    commands.command(stage, short_help=HELP[stage])(command)


for _stage in (*PLANS, "all"):
    _command(_stage)


def main() -> None:
    run("hd-train", commands, "Stopped. Run the same command again to go on from the last saved step.")


if __name__ == "__main__":
    main()
