"""The noise of a request: a seed gives the same numbers alone, in any batch, in any slot or order.

Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a key and a counter into random
bits. The key is (seed, stream), the counter starts at the step, and Box-Muller turns the bits into normal numbers. The
batch, the machine and numpy's version make no difference: numpy promises to keep the bits of Philox, but not its own
normal numbers.

The streams are HANDS, LATENTS, one for each redraw of hands, and one for each prompt's offset. Step 0 of a stream is
the initial noise; step 1 + i is what step i adds.

Try it:

    from handiffuser.runtime.noise import LATENTS, normal
    first = normal(7, LATENTS, 0, (4, 64, 64))
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from handiffuser.errors import RequestError
from handiffuser.settings import MAX_SEED, SETTINGS

HANDS = "hands"
LATENTS = "latents"


def normal(seed: int, stream: str | int, step: int, shape: Sequence[int]) -> np.ndarray:
    """Unit normal noise, float32 of the given shape.

    seed: 0 ... 2^63 - 1. stream: any name or number; the streams of a seed are independent. step: 0 and up.
    Raises RequestError for another seed.
    """
    seed = check_seed(seed)
    key = np.array([seed, stream_key(stream)], dtype=np.uint64)
    # The low word counts blocks of one step, so that steps are 2^64 blocks apart and never meet.
    counter = np.array([0, step, 0, 0], dtype=np.uint64)
    count = math.prod(shape)
    bits = np.random.Philox(key=key, counter=counter).random_raw(count + count % 2) >> np.uint64(11)
    # Box and Muller 1958: two uniform numbers make two normal ones. The first is never 0: its log is finite.
    radius = np.sqrt(-2 * np.log((bits[0::2] + np.uint64(1)) * 2.0**-53))
    angle = bits[1::2] * (2 * math.pi * 2.0**-53)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return pairs.reshape(-1)[:count].reshape(shape).astype(np.float32)


def initial(seed: int, stream: str, shape: Sequence[int], offset: float = 0.0, prompt: str = "") -> np.ndarray:
    """The initial noise of a seed, float32 [C, ...], before a schedule scales it.

    offset: the standard deviation by which each channel moves as a whole. Few large steps turn pure noise into the mean
    of all that the prompt allows, so that the colours that it leaves open come out alike. With the offset (for
    training: Guttenberg, "Diffusion with offset noise", 2023) they vary. The first of 4 to 12 steps lacks about 0.1.
    The offset depends on the prompt, too: the prompts of a list share a seed, but not a tint.
    """
    start = normal(seed, stream, 0, shape)
    if offset:
        start += np.float32(offset) * normal(seed, f"{stream}-offset {prompt}", 0, (shape[0], *[1] * (len(shape) - 1)))
    return start


def drawn_again(stream: str, draw: int) -> str:
    """The stream of a redraw; of the first draw (0) the stream itself."""
    return f"{stream}-{draw}" if draw else stream


def check_seed(seed: int) -> int:
    """The seed as a Python int; raises RequestError unless it is a whole number in 0 ... 2^63 - 1."""
    try:
        value = operator.index(seed)
    except TypeError:
        value = -1
    if not 0 <= value <= MAX_SEED:
        raise RequestError(f"seed must be {SETTINGS['seed'].constraint}, got {seed!r}.", "seed")
    return value


def stream_key(stream: str | int) -> int:
    """The second half of Philox's key."""
    return int.from_bytes(hashlib.sha256(str(stream).encode()).digest()[:8], "little")


@dataclass(frozen=True)
class RequestNoise:
    """The noise of one sampling of a request, on the host or on a GPU.

    Step 0 of its stream, scaled by the schedule's init_sigma, is the initial state; step 1 + i is what step i adds.
    offset: how far the initial channels move as a whole, see `initial`.
    """

    seed: int
    stream: str
    init_sigma: float
    stochastic: bool
    offset: float = 0.0
    prompt: str = ""

    def start(self, shape: Sequence[int]) -> np.ndarray:
        return initial(self.seed, self.stream, shape, self.offset, self.prompt) * np.float32(self.init_sigma)

    def step(self, i: int, shape: Sequence[int]) -> np.ndarray:
        return normal(self.seed, self.stream, 1 + i, shape)
