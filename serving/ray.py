"""`hd-run --ray`: the same requests, folder and ledger, on every GPU or core of a Ray cluster.

    for row in paint(requests, Options("demo"), "out", workers=2): print(row["id"], row["state"])

Ray Data's `map_batches` with one actor a GPU, or a core, each with its own loop. What crosses the cluster are requests
and what became of them; pictures go from the actor to the output folder, which all machines must reach. A row that
fails is a sentence; an actor that dies is started again, and its rows run again, but for those whose pictures are
there: what the ledger has is never made twice.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ..errors import EngineError, HanDiffuserError
from ..runtime.pipeline import HanDiffuser
from ..runtime.remote import open_folder
from ..runtime.requests import Request
from ..runtime.results import Failure
from .worker import Options as Options

BLOCK = 16  # requests that an actor takes at once, at most: enough to keep its slots full


class Painter:
    """The actor: a loaded bundle and the output folder."""

    def __init__(self, options: Options, output: str) -> None:
        self.pipeline = HanDiffuser.load(
            options.engines, options.device, options.threads, options.batch_size, options.backend
        )
        self.folder = open_folder(output, shared=True)
        self.folder.__enter__()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """{"request": JSON} -> {"id", "state": "made", "there" or "failed", "sentence", "warnings": JSON}."""
        requests = [Request(**_tupled(json.loads(text))) for text in batch["request"]]
        rows: dict[str, dict[str, str]] = {}

        def row(id: str, state: str, sentence: str = "", warnings: Sequence[str] = ()) -> None:
            rows[id] = {"id": id, "state": state, "sentence": sentence, "warnings": json.dumps(list(warnings))}

        todo = []
        for request in requests:
            try:
                if self.folder.done(request, self.pipeline.digest):  # an earlier life of this actor was that far
                    row(str(request.id), "there")
                else:
                    todo.append(request)
            except HanDiffuserError as error:
                row(str(request.id), "failed", str(error))
        try:
            for result in self.pipeline.run(todo):
                if isinstance(result, Failure):
                    row(result.id, "failed", result.sentence)
                else:
                    self.folder.save(result)
                    row(result.id, "made", warnings=result.warnings)
            self.folder.flush()
        except HanDiffuserError as error:  # out of memory; a disk that is full: another run goes on from here
            for request in todo:
                if str(request.id) not in rows or not self._there(request):
                    row(str(request.id), "failed", str(error))
        ordered = [rows[str(request.id)] for request in requests]
        return {name: [each[name] for each in ordered] for name in ("id", "state", "sentence", "warnings")}

    def _there(self, request: Request) -> bool:
        with contextlib.suppress(HanDiffuserError):
            return self.folder.done(request, self.pipeline.digest)
        return False


def _tupled(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def connect(address: str) -> int:
    """Joins the cluster at `address`, or starts one here for "local"; how many actors it has room for, with a GPU each
    where there are any. Raises EngineError when there is none at that address."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
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
            f"There is no Ray at {address} ({str(error).splitlines()[0].rstrip('.')}). Start one."
        ) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    resources = ray.cluster_resources()
    return int(resources.get("GPU", 0)) or max(1, int(resources.get("CPU", 1)))


def paint(requests: Sequence[Request], options: Options, output: str, workers: int) -> Iterator[dict[str, Any]]:
    """Makes what is prepared on `workers` actors, and yields what became of each request, as it is known."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    for name in ("ray", "ray.data"):  # what became of each row is said by whoever asked
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = [{"request": json.dumps(asdict(request))} for request in requests]
    # Small enough that all have work to the end, large enough that slots stay full.
    block = max(1, min(BLOCK, len(rows) // (2 * workers)))
    blocks = -(-len(rows) // block)
    on_gpu = ray.cluster_resources().get("GPU", 0) >= 1 and options.device != "cpu"
    painted = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
        Painter,
        fn_constructor_args=(options, output),
        batch_size=None,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=min(workers, blocks)),
        num_gpus=1 if on_gpu else None,
        num_cpus=None if on_gpu else (options.threads or 1),
    )
    for batch in painted.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
        for i in range(len(batch["id"])):
            yield {
                "id": str(batch["id"][i]),
                "state": str(batch["state"][i]),
                "sentence": str(batch["sentence"][i]),
                "warnings": json.loads(str(batch["warnings"][i])),
            }
