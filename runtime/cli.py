"""`hd-run ENGINES PROMPT...`: prompts in, a folder of pictures out.

hd-run demo "a right hand making a fist, blue background" "two open hands" --seed 7 --output out
hd-run engines/ --prompts prompts.jsonl --batch-size 8
some-program | hd-run demo --prompts -
"""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import click

from .. import commands, grammar, shipped
from ..commands import INTERRUPTED
from ..contract import MANIFEST, Manifest, read_size
from ..engines.adapted import chosen
from ..engines.backends import CHOICES, DEVICES
from ..errors import HanDiffuserError, OutputError, RequestError
from ..files import written
from ..hands import NO_HANDS, hands_file, load_hands
from ..hints import hint
from ..settings import SETTINGS
from .bundle import Bundle
from .canvas import content_of
from .noise import LATENTS
from .options import given, setting_options
from .outputs import OutputFolder
from .pipeline import HanDiffuser
from .reporting import Reporter
from .requests import PICTURES, Request, RequestFile, Resolver, absolute, moved
from .results import Failure

# What Ray takes as an address.
ADDRESS = re.compile(r"auto|local|(ray://)?\S+:\d+")


def check(context: click.Context, _: click.Parameter, asked: bool) -> None:
    """Prints what is installed and what runs here; see `check.report`."""
    if asked:
        from .check import report

        lines, code = report()
        click.echo("\n".join(lines))
        context.exit(code)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("engines", metavar="ENGINES")
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1)
@click.option(
    "--prompts",
    "prompts_file",
    metavar="FILE",
    help="A .txt (a prompt a line) or .jsonl file of prompts; - reads either kind from standard input.",
)
@click.option("--strict", is_flag=True, help="Exit code 1 if any prompt was refused or any picture failed.")
@click.option(
    "--list-words",
    is_flag=True,
    help="Show the words that the model was trained on, and make no picture.",
)
@click.option("--output", "-o", default="out", show_default=True, metavar="FOLDER", help="Where pictures go.")
@setting_options
@click.option(
    "--hand-params",
    metavar="FILE",
    help="Take the hands of this .hands.npz, edited or not. Its camera stays: bending a finger moves nothing else. "
    "Without a camera in the file, placement says where the hands are.",
)
@click.option(
    "--image",
    "photo",
    metavar="PHOTO",
    help="Take the hands of this photograph, and write PHOTO.photo.hands.png, which shows how sure each is. Without a "
    "PROMPT the picture shows what they do.",
)
@click.option("--no-hands", is_flag=True, help="Paint the prompt alone, without hands.")
@click.option(
    "--init-image",
    "image",
    metavar="FILE",
    help="Start from this picture (PNG, JPEG, WebP). It becomes as large as the model's pictures. See --strength.",
)
@click.option(
    "--mask",
    metavar="FILE",
    help="With --init-image: paint again what is white or transparent in this picture, and keep the rest.",
)
@click.option(
    "--lora",
    multiple=True,
    metavar="FILE[:SCALE]",
    help="Paint with an adapter (LoRA, .safetensors) merged into the weights; repeatable. It is merged once and kept.",
)
@click.option(
    "--lora-memory",
    type=click.FloatRange(0, 10_000, min_open=True),
    metavar="GB",
    help="Memory for engines of adapters that lines of a .jsonl name.  [default: half of what is free]",
)
@click.option("--batch-size", type=click.IntRange(1, 4096), default=8, show_default=True, help="Pictures made at once.")
@click.option("--backend", type=click.Choice(CHOICES), default="auto", show_default=True, help="What runs the engines.")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads.  [default: all cores]")
@click.option("--no-overlap", is_flag=True, help="On a GPU: use one stream, without overlap.")
@click.option("--no-warm-up", is_flag=True, help="On a GPU: load engines at their first use, not before.")
@click.option(
    "--ray",
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    help="Use all GPUs or cores of the Ray cluster at ADDRESS, or of this machine. Put it after the prompts.",
)
@click.option("--ray-workers", type=click.IntRange(1, 100_000), help="Ray actors.  [default: one for each GPU or core]")
@click.option("--quiet", "-q", is_flag=True, help="Only warnings and errors.")
@click.option(
    "--check",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=check,
    help="Show what is installed and what runs on this machine, then exit: 0 where pictures can be made, else 1.",
)
@click.version_option(package_name="handiffuser", prog_name="hd-run")
def run(engines: str, prompts: tuple[str, ...], prompts_file: str | None, output: str, **options: Any) -> int:
    """Makes a picture of every PROMPT, with the hands that it describes.

    ENGINES is a bundle folder that hd-export made, the word `demo` for the one that ships with this package, or an id
    of the Hugging Face Hub (org/name or hf://org/name@revision), which is downloaded.

    For each picture the output folder gets ID.png, ID.hands.npz (SMPL-H arrays), ID.hands.png (the skeleton drawn
    over it) and ID.json. index.html shows them all. After an interruption, run the same command again: it skips
    finished pictures. The exit code is 0 when any picture is there, 1 when the run made none or had to stop, and 130
    after Ctrl-C. With --strict it is also 1 when a prompt was refused or a picture failed.
    """
    check_order(engines, prompts, prompts_file, options["ray"])
    if options["list_words"]:
        return list_words(engines)
    say = Reporter(options["quiet"])
    warn_of_quotes(engines, prompts, say)
    if options["photo"] is not None:
        prompts = hands_of_photo(engines, prompts if prompts or prompts_file else None, output, options, say)
    hands = NO_HANDS if options["no_hands"] else options["hand_params"]
    settings = {**given(options), "hands": hands, "image": options["image"], "mask": options["mask"]}
    settings["lora"] = options["lora"] or None
    check_files(options)
    source = Prompts(prompts, prompts_file, settings, say)
    lines = iter(source)
    first = next(lines, None)
    if first is None:
        return nothing_to_do(engines, source)

    # The cheap checks come first: the manifest, then the folder, then the loading.
    bundle = shipped.resolve(engines, "bundle", options["quiet"])
    Manifest.load(bundle, verify=False)
    if options["ray"] is not None:
        return _on_ray(bundle, output, chain([first], lines), source, options, say)
    from .remote import open_folder  # which imports fsspec for URLs

    with open_folder(output, say=say.warning) as folder:
        pictures = len(source) * options["images_per_prompt"]
        pipeline = _loaded(bundle, pictures, options, say, shared_adapters(source, options))
        resolver = pipeline.resolver(options["seed"] or 0, options["images_per_prompt"])
        queue = Todo(chain([first], lines), resolver, folder, pipeline.digest, source)

        failed, stopped, code = 0, "", 0
        started = time.perf_counter()
        try:
            with say.progress(pictures) as progress:
                # The first pictures start before the rest of a long file is read.
                head = list(islice(filter(None, queue), options["batch_size"]))
                if head and not options["no_warm_up"]:
                    pipeline.warm_up(len(head), progress.event)
                todo = head if len(head) < options["batch_size"] else chain(head, queue)
                for result in pipeline.run(todo, progress.event):
                    if isinstance(result, Failure):
                        failed += 1
                        say.problem(f"{result.id}: {result.sentence}")
                        continue
                    for warning in result.warnings:
                        say.warning_of(result.id, warning)
                    folder.save(result)
                    progress.picture(queue.skipped + source.refused)
                folder.flush()
        except KeyboardInterrupt:
            commands.ending()  # pictures may be on their way to the disk
            stopped, code = "Interrupted. Run the same command again to go on.", INTERRUPTED
        except HanDiffuserError as error:
            stopped, code = str(error), 1
        for sentence in pipeline.loop.warnings():
            say.warning(sentence)
        seconds = time.perf_counter() - started
        folder.drain()  # after Ctrl-C finished pictures may still be on their way to the disk
        return _end(folder, say, seconds, queue.skipped, source.refused, failed, stopped, code, options["strict"])


