"""Records every graph's inputs in a real run, at early, middle and late steps, for calibration.

    inputs, pictures = record("bundle", ["a right hand making a fist"], seeds=(0, 1))
    save_inputs("inputs.npz", inputs)

A sample is bounded however long the run is, and spread evenly over it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..contract import IMAGE_ENCODER
from ..engines import Engine, load_engines
from ..errors import HanDiffuserError, RequestError
from ..runtime.bundle import Bundle
from ..runtime.host import HostLoop
from ..runtime.pipeline import HanDiffuser
from ..runtime.requests import Request
from ..runtime.results import Failure, Picture

# The prompts cover what a model may find hard: each side, both hands, near and spread fingers.
PROMPTS = (
    "a right hand making a fist, blue background",
    "a left hand, open, palm to the viewer, white background",
    "two open hands seen from the back",
    "a dark right hand showing the victory sign on a yellow background",
    "a pale left hand giving a thumbs up, grey background",
    "a pointing right hand seen from the side, black background",
)

Feeds = dict[str, np.ndarray]  # input name -> array, the rows of a batch first
Inputs = dict[str, list[Feeds]]  # graph -> the calls that were kept, in the order in which they came


class Recorder:
    """An engine that keeps some of its inputs: at most `calls` calls, and `rows` rows of each."""

    def __init__(self, engine: Engine, calls: int = 8, rows: int = 4) -> None:
        self.engine, self.spec = engine, engine.spec
        self.device, self.batches, self.prepare = engine.device, engine.batches, engine.prepare
        self._calls, self._rows = calls, rows
        self._count, self._stride = 0, 1
        self._kept: dict[int, Feeds] = {}  # by the number of the call: every _stride-th
        self._last: Feeds = {}

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        batch = len(next(iter(feeds.values())))
        # Rows change from call to call, so that every prompt of a batch appears.
        rows = (self._count + np.arange(min(self._rows, batch)) * batch // min(self._rows, batch)) % batch
        self._last = {name: np.asarray(value)[rows] for name, value in feeds.items()}
        if self._count % self._stride == 0:
            self._kept[self._count] = self._last
            if len(self._kept) > 2 * self._calls:
                self._stride *= 2
                self._kept = {number: kept for number, kept in self._kept.items() if number % self._stride == 0}
        self._count += 1
        return self.engine(feeds)

    def inputs(self) -> list[Feeds]:
        """The sample so far, evenly spread from the first call to the last."""
        kept = dict(self._kept)
        if self._count:
            kept[self._count - 1] = self._last
        numbers = sorted(kept)
        chosen = np.linspace(0, len(numbers) - 1, min(self._calls, len(numbers))).round().astype(int)
        return [kept[numbers[i]] for i in chosen]


def record(
    bundle: str | Path,
    prompts: Sequence[str] = PROMPTS,
    seeds: Sequence[int] = (0,),
    device: str = "cpu",
    *,
    calls: int = 8,
    rows: int = 4,
    threads: int | None = None,
    **settings: Any,
) -> tuple[Inputs, list[Picture | Failure]]:
    """Runs every prompt with every seed, and keeps for each graph at most `calls` calls of at most `rows` rows.

    settings: steps, solver, guidance, ... as in `Request`. Returns the inputs by graph, and the results of
    the requests in order: seeds within prompts. Raises BundleError, EngineError or RequestError when nothing can run.
    """
    folder = Path(bundle)
    manifest, engines = load_engines(folder, device, threads)
    recorders = {name: Recorder(engine, calls, rows) for name, engine in engines.items()}
    known = Bundle.load(folder, manifest)
    pipeline = HanDiffuser(known, HostLoop(known, recorders))
    results = run_all(pipeline, requests_for(pipeline, prompts, seeds, **settings))
    for result in results if IMAGE_ENCODER in recorders else ():  # which no prompt alone needs
        if isinstance(result, Picture):
            recorders[IMAGE_ENCODER]({"image": result.image[None]})
    return {name: recorder.inputs() for name, recorder in recorders.items()}, results


def requests_for(pipeline: HanDiffuser, prompts: Iterable[str], seeds: Iterable[int], **settings: Any) -> list[Request]:
    """Every prompt with every seed, filled in from the bundle's defaults. Raises RequestError for what cannot run."""
    try:
        asked = [Request(prompt, seed=seed, **settings) for prompt, seed in itertools.product(prompts, seeds)]
    except TypeError as error:
        raise RequestError(f"{error}. The settings are those of handiffuser.Request.") from None
    resolved, refused = pipeline.prepare(asked)
    for line, sentence in refused:
        raise RequestError(f"Request {line}: {sentence}")
    if not resolved:
        raise RequestError("There is nothing to run: give at least one prompt and one seed.")
    return resolved


def run_all(pipeline: HanDiffuser, requests: Sequence[Request]) -> list[Picture | Failure]:
    """The results of prepared requests, in their order."""
    results = {result.id: result for result in pipeline.run(requests)}
    return [results[str(request.id)] for request in requests]


def save_inputs(path: str | Path, inputs: Inputs) -> None:
    """Writes a sample as one `.npz`: an array for each input of each call, `graph/call/input`."""
    arrays = {
        f"{graph}/{number:03}/{name}": value
        for graph, calls in inputs.items()
        for number, feeds in enumerate(calls)
        for name, value in feeds.items()
    }
    with open(path, "wb") as file:  # numpy adds .npz to a path
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load_inputs(path: str | Path) -> Inputs:
    """Reads what `save_inputs` wrote. Raises HanDiffuserError when it cannot be read."""
    inputs: Inputs = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for key in sorted(arrays.files):
                graph, number, name = key.split("/")
                calls = inputs.setdefault(graph, [])
                if int(number) == len(calls):
                    calls.append({})
                calls[int(number)][name] = arrays[key]
    except Exception as error:  # a damaged zip raises many kinds
        raise HanDiffuserError(f"{path} must be a file of save_inputs ({error}).") from error
    return inputs
