"""Runs `hd-eval`: finds or paints the pictures, looks at them, and collects the figures."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ..detection.detect import MediaPipe
from ..errors import DetectionError, EvaluationError
from . import measure, painting, pictures, reference
from .features import load_extractor
from .measure import Instruments, Seen

Progress = Callable[[str], AbstractContextManager[pictures.Show]]


def instruments(options: dict[str, Any]) -> Instruments:
    """Detector, extractor and CLIP model for the options. Raises EvaluationError for a missing one."""
    clip = None
    if options["clip_folder"] is not None:
        from .clip import Clip

        clip = Clip(options["clip_folder"])
    if options["threads"]:
        import torch

        torch.set_num_threads(options["threads"])
    try:
        detector = None if options["no_detector"] else MediaPipe()
    except DetectionError as error:
        raise EvaluationError(f"{error} Or leave the detector out: --no-detector.") from None
    if detector is None and options["crops"] == "found":
        raise EvaluationError('--crops must be "asked" with --no-detector, got "found". Leave --no-detector out.')
    extractor = load_extractor(options["weights"])
    return Instruments(detector, extractor, clip, crops=options["crops"], least=options["min_crop"])


def work(
    what: str, options: dict[str, Any], tools: Instruments, say: pictures.Say, progress: Progress
) -> dict[str, Any]:
    """The document. Its "shown" has the best and the worst hands for the report."""
    against, kind = options["against"], pictures.kind_of(what)
    if options["reference"] is not None:
        if kind == "folder" or pictures.kind_of(options["reference"]) == "folder":
            raise EvaluationError(
                "WHAT and --reference must be bundles or checkpoints, got a folder of pictures. Name two that paint."
            )
        if tools.crops == "found":
            raise EvaluationError('--crops must be "asked" with --reference, got "found". Leave --crops out.')
    elif kind == "folder" and (options["prompts"] or options["given_hands"]):
        raise EvaluationError(
            f"WHAT must be a bundle or a checkpoint to paint prompts, got the folder {what}. Leave the prompts out."
        )
    others, labels = None, dict[str, dict[str, str]]()
    if against is not None:
        with progress(f"{against}") as show:
            others = _look(against, tools, options, say, show, detect=False)
        labels = {pictures.picture_id(k): words for k, words in zip(others.keys, others.labels, strict=True)}
        labels |= dict(zip(others.keys, others.labels, strict=True))
    sets: list[tuple[Path, set[str] | None]] = [(Path(what), None)]
    names = [what]
    if kind != "folder":
        made, names = paint(what, options, say, progress)
        sets = list(made)
    looks = []
    for (folder, keys), name in zip(sets, names, strict=True):
        with progress(f"looking at {name}") as show:
            looks.append(_look(folder, tools, options, say, show, keys, labels=labels))
        if not looks[-1].keys:
            raise EvaluationError(f"WHAT must hold a readable picture, got {folder}. Name another folder.")
    seen = looks[-1]
    document = {
        "settings": measure.settings(tools, None if against is None else str(against)),
        "folder": str(sets[-1][0]),
        **measure.figures(seen, others),
        "notes": remarks(tools, seen, others),
    }
    if options["reference"] is not None:
        document["reference"] = names[0]
        document["differences"] = reference.compare(looks[0], seen, others)
        document["psnr"] = reference.psnr(sets[0][0], sets[1][0], {*looks[0].keys} & {*seen.keys})
        document["verdict"] = reference.verdict(document["differences"], document["psnr"])
        document["notes"].append(document["verdict"])
    document["shown"] = (seen.best, seen.worst)
    return document


def paint(
    what: str, options: dict[str, Any], say: pictures.Say, progress: Progress
) -> tuple[list[painting.Made], list[str]]:
    """Paints the prompts, with the reference first if there is one. Returns pictures and names."""
    made, names = [], []
    for number, name in enumerate(name for name in (options["reference"], what) if name is not None):
        is_reference = options["reference"] is not None and number == 0
        painter = painting.painter_of(name, options, say, checkpoint=is_reference)
        hands = options["pictures"] / "given-hands" if options["given_hands"] else None
        requests = painting.wanted(
            options["against"], options["prompts"], options["count"], hands, options["seed"], say
        )
        with progress(f"painting with {painter.name}") as show:
            made.append(painting.make(painter, requests, options["pictures"], say, show))
        names.append(painter.name)
        painter.close()
    return made, names


def _look(
    folder: Path,
    tools: Instruments,
    options: dict[str, Any],
    say: pictures.Say,
    show: pictures.Show,
    keys: set[str] | None = None,
    **more: Any,
) -> Seen:
    shown = pictures.read_pictures(folder, options["body"], say, keys)
    return measure.look(shown, tools, pictures.count_pictures(folder) if keys is None else len(keys), show, **more)


def lacking(what: str, thing: str, ours: int, theirs: int) -> list[str]:
    """A sentence where one side has too few for a distance."""
    if min(ours, theirs) >= 2:
        return []
    first, _, rest = thing.partition(" ")  # "hand whose place is known"
    one, other = (f"{count or 'no'} {first}{'s' * (count > 1)} {rest}".rstrip() for count in (ours, theirs))
    return [f"{what} are missing: they need two on each side, got {one} here and {other} in --against."]


def remarks(tools: Instruments, seen: Seen, others: Seen | None) -> list[str]:
    """Notes that belong to the figures."""
    out = []
    if others is not None:
        fewest, features = min(len(seen.features), len(others.features)), seen.features.shape[1]
        if fewest >= 2 and tools.extractor.warning:
            out.append(tools.extractor.warning)
        out += lacking("FID and KID", "picture", len(seen.features), len(others.features))
        if 2 <= fewest <= 5 * features:
            out.append(
                f"FID of {fewest} pictures and {features} features is too high: read KID, or compare only FIDs of "
                "equally many pictures."
            )
        crops = len(seen.crop_features), len(others.crop_features)
        out += lacking("FID-H and KID-H", "hand whose place is known", *crops)
        if min(crops) < 2 and tools.crops == "asked":
            out[-1] += " With --crops found the detector finds the places of the hands."
    if seen.detected and not seen.asked:
        out.append("The pictures do not say which hands they show: only the surest hand of each counts.")
    if tools.detector is None:
        out.append("No detector ran: the metrics of hands are left out.")
    return out
