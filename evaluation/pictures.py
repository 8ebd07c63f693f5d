"""Pictures to be judged: read from a folder in the sample format, or made first by an engine or a checkpoint.

    for shown in read_pictures(Path("out"), body=None):
        shown.image, shown.prompt, shown.hands

What is made is kept as hd-run keeps it, under the id of the sample whose prompt it is, so that a second run goes on.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import shipped
from ..contract import MANIFEST
from ..data.dataset import Index
from ..data.pictures import PICTURES
from ..data.samples import Bad, Sample, members, person, picture
from ..errors import EvaluationError, HanDiffuserError
from ..models.foreign import MODEL_INDEX
from ..runtime.outputs import OutputFolder
from ..runtime.requests import Request, RequestFile
from ..runtime.results import Failure, Picture
from ..schema import MisfitError
from .hands import Asked

SIDES = ("left", "right")
PLAIN = (*PICTURES, ".bmp", ".tif", ".tiff")
Say = Callable[[str], None]
Show = Callable[[int, int], None]  # done, in all


@dataclass
class Shown:
    """A picture and what is known of it."""

    key: str
    image: np.ndarray = field(repr=False)  # uint8 [H, W, 3]
    prompt: str
    hands: list[Asked] = field(repr=False)  # that it was painted from; empty where that is not known
    labels: dict[str, str]


def kind_of(what: str) -> str:
    """ "bundle", "checkpoint" or "folder": what a user names. Raises EvaluationError for nothing of the kind."""
    path = shipped.resolve(what, "bundle")
    if (path / MANIFEST).is_file():
        return "bundle"
    if (path / MODEL_INDEX).is_file():
        return "checkpoint"
    if path.is_dir():
        return "folder"
    raise EvaluationError(
        f"There is no folder {what}. Name a folder of pictures (what hd-run writes), a bundle, a checkpoint, or demo."
    )


def read_pictures(
    folder: Path, body: Path | None, say: Say, keys: Collection[str] | None = None
) -> Iterator[Shown | None]:
    """The folder's pictures one by one, or those of `keys` alone; None for what cannot be read, which is said."""
    if plain := plain_pictures(folder):
        yield from _read_plain(plain, say)
        return
    index = Index.open(folder)
    for number in range(len(index)):
        if keys is not None and index.entry(number).key not in keys:
            continue
        sample = index.sample(number)
        if isinstance(sample, Bad):
            say(f"left out: {sample}")
            yield None
            continue
        try:
            image = picture(sample)
            yield Shown(sample.key, image, sample.prompts[0], asked_hands(sample, image, body), labels_of(sample))
        except MisfitError as error:
            say(f"left out: {sample.key}: {error}")
            yield None


def count_pictures(folder: Path) -> int:
    """How many samples, or plain pictures, a folder holds. Raises DatasetError for none."""
    return len(plain_pictures(folder)) or len(Index.open(folder))


def plain_pictures(folder: Path) -> list[Path]:
    """The picture files of a folder that has neither shards nor a `.json`: photographs without any annotation."""
    if not folder.is_dir():
        return []
    files = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    if any(path.suffix.lower() in (".json", ".tar") for path in files):
        return []
    return [path for path in files if path.suffix.lower() in PLAIN]


def _read_plain(paths: Sequence[Path], say: Say) -> Iterator[Shown | None]:
    for path in paths:
        try:
            yield Shown(path.stem, picture(Sample(path.stem, [""], None, path.read_bytes())), "", [], {})
        except (OSError, MisfitError) as error:
            say(f"left out: {path.name}: {getattr(error, 'strerror', None) or error}")
            yield None


def labels_of(sample: Sample) -> dict[str, str]:
    return {name: word for name, word in (sample.meta.get("labels") or {}).items() if isinstance(word, str)}


def asked_hands(sample: Sample, image: np.ndarray, body: Path | None) -> list[Asked]:
    """The hands that a sample says it shows. Where it has no joints_2d they are posed: with `body`, or the demo's."""
    if sample.hands is None:
        return []
    people = [person(sample.hands, number) for number in range(sample.people)]
    if all("joints_2d" in one and "visibility" in one for one in people):
        places = [(one["joints_2d"], one["visibility"] > 0.5) for one in people]
    else:
        from ..data.hands import joints_in_picture
        from ..demo.render import demo_body
        from ..models.smplh import SMPLH

        loaded = demo_body() if body is None else SMPLH.load(body)
        joints, seen = joints_in_picture(people, [image.shape[1] / image.shape[0]] * len(people), loaded)
        places = list(zip(joints, seen, strict=True))
    return [
        Asked(name, joints[side].astype(np.float64))
        for joints, seen in places
        for side, name in enumerate(SIDES)
        if seen[side]
    ]


# --- making them ---


