"""`hd-repair`: the hands of your own pictures, painted again.

hd-repair demo photo.png --dry-run                       # what is found, and how sure it is
hd-repair demo photo.png --gesture open_hand --output repaired
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np

from .. import commands, shipped
from ..commands import INTERRUPTED
from ..contract import Manifest
from ..detection.detect import Detector, MediaPipe
from ..detection.draw import draw
from ..detection.hands import Seen, find, from_estimates
from ..detection.poses import Poses
from ..engines.adapted import chosen as chosen_adapters
from ..engines.backends import CHOICES, DEVICES
from ..errors import DetectionError, HanDiffuserError, OutputError
from ..files import lock, written
from ..pictures import encode_png
from ..runtime.options import given, settings_without
from ..runtime.pipeline import HanDiffuser
from ..runtime.reporting import line
from ..runtime.rest import joints_at_rest
from .files import NOTE, Original
from .wish import SMALLEST, Wish, choose, known_gesture

PATH = click.Path(path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("engines")
@click.argument("pictures", nargs=-1, required=True, type=PATH, metavar="PICTURE...")
@click.option("--output", "-o", default=Path("repaired"), show_default=True, type=PATH, metavar="FOLDER",
              help="Where repaired pictures go.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Write what was found as ID.hands.png, and paint nothing.")
@click.option("--gesture", metavar="NAME", help="What the hands shall do, such as open_hand; wrist and size stay.")
@click.option(
    "--side",
    type=click.Choice(["left", "right"]),
    help="Repair the hands of this side alone. Of a single hand it says the side.",
)
@click.option("--hands", "hands_file", type=PATH, metavar="FILE",
              help="Take the hands of this file instead of looking for some: a .hands.npz, or an estimate of HaMeR or "
              "WiLoR.")  # fmt: skip
@click.option("--hand-mean", type=PATH, metavar="FILE", help="An SMPL-H .npz, which some of those estimates need.")
@click.option("--box", metavar="X0,Y0,X1,Y1",
              help="A hand is here, in pixels, where none is found. Give its --gesture and --side.")  # fmt: skip
@click.option("--keep-pose", is_flag=True, help="Change a hand's look and not its pose.")
@click.option(
    "--caption", metavar="TEXT", help="What the picture shows around the hand.  [default: made of its colours]"
)
@click.option("--all", "every", is_flag=True, help="Also paint hands whose pose is not sure.")
@click.option("--lora", multiple=True, metavar="FILE[:SCALE]",
              help="Paint with an adapter (LoRA, .safetensors) merged into the weights; repeatable.")  # fmt: skip
@settings_without("size", "images_per_prompt")  # a repaired picture keeps its size, and there is one
@click.option("--batch-size", type=click.IntRange(1, 64), default=4, show_default=True, help="Hands painted at once.")
@click.option("--backend", type=click.Choice(CHOICES), default="auto", show_default=True, help="What runs the engines.")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads.  [default: all cores]")
@click.option("--quiet", "-q", is_flag=True, help="Only warnings and errors.")
@click.version_option(package_name="handiffuser", prog_name="hd-repair")
def repair_command(engines: str, pictures: tuple[Path, ...], output: Path, **options: Any) -> int:
    """Paints the hands of every PICTURE again, and leaves all other pixels as they are.

    ENGINES is a bundle folder, the word demo, or an id of the Hugging Face Hub. Each PICTURE becomes ID.png in the
    output folder, with ID.hands.png: what was found, and how sure. A hand whose pose is not sure stays as it is, and a
    sentence says so: name what it does with --gesture. After an interruption, run the same command again: it skips
    finished pictures. The exit code is 1 when a picture failed, and 130 after Ctrl-C.
    """
    wish = Wish(options["gesture"], options["every"], options["caption"], options["strength"], options["keep_pose"])
    if wish.gesture:
        known_gesture(wish.gesture, [name for name in Poses.load().names if name])
    box = _box(options["box"], options["gesture"], options["side"])
    chosen_adapters(options["lora"])  # one error, and not one for every picture
    bundle = shipped.resolve(engines, "bundle", options["quiet"])
    Manifest.load(bundle, verify=False)
    rest = joints_at_rest(bundle)
    job = Job(bundle, output, rest, wish, box, options)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with _locked(output):
            for number, path in enumerate(pictures):
                job.one(path, number, len(pictures))
    except KeyboardInterrupt:
        commands.ending()
        line("Interrupted. Run the same command again to go on.", "hd-repair:")
        return INTERRUPTED
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror or error}. Name another folder.") from error
    finally:
        job.close()
    return 1 if job.failed else 0


class Job:
    """All pictures of a command; the model and the detector load when the first picture needs them."""

    def __init__(
        self, bundle: Path, output: Path, rest: np.ndarray, wish: Wish, box: np.ndarray | None, options: dict[str, Any]
    ) -> None:
        self.bundle, self.output, self.rest, self.wish, self.box, self.options = (
            bundle,
            output,
            rest,
            wish,
            box,
            options,
        )
        self.failed = 0
        self._pipeline: HanDiffuser | None = None
        self._detector: Detector | None = None
        self._found: list[Seen] = []  # in the picture on its way
        self.settings = {name: value for name, value in given(options).items() if name != "strength"}
        self.settings["seed"] = options["seed"] or 0

    def one(self, path: Path, number: int, total: int) -> None:
        """Repairs a picture; what is wrong with it is said, and the next one comes."""
        from .repair import repair  # needs OpenCV; a wrong word is told without it

        try:
            started = time.perf_counter()
            original = Original.read(path)
            name = f"{path.stem}-{self._digest(original)}"
            done = self.output / f"{name}.png"
            if done.exists() and not self.options["dry_run"]:
                return self._say(f"{path} is done: {done}")
            seen = self._seen(original)
            self._write(self.output / f"{name}.hands.png", encode_png(draw(original.shown, seen)))
            chosen, said = choose(seen, self.wish, original.image, self.rest)
            for sentence in [f"{path} shows {' and '.join(map(str, seen))}.", *said]:
                self._say(sentence)
            if self.options["dry_run"]:
                return self._say(f"See {self.output / name}.hands.png")
            if not chosen:
                return self._say(f"{path} stays as it is.")
            again = self._detector if self.wish.automatic else None
            outcome = repair(
                self.pipeline,
                original.image,
                chosen,
                self.rest,
                self.wish,
                again,
                around=self._around(original),
                **self.settings,
            )
            for sentence in outcome.said:
                self._say(sentence)
            if not outcome.painted:
                return self._say(f"{path} stays as it is.")
            self._write(done, original.encoded(outcome.image, {NOTE: json.dumps(outcome.painted)}))
            captions = "; ".join(repr(hand["caption"]) for hand in outcome.painted)
            seconds = time.perf_counter() - started
            self._say(f"[{number + 1}/{total}] {done} ({len(outcome.painted)} painted as {captions}; {seconds:.1f} s)")
        except HanDiffuserError as error:
            self.failed += 1
            line(f"{path}: {error}", "hd-repair:", "red")

    @property
    def pipeline(self) -> HanDiffuser:
        if self._pipeline is None:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_, **__: line(str(message), "hd-repair: warning:", "yellow")
                self._pipeline = HanDiffuser.load(
                    self.bundle,
                    self.options["device"],
                    self.options["threads"],
                    self.options["batch_size"],
                    self.options["backend"],
                    lora=self.options["lora"],
                )
        return self._pipeline

    def close(self) -> None:
        for one in (self._pipeline, self._detector):
            if one is not None:
                one.close()

    def _seen(self, original: Original) -> list[Seen]:
        size, file = original.image.shape[:2], self.options["hands_file"]
        if self.box is not None:
            from .place import placed

            middle = (self.box[:2] + self.box[2:]) / 2
            if not ((middle > 0) & (middle < size[::-1])).all():
                raise DetectionError(
                    f"--box must have its middle in the picture of {size[1]}x{size[0]} pixels, got "
                    f"{self.options['box']}. Take the pixels of the upright picture."
                )
            if (self.box[2:] - self.box[:2]).max() < SMALLEST:
                raise DetectionError(
                    f"--box must be at least {SMALLEST:.0f} pixels wide or high, got {self.options['box']}. Give a "
                    "larger picture."
                )
            return [placed(self.box, self.options["side"], self.wish.gesture or "", self.rest)]
        if file is not None:
            from .repair import given_hands

            own = file.name.endswith(".hands.npz")
            seen = (
                given_hands(file, size, self.pipeline)
                if own
                else from_estimates(file, size, self.rest, self.options["hand_mean"])
            )
        else:
            self._detector = self._detector or MediaPipe()
            seen = self._found = find(original.shown, self.rest, self._detector, side=self.options["side"])
        seen = [one for one in seen if self.options["side"] in (None, one.side)]
        if not seen:
            raise DetectionError(
                "No hand was found. Say where one is with --box, --side and --gesture, or give --hands."
            )
        return seen

    def _around(self, original: Original) -> list[Seen]:
        """All hands that the detector finds: those that are not repaired keep their pixels."""
        if self.box is None and self.options["hands_file"] is None:
            return self._found
        try:
            self._detector = self._detector or MediaPipe()
            return find(original.shown, self.rest, self._detector)
        except DetectionError:
            return []

    def _digest(self, original: Original) -> str:
        """Eight digits of all that decides the result: another command writes beside, and the same one skips."""
        said = {
            name: str(value)
            for name, value in sorted(self.options.items())
            if name not in ("quiet", "dry_run", "threads", "lora")
        }
        if adapters := chosen_adapters(self.options["lora"]):  # by content; without them as before there were any
            said["lora"] = str([one.key for one in adapters])
        said["bundle"] = str(Manifest.load(self.bundle, verify=False).sha256)
        return hashlib.sha256(original.content + json.dumps(said).encode()).hexdigest()[:8]

    def _write(self, path: Path, content: bytes) -> None:
        with written(path) as temporary:
            temporary.write_bytes(content)

    def _say(self, sentence: str) -> None:
        if not self.options["quiet"]:
            line(sentence, "hd-repair:")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One command works in a folder at a time. Raises OutputError."""
    try:
        held = lock(folder / ".hd-repair.lock")
    except BlockingIOError:
        raise OutputError(f"Another hd-repair writes into {folder}. Wait for it, or name another --output.") from None
    try:
        yield
    finally:
        (folder / ".hd-repair.lock").unlink(missing_ok=True)
        held.close()


def _box(text: str | None, gesture: str | None, side: str | None) -> np.ndarray | None:
    """Left, top, right, bottom. Raises DetectionError."""
    if text is None:
        return None
    try:
        box = np.array([float(part) for part in text.split(",")])
    except ValueError:
        box = np.zeros(0)
    if box.shape != (4,) or not np.isfinite(box).all() or not (box[2:] > box[:2]).all():
        raise DetectionError(
            f"--box must be left,top,right,bottom in pixels, got {text!r}. Such as --box 40,60,200,220."
        )
    if gesture is None or side is None:
        raise DetectionError("--box must come with --gesture and --side, which a box does not tell.")
    return box


def main() -> None:
    commands.run("hd-repair", repair_command, "Interrupted. Run the same command again to go on.")
