"""`hd-run --ray`: the same requests, folder and ledger, on every GPU or core of a Ray cluster.

    for row in paint(requests, Options("demo"), "out", workers=2): print(row["id"], row["state"])

Ray Data's `map_batches` with one actor for each GPU or core, each with its own loop. The cluster carries requests and
their results; each actor writes its pictures into the output folder, which all machines must reach. A row that fails
has a sentence. Ray starts a dead actor again and repeats its rows; the actor skips those whose pictures the ledger has.
An error of the machine rather than of a row, such as a full disk or engines that do not load, ends the run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ..errors import EngineError, HanDiffuserError, OutputError, RequestError
from ..runtime.remote import open_folder
from ..runtime.requests import Request
from ..runtime.results import Failure
from .worker import Options as Options

MAX_BLOCK_REQUESTS = 16  # that an actor takes at once: enough to keep its slots full
COLUMNS = ("id", "state", "sentence", "warnings")
MAX_TRIES = 4  # actors that may die while they have a block, before its requests fail
GIVEN_UP = f"{MAX_TRIES} actors ended while they made this picture or another one of its batch."


class Tries:
    """Counts how often any machine began a block. Ray repeats a block for ever, even if no actor survives it.

    Ray's own count includes deaths of machines where the block only waited.
    """

    def __init__(self) -> None:
        self.begun: Counter[str] = Counter()

    def begin(self, block: str) -> int:
        self.begun[block] += 1
        return self.begun[block]


class Painter:
    """The actor: a loaded bundle and the output folder.

    Ray restarts for ever an actor that fails when it begins. So this one does not fail: it reports the error for every
    row. begin: takes the id of a block's first row, and returns how often actors have begun the block.
    """

    def __init__(self, options: Options, output: str, begin: Callable[[str], int] = lambda block: 1) -> None:
        self.begin = begin
        self.broken = ""  # why this actor cannot make pictures
        try:
            self.pipeline = options.load()
            self.folder = open_folder(output, shared=True)
            self.folder.__enter__()
        except Exception as error:  # a driver, a library, memory, a path that is not shared
            said = str(error) if isinstance(error, HanDiffuserError) else f"{type(error).__name__}: {error}"
            self.broken = f"On {socket.gethostname()}: {said}"

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """{"request": JSON} -> {"id", "state", "sentence", "warnings": JSON}. state: "made", "there", "failed", or
        "stopped" if the next rows would fail too."""
        requests = [Request(**_tupled(json.loads(text))) for text in batch["request"]]
        rows: dict[str, dict[str, str]] = {}

        def row(id: str, state: str, sentence: str = "", warnings: Sequence[str] = ()) -> None:
            rows[id] = {"id": id, "state": state, "sentence": sentence, "warnings": json.dumps(list(warnings))}

        state, why = "stopped", self.broken
        if not self.broken:
            try:
                hopeless = self.begin(str(requests[0].id)) > MAX_TRIES
                self._paint(requests, row, GIVEN_UP if hopeless else "")
            except OutputError as error:  # the disk is full
                self.broken = why = str(error)
            except HanDiffuserError as error:  # out of memory, for example: other rows may need less
                state, why = "failed", str(error)
            except Exception as error:
                state, why = "failed", f"{type(error).__name__}: {error}"
        for request in requests if why else ():
            known = rows.get(str(request.id), {}).get("state")
            if known is None or (known == "made" and not self._there(request)):
                row(str(request.id), state, why)
        ordered = [rows[str(request.id)] for request in requests]
        return {name: [each[name] for each in ordered] for name in COLUMNS}

    def _paint(self, requests: Sequence[Request], row: Callable[..., None], hopeless: str) -> None:
        """Makes the pictures that are not there yet. Raises HanDiffuserError for errors that are not a row's own."""
        todo = []
        for request in requests:
            try:
                if self.folder.done(request, self.pipeline.digest):  # made before this actor died and started again
                    row(str(request.id), "there")
                elif hopeless:
                    row(str(request.id), "failed", hopeless)
                else:
                    todo.append(request)
            except RequestError as error:
                row(str(request.id), "failed", str(error))
        try:
            for result in self.pipeline.run(todo):
                if isinstance(result, Failure):
                    row(result.id, "failed", result.sentence)
                else:
                    self.folder.save(result)
                    row(result.id, "made", warnings=result.warnings)
        finally:
            self.folder.flush()  # before this actor reports the rows as made

    def _there(self, request: Request) -> bool:
        with contextlib.suppress(HanDiffuserError):
            return self.folder.done(request, self.pipeline.digest)
        return False


def _tupled(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def connect(address: str) -> int:
    """Joins the cluster at `address`, or starts one here for "local". Returns how many actors fit, with a GPU each if
    the cluster has GPUs. Raises EngineError if no cluster answers at that address."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if not ray.is_initialized():
            kind: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **kind)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise EngineError(
            f"No Ray cluster answers at {address} ({str(error).splitlines()[0].rstrip('.')}). Start one."
        ) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    resources = ray.cluster_resources()
    return int(resources.get("GPU", 0)) or max(1, int(resources.get("CPU", 1)))


def paint(requests: Sequence[Request], options: Options, output: str, workers: int) -> Iterator[dict[str, Any]]:
    """Makes prepared requests on `workers` actors, and yields the result of each: id, state, sentence, warnings.

    Raises HanDiffuserError if the run ends early: the disk is full, or the cluster fails.
    """
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    for name in ("ray", "ray.data"):  # the caller reports each row
        logging.getLogger(name).setLevel(logging.CRITICAL)
    rows = [{"request": json.dumps(asdict(request))} for request in requests]
    # Small enough that all actors have work to the end, large enough that their slots stay full.
    block = max(1, min(MAX_BLOCK_REQUESTS, len(rows) // (2 * workers)))
    blocks = -(-len(rows) // block)
    on_gpu = ray.cluster_resources().get("GPU", 0) >= 1 and options.device != "cpu"
    tries: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Tries).remote()
    painted = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
        Painter,
        fn_constructor_args=(options, output, lambda block: ray.get(tries.begin.remote(block))),
        batch_size=None,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=min(workers, blocks)),
        num_gpus=1 if on_gpu else None,
        num_cpus=None if on_gpu else (options.threads or 1),
    )
    batches = iter(painted.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0))
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # clusters fail in many ways
            raise EngineError(_trouble(error)) from error
        if batch is None:
            return
        stopped = ""
        for id, state, sentence, said in zip(*(batch[name].tolist() for name in COLUMNS), strict=True):
            if state == "stopped":
                stopped = sentence
            else:
                yield {"id": id, "state": state, "sentence": sentence, "warnings": json.loads(said)}
        if stopped:
            raise HanDiffuserError(stopped)


def _trouble(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[-1].rstrip(".")[:300] if lines else ""
    return (
        f"Ray gave up ({type(error).__name__}: {said}). The pictures finished so far are kept: run the same command "
        "again to make the rest."
    )