def wanted(
    against: Path | None, prompts: str | None, count: int | None, given: Path | None, seed: int, say: Say
) -> list[Request]:
    """What is to be painted: the lines of a prompts file, or the first wording of each sample of a folder.

    given: a folder to put the samples' own hands into, so that they are painted instead of stage 1's. seed: of the
    first; the next has the next one, as the same noise in every picture would make them more alike than they are.
    """
    if prompts is not None:
        requests = []
        for number, line in RequestFile(prompts):
            if isinstance(line, Request):
                own = line.seed if line.seed is not None else seed + number - 1
                requests.append(replace(line, id=line.id or f"prompt-{number:05d}", seed=own))
            else:
                say(f"left out: {prompts}, line {number}: {line}")
    elif against is not None and plain_pictures(against):
        raise EvaluationError(f"{against} holds pictures without prompts. Say what to paint: --prompts FILE.")
    elif against is not None:
        requests, index = [], Index.open(against)
        for number in range(len(index) if count is None else min(count, len(index))):
            sample = index.sample(number)
            if isinstance(sample, Bad):
                say(f"left out: {sample}")
                continue
            hands = None if given is None else _given(sample, given)
            if given is not None and hands is None:
                say(f"left out: {sample.key}: It has no hands to paint.")
                continue
            try:
                requests.append(Request(sample.prompts[0], picture_id(sample.key), seed + number, hands=hands))
            except HanDiffuserError as error:
                say(f"left out: {sample.key}: {error}")
    else:
        raise EvaluationError(
            "There is nothing to paint: name a folder whose prompts it shall follow, --against FOLDER, or --prompts "
            "FILE."
        )
    if not requests:
        raise EvaluationError("None of the prompts can be painted.")
    return requests[:count]


def picture_id(key: str) -> str:
    """A sample's key as the id of a picture: its characters that name no files are dashes."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", key)[:100] or "picture"


def _given(sample: Sample, folder: Path) -> str | None:
    if sample.hands is None or sample.people != 1 or "placement" not in sample.hands:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{picture_id(sample.key)}.hands.npz"
    content = members(sample)["hands.npz"]
    if not path.is_file() or path.read_bytes() != content:
        path.write_bytes(content)
    return str(path)


class Made(NamedTuple):
    """What was painted: a folder, which may hold more, and the keys in it that were asked for."""

    folder: Path
    keys: set[str]


class Painter:
    """A bundle in its engine, or a checkpoint in PyTorch: both take the same requests and draw the same noise."""

    what: str  # as the user named it
    name: str  # for reading
    digest: str

    def prepare(self, requests: Sequence[Request]) -> tuple[list[Request], list[Any]]:
        """All gaps filled in, and a Refused for each that it cannot run."""
        raise NotImplementedError

    def run(self, requests: Sequence[Request]) -> Iterator[Picture | Failure]:
        raise NotImplementedError

    def close(self) -> None: ...


class Engines(Painter):
    """A bundle, as hd-run runs it."""

    def __init__(self, what: str, options: dict[str, Any], say: Say) -> None:
        from ..runtime.pipeline import HanDiffuser

        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
            self.pipeline = HanDiffuser.load(
                what, options["device"], options["threads"], options["batch_size"], options["backend"]
            )
        manifest = self.pipeline.manifest
        self.what, self.digest = what, self.pipeline.digest
        self.name = f"{what} ({manifest.precision} bundle)"

    def prepare(self, requests: Sequence[Request]) -> tuple[list[Request], list[Any]]:
        return self.pipeline.prepare(requests)

    def run(self, requests: Sequence[Request]) -> Iterator[Picture | Failure]:
        return self.pipeline.run(list(requests))

    def close(self) -> None:
        self.pipeline.close()


def painter_of(what: str, options: dict[str, Any], say: Say, checkpoint: bool = False) -> Painter:
    """Loads a bundle or a checkpoint. checkpoint: the word demo means the shipped checkpoint."""
    is_demo = what == "demo" and checkpoint
    if not is_demo and kind_of(what) == "bundle":
        return Engines(what, options, say)
    from .eager import Torch

    return Torch(shipped.checkpoint_path() if is_demo else Path(what), options, what)


def make(painter: Painter, requests: Sequence[Request], folder: Path, say: Say, show: Show) -> Made:
    """Paints what is not there yet into a folder of the painter's own under `folder`.

    Raises EvaluationError when nothing could be painted.
    """
    out = folder / f"{picture_id(Path(painter.what).name)}-{painter.digest[:8]}"
    resolved, refused = painter.prepare(requests)
    for problem in refused:
        say(f"left out: prompt {problem.line}: {problem.sentence}")
    with OutputFolder(out) as kept:
        todo, other = [], set[str]()  # other: what is there under an id that is wanted, of another prompt
        for request in resolved:
            try:
                if not kept.done(request, painter.digest):
                    todo.append(request)
            except HanDiffuserError as error:
                other.add(str(request.id))
                say("left out: " + str(error).replace("--output", "--pictures"))
        done = len(resolved) - len(todo)
        show(done, len(resolved))
        for result in painter.run(todo):
            if isinstance(result, Failure):
                say(f"left out: {result.id}: {result.sentence}")
            else:
                kept.save(result)
            done += 1
            show(done, len(resolved))
        kept.flush()
    keys = {str(request.id) for request in resolved if (out / f"{request.id}.json").is_file()} - other
    if not keys:
        raise EvaluationError(f"No picture could be painted of {len(requests)} prompts.")
    return Made(out, keys)