def shared_adapters(source: Prompts, options: dict[str, Any]) -> tuple[str, ...]:
    """The adapters to load with the weights, because all pictures have them: so the weights without them are not
    loaded."""
    return () if source.file is not None and source.file.names_adapters else options["lora"]


def _loaded(bundle: Path, pictures: int, options: dict[str, Any], say: Reporter, lora: tuple[str, ...]) -> HanDiffuser:
    """The bundle, for a run of so many pictures, with the adapters of all; warnings go to `say`."""
    say.merge(bundle, lora, options["backend"], options["device"])
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say.warning(str(message))
        return HanDiffuser.load(
            bundle,
            options["device"],
            options["threads"],
            options["batch_size"],
            options["backend"],
            overlap=not options["no_overlap"],
            pictures=pictures,
            lora=lora,
            lora_memory=options["lora_memory"],
        )


def check_order(engines: str, prompts: tuple[str, ...], prompts_file: str | None, ray: str | None) -> None:
    """Raises RequestError where arguments are in the wrong order, or a prompt names a setting."""
    if ray is not None and not ADDRESS.fullmatch(ray):
        raise RequestError(
            f"--ray must be an address such as 10.0.0.1:6379, or stand last, got {ray!r}. "
            f'If that is a prompt, put it before --ray: hd-run {engines} "{ray}" --ray.'
        )
    options = [name for parameter in run.params for name in parameter.opts]
    for word in prompts:  # steps=8 would be painted as a prompt
        name, equals, _ = word.partition("=")
        if equals and re.fullmatch(r"[\w-]+", name) and (said := hint(name, "hd-run", options)):
            raise RequestError(f"A setting must be an option, got {word!r}. {said}")
    if engines == "demo" or Path(engines).exists():
        return
    bundle = next((word for word in prompts if word == "demo" or (Path(word) / MANIFEST).is_file()), None)
    if bundle is not None:
        rest = " ".join(f'"{word}"' for word in (engines, *prompts) if word is not bundle)
        raise RequestError(f"The bundle must come before the prompts, got {engines!r}. Type: hd-run {bundle} {rest}")
    alone = not prompts and prompts_file is None
    if "/" not in engines and (alone or " " in engines.strip()):
        raise RequestError(
            f"The first argument must be a bundle, got {engines!r}. The word demo names the one that ships: "
            f'hd-run demo "{engines}"'
        )


