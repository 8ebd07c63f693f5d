"""The part of a bundle that both loops share: tokens, schedules and pictures. It runs no graph."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import grammar
from ..contract import (
    IMAGE_ENCODER,
    MAX_SIDE,
    ROW_HEAD,
    TOKENIZER,
    WEIGHTS,
    Manifest,
    Size,
    apart,
    read_size,
    shown_size,
)
from ..engines.adapted import Chosen, changes, used
from ..errors import BundleError, CheckpointError, RequestError
from ..hands import Hands, by_person, hand_arrays, keep_camera, load_hands
from ..installed import version
from ..schedules import NoiseSchedule, Table, rows, skipped
from ..settings import SETTINGS
from ..tokens import PromptTokenizer, Reading
from .canvas import Canvas, canvas_of, content_of, digest
from .clash import clash
from .noise import HANDS, LATENTS
from .reading import PROMPTS, Reader
from .requests import Request, adapters_of
from .results import Failure, Picture, Work, failed
from .room import Room
from .words import chunks_read

WIDE = 2  # spans from which the positions of the left edge and of the right look alike
TABLES = 64  # schedules in a cache
CANVASES = 16  # pictures in a cache: some megabytes each

# Outputs of hand_features that a picture keeps -> their names in `Picture.hands`.
_FEATURE_NAMES = {
    "joints_3d": "joints",
    "joints": "joints_2d",
    "vertices": "vertices",
    "visibility": "visibility",
    "camera": "camera",
}


class Bundle:
    """A bundle's manifest and tokenizer. `made_by` is the origin in the metadata of its pictures."""

    def __init__(self, manifest: Manifest, tokenizer: PromptTokenizer) -> None:
        self.manifest, self.tokenizer = manifest, tokenizer
        self.reader = Reader(manifest, tokenizer)
        self.empty = tokenizer.encode("")[0]  # ids of the empty prompt [77]
        self.digest = _digest(manifest)
        self.made_by = _made_by(self.digest)
        self._schedules = {name: NoiseSchedule.from_config(config) for name, config in manifest.schedules.items()}
        self._mean = np.array(manifest.params_mean, np.float32)
        self._std = np.array(manifest.params_std, np.float32)
        self._tables: dict[tuple[Any, ...], Table] = {}
        self._words = frozenset(manifest.words)
        self._is_demo = grammar.is_demo(self._words)
        self.inpaints = any(tensor.name == "masked_latents" for tensor in manifest.graphs["unet"].inputs)
        self._canvases: dict[tuple[Any, ...], Canvas] = {}  # hashes of picture and mask, size -> both, read
        self.engine_sizes: frozenset[Size] | None = None  # that the engines were built for; None: any
        self.build_sizes = ""  # the command that builds engines for another size
        self.room = Room(manifest)
        self.folder: Path | None = None
        # Adapters that all pictures have, because their weights were merged when the engines were loaded.
        self.loaded: tuple[Chosen, ...] = ()
        self.adapted: Path | None = None  # the folder in the user's cache that these are merged into
        self.adapts = True  # whether requests may bring adapters of their own
        self._fitting: set[Any] = set()  # keys of adapters that fit this bundle
        self._placed: dict[bytes, np.ndarray] = {}  # params and camera of a file -> params that keep that camera

    @classmethod
    def load(cls, folder: Path, manifest: Manifest | None = None) -> Bundle:
        """Reads a bundle, and hashes its files unless a checked `manifest` is given.

        Raises BundleError for a missing or damaged bundle.
        """
        manifest = manifest or Manifest.load(folder)
        bundle = cls(manifest, PromptTokenizer(folder / TOKENIZER, manifest.tokenizer))
        bundle.folder = Path(folder)
        return bundle

    def picture(self, work: Work, image: np.ndarray) -> Picture:
        """The Picture of finished work; image: [H, W, 3], copied."""
        seconds = time.perf_counter() - work.started
        hands = self.hands_of(work)
        if self.adapted is not None:
            used(self.adapted)
        adapters = (self.loaded or work.adapters) if work.request.lora else ()
        return Picture(
            str(work.request.id), work.request, image.copy(), hands, seconds, work.warnings, self.made_by, work.draws,
            adapters,
        )  # fmt: skip

    def hands_of(self, work: Work) -> dict[str, np.ndarray]:
        """The hands of work whose hands are made, as in `Picture.hands`."""
        hands = {"params": work.params, **hand_arrays(work.params)}
        hands.update((ours, work.features[name]) for name, ours in _FEATURE_NAMES.items() if name in work.features)
        hands = by_person(hands, self.manifest.num_people)
        if (span := self.span(work.request)) != 1 and "joints_2d" in hands:  # of the own width -> of the picture's
            x, y = hands["joints_2d"][..., 0], hands["joints_2d"][..., 1]
            hands["joints_2d"] = np.stack([np.float32(0.5) + (x - np.float32(0.5)) / np.float32(span), y], -1)
        return hands

    def size(self, request: Request) -> Size:
        """Height and width of a request's picture in pixels. Raises RequestError for a size that cannot be painted."""
        own, multiple = self.manifest.image_size, self.manifest.size_multiple
        if request.size is None:
            return own
        size = read_size(request.size)
        if size == own:
            return own
        if not multiple:
            raise RequestError(
                f"size must be {shown_size(own)} for this bundle, got {request.size}. To paint any size, export it "
                "again: hd-export CHECKPOINT OUT.",
                "size",
            )
        if self.engine_sizes is not None and size not in self.engine_sizes:
            near = min(sorted(self.engine_sizes), key=lambda one: apart(one, size))
            raise RequestError(
                f"size must be {' or '.join(map(shown_size, sorted(self.engine_sizes)))} with these engines, got "
                f"{request.size}. The nearest is {shown_size(near)}. Or build for it: "
                f"{self.build_sizes} {request.size}.",
                "size",
            )
        near = self.manifest.nearest(size)
        if size != near:
            raise RequestError(
                f"size must be multiples of {multiple} up to {MAX_SIDE} pixels, got {request.size}. The nearest is "
                f"{shown_size(near)}.",
                "size",
            )
        return size

    def span(self, request: Request) -> float:
        """How many times as wide as the bundle's own pictures a request's picture is, at the same height."""
        (H, W), (height, width) = self.manifest.image_size, self.size(request)
        return (width * H) / (height * W)

    def spans(self, requests: Iterable[Request]) -> np.ndarray:
        """float32 [B], the input of `hand_features`."""
        return np.array([self.span(request) for request in requests], np.float32)

    def given(self, hands: Hands, joints_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Normalised parameters [P] of hands from a file. Where the file has a camera, they are placed so that this
        camera follows from them. joints_of: runs `hand_features` on one row, x [P] -> joints_3d [62, 3] metres, or
        [people, 62, 3]. Raises RequestError for more people than the bundle knows."""
        hands = hands.of(self.manifest.num_people)
        if hands.camera is None:
            return self.normalised(hands.params)
        key = hands.params.tobytes() + hands.camera.tobytes()
        if key not in self._placed:
            keep(self._placed, key, keep_camera(hands, joints_of(self.normalised(hands.params))))
        return self.normalised(self._placed[key])

    def adapters(self, request: Request) -> tuple[Chosen, ...]:
        """The adapters to merge for a request, beside those that are loaded. Raises RequestError where it may not bring
        any, or where one does not fit this bundle."""
        adapters = adapters_of(request)
        if not adapters or [one.key for one in adapters] == [one.key for one in self.loaded]:
            return ()
        if not self.adapts or self.loaded or self.folder is None:
            there, asked = (" ".join(map(shown_adapter, some)) for some in (self.loaded, adapters))
            raise RequestError(
                f"lora must be {there or 'left out'}, as these engines were loaded, got {asked}. Give all pictures of "
                "a run the same adapters (hd-run --lora), or merge them into a bundle: hd-engines merge.",
                "lora",
            )
        key = tuple(one.key for one in adapters)
        if key not in self._fitting:
            try:
                changes(self.folder, adapters)
            except (BundleError, CheckpointError) as error:
                raise RequestError(str(error), "lora") from None
            self._fitting.add(key)
        return adapters

    def again(self, work: Work, x: np.ndarray, features: Mapping[str, np.ndarray]) -> bool:
        """Whether stage 1 draws these hands again: x [P] and their row of `hand_features`."""
        more = work.request.hands is None and work.draws <= (work.request.hand_redraws or 0)
        return more and clash(features["joints_3d"], features["visibility"], self.params(x))

    def normalised(self, params: np.ndarray) -> np.ndarray:
        """Hand parameters [P] in the units of the hand prior: mean 0, standard deviation 1."""
        return (params.reshape(-1) - self._mean) / self._std

    def params(self, x: np.ndarray) -> np.ndarray:
        """The inverse of `normalised`."""
        return x * self._std + self._mean

    def tokens(self, request: Request) -> tuple[tuple[Reading, Reading], list[str]]:
        """The negative prompt, then the prompt. And warnings: text that was not read, words that this bundle was not
        trained on, and settings without effect."""
        warnings: list[str] = []
        new: list[str] = []
        uses: dict[str, list[str]] = {}
        readings = [self.reader.read(request, name) for name in PROMPTS]
        for name, reading in zip(PROMPTS, readings, strict=True):
            warnings += self.reader.unread(request, name)
            if self._words:
                end = len(reading.text) - len(reading.cut)
                strange, unknown = grammar.strangers(reading.text, self._words, self._is_demo, end)
                new += [word for word in strange if word not in new]
                uses |= unknown
        if said := grammar.sentence(new, uses, self._words):
            warnings.append(said)
        if self.span(request) >= WIDE:
            own = shown_size(self.manifest.image_size)
            warnings.append(f"The picture is more than {WIDE} times as wide as {own}. Hands may show up at both sides.")
        return (readings[0], readings[1]), warnings + _idle(request)

    def table(self, stream: str, request: Request) -> Table:
        """The schedule of one stage of a filled request. Raises RequestError for a solver or steps that it cannot
        run."""
        if stream == HANDS:
            graph, chosen = "hand_prior", (request.hand_solver, request.hand_steps, request.hand_guidance)
            interval = (0.0, 1.0)
        else:
            graph, chosen = "unet", (request.solver, request.steps, request.guidance)
            interval = request.guidance_interval
        start = 0
        if graph == "unet" and request.image is not None:
            start = skipped(request.steps or 0, request.strength or 0.0)
        key = (graph, *chosen, interval, start)
        if key not in self._tables:
            solver, steps, guidance = chosen
            if solver is None or steps is None or guidance is None:
                raise RequestError("The request must have all its settings. Call HanDiffuser.prepare first.")
            history = self.manifest.num_history[graph]
            try:
                table = rows(self._schedules[graph], solver, steps, guidance, history, interval, start)
            except RequestError as error:
                if stream == HANDS and error.param:
                    error.param = f"hand_{error.param}"
                raise
            keep(self._tables, key, table)
        return self._tables[key]

    def levels(self, request: Request) -> np.ndarray:
        """[N, 3], a row for each step of a filled request: the shares of picture and noise (α, σ) in scale * latents,
        and that scale."""
        table = self.table(LATENTS, request)
        scale = table.rows[:, ROW_HEAD.index("scale")].astype(np.float64)
        return np.column_stack([table.levels[:-1] * scale[:, None], scale])

    def shares(self, request: Request) -> np.ndarray:
        """float32 [N + 1, 2]: the shares of picture and noise before each step of a filled request with a picture, and
        in its result. Where all is painted again the start is noise alone, as in diffusers' inpaint pipeline."""
        table = self.table(LATENTS, request)
        shares = table.levels.astype(np.float32)
        if request.image is None or (request.strength == 1 and (request.mask is not None or self.inpaints)):
            shares[0] = 0, table.init_sigma
        return shares

    def canvas(self, request: Request) -> Canvas | None:
        """The picture that a request brings, read; None for one without, unless the UNet was trained for inpainting.

        Raises RequestError for a picture or mask that cannot be used, and where the bundle cannot read pictures.
        """
        if request.image is None and not self.inpaints:
            return None
        if IMAGE_ENCODER not in self.manifest.graphs:
            raise RequestError(
                f"image must be left out: this bundle lacks the graph {IMAGE_ENCODER}, which reads pictures. Export it "
                "again: hd-export CHECKPOINT OUT.",
                "image",
            )
        image, mask = (
            None if source is None else content_of(name, source)
            for name, source in (("image", request.image), ("mask", request.mask))
        )
        size = self.size(request)
        key = (*(None if content is None else digest(content) for content in (image, mask)), size)
        if key not in self._canvases:
            keep(self._canvases, key, canvas_of(image, mask, self.manifest, size), CANVASES)
        return self._canvases[key]

    def canvases(self, requests: Iterable[Request]) -> tuple[dict[Hashable, Canvas | None], list[Failure]]:
        """The `canvas` of each request by id, and a Failure for each whose picture cannot be read, because files may
        change, or whose size, prompt or adapters these engines do not take."""
        found: dict[Hashable, Canvas | None] = {}
        failures = []
        for request in requests:
            try:
                self.size(request)
                self.reader.check(request)
                if not self.adapts:
                    self.adapters(request)
                found[request.id] = self.canvas(request)
            except RequestError as error:
                failures.append(failed(request, error))
        return found, failures

    def check(self, request: Request) -> None:
        """Raises RequestError when this bundle cannot run the request, or this machine lacks the memory for its
        size."""
        self.table(LATENTS, request)
        self.reader.check(request)
        readings = [self.reader.read(request, name) for name in PROMPTS]
        self.room.check(self.size(request), chunks_read(readings, request))
        self.canvas(request)
        self.adapters(request)
        if request.hands is None:
            self.table(HANDS, request)
        else:
            try:
                load_hands(request.hands).of(self.manifest.num_people)
            except RequestError as error:
                error.param = "hands"
                raise


def _idle(request: Request) -> list[str]:
    """A sentence for each setting of a filled request that has no effect."""
    if request.guidance != 1:
        return []
    given = {
        "negative prompt": request.negative_prompt != "",
        "guidance interval": request.guidance_interval != SETTINGS["guidance_interval"].default,
    }
    return [f"The {name} has no effect: the guidance is 1, which is off." for name, there in given.items() if there]


def keep(cache: dict[Any, Any], key: Any, value: Any, most: int = TABLES) -> None:
    """Adds to a cache. A full cache drops its oldest entry: requests bring ever new guidances."""
    if len(cache) >= most:
        cache.pop(next(iter(cache)))
    cache[key] = value


def shown_adapter(one: Chosen) -> str:
    """An adapter as a user names it."""
    return f"{one.path.name}:{one.scale:g}"


def _digest(manifest: Manifest) -> str:
    """16 hexadecimal digits that name the bundle in ids and metadata: a hash of all that determines a picture.

    The date and versions of the export and the defaults are left out: requests carry the values of the defaults.
    """
    names = ("files", "schedules", "num_history", "latent_size", "tokenizer", "params_mean", "params_std")
    values = {name: getattr(manifest, name) for name in names}
    values["files"] = {name: one for name, one in manifest.files.items() if name != WEIGHTS}  # which no graph reads
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _made_by(bundle: str) -> dict[str, str]:
    """The origin in the metadata of pictures; the loop adds its device."""
    packages = (
        "handiffuser",
        "onnxruntime",
        "onnxruntime-gpu",
        "openvino",
        "tensorrt",
        "tensorrt-lean",
        "tensorrt-rtx",
    )
    found = {package: version(package) for package in packages}
    return {"bundle": bundle} | {package: number for package, number in found.items() if number}
