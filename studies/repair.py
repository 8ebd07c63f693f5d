"""Does hd-repair help? Spoiled pictures of the demo's world, repaired in several ways, beside the truth.

    spoiled      as they are
    automatic    hd-repair PICTURE: it finds the hand, and declines where it is not sure
    named        hd-repair PICTURE --gesture NAME --side SIDE
    given        hd-repair PICTURE --hands TRUTH
    adetailer    the common way with the same model: detect, paint a blurred box again without hands
    truth        the same picture with a good hand

    python studies/repair.py OUT --count 144 -o repair.json
    python studies/repair.py OUT --count 36 --sheet sheet.png          # pictures of all ways
    python studies/repair.py OUT --way named --way truth               # only these

Kinds of spoiling and backgrounds: `spoiled.py`. Who counts fingers: `counting.py`. The detector looks at each hand in a
crop of NEAR times its true box, so that small hands in large pictures count as much as others.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import counting
import cv2
import numpy as np
from handiffuser import HanDiffuser
from handiffuser.commands import run
from handiffuser.data.cli import progress
from handiffuser.detection.detect import MediaPipe
from handiffuser.detection.fit import Fitted
from handiffuser.detection.hands import Seen, closer, find, fitted
from handiffuser.evaluation.cli import finish, say
from handiffuser.evaluation.distances import MEAN_DRAWS, mean, resampled
from handiffuser.evaluation.hands import Asked, match
from handiffuser.files import written
from handiffuser.pictures import encode_png, resized
from handiffuser.repair.repair import Outcome, repair
from handiffuser.repair.wish import MOVED, SURE, Wish, choose
from handiffuser.rotations import axis_angle_to_matrix
from handiffuser.runtime.rest import joints_at_rest
from PIL import Image
from rich.console import Console
from rich.table import Table
from spoiled import GROUNDS, KINDS, STRETCHED, Case, make

WAYS = ("spoiled", "automatic", "named", "given", "adetailer", "truth")
TIMED = ("automatic", "named", "given")  # the common way takes what the automatic way found
NEAR = 2.2
FRESH = 20_400_000  # spoiled.SEED chose the limits of the automatic way, and 555 the weights of sureness
SAID = (0, 0.3, 0.5, 0.7, 0.8, 0.9, 1.01)  # groups of sureness
TURNED = 15.0  # degrees a joint: the pose is right
DROP = 0.1  # of the joints: more of them lost is worse than before
BOX, STRENGTH, STEPS, BLUR = 1.2, 0.5, 8, 4.0  # ADetailer's: box, denoising, steps and pixels of blur
SHOWN = {"found": "found", "score": "score, misses 0", "joints": "joints within 10 %", "side": "side",
         "gesture": "gesture read right", "voted": "gesture read right in three looks", "fingers": "fingers right",
         "seam": "seam", "seam_truth": "seam of the truth",
         "ground": "background error, 0 to 255", "outside": "bytes changed outside", "painted": "painted",
         "worse": "worse than before", "better": "better than before", "pictures": "time, in pictures"}  # fmt: skip
SHARES = ("found", "joints", "side", "gesture", "voted", "fingers", "painted", "worse", "better")
WORSE = "of all pictures: joints within 10 % fall by more than a tenth, or a right number of fingers becomes wrong"


class Bench:
    """What the ways share: the model, the detector and the body. seconds: CPU seconds of one picture."""

    def __init__(self, engines: str) -> None:
        self.pipeline = HanDiffuser.load(engines, "cpu", threads=1)
        self.detector, self.rest = MediaPipe(), joints_at_rest("demo" if engines == "demo" else Path(engines))
        self.seen: list[Seen] = []  # the hands that were found in the case's picture
        self.pipeline.generate("a fist", seed=1)
        started = time.process_time()
        for seed in range(4):
            self.pipeline.generate("an open hand", seed=seed)
        self.seconds = (time.process_time() - started) / 4

    def close(self) -> None:
        self.pipeline.close()
        self.detector.close()


def automatic(bench: Bench, case: Case) -> Outcome | None:
    """None where it declines, or finds nothing."""
    bench.seen = find(case.picture, bench.rest, bench.detector)
    return painted(bench, case, bench.seen, Wish(every=True))  # `gated` declines later: its limits were chosen so


def named(bench: Bench, case: Case) -> Outcome | None:
    """A person says gesture and side of the hands; see `detection.hands.find`."""
    seen = find(case.picture, bench.rest, bench.detector, side=case.side)
    return painted(bench, case, [one for one in seen if one.side == case.side], Wish(gesture=case.gesture))


def given(bench: Bench, case: Case) -> Outcome | None:
    return painted(bench, case, [Seen(case.hand)], Wish())


def painted(bench: Bench, case: Case, seen: Sequence[Seen], wish: Wish) -> Outcome | None:
    chosen = choose(seen, wish, case.picture, bench.rest)[0]
    if not chosen:
        return None
    out = repair(bench.pipeline, case.picture, chosen, bench.rest, wish, bench.detector, seed=1)
    for note, one in zip(out.painted, chosen, strict=True):
        if isinstance(one.hand, Fitted) and one.found is not None:
            note |= {"sure": one.sureness, "score": one.found.score, "residual": one.hand.residual,
                     "degrees": float(one.hand.degrees.mean()), "named": max(one.hand.gestures.values())}  # fmt: skip
    return out


def adetailer(bench: Bench, case: Case) -> Outcome | None:
    """Each found hand: its box with a blurred border is painted again under the picture's prompt, without hands."""
    out = Outcome(case.picture, np.zeros(case.picture.shape[:2], bool))
    size = bench.pipeline.manifest.image_size
    for one in (seen.found for seen in bench.seen if seen.found is not None):
        points = one.joints * case.picture.shape[1::-1]
        box, part = (around(points, share) for share in (BOX, 1.6 * BOX))
        crop = resized(cut(out.image, part), size)
        y, x = np.mgrid[: size[0], : size[1]] / size[0] * (part[2] - part[0])
        mask = (np.abs(x - (part[2] - part[0]) / 2) < (box[2] - box[0]) / 2) & (
            np.abs(y - (part[3] - part[1]) / 2) < (box[3] - box[1]) / 2
        )
        soft = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), BLUR)
        made = bench.pipeline.generate(case.prompt, seed=1, image=crop, mask=mask, strength=STRENGTH, steps=STEPS,
                                       hands="none")[0]  # fmt: skip
        out = laid(out, made.image, soft, part)
        out.painted.append({"score": one.score})
    return out if out.painted else None


