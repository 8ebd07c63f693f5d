"""Paints the pictures to judge: a bundle in its engine, or a checkpoint in PyTorch, from the same requests and noise.

    painter = painter_of("bundle", options, say)
    made = make(painter, wanted(Path("renders"), None, 96, None, 0, say), Path("out"), say, show)

A painted picture is kept as hd-run keeps it, under the id of its sample. A second run paints only the missing ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from .. import shipped
from ..data.dataset import Index
from ..data.samples import Bad, Sample, members
from ..errors import EvaluationError, HanDiffuserError
from ..runtime.outputs import OutputFolder
from ..runtime.requests import Request, RequestFile
from ..runtime.results import Failure, Picture
from .pictures import Say, Show, kind_of, picture_id, plain_pictures


def wanted(
    against: Path | None, prompts: str | None, count: int | None, given: Path | None, seed: int, say: Say
) -> list[Request]:
    """The requests to paint: the lines of a prompts file, or the first wording of each sample of a folder.

    given: a folder for the samples' own hands, which are painted instead of stage 1's. seed: of the first request; each
    next one adds 1, because the same noise in every picture would make the pictures too similar.
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
        raise EvaluationError(
            f"--against must hold prompts, got {against}, pictures without prompts. Say what to paint: --prompts FILE."
        )
    elif against is not None:
        requests, index = [], Index.open(against)
        for number in range(len(index) if count is None else min(count, len(index))):
            sample = index.sample(number)
            if isinstance(sample, Bad):
                say(f"left out: {sample}")
                continue
            hands = None if given is None else _given(sample, given)
            if given is not None and hands is None:
                say(f"left out: {sample.key}: it has no hands to paint.")
                continue
            try:
                caption = sample.prompts[0]  # read as it is written and cut after one chunk, as in training
                requests.append(
                    Request(caption, picture_id(sample.key), seed + number, hands=hands, plain_prompts=True)
                )
            except HanDiffuserError as error:
                say(f"left out: {sample.key}: {error}")
    else:
        raise EvaluationError(
            "A bundle or checkpoint has nothing to paint without prompts. Name a folder of samples, --against FOLDER, "
            "or a file, --prompts FILE."
        )
    if not requests:
        raise EvaluationError("No prompt can be painted. The lines above say why.")
    return requests[:count]


def _given(sample: Sample, folder: Path) -> str | None:
    if sample.hands is None or "placement" not in sample.hands:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{picture_id(sample.key)}.hands.npz"
    content = members(sample)["hands.npz"]
    if not path.is_file() or path.read_bytes() != content:
        path.write_bytes(content)
    return str(path)


class Made(NamedTuple):
    """The folder of painted pictures, and the keys of the requested ones. The folder may hold more."""

    folder: Path
    keys: set[str]


class Painter(Protocol):
    """What paints: `Engines`, or `eager.Torch`."""

    what: str  # as the user named it
    name: str  # for a reader
    digest: str

    def prepare(self, requests: Sequence[Request]) -> tuple[list[Request], list[Any]]:
        """The requests with the painter's defaults filled in, and a Refused for each that it cannot run."""

    def run(self, requests: Sequence[Request]) -> Iterator[Picture | Failure]: ...

    def close(self) -> None: ...


class Engines:
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
    """Loads a bundle or a checkpoint. checkpoint: "demo" means the shipped checkpoint, not the bundle."""
    is_demo = what == "demo" and checkpoint
    if not is_demo and kind_of(what) == "bundle":
        return Engines(what, options, say)
    from .eager import Torch

    return Torch(shipped.checkpoint_path() if is_demo else Path(what), options, what)


def make(painter: Painter, requests: Sequence[Request], folder: Path, say: Say, show: Show) -> Made:
    """Paints the missing pictures into the painter's own folder under `folder`.

    Raises EvaluationError when no picture can be painted.
    """
    out = folder / f"{picture_id(Path(painter.what).name)}-{painter.digest[:8]}"
    resolved, refused = painter.prepare(requests)
    for problem in refused:
        say(f"left out: prompt {problem.line}: {problem.sentence}")
    with OutputFolder(out) as kept:
        todo, other = [], set[str]()  # other: wanted ids that already hold a picture of another prompt
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
        raise EvaluationError(f"None of {len(requests)} prompts gave a picture. The lines above say why.")
    return Made(out, keys)
