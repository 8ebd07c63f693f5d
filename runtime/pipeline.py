"""The two stages as one loop: prompts in, hands and pictures out. `hd-run` and `HanDiffuser.generate` both drive it.

    pipeline = HanDiffuser.load("demo")
    pictures = pipeline.generate(["a right hand making a fist", "two open hands"], seed=7)

Stage 1 makes hands of a batch of prompts and turns them into the context of stage 2; these requests then wait for a
slot. Stage 2 steps all its slots at once; a request takes a free slot at any step and leaves it when it is done, so
requests with different numbers of steps, solvers or guidance share every batch. A request's noise depends on its own
seed only: the same request gives the same picture alone or in any company.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from operator import length_hint
from pathlib import Path
from typing import Any

import numpy as np
import numpy.random

from .. import demo
from ..contract import TOKENIZER, Manifest
from ..engines import Engine, load_engines
from ..engines.cuda import Cuda
from ..engines.inductor import find_compiled, load_inductor
from ..engines.onnxruntime import DEVICES, has_cuda_provider
from ..engines.plans import PlanStore
from ..engines.tensorrt import MODULES, Backend
from ..errors import EngineError, RequestError
from .device import TABLES, DeviceLoop, load_loop, usable_plans
from .hands import hand_arrays, load_hands
from .noise import HANDS, LATENTS, of_request
from .requests import Refused, Request, resolve, take
from .sampler import Job, Result, StepSampler
from .schedules import NoiseSchedule, Table, rows
from .steptimes import StepTimes
from .tokens import PromptTokenizer

BACKENDS = ("auto", "onnxruntime", *MODULES, "inductor")

# Called as the loop goes on: "hands" with the number of requests whose hands are ready, "steps" with the number of
# requests that made one step of stage 2.
OnEvent = Callable[[str, int], None]

# Outputs of hand_features that a picture keeps -> what they are called beside the SMPL-H arrays.
_FEATURE_NAMES = {
    "joints_3d": "joints",
    "joints": "joints_2d",
    "vertices": "vertices",
    "visibility": "visibility",
    "camera": "camera",
}


@dataclass
class Picture:
    """A finished request.

    hands: `params` [330]; SMPL-H arrays `global_orient` [3], `body_pose` [63], `left_hand_pose` [45],
    `right_hand_pose` [45] (axis-angle, radians), `betas` [10], `placement` [2, 4]; `joints` [62, 3] and `vertices`
    [V, 3] in metres, `joints_2d` [2, 21, 2] in [0, 1] of the image, `visibility` [2], `camera` [3].
    """

    id: str
    request: Request
    image: np.ndarray = field(repr=False)  # uint8 [H, W, 3]
    hands: dict[str, np.ndarray] = field(repr=False)
    seconds: float  # from the start of its stage 1 to its picture, shared with the rest of its batch
    warnings: list[str] = field(default_factory=list)
    made_by: dict[str, str] = field(default_factory=dict)  # versions, device, digest of the bundle


@dataclass
class Failure:
    """A request that came to nothing while it ran; others are not affected."""

    id: str
    request: Request
    sentence: str


@dataclass
class Work:
    """A request on its way through the stages."""

    request: Request
    started: float
    ids: np.ndarray  # int64 [2, length]: negative prompt, prompt
    warnings: list[str]
    x: np.ndarray | None = None  # hand parameters [P], normalised
    params: np.ndarray = field(default_factory=lambda: np.empty(0))  # the same, not normalised
    features: dict[str, np.ndarray] = field(default_factory=dict)  # a row of every output of hand_features
    inputs: dict[str, np.ndarray] = field(default_factory=dict)  # a row of every output of unet_context


class HanDiffuser:
    """A loaded bundle. `timings` holds the seconds spent in each graph so far, and in `run` altogether ("total")."""

    def __init__(
        self,
        manifest: Manifest,
        engines: Mapping[str, Engine],
        tokenizer: PromptTokenizer,
        batch_size: int = 8,
    ) -> None:
        """batch_size: slots, the largest number of requests that run at once."""
        if batch_size < 1:
            raise RequestError(f"A batch of {batch_size} holds no picture. Take a batch size of 1 or more.")
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.timings: dict[str, float] = dict.fromkeys([*engines, "total"], 0.0)
        self.engines = {name: _Timed(name, engine, self.timings) for name, engine in engines.items()}
        self.digest = _digest(manifest)
        self.made_by = _made_by(self.digest, engines)
        self._schedules = {name: NoiseSchedule.from_config(config) for name, config in manifest.schedules.items()}
        self._mean = np.array(manifest.params_mean, np.float32)
        self._std = np.array(manifest.params_std, np.float32)
        self._tables: dict[tuple[Any, ...], Table] = {}
        self._times: dict[bytes, np.ndarray] = {}  # timesteps -> rows of unet_time
        self._step_times = {name: StepTimes() for name in ("hand_prior", "unet")}
        self._no_text: np.ndarray | None = None  # text_encoder of "", [D]
        self.loop: DeviceLoop | None = None  # what runs instead of `engines` on a GPU

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
    ) -> HanDiffuser:
        """Loads a bundle or an engines folder, or the word "demo" for the shipped one.

        device: "auto", "cpu" or "cuda". threads: CPU threads; by default all cores. backend: one of BACKENDS; "auto"
        takes TensorRT plans where the folder has some for this GPU, else ONNX Runtime. overlap: on a GPU, run the
        hands of the next requests and the decoder of the last ones beside the steps of the current ones.
        onnxruntime_graphs: with ONNX Runtime on a GPU, replay the steps as its own CUDA graphs (the host then waits for
        each).
        Raises BundleError for a missing or damaged bundle, EngineError when it cannot run here. Warns where something
        else is used than the folder was made for.
        """
        if backend not in BACKENDS:
            raise EngineError(f"There is no backend {backend!r}. Choose one of {', '.join(BACKENDS)}.")
        folder = demo.resolve(path, "bundle")
        chosen = choose_backend(folder, backend, device)
        if chosen == "inductor" and find_compiled(folder, Manifest.load(folder, verify=False), device)[0] == "cpu":
            manifest = Manifest.load(folder)
            engines = load_inductor(folder, manifest, device, threads)
            return cls(manifest, engines, PromptTokenizer(folder / TOKENIZER, manifest.tokenizer), batch_size)
        if chosen == "onnxruntime" and not on_gpu(device):
            manifest, engines = load_engines(folder, "cpu", threads)
            return cls(manifest, engines, PromptTokenizer(folder / TOKENIZER, manifest.tokenizer), batch_size)
        manifest = Manifest.load(folder)
        pipeline = cls(manifest, {}, PromptTokenizer(folder / TOKENIZER, manifest.tokenizer), batch_size)
        pipeline.loop, sentences = load_loop(pipeline, folder, chosen, batch_size, overlap, onnxruntime_graphs)
        pipeline.made_by |= {"device": pipeline.loop.cuda.name, "backend": chosen}
        for sentence in sentences:
            warnings.warn(sentence, RuntimeWarning, stacklevel=2)
        return pipeline

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
        seed = settings.pop("seed", None)
        try:
            requests = [p if isinstance(p, Request) else Request(p, **settings) for p in prompts]
        except TypeError as error:
            raise RequestError(f"{error}. The settings are those of handiffuser.Request.") from None
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
        """Fills in defaults, seeds and ids, and sorts out what this bundle cannot run. See `requests.resolve`."""
        if images_per_prompt < 1:
            raise RequestError(f"{images_per_prompt} images per prompt are none. Ask for 1 or more.")
        return resolve(
            requests,
            self.manifest.defaults,
            bundle=self.digest,
            seed=seed,
            images=images_per_prompt,
            check=self._check,
        )

    def run(self, requests: Iterable[Request | None], on_event: OnEvent | None = None) -> Iterator[Picture | Failure]:
        """Runs prepared requests and yields each as soon as it is done, in the order in which they finish.

        requests: an iterator is asked for more at a step, when there is room. It may be lazy or endless: None says
        that nothing has come in yet, and it is asked again after the next step. With nothing in flight it is asked
        at once, so that it should wait then.
        Raises EngineError when a graph cannot be run at all (out of memory); what was yielded before stays good.
        """
        tell = on_event or (lambda kind, count: None)
        if self.loop is not None:
            yield from self.loop.run(requests, tell)
            return
        slots = min(self.batch_size, length_hint(requests, self.batch_size))
        if not slots:
            return
        source, more = iter(requests), True
        history = self.manifest.num_history
        hand_prior, unet = self.engines["hand_prior"], self.engines["unet"]
        times = self._step_times
        hand_sampler = StepSampler(
            hand_prior, "x", history["hand_prior"], slots, times["hand_prior"], hand_prior.branched
        )
        sampler = StepSampler(unet, "latents", history["unet"], slots, times["unet"], unet.branched)
        ready: deque[Work] = deque()  # has its context, waits for a slot
        running: dict[Hashable, Work] = {}
        clock = time.perf_counter()
        while more or ready or running:
            results: list[Picture | Failure] = []
            while more and len(ready) < sampler.free:
                batch, more = take(source, slots)
                if not batch:
                    break
                works, failures = self._stage_1(batch, hand_sampler)
                ready.extend(works)
                results += failures
                tell("hands", len(batch))
            while ready and sampler.free:
                work = ready.popleft()
                running[work.request.id] = work
                sampler.submit(self._job(work))
            if sampler.active:
                done = sampler.step()
                tell("steps", sampler.advanced)
                results += self._finish(done, running)
            for result in results:
                self.timings["total"] += time.perf_counter() - clock
                yield result
                clock = time.perf_counter()  # what the caller does with a picture is not ours to count
        self.timings["total"] += time.perf_counter() - clock

    def _stage_1(self, requests: list[Request], sampler: StepSampler) -> tuple[list[Work], list[Picture | Failure]]:
        """Text -> hands -> features -> context -> keys and values, for a batch of B requests."""
        started = time.perf_counter()
        works = [Work(request, started, *self.tokens(request)) for request in requests]
        failures: list[Picture | Failure] = []

        by_id: dict[Hashable, Work] = {work.request.id: work for work in works}
        textual = [work for work in works if work.request.hands is None]
        if textual:
            ids = np.stack([work.ids[1] for work in textual])  # [B, length]
            for work, text in zip(textual, self.engines["text_encoder"]({"input_ids": ids})["text"], strict=True):
                sampler.submit(self._hand_job(work.request, text))
        while sampler.active:
            for key, state, failed_step in sampler.step():
                if state is None:
                    failures.append(not_finite(by_id[key].request, f"hand_prior, step {failed_step}"))
                by_id[key].x = state
        for work in works:
            if work.request.hands is not None:
                try:
                    work.x = self.normalised(load_hands(work.request.hands))
                except RequestError as error:  # it was good when the run began
                    failures.append(Failure(str(work.request.id), work.request, str(error)))

        # From here on only those that have hands; then only those whose features are finite.
        x = [work.x for work in works if work.x is not None]
        works = [work for work in works if work.x is not None]
        if not works:
            return [], failures
        features = self.engines["hand_features"]({"x": np.stack(x)})
        fine = np.ones(len(works), bool)
        for value in features.values():
            fine &= np.isfinite(value).reshape(len(works), -1).all(1)
        failures += [not_finite(work.request, "hand_features") for work, ok in zip(works, fine, strict=True) if not ok]
        works = [work for work, ok in zip(works, fine, strict=True) if ok]
        if not works:
            return [], failures
        features = {name: value[fine] for name, value in features.items()}
        ids = np.stack([work.ids for work in works])  # [B, 2, length]
        context = self.engines["text_hand_encoder"]({"input_ids": ids, **features})["context"]
        keys = self.engines["unet_context"]({"context": context})
        for row, work in enumerate(works):
            work.params = self.params(work.x)  # type: ignore[arg-type]
            work.features = {name: value[row] for name, value in features.items()}
            work.inputs = {name: value[row] for name, value in keys.items()}
        return works, failures

    def _hand_job(self, request: Request, text: np.ndarray) -> Job:
        """Stage 1's job; text is the prompt's sentence vector [D]."""
        if self._no_text is None:
            ids = self.tokenizer.encode("")[0]
            self._no_text = self.engines["text_encoder"]({"input_ids": ids[None]})["text"][0]
        both = np.stack([self._no_text, text])  # [2, D]
        return _job(request, HANDS, self.table(HANDS, request), self._mean.shape, {"text": both})

    def _job(self, work: Work) -> Job:
        """Stage 2's job."""
        request = work.request
        table = self.table(LATENTS, request)
        steps = {}
        if "time" in self.engines["unet"].names:
            timesteps = table.timesteps.astype(np.float32)
            key = timesteps.tobytes()
            if key not in self._times:
                keep(self._times, key, self.engines["unet_time"]({"timesteps": timesteps})["time"])
            steps["time"] = self._times[key]
        shape = self.manifest.latent_size
        return _job(request, LATENTS, table, shape, work.inputs, steps)

    def _finish(self, results: list[Result], running: dict[Hashable, Work]) -> list[Picture | Failure]:
        """Decodes the requests that have left their slots: one by one, because a processor's caches hold no more."""
        works = [running.pop(result.key) for result in results]
        finished: list[Picture | Failure] = [
            not_finite(work.request, f"unet, step {result.failed_step}")
            for work, result in zip(works, results, strict=True)
            if result.state is None
        ]
        for work, result in zip(works, results, strict=True):
            if result.state is None:
                continue
            decoded = self.engines["image_decoder"]({"latents": result.state[None]})
            fine = decoded["finite"][0] > 0.5  # uint8 would hide what is not finite
            finished.append(
                self.picture(work, decoded["image"][0]) if fine else not_finite(work.request, "image_decoder")
            )
        return finished

    def picture(self, work: Work, image: np.ndarray) -> Picture:
        """What the user gets of finished work: its image [H, W, 3] (copied) and its hands."""
        hands = {"params": work.params, **hand_arrays(work.params)}
        hands.update((ours, work.features[name]) for name, ours in _FEATURE_NAMES.items() if name in work.features)
        seconds = time.perf_counter() - work.started
        return Picture(str(work.request.id), work.request, image.copy(), hands, seconds, work.warnings, self.made_by)

    def normalised(self, params: np.ndarray) -> np.ndarray:
        """Hand parameters [P] as the hand prior knows them: mean 0, spread 1."""
        return (params - self._mean) / self._std

    def params(self, x: np.ndarray) -> np.ndarray:
        """The opposite of `normalised`."""
        return x * self._std + self._mean

    def tokens(self, request: Request) -> tuple[np.ndarray, list[str]]:
        """int64 [2, length]: the negative prompt, then the prompt. And what was cut off, as diffusers says it."""
        rows, warnings = [], []
        for name in ("negative_prompt", "prompt"):
            ids, dropped = self.tokenizer.encode(getattr(request, name))
            rows.append(ids)
            if dropped:
                dropped = dropped.strip()
                shown = dropped if len(dropped) <= 200 else dropped[:200] + " ..."
                what, room = name.replace("_", " "), self.tokenizer.length - 2
                warnings.append(f"The {what} is longer than {room} tokens. This part was cut: {shown!r}")
        return np.stack(rows), warnings

    def table(self, stream: str, request: Request) -> Table:
        """The schedule of one stage of a request; raises RequestError for a solver or steps it cannot do."""
        if stream == HANDS:
            graph, chosen = "hand_prior", (request.hand_solver, request.hand_steps, request.hand_guidance)
            interval = (0.0, 1.0)
        else:
            graph, chosen = "unet", (request.solver, request.steps, request.guidance)
            interval = request.guidance_interval
        key = (graph, *chosen, interval)
        if key not in self._tables:
            solver, steps, guidance = chosen
            if solver is None or steps is None or guidance is None:
                raise RequestError("The request has gaps. Fill them with HanDiffuser.prepare before it is run.")
            history = self.manifest.num_history[graph]
            table = rows(self._schedules[graph], solver, steps, guidance, history, interval)
            keep(self._tables, key, table)
        return self._tables[key]

    def _check(self, request: Request) -> None:
        """Raises RequestError when this bundle cannot run the request."""
        self.table(LATENTS, request)
        if request.hands is None:
            self.table(HANDS, request)
        else:
            load_hands(request.hands)