def around(points: np.ndarray, share: float) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a square of `share` times the points' box."""
    low, high = points.min(0), points.max(0)
    half = max(round(share * float((high - low).max()) / 2), 4)
    x, y = ((low + high) / 2).round().astype(int)
    return x - half, y - half, x + half, y + half


def cut(picture: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """The box of a picture, whose edge goes on beyond it."""
    rows = np.arange(box[1], box[3]).clip(0, picture.shape[0] - 1)
    columns = np.arange(box[0], box[2]).clip(0, picture.shape[1] - 1)
    return np.ascontiguousarray(picture[rows][:, columns])


def laid(out: Outcome, image: np.ndarray, soft: np.ndarray, box: tuple[int, int, int, int]) -> Outcome:
    """A painted box over the picture, by a soft mask float32 [H, W]."""
    side = box[2] - box[0]
    layer, alpha = resized(image, (side, side)), cv2.resize(soft, (side, side))
    rows, columns = np.arange(box[1], box[3]), np.arange(box[0], box[2])
    rows_in = (rows >= 0) & (rows < out.image.shape[0])
    columns_in = (columns >= 0) & (columns < out.image.shape[1])
    place, own = np.ix_(rows[rows_in], columns[columns_in]), np.ix_(rows_in, columns_in)
    picture, mask = out.image.copy(), out.mask.copy()
    picture[place] = (layer[own] * alpha[own][..., None] + picture[place] * (1 - alpha[own][..., None]) + 0.5).astype(
        np.uint8
    )
    mask[place] |= alpha[own] > 1 / 255
    return Outcome(picture, mask, out.painted)


def look(bench: Bench, case: Case, picture: np.ndarray, skin: np.ndarray) -> dict[str, float | None]:
    """What detector, fit and counter say of the case's hand in a picture. Rates of a missed hand are 0."""
    box = around(case.hand.joints_2d, NEAR)
    crop = cut(picture, box)
    asked = Asked(case.side, (case.hand.joints_2d - box[:2]) / len(crop))
    pair = match([asked], bench.detector(crop), crop.shape)[0]
    row: dict[str, float | None] = {
        "found": 0.0,
        "score": 0.0,
        "joints": 0.0,
        "side": None,
        "gesture": 0.0,
        "voted": 0.0,
    }
    if pair.found is not None and pair.distances is not None:
        read = fitted(pair.found, crop.shape[:2], bench.rest, bench.detector)
        assert isinstance(read.hand, Fitted)
        row = {"found": 1.0, "score": pair.found.score, "joints": float((pair.distances <= 0.1).mean()),
               "side": float(pair.found.side == case.side), "gesture": float(read.gesture == case.gesture)}  # fmt: skip
        voted = fitted(closer(crop, pair.found, bench.detector), crop.shape[:2], bench.rest, bench.detector)
        assert isinstance(voted.hand, Fitted) and voted.found is not None
        right = voted.side == case.side and turned(voted.hand.fingers, case.hand.fingers) <= TURNED
        row |= {"voted": float(voted.gesture == case.gesture), "sure": voted.sureness, "right": float(right),
                "apart": voted.found.apart, "turn": away(voted.hand.turn, case.hand.turn)}  # fmt: skip
    shape = counting.silhouette(picture, case.ground, skin, case.hand.joints_2d)
    counted = counting.count(shape)
    row["counted"] = counted
    row["fingers"] = None if case.count is None else float(counted == case.count)
    return row


def away(turn: np.ndarray, truth: np.ndarray) -> float:
    """The angle between rotations [3, 3], degrees."""
    return float(np.degrees(np.arccos(((np.einsum("ij,ij", turn, truth) - 1) / 2).clip(-1, 1))))


def turned(fingers: np.ndarray, truth: np.ndarray) -> float:
    """The mean angle between rotations [15, 3], axis-angle, degrees."""
    a, b = (axis_angle_to_matrix(np.asarray(one, np.float64)) for one in (fingers, truth))
    return float(np.degrees(np.arccos(((np.einsum("jik,jik->j", a, b) - 1) / 2).clip(-1, 1))).mean())


def pixels(case: Case, outcome: Outcome) -> dict[str, float | None]:
    """Seam, background and bytes outside of what was painted."""
    ours, truth = (one.astype(np.float32) for one in (outcome.image, case.truth))
    behind = outcome.mask & (case.cover < 0.02)
    return {
        "seam": jump(ours, outcome.mask),
        "seam_truth": jump(truth, outcome.mask),
        "ground": float(np.abs(ours - truth)[behind].mean()) if behind.any() else None,
        "outside": float((outcome.image != case.picture)[~outcome.mask].sum()),
    }


def jump(picture: np.ndarray, mask: np.ndarray) -> float | None:
    """The mean difference, in levels, of neighbouring pixels that the mask's border parts."""
    steps = []
    for axis in (0, 1):
        border = np.diff(mask.astype(np.int8), axis=axis) != 0
        steps.append(np.abs(np.diff(picture.astype(np.float32), axis=axis)).mean(-1)[border])
    all_steps = np.concatenate(steps)
    return float(all_steps.mean()) if len(all_steps) else None


def measure(bench: Bench, number: int, seed: int, folder: Path | None, ways: Sequence[str] = WAYS) -> dict[str, Any]:
    """The rows of ways for a case; always of "spoiled", which others are compared with. folder: where their crops go,
    to look at."""
    case = make(number, seed)
    skin = counting.palette(case.truth, case.cover, case.hand.joints_2d)
    does: dict[str, Callable[[Bench, Case], Outcome | None]] = {
        "automatic": automatic, "named": named, "given": given, "adetailer": adetailer}  # fmt: skip
    rows: dict[str, dict[str, Any]] = {}
    crops = []
    for way in (way for way in WAYS if way in ("spoiled", *ways)):
        started = time.process_time()
        outcome = does[way](bench, case) if way in does else None
        spent = time.process_time() - started
        picture = outcome.image if outcome else case.truth if way == "truth" else case.picture
        rows[way] = look(bench, case, picture, skin) if outcome or way not in does else rows["spoiled"].copy()
        if way in does:
            rows[way]["painted"] = float(outcome is not None)
            timed = outcome is not None and way in TIMED
            rows[way]["pictures"] = spent / bench.seconds / max(len(outcome.painted), 1) if timed else None
            rows[way] |= compared(rows["spoiled"], rows[way])
        if outcome:
            rows[way] |= pixels(case, outcome) | {"notes": outcome.painted}
        crops.append(resized(cut(picture, around(case.hand.joints_2d, 2.0)), (160, 160)))
    rows["spoiled"]["counted_right"] = None if case.shown is None else float(rows["spoiled"]["counted"] == case.shown)
    if "truth" in rows:
        rows["truth"]["counted_right"] = rows["truth"]["fingers"]
    if folder is not None:
        with written(folder / f"{number:04d}.png") as temporary:
            temporary.write_bytes(encode_png(np.concatenate(crops, 1)))
    return {"number": number, "kind": case.kind, "background": case.surface, "pixels": case.pixels,
            "gesture": case.gesture, "side": case.side, "picture": list(case.picture.shape[:2]), "count": case.count,
            "ways": rows}  # fmt: skip


def gated(row: dict[str, Any]) -> dict[str, Any]:
    """The case as hd-repair would leave it: it declines where it is unsure, and where the painted hand is elsewhere."""
    ways = row["ways"]
    notes = ways.get("automatic", {}).get("notes", [])
    if all(note["sure"] >= SURE and note["moved"] <= MOVED for note in notes):
        return row
    stays = {**ways["spoiled"], "painted": 0.0, **compared(ways["spoiled"], ways["spoiled"])}
    return row | {"ways": ways | {"automatic": stays}}


def compared(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """Whether a repaired picture is worse or better than the spoiled one; see WORSE."""
    joints = after["joints"] - before["joints"]
    fingers = (after["fingers"] or 0) - (before["fingers"] or 0)
    worse = joints < -DROP or fingers < 0
    return {"worse": float(worse), "better": float(not worse and (joints > DROP or fingers > 0))}


def table_of(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Way -> metric -> {"value", "low", "high", "n"}."""
    weights = resampled(np.random.default_rng(0), max(len(rows), 1), MEAN_DRAWS)
    out: dict[str, dict[str, Any]] = {}
    for way in WAYS:
        out[way] = {}
        for metric in (*SHOWN, "counted_right"):
            told = [(i, row["ways"].get(way, {}).get(metric)) for i, row in enumerate(rows)]
            kept = [(i, value) for i, value in told if value is not None]
            if kept:
                owners, values = (np.array(column) for column in zip(*kept, strict=True))
                out[way][metric] = mean(values.astype(float), owners.astype(int), weights)
    return out


def reliability(rows: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """How often a reading was right, by how sure the fit was of it: of spoiled, repaired and good pictures, but
    of those that show another gesture, which are right in their way."""
    read = [(row["ways"][way]["sure"], row["ways"][way]["right"]) for row in rows for way in row["ways"]
            if way != "automatic" and row["ways"][way].get("sure") is not None
            and row["ways"][way].get("painted", 1.0) and (way, row["kind"]) != ("spoiled", "gesture")]  # fmt: skip
    out = []
    for low, high in pairwise(SAID):
        right = [one for sure, one in read if low <= sure < high]
        if right:
            said = float(np.mean([sure for sure, _ in read if low <= sure < high]))
            out.append({"from": low, "said": said, "right": sum(right), "readings": len(right)})
    return out


def show(title: str, figures: dict[str, dict[str, Any]]) -> None:
    table = Table(title=title)
    for column in ("", *WAYS):
        table.add_column(column)
    for metric, label in SHOWN.items():
        cells = []
        for way in WAYS:
            entry = figures[way].get(metric)
            scale, digits = (100, 0) if metric in SHARES else (1, 2)
            cells.append("" if entry is None else " to ".join(
                f"{scale * entry[key]:.{digits}f}" for key in ("low", "high")).join(
                (f"{scale * entry['value']:.{digits}f} (", ")")))  # fmt: skip
        if any(cells):
            table.add_row(label + (", %" if metric in SHARES and "%" not in label else ""), *cells)
    Console(highlight=False, soft_wrap=True, width=170).print(table)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--engines", default="demo", show_default=True)
@click.option("--count", type=click.IntRange(1), default=144, show_default=True, help="Pictures; a sixth of each kind.")
@click.option("--seed", type=int, default=FRESH, show_default=True)
@click.option("--way", "ways", multiple=True, type=click.Choice(WAYS), help="Only these, and spoiled; repeatable.")
@click.option("--sheet", type=click.Path(path_type=Path), metavar="FILE.png", help="All ways side by side.")
@click.option("--output", "-o", type=click.Path(path_type=Path), metavar="FILE.json", help="The JSON document, too.")
def command(
    out: Path, engines: str, count: int, seed: int, ways: tuple[str, ...], sheet: Path | None, output: Path | None
) -> int:
    """Spoils, repairs and measures pictures in OUT. The same command again goes on."""
    out.mkdir(parents=True, exist_ok=True)
    rows, bench = [], None
    with progress(f"repairing in {out}") as step:
        for number in range(count):
            path = out / f"{number:04d}.json"
            if not path.exists():
                bench = bench or Bench(engines)
                with written(path) as temporary:
                    temporary.write_text(json.dumps(measure(bench, number, seed, out, ways or WAYS)) + "\n")
            rows.append(gated(json.loads(path.read_text())))
            step(number + 1, count)
    if bench is not None:
        bench.close()
    groups = {"all spoiled": [row for row in rows if row["kind"] != "whole"]}
    groups |= {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}
    spoiled = groups["all spoiled"]
    groups |= {ground: [row for row in spoiled if row["background"] == ground] for ground in GROUNDS}
    groups["under 60 pixels"] = [row for row in spoiled if row["pixels"] < 60]
    found = {name: {"pictures": len(some), "ways": table_of(some)} for name, some in groups.items() if some}
    for name, group in found.items():
        show(f"{name}: {group['pictures']} pictures", group["ways"])
    if sheet is not None:
        strips = [np.asarray(Image.open(out / f"{number:04d}.png")) for number in range(count)]
        strips += [np.zeros_like(strips[0])] * (-len(strips) % 2)
        sheet.write_bytes(encode_png(np.concatenate([np.concatenate(strips[k::2]) for k in (0, 1)], 1)))
        say(f"{sheet}: {', '.join(WAYS)}; twice side by side")
    settings = {
        "engines": engines,
        "seed": seed,
        "sure": SURE,
        "moved": MOVED,
        "worse": WORSE,
        "near": NEAR,
        "adetailer": {"strength": STRENGTH, "steps": STEPS, "box": BOX, "blur": BLUR},
        "counted": sorted(STRETCHED),
    }
    surely = reliability(rows)
    for one in surely:
        say(f"said {one['said']:.0%}: {one['right']:.0f} of {one['readings']} right")
    finish({"groups": found, "reliability": surely, "settings": settings}, output)
    return 0


if __name__ == "__main__":
    run("repair", command, "Stopped. The same command goes on.")
