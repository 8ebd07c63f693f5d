"""The public face of a run: prompts in, pictures with their hands out. `hd-run` drives the same.

    with HanDiffuser.load("demo") as pipeline:
        pictures = pipeline.generate(["a right hand making a fist", "two open hands"], seed=7)

What happens in between is a loop, on the host (`host.py`) or on a GPU (`device.py`), over engines that `loading.py` and
`device_loading.py` find. A request's noise depends on its own seed only: the same request gives the same picture alone
or in any company.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import shipped
from ..contract import Manifest
from ..errors import EngineError, RequestError
from ..hints import hint
from .bundle import Bundle
from .host import HostLoop
from .loading import load_loop
from .requests import Refused, Request, Resolver, resolve
from .results import Failure, OnEvent, Peek, Picture

if TYPE_CHECKING:
    from .device import DeviceLoop


class HanDiffuser:
    """A loaded bundle. Closing it, or leaving its `with`, frees what it holds on a GPU.

    `timings` holds the seconds spent in each graph so far (on a GPU in the UNet's steps only), and in `run` altogether
    ("total").
    """

    def __init__(self, bundle: Bundle, loop: HostLoop | DeviceLoop) -> None:
        self.bundle = bundle
        self._loop: HostLoop | DeviceLoop | None = loop

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "auto",
        threads: int | None = None,
        batch_size: int = 8,
        backend: str = "auto",
        overlap: bool = True,
        onnxruntime_graphs: bool = False,
        pictures: int = 1,
    ) -> HanDiffuser:
        """Loads a bundle or an engines folder, or the word "demo" for the shipped one.

        device: "auto", "cpu" or "cuda". threads: CPU threads; by default all cores. batch_size: slots, the largest
        number of requests that run at once. backend: a name of `engines.backends.CHOICES`; "auto" takes TensorRT plans
        where the folder has some for this GPU, else ONNX Runtime; on a CPU with bfloat16, OpenVINO where it is
        installed, near enough and worth its compiling for a run of `pictures` pictures (a server says `loading.MANY`).
        overlap: on a GPU, run the hands of the next requests and the decoder of the last ones beside the current steps.
        onnxruntime_graphs: with ONNX Runtime on a GPU, replay the steps as its own CUDA graphs (the host then waits for
        each).
        Raises BundleError for a missing or damaged bundle, EngineError when it cannot run here. Warns where something
        else is used than the folder was made for.
        """
        if batch_size < 1:
            raise RequestError(f"A batch of {batch_size} holds no picture. Take a batch size of 1 or more.")
        folder = shipped.resolve(path, "bundle")
        loop, sentences = load_loop(folder, backend, device, batch_size, threads, overlap, onnxruntime_graphs, pictures)
        for sentence in sentences:
            warnings.warn(sentence, RuntimeWarning, stacklevel=2)
        return cls(loop.bundle, loop)

    @property
    def loop(self) -> HostLoop | DeviceLoop:
        """What runs. Raises EngineError after `close`."""
        if self._loop is None:
            raise EngineError("This HanDiffuser was closed. Load it again: HanDiffuser.load(...).")
        return self._loop

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that stand for the bundle in ids and metadata."""
        return self.bundle.digest

    @property
    def made_by(self) -> dict[str, str]:
        """What a picture's metadata says of its origin: versions, device, bundle."""
        return self.bundle.made_by

    @property
    def batch_size(self) -> int:
        """The largest number of requests that run at once."""
        return self.loop.slots

    @property
    def on_gpu(self) -> bool:
        """Whether the loop is the one on a GPU."""
        return self.loop.on_gpu

    @property
    def timings(self) -> dict[str, float]:
        return self.loop.timings

    def warm_up(self, rows: int | None = None, on_event: OnEvent | None = None) -> None:
        """Makes ready, on a GPU, what batches of up to `rows` requests need: engines loaded, run once and captured.

        Optional: without it that happens as engines are first used, and what is in flight waits. Not to be called while
        `run` runs. on_event: is told ("warm-up", 1) for every engine. Raises EngineError as `run` does.
        """
        self.loop.warm_up(rows or self.batch_size, on_event or (lambda kind, count: None))

    def cancel(self, id: str) -> None:
        """Takes a request that `run` has taken out of the batch at the next step; the others go on as if it had come to
        its end. `run` then yields a Failure for it, or its picture if that was there already. From any thread."""
        self.loop.cancel(id)

    def peek(self, id: str) -> Peek | None:
        """Where a request is, to show it before it is done; None before its hands are there and after its last step.

        To be called between two steps: from `run`'s on_event or from its iterator of requests.
        """
        return self.loop.peek(id)

    def hands(self, requests: Iterable[Request]) -> list[dict[str, np.ndarray] | Failure]:
        """The hands of prepared requests, at most a batch of them, without their pictures; as in `Picture.hands`.

        To be called between two steps, as `peek` is, or while `run` does not run. Of hands that a request brings it is
        where their joints are, and what the camera sees of them. Raises RequestError for more than a batch.
        """
        requests = list(requests)
        if len(requests) > self.batch_size:
            raise RequestError(f"{len(requests)} requests are more than a batch of {self.batch_size}. Ask in parts.")
        return self.loop.hands(requests)

    def close(self) -> None:
        """Frees engines and memory. May be called again; nothing else may."""
        if self._loop is not None:
            loop, self._loop = self._loop, None
            loop.close()

    def __enter__(self) -> HanDiffuser:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def generate(
        self,
        prompts: str | Request | Iterable[str | Request],
        *,
        images_per_prompt: int = 1,
        **settings: Any,
    ) -> list[Picture]:
        """Makes a picture of each prompt, or images_per_prompt of them with consecutive seeds, in order.

        settings: seed, steps, solver, guidance, negative_prompt, hand_steps, hand_solver, hand_guidance, hands, as in
        `Request`; they apply to prompts given as text. Raises RequestError for the first prompt that cannot be run,
        before anything runs, and EngineError when one fails while it runs. `run` goes on instead.
        """
        prompts = [prompts] if isinstance(prompts, (str, Request)) else list(prompts)
        known = [field.name for field in fields(Request) if field.name != "prompt"]
        for name in settings:
            if name not in known:
                said = hint(name, "request", [*known, "images_per_prompt"]) or f"The settings are {', '.join(known)}."
                raise RequestError(f"{name} is not a setting of a request. {said}")
        seed = settings.pop("seed", None)
        requests = [p if isinstance(p, Request) else Request(p, **settings) for p in prompts]
        resolved, refused = self.prepare(requests, 0 if seed is None else seed, images_per_prompt)
        for line, sentence in refused:
            raise RequestError(f"Prompt {line}: {sentence}")
        pictures: dict[str, Picture] = {}
        for result in self.run(resolved):
            if isinstance(result, Failure):
                raise EngineError(f"{result.request.prompt!r}: {result.sentence}")
            pictures[result.id] = result
        return [pictures[str(request.id)] for request in resolved]

    def prepare(
        self, requests: Iterable[Request], seed: int = 0, images_per_prompt: int = 1
    ) -> tuple[list[Request], list[Refused]]:
        """Fills in defaults, seeds and ids, and sorts out what this bundle cannot run."""
        return resolve(requests, self.resolver(seed, images_per_prompt))

    def resolver(self, seed: int = 0, images_per_prompt: int = 1) -> Resolver:
        """What fills in requests for this bundle one by one, so that a long list can begin before its end is read."""
        if images_per_prompt < 1:
            raise RequestError(f"images_per_prompt must be 1 or more, got {images_per_prompt}. Ask for one at least.")
        return Resolver(
            self.manifest.defaults,
            bundle=self.digest,
            seed=seed,
            images=images_per_prompt,
            check=self.bundle.check,
        )

    def run(self, requests: Iterable[Request | None], on_event: OnEvent | None = None) -> Iterator[Picture | Failure]:
        """Runs prepared requests and yields each as soon as it is done, in the order in which they finish.

        requests: an iterator is asked for more at a step, when there is room. It may be lazy or endless: None says
        that nothing has come in yet, and it is asked again after the next step. With nothing in flight it is asked
        at once, so that it should wait then.
        Raises EngineError when a graph cannot be run at all (out of memory), or when this was closed meanwhile; what
        was yielded before stays good.
        """
        results: Any = self.loop.run(requests, on_event or (lambda kind, count: None))
        with closing(results):
            for result in results:
                yield result
                _ = self.loop  # which says when it was closed meanwhile