class _Timed:
    """An engine that notes the seconds it takes, and is fed only the tensors that its graph has.

    A configuration without some hand cue has a graph without that input.
    """

    def __init__(self, name: str, engine: Engine, timings: dict[str, float]) -> None:
        self.engine, self.name, self.timings = engine, name, timings
        self.names = frozenset(spec.name for spec in engine.spec.inputs)
        self.branched = engine.spec.branched

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        feeds = {name: value for name, value in feeds.items() if name in self.names}
        started = time.perf_counter()
        try:
            return self.engine(feeds)
        finally:
            self.timings[self.name] += time.perf_counter() - started


def keep(cache: dict[Any, Any], key: Any, value: Any) -> None:
    """Adds to a cache, and lets its oldest entry go when it is full: a server sees ever new guidances."""
    if len(cache) >= TABLES:
        cache.pop(next(iter(cache)))
    cache[key] = value


def choose_backend(folder: Path, backend: str, device: str) -> str:
    """The backend that "auto" means: that of the folder's plans where there is a GPU, else ONNX Runtime."""
    if backend != "auto" and not (backend in MODULES and device == "cpu"):
        return backend
    # Not "inductor": it needs PyTorch, which nothing is to import unasked.
    made_for = sorted({plan.parts["backend"] for plan in PlanStore(folder)} & set(MODULES))
    if backend != "auto":
        raise EngineError(f"{backend} runs on NVIDIA GPUs only. Leave out --device cpu, or take --backend onnxruntime.")
    if not made_for or device == "cpu":
        return "onnxruntime"
    try:
        cuda, manifest, store = Cuda(), Manifest.load(folder, verify=False), PlanStore(folder)
    except EngineError as error:
        warnings.warn(f"The plans in {folder} are not used. {error}", RuntimeWarning, stacklevel=3)
        return "onnxruntime"
    for name in made_for:
        try:
            usable_plans(store, manifest, Backend(name), cuda)
            return name
        except EngineError as error:
            warnings.warn(f"ONNX Runtime is used instead of {name}. {error}", RuntimeWarning, stacklevel=3)
    return "onnxruntime"