def warn_of_quotes(engines: str, prompts: tuple[str, ...], say: Reporter) -> None:
    """Warns where the user seems to have forgotten the quotes: two prompts of one word each follow each other."""
    single = [len(prompt.split()) == 1 for prompt in prompts]
    if any(one and following for one, following in pairwise(single)):
        words = ", ".join(repr(prompt) for prompt in prompts)
        say.warning(
            f"{len(prompts)} prompts were given: {words}. If they are one prompt, put it in quotes: "
            f'hd-run {engines} "{" ".join(prompts)}"'
        )


def check_files(options: dict[str, Any]) -> None:
    """Raises RequestError for a file that cannot be read: one error, and not one for every prompt."""
    if options["hand_params"] is not None:
        load_hands(options["hand_params"])
    for name in PICTURES:
        if options[name] is not None:
            content_of(name, options[name])
    chosen(options["lora"])


def list_words(engines: str) -> int:
    """Prints the words that a bundle was trained on, in groups where the demo's grammar knows them."""
    known = Manifest.load(shipped.resolve(engines, "bundle"), verify=False).words
    if not known:
        click.echo(f"{engines} reads prompts with CLIP: any words go.")
    elif grammar.is_demo(known):
        click.echo(grammar.overview())
    else:
        click.echo(f"{engines} was trained on these words: {', '.join(sorted(known))}")
    return 0


