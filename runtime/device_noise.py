"""Noise drawn on the GPU by our own kernel: the same numbers as on the host.

On the host the noise of eight rows takes 2 ms a step with a stochastic solver, as long as the step on a fast GPU.
`noise.cu` is the kernel; it equals `noise.normal` to one unit in the last place of float32.
"""

from __future__ import annotations

import ctypes
import math
from importlib import resources
from typing import Any

from ..errors import EngineError
from .device_graphs import Staging
from .noise import RequestNoise, stream_key

THREADS = 128
TYPES = (ctypes.c_void_p, *[ctypes.c_uint64] * 4, ctypes.c_float)  # out, seed, stream, step, count, scale


class DeviceNoise:
    """Draws noise into device arrays. Where the driver refuses the kernel, the host draws and uploads."""

    def __init__(self, cuda: Any, staging: Staging) -> None:
        self.staging, self.refused = staging, ""
        self.kernel: Any = None
        code = resources.files(__package__).joinpath("noise.ptx").read_bytes()
        try:
            self.kernel = cuda.kernel(code, "normal", TYPES)
        except EngineError as error:
            self.refused = str(error)

    def start(self, stream: Any, target: Any, noise: RequestNoise) -> None:
        """Writes the initial noise into a float32 row. With an offset the host draws it, once a picture."""
        if self.kernel is None or noise.offset:
            self.staging.upload(stream, target, noise.start(target.shape))
        else:
            self._draw(stream, target, noise, 0, noise.init_sigma)

    def step(self, stream: Any, target: Any, noise: RequestNoise, i: int) -> None:
        """Writes the noise that step i adds into a float32 row."""
        if self.kernel is None:
            self.staging.upload(stream, target, noise.step(i, target.shape))
        else:
            self._draw(stream, target, noise, 1 + i, 1.0)

    def _draw(self, stream: Any, target: Any, noise: RequestNoise, draw: int, scale: float) -> None:
        count = math.prod(target.shape)
        blocks = -(-count // (4 * THREADS))  # each thread makes four numbers
        key = (noise.seed, stream_key(noise.stream))
        self.kernel.launch(stream, blocks, THREADS, target.pointer, *key, draw, count, scale)
