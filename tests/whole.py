"""What tests of whole runs share: the command and its pictures, requests of all kinds, and one fault at a time."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from handiffuser import Request
from handiffuser.errors import HanDiffuserError
from handiffuser.runtime import cli
from PIL import Image

PROMPTS = ["a fist", "two open hands", "a thumb", "one hand", "two hands"]
SOLVERS = ("ddim", "ddpm", "euler", "dpm++2m", "plms")


def hd_run(folder, out, *arguments):
    """The command's exit code, with its error as `hd-run` would print it."""
    command = [str(folder), *PROMPTS, "-o", str(out), "--steps", "4", "--hand-steps", "2", "--batch-size", "4"]
    try:
        return cli.run.main([*command, *map(str, arguments)], standalone_mode=False), ""
    except HanDiffuserError as error:
        return 1, f"hd-run: {error}"


def pictures(out: Path) -> dict:
    """(prompt, seed) -> pixels of what was saved."""
    found = {}
    for path in out.glob("*.json"):
        record = json.loads(path.read_text())
        found[record["prompt"], record["seed"]] = np.asarray(Image.open(path.with_suffix(".png"))).astype(int)
    return found


def same(ours: dict, theirs: dict, levels: int = 1) -> None:
    """levels: of 255 that a pixel may differ by."""
    assert ours.keys() == theirs.keys() and ours
    for key, picture in theirs.items():
        np.testing.assert_allclose(ours[key], picture, rtol=0, atol=levels)


def mixed(count: int, seed: int = 0) -> list[Request]:
    """Requests of any solver, guidance and number of steps, every third with an offset."""
    random = np.random.default_rng(seed)
    return [
        Request(
            f"prompt {i}",
            seed=i,
            steps=int(random.integers(4, 9)),
            solver=SOLVERS[random.integers(5)],
            guidance=float(random.integers(1, 4)),
            hand_steps=int(random.integers(2, 6)),
            noise_offset=(None, None, 0.3)[i % 3],
        )
        for i in range(count)
    ]


def run(pipeline, requests) -> dict:
    """Id -> pixels."""
    resolved, refused = pipeline.prepare(requests, 0)
    assert not refused
    return {result.id: result.image.astype(int) for result in pipeline.run(resolved)}


KINDS = ("out of memory", "a call fails", "the context breaks")
MANY = 10  # places


def fault(kind: str, gpu, at: int) -> None:
    """One fault, `at` places from here on."""
    if kind == "out of memory":
        gpu.refuse_allocation = gpu.allocations + at
    elif kind == "a call fails":
        gpu.refuse[gpu.number + at] = gpu.cudaError_t.cudaErrorLaunchFailure
    else:
        gpu.break_at = gpu.operations + at


def counted(kind: str, gpu) -> int:
    """How many places for such a fault there were so far."""
    return {"out of memory": gpu.allocations, "a call fails": gpu.number, "the context breaks": gpu.operations}[kind]


def places_of(total: int, count: int) -> list[int]:
    """The first three of `total` calls, and one of each of `count` equal parts of the others.

    Many of them are other ones every day, so that a few runs of the slow tests see most places.
    """
    edges = np.linspace(4, total, count)
    if count > MANY:
        draw = np.random.default_rng(int(time.time() // 86400))
        edges[:-1] += draw.random(count - 1) * np.diff(edges)
    return sorted({*range(1, 4), *edges.astype(int).tolist()})


def faults_end_in_one_sentence(folder, out, arguments, capsys, fresh: Callable, count: int) -> None:
    """Runs the command with a fault at one place after the other.

    Nothing hangs, nothing that is not the right picture is saved, and the next run on a sound GPU makes the rest.
    fresh: (place or None) -> (a new GPU with the fault there, a function that says how many places there were).
    """

    def attempt(at, out):
        gpu, total = fresh(at)
        code, error = hd_run(folder, out, *arguments)
        spoken = capsys.readouterr().err + error
        gc.collect()
        assert not gpu.problems, at
        return code, spoken, total(), gpu

    code, spoken, total, _ = attempt(None, out / "right")
    assert code == 0, spoken
    right = pictures(out / "right")
    for at in places_of(total, count):
        code, spoken, _, gpu = attempt(at, out / f"{at}")
        saved = pictures(out / f"{at}")
        assert saved.keys() <= right.keys()
        for key, picture in saved.items():
            np.testing.assert_allclose(picture, right[key], rtol=0, atol=1)
        assert "Traceback" not in spoken, (at, spoken)
        if len(saved) < len(right):
            said = [line for line in spoken.splitlines() if line.startswith("hd-run: ") and "warning" not in line]
            assert code == 1 and len(said) == 1, (at, spoken)
            assert "Export the bundle again" not in said[0], "nothing is wrong with the bundle"
        if gpu.broken is None:
            assert not gpu.live(), (at, "memory is left on the device")
        code, spoken, *_ = attempt(None, out / f"{at}")
        assert code == 0, (at, spoken)
        same(pictures(out / f"{at}"), right)
