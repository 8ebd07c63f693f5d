"""Pictures that requests bring, on a GPU: encoded beside the steps, and kept by one small kernel behind each step.

    blends = pictures.encode(side, works, canvases, bundle)
    blends["a"].start(main, state, noise)      # the picture with noise
    blends["a"].step(main, state, 0)           # after step 0
    pictures.give(blends["a"])                 # when both streams are done with it

The kernel (`blend.cu`) computes what `canvas.Blend` computes, for one request. So rows without a picture cost nothing,
and the captured step graph is the same for all.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import numpy as np

from ..errors import EngineError
from .bundle import Bundle
from .canvas import Blend, Canvas
from .device_graphs import DeviceGraph
from .device_noise import DeviceNoise
from .noise import RequestNoise
from .results import Work

THREADS = 128
# x, known, noise, mask; shares of picture and noise; numbers of the mask, of x
TYPES = (*[ctypes.c_void_p] * 4, *[ctypes.c_float] * 2, *[ctypes.c_uint64] * 2)
ROWS = ("known", "noise", "masked_latents")  # arrays [C, h, w]; "mask" is [1, h, w]


@dataclass(eq=False)
class DeviceBlend:
    """`canvas.Blend` on a device.

    arrays: known, noise, mask, and perhaps masked_latents. shares: float32 [N + 1, 2], see `Bundle.shares`. keeps:
    whether it keeps a part of the picture after each step.
    """

    pictures: DevicePictures
    arrays: dict[str, Any]
    shares: np.ndarray
    keeps: bool

    def start(self, stream: Any, x: Any, noise: RequestNoise) -> None:
        """Writes the initial state into a row."""
        self.pictures.noise.start(stream, self.arrays["noise"], replace(noise, init_sigma=1.0))
        self.pictures.blend(stream, x, self.arrays, False, self.shares[0])

    def step(self, stream: Any, x: Any, i: int) -> None:
        """Puts back what is kept, after step i."""
        if self.keeps:
            self.pictures.blend(stream, x, self.arrays, True, self.shares[i + 1])


class DevicePictures:
    """Encodes pictures and blends them. Where the driver refuses the kernel, the host blends, and waits for each step.

    encoder: of the bundle; None where it has none. latents: the shape [C, h, w].
    """

    def __init__(self, cuda: Any, noise: DeviceNoise, encoder: DeviceGraph | None, latents: tuple[int, ...]) -> None:
        self.cuda, self.staging, self.noise, self.encoder, self.latents = cuda, noise.staging, noise, encoder, latents
        self.free: list[dict[str, Any]] = []
        self.lent: list[DeviceBlend] = []
        self.refused = ""
        self.kernel: Any = None
        code = resources.files(__package__).joinpath("blend.ptx").read_bytes()
        if encoder is not None:
            try:
                self.kernel = cuda.kernel(code, "blend", TYPES)
            except EngineError as error:
                self.refused = str(error)

    def encode(
        self, stream: Any, works: Iterable[Work], given: Mapping[Hashable, Canvas | None], bundle: Bundle
    ) -> dict[Hashable, DeviceBlend]:
        """Enqueues the pictures of a batch; returns what they keep, by id. given: `Bundle.canvases`."""
        inpaints, blends, canvases = bundle.inpaints, dict[Hashable, DeviceBlend](), list[Canvas]()
        for work in works:
            if (canvas := given[work.request.id]) is None:
                continue
            work.warnings += canvas.warnings
            keeps = canvas.keeps and not inpaints
            blend = DeviceBlend(self, self._take(inpaints), bundle.shares(work.request), keeps)
            self.lent.append(blend)
            self.staging.upload(stream, blend.arrays["mask"], canvas.binary if inpaints else canvas.mask)
            blends[work.request.id] = blend
            canvases.append(canvas)
        for name, pixels in (("known", "pixels"), ("masked_latents", "hidden"))[: 1 + inpaints]:
            if canvases and self.encoder is not None:
                images = np.stack([getattr(canvas, pixels) for canvas in canvases])
                self.staging.upload(stream, self.encoder.inputs["image"][: len(images)], images)
                self.encoder.launch(stream, len(images))
                for row, blend in enumerate(blends.values()):
                    stream.copy(blend.arrays[name], self.encoder.outputs["latents"][row])
        return blends

    def blend(self, stream: Any, x: Any, arrays: Mapping[str, Any], masked: bool, shares: np.ndarray) -> None:
        """x <- m x + (1 - m) (picture known + rest noise), a row; m is the mask where it is masked, else 0."""
        picture, rest = map(float, shares)
        if self.kernel is not None:
            count, cells = math.prod(x.shape), math.prod(x.shape[1:])
            known, noise, mask = (arrays[name].pointer for name in ("known", "noise", "mask"))
            pointers = (x.pointer, known, noise, mask if masked else 0)
            self.kernel.launch(stream, -(-count // THREADS), THREADS, *pointers, picture, rest, cells, count)
            return
        sources = {"x": x, **arrays}
        host = {name: self.staging.take(tuple(source.shape), source.dtype) for name, source in sources.items()}
        for name, source in sources.items():
            stream.copy(host[name], source)
        stream.synchronize()
        kept = Blend(host["known"], host["noise"], host["mask"], shares[None].repeat(2, 0))
        self.staging.upload(stream, x, kept(0, host["x"]) if masked else kept.start())
        for pinned in host.values():
            self.staging.give(pinned)

    def give(self, blend: DeviceBlend) -> None:
        """Takes the arrays back. The streams must be done with them."""
        self.lent.remove(blend)
        self.free.append(blend.arrays)

    def reclaim(self) -> None:
        """Takes all arrays back. The streams must be idle."""
        for blend in [*self.lent]:
            self.give(blend)

    def _take(self, inpaints: bool) -> dict[str, Any]:
        if self.free:
            return self.free.pop()
        arrays = {name: self.cuda.zeros(self.latents, "float32") for name in ROWS[: 2 + inpaints]}
        return arrays | {"mask": self.cuda.zeros((1, *self.latents[1:]), "float32")}
