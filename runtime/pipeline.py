"""The public face of a run: prompts in, pictures with their hands out. `hd-run` drives the same.

    with HanDiffuser.load("demo") as pipeline:
        pictures = pipeline.generate(["a right hand making a fist", "two open hands"], seed=7)

A loop runs the engines, on the host (`host.py`) or on a GPU (`device.py`); `loading.py` and `device_loading.py` find
them. The noise of a request depends on its seed alone: the same request gives the same picture alone or in any batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import hub, shipped
from ..contract import Manifest
from ..engines.backends import CHOICES, DEVICES
from ..errors import EngineError, RequestError
from . import called
from .bundle import Bundle
from .called import Output
from .host import HostLoop
from .loading import load_loop
from .requests import KEYS, Refused, Request, Resolver, check_names, resolve
from .results import Failure, OnEvent, Peek, Picture

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..settings import Settings
    from .device import DeviceLoop


class HanDiffuser:
    """A loaded bundle. Closing it, or leaving its `with`, frees its memory on a GPU.

    `timings` holds the seconds of each graph so far (on a GPU of the UNet's steps only), and of `run` ("total").
    BACKENDS, DEVICES: what `load` takes.
    """

    BACKENDS, DEVICES = tuple(CHOICES), tuple(DEVICES)

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
        lora: str | Path | Sequence[str | Path] | None = None,
        lora_memory: float | None = None,
    ) -> HanDiffuser:
        """Loads a bundle or an engines folder, the word "demo" for the shipped one, or an id of the Hub (org/name).

        device: "auto", "cpu" or "cuda". threads: CPU threads; by default all cores. batch_size: slots, the largest
        number of requests that run at once.
        backend: of BACKENDS. "auto" takes TensorRT plans where the folder has some for this GPU, else
        ONNX Runtime. On a CPU it takes OpenVINO where that is installed, exact enough, and fast enough
        for a run of `pictures` pictures to pay for compiling (a server says `loading.SERVER_PICTURES`).
        overlap: on a GPU, run hands of the next requests and the decoder of the last beside the current steps.
        onnxruntime_graphs: with ONNX Runtime on a GPU, replay the steps as its own CUDA graphs; the host waits for
        each.
        lora: adapters (LoRA) that all pictures have, FILE[:SCALE] each. Without it, requests may bring their own on a
        CPU. lora_memory: gigabytes that the weights of these may take at once; by default half of what is free.
        Raises BundleError for a missing or damaged bundle, HubError for an id that cannot be fetched, EngineError when
        it cannot run here, CheckpointError for an adapter that does not fit. Warns where it uses other engines than
        those of the folder.
        """
        if batch_size < 1:
            raise RequestError(f"batch_size must be at least 1, got {batch_size}.")
        folder = shipped.resolve(path, "bundle")
        names = [str(one) for one in ([lora] if isinstance(lora, (str, Path)) else lora or ())]
        memory = None if lora_memory is None else int(lora_memory * 1e9)
        loop, sentences = load_loop(
            folder, backend, device, batch_size, threads, overlap, onnxruntime_graphs, pictures, names, memory
        )
        for sentence in sentences:
            warnings.warn(sentence, RuntimeWarning, stacklevel=2)
        return cls(loop.bundle, loop)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, device: str = "auto", **options: Any
    ) -> HanDiffuser:
        """`load`, as users of diffusers call it: a bundle's folder, "demo", or an id of the Hub (org/name).

        revision: branch, tag or commit of an id. options: of `load`. Raises RequestError for arguments of diffusers
        that mean something else here, HubError for an id that cannot be fetched, and as `load` does.
        """
        called.refuse(options, called.LOADING, "from_pretrained")
        check_names(options, "argument", [*list(signature(cls.load).parameters)[1:], "revision"])
        if revision is not None:
            if hub.parse(name) is None:
                raise RequestError(f"revision must be left out for a folder, got {revision!r}.", "revision")
            name = f"{name}@{revision}"
        return cls.load(name, device, **options)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        seed: int | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[..., Any] | None = None,
        **settings: Any,
    ) -> Output:
        """Makes pictures under diffusers' names: `.images`, with their `.hands`, `.seeds` and `.pictures`.

        generator: stands for the seed that it was made with (`initial_seed()`), or a list, one for each picture. seed:
        counts up over the pictures. Without either the pictures are new each time; `.seeds` says which.
        output_type: "pil" or "np", float32 [N, H, W, 3] from 0 to 1. callback_on_step_end: called with this, step,
        timestep and {"latents": [1, C, h, w]} (None at the last step) for each step of each picture; it may not change
        them. settings: further ones of `settings.SETTINGS`, and `hands`.
        Raises RequestError for what cannot be run, before anything runs, and EngineError when a picture fails.
        """
        given = {name: value for name, value in locals().items() if name not in ("self", "settings")}
        return called.call(self, **given, **settings)

    if not TYPE_CHECKING:  # a type checker would take any name for good

        def __getattr__(self, name: str) -> Any:
            """Says what stands in place of a method of diffusers' pipelines."""
            instead = called.ATTRIBUTES.get(name, "")
            raise AttributeError(f"HanDiffuser has no {name}. {instead}".rstrip(), name=name, obj=self)

    @property
    def loop(self) -> HostLoop | DeviceLoop:
        """The loop. Raises EngineError after `close`."""
        if self._loop is None:
            raise EngineError("This HanDiffuser was closed. Load it again: HanDiffuser.load(...).")
        return self._loop

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that name the bundle in ids and metadata."""
        return self.bundle.digest

    @property
    def made_by(self) -> dict[str, str]:
        """The origin in the metadata of a picture: versions, device, bundle."""
        return self.bundle.made_by

    @property
    def batch_size(self) -> int:
        """The largest number of requests that run at once."""
        return self.loop.slots

    @property
    def on_gpu(self) -> bool:
        """Whether the loop runs on a GPU."""
        return self.loop.on_gpu

    @property
    def timings(self) -> dict[str, float]:
        return self.loop.timings

    def warm_up(self, rows: int | None = None, on_event: OnEvent | None = None) -> None:
        """On a GPU, loads, runs once and captures the engines for batches of up to `rows` requests.

        Optional: without it that happens at their first use, and all requests wait. Do not call it while `run` runs.
        on_event: called with ("warm-up", 1) for every engine. Raises EngineError as `run` does.
        """
        self.loop.warm_up(rows or self.batch_size, on_event or (lambda kind, count: None))

    def cancel(self, id: str) -> None:
        """Removes a request from `run` at the next step; the others go on. Any thread may call it.

        `run` yields a Failure for the request, or its picture if that was finished already.
        """
        self.loop.cancel(id)

    def peek(self, id: str) -> Peek | None:
        """Where a request is; None before its hands are made and after its last step.

        Call it between two steps: from the on_event of `run`, or from its iterator of requests.
        """
        return self.loop.peek(id)

    def hands(self, requests: Iterable[Request]) -> list[dict[str, np.ndarray] | Failure]:
        """The hands of at most `batch_size` prepared requests, without pictures; as in `Picture.hands`.

        Call it between two steps, as `peek`, or while `run` does not run. For a request with given hands the result
        says where their joints are and what the camera sees of them. Raises RequestError for more requests than a
        batch.
        """
        requests = list(requests)
        if len(requests) > self.batch_size:
            raise RequestError(
                f"requests must be at most {self.batch_size}, the batch size, got {len(requests)}. Split them."
            )
        return self.loop.hands(requests)

    def close(self) -> None:
        """Frees engines and memory. Afterwards only `close` may be called."""
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
        **settings: Unpack[Settings],
    ) -> list[Picture]:
        """Makes a picture of each prompt, or images_per_prompt of them with consecutive seeds, in order.

        settings: as in `settings.SETTINGS`, and `id` and `hands` as in `Request`; they apply to prompts given as text.
        Raises RequestError for the first prompt that cannot be run, before anything runs, and EngineError when one
        fails while it runs. `run` goes on instead.
        """
        prompts = [prompts] if isinstance(prompts, (str, Request)) else list(prompts)
        check_names(settings, "setting", [*KEYS[1:], "images_per_prompt"])
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
        """Fills in defaults, seeds and ids, and refuses requests that this bundle cannot run."""
        return resolve(requests, self.resolver(seed, images_per_prompt))

    def resolver(self, seed: int = 0, images_per_prompt: int = 1) -> Resolver:
        """A Resolver for this bundle, which fills in requests one by one: a long list begins before its end is read."""
        if images_per_prompt < 1:
            raise RequestError(f"images_per_prompt must be at least 1, got {images_per_prompt}.", "images_per_prompt")
        return Resolver(
            self.manifest.defaults,
            bundle=self.digest,
            seed=seed,
            images=images_per_prompt,
            check=self.bundle.check,
            lora=[one.typed for one in self.bundle.loaded] or None,
        )

    def run(self, requests: Iterable[Request | None], on_event: OnEvent | None = None) -> Iterator[Picture | Failure]:
        """Runs prepared requests and yields each as soon as it is done, in the order in which they finish.

        requests: an iterator gives the next ones at a step, when there is room. It may be lazy or endless. It yields
        None while it waits, and is asked again after the next step. Without a request under way it is asked at once, so
        it should block then.
        Raises EngineError when a graph fails (out of memory), or when this was closed meanwhile. Earlier results stay
        good.
        """
        results: Any = self.loop.run(requests, on_event or (lambda kind, count: None))
        with closing(results):
            for result in results:
                yield result
                _ = self.loop  # raises when this was closed meanwhile