def on_gpu(device: str) -> bool:
    """Whether ONNX Runtime is to run on a GPU. Raises EngineError when it must and cannot."""
    if device not in DEVICES:
        raise EngineError(f"There is no device {device!r}. Choose one of {', '.join(DEVICES)}.")
    if device == "cpu" or (device == "auto" and not has_cuda_provider()):
        return False
    try:
        Cuda()
    except EngineError:
        if device == "cuda":
            raise
        return False
    return True


def _job(
    request: Request,
    stream: str,
    table: Table,
    shape: tuple[int, ...],
    constants: Mapping[str, np.ndarray],
    steps: Mapping[str, np.ndarray] | None = None,
) -> Job:
    """A job whose noise is the request's own."""
    state, noise = of_request(request.seed, stream, shape, table.init_sigma, table.stochastic)
    return Job(request.id, state, table.rows, steps or {}, constants, noise)


def _digest(manifest: Manifest) -> str:
    """16 hexadecimal digits that stand for the bundle in ids and metadata: all that has a say in a picture.

    Not when and by what it was exported, and not its defaults: a request carries their values itself.
    """
    names = ("files", "schedules", "num_history", "latent_size", "tokenizer", "params_mean", "params_std")
    values = {name: getattr(manifest, name) for name in names}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def not_finite(request: Request, where: str) -> Failure:
    return Failure(
        str(request.id),
        request,
        f"{where} gave NaN or infinity, so there is no picture. Try another seed or lower guidance; if it stays, "
        "the bundle's precision does not hold: export it in fp32.",
    )


def _made_by(bundle: str, engines: Mapping[str, Engine]) -> dict[str, str]:
    """What a picture's metadata says of its origin."""
    made_by = {"bundle": bundle, "device": getattr(engines.get("unet"), "device", "unknown")}
    for package in ("handiffuser", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx"):
        try:
            made_by[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return made_by