def nothing_to_do(engines: str, source: Prompts) -> int:
    """The exit code where every prompt was refused. Raises RequestError where none was given."""
    if source.refused:
        return 1
    raise RequestError(f'There is nothing to do. Give a prompt, such as hd-run {engines} "a fist", or --prompts FILE.')


def hands_of_photo(
    engines: str, prompts: tuple[str, ...] | None, output: str, options: dict[str, Any], say: Reporter
) -> tuple[str, ...]:
    """Writes the hands of --image into the output folder, makes them --hand-params, and returns the prompts: where the
    user gave none, what the hands do."""
    from ..detection.photo import Photo
    from ..detection.poses import Poses
    from .rest import joints_at_rest

    for name in ("hand_params", "no_hands"):
        if options[name]:
            raise RequestError(f"--image must stand without --{name.replace('_', '-')}, got both. Leave one out.")
    if "://" in output:
        raise RequestError(f"--output must be a folder of this machine with --image, got {output}. Name a folder.")
    folder = shipped.resolve(engines, "bundle", options["quiet"])
    manifest, poses = Manifest.load(folder, verify=False), Poses.of(folder)
    photo = Photo.read(options["photo"])
    asked = str(options["size"] or "")
    size = read_size(asked) if re.match(SETTINGS["size"].pattern, asked) else manifest.image_size
    told = photo.hands_for(joints_at_rest(folder), size, poses)
    beside = Path(output) / f"{photo.path.stem}.photo"
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        for suffix, content in ((".hands.npz", hands_file(told.arrays, told.caption)), (".hands.png", told.png())):
            with written(beside.with_name(beside.name + suffix)) as temporary:
                temporary.write_bytes(content)
    except OSError as error:
        raise OutputError(
            f"{beside.parent} cannot be written: {error.strerror or error}. Name another folder with --output."
        ) from error
    options["hand_params"] = str(beside) + ".hands.npz"
    for sentence in [*told.said, f"See them: {beside}.hands.png"]:
        say.note(sentence)
    return (told.caption,) if prompts is None else prompts


def _on_ray(
    bundle_folder: Path,
    output: str,
    lines: Iterator[tuple[str, Request]],
    source: Prompts,
    options: dict[str, Any],
    say: Reporter,
) -> int:
    """`run` on a Ray cluster: this process keeps the folder's lock and the count, actors make the pictures."""
    from ..serving import ray

    folder_of_engines = bundle_folder.resolve()
    bundle = Bundle.load(folder_of_engines)
    output = output if "://" in output else str(Path(output).resolve())
    from .remote import open_folder  # which imports fsspec for URLs

    with open_folder(output, say=say.warning) as folder:
        images = options["images_per_prompt"]
        resolver = Resolver(
            bundle.manifest.defaults, bundle=bundle.digest, seed=options["seed"] or 0, images=images, check=bundle.check
        )
        queue = Todo(lines, resolver, folder, bundle.digest, source)
        todo = [absolute(request) for request in queue if request is not None]
        failed, code, stopped = 0, 0, ""
        started = time.perf_counter()
        try:
            if todo:
                room = ray.connect(options["ray"])
                workers = options["ray_workers"] or max(1, room // (options["threads"] or 1))
                how = ray.Options(
                    str(folder_of_engines),
                    options["device"],
                    options["threads"] or 1,
                    options["batch_size"],
                    options["backend"],
                    pictures=-(-len(todo) // workers),
                    lora=tuple(moved(shared_adapters(source, options), Path.cwd())),
                    lora_memory=options["lora_memory"],
                )
                steps = {str(request.id): len(bundle.table(LATENTS, request).rows) for request in todo}
                total = len(source) * images
                # Ray prints on stdout which of its processes ended. This command reports each picture itself.
                with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), say.progress(total) as progress:
                    for row in ray.paint(todo, how, output, workers):
                        folder.flush()  # raises where another run has taken the folder
                        if row["state"] == "failed":
                            failed += 1
                            say.problem(f"{row['id']}: {row['sentence']}")
                            continue
                        for warning in row["warnings"]:
                            say.warning_of(row["id"], warning)
                        folder.saved.append(row["id"])
                        progress.event("steps", steps[row["id"]])
                        progress.picture(queue.skipped + source.refused)
        except KeyboardInterrupt:
            commands.ending()
            stopped, code = "Interrupted. Run the same command again to go on.", INTERRUPTED
        except HanDiffuserError as error:
            stopped, code = str(error), 1
        seconds = time.perf_counter() - started
        return _end(folder, say, seconds, queue.skipped, source.refused, failed, stopped, code, options["strict"])


def _end(
    folder: OutputFolder,
    say: Reporter,
    seconds: float,
    skipped: int,
    refused: int,
    failed: int,
    stopped: str,
    code: int,
    strict: bool,
) -> int:
    """Writes the contact sheet, reports the result, and returns the exit code."""
    index = ""
    try:
        index = str(folder.write_index())
    except OutputError as error:
        stopped, code = stopped or str(error), code or 1
    if stopped:
        say.problem(stopped)
    say.summary(folder, index, seconds, skipped, refused, failed)
    if strict and (refused or failed):
        code = code or 1
    return code if code or folder.saved or skipped else 1


class Prompts:
    """The user's prompts: yields (place, Request) of the command line, then of the file, as it reads them.

    It reports and counts those that it refuses. `len` counts all, good and bad.
    """

    def __init__(self, prompts: tuple[str, ...], path: str | None, settings: dict[str, Any], say: Reporter) -> None:
        self.prompts, self.settings, self.say = prompts, settings, say
        self.file = RequestFile(path, **settings) if path is not None else None
        self.refused = 0

    def __len__(self) -> int:
        return len(self.prompts) + (len(self.file) if self.file is not None else 0)

    def refuse(self, place: str, error: RequestError) -> None:
        self.refused += 1
        self.say.problem(f"{place}: {error}")

    def __iter__(self) -> Iterator[tuple[str, Request]]:
        for number, prompt in enumerate(self.prompts, 1):
            try:
                request = Request(prompt, **self.settings)
            except RequestError as error:
                self.refuse(f"prompt {number}", error)
            else:
                yield f"prompt {number}", request
        if self.file is not None:
            for number, line in self.file:
                place = f"{self.file.name}, line {number}"
                if isinstance(line, RequestError):
                    self.refuse(place, line)
                else:
                    yield place, line


class Todo:
    """The requests that are still to do, filled in one by one as the loop has room for them.

    It skips and counts finished pictures, and refuses what this bundle cannot run.
    """

    def __init__(
        self,
        lines: Iterator[tuple[str, Request]],
        resolver: Resolver,
        folder: OutputFolder,
        bundle: str,
        prompts: Prompts,
    ) -> None:
        self.lines, self.resolver, self.folder, self.bundle, self.prompts = lines, resolver, folder, bundle, prompts
        self.skipped = 0
        self._requests = self._each()

    def __iter__(self) -> Iterator[Request | None]:
        return self._requests

    def _each(self) -> Iterator[Request | None]:
        for place, request in self.lines:
            try:
                for filled in self.resolver.each(request):
                    if self.folder.done(filled, self.bundle):
                        self.skipped += 1
                        if self.skipped % 64 == 0:
                            yield None  # the loop goes on while thousands of finished pictures are skipped
                    else:
                        yield filled
            except RequestError as error:
                self.prompts.refuse(place, error)


def main() -> None:
    """Entry point: one sentence and an exit code instead of a traceback."""
    commands.run("hd-run", run)


if __name__ == "__main__":
    main()
