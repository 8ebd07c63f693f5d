"""What can be seen of a picture before it is done: its latents without their noise, as colours."""

from __future__ import annotations

import numpy as np

from ..runtime.bundle import Bundle
from .messages import Run


class InFlight:
    """A request that the loop has, and what previews of it need."""

    def __init__(self, run: Run) -> None:
        self.request, self.preview_steps = run.request, run.preview_steps
        self.begun = not run.hands_first  # the front has its hands, or does not want them
        self.step = -1
        self.latents: np.ndarray | None = None  # at `step`
        self._levels: np.ndarray | None = None

    @property
    def wants_peek(self) -> bool:
        """A look costs little, but on a GPU the loop waits for it."""
        return bool(self.preview_steps) or not self.begun

    def clean(self, step: int, latents: np.ndarray, bundle: Bundle) -> np.ndarray:
        """An estimate of the latents without noise, from two steps.

        On a straight path (DDIM) both hold the same picture and the same noise, in proportions that are known.
        """
        if self._levels is None:
            self._levels = bundle.levels(self.request)
        levels = self._levels
        if self.latents is None or self.step != step - 1 or step >= len(levels):
            return latents * levels[min(step, len(levels) - 1), 2]
        (a0, s0, k0), (a1, s1, k1) = levels[step - 1], levels[step]
        mixed = s0 * a1 - s1 * a0
        if abs(mixed) < 1e-3:
            return latents * k1
        return (s0 * k1 * latents - s1 * k0 * self.latents) / mixed


QUADRATIC = 8  # channels: with more, a few of them hold the colours as they are


class Colours:
    """The colour of a latent: a quadratic function of it and of the mean around it; a linear one of many channels.

    The loop fits it to the pictures that it makes and their latents. It costs a thousandth of the decoder, and shows
    where a picture is going.
    """

    def __init__(self) -> None:
        self.squares: np.ndarray | None = None  # XᵀX [F, F] over all pictures so far
        self.products = np.zeros(0)  # XᵀY [F, 3]
        self.count = 0

    def learn(self, latents: np.ndarray, image: np.ndarray) -> None:
        """latents: [C, h, w]. image: uint8 [H, W, 3], H and W multiples of h and w."""
        _, h, w = latents.shape
        if image.shape[0] % h or image.shape[1] % w or not np.isfinite(latents).all():
            return
        means = image.reshape(h, image.shape[0] // h, w, image.shape[1] // w, 3).mean((1, 3)).reshape(-1, 3)
        x = self._features(latents)
        if self.squares is None:
            self.squares, self.products = np.zeros((x.shape[1],) * 2), np.zeros((x.shape[1], 3))
        self.squares += x.T @ x
        self.products += x.T @ means
        self.count += len(x)

    def __call__(self, latents: np.ndarray) -> np.ndarray:
        """uint8 [h, w, 3]."""
        _, h, w = latents.shape
        if self.squares is None:  # before the first picture: shades of the first channel
            shade = latents[:1] / max(float(np.abs(latents[0]).max()), 1e-6) * 100 + 128
            return np.nan_to_num(shade.repeat(3, 0).transpose(1, 2, 0)).clip(0, 255).astype(np.uint8)
        ridge = 1e-4 * self.count * np.eye(len(self.squares))
        colours = self._features(latents) @ np.linalg.solve(self.squares + ridge, self.products)
        return np.nan_to_num(colours).clip(0, 255).reshape(h, w, 3).astype(np.uint8)

    @staticmethod
    def _features(latents: np.ndarray) -> np.ndarray:
        """[C, h, w] -> [h w, F]: one, each channel and its 3 x 3 mean, and of few channels the products of both."""
        C, h, w = latents.shape
        wide = np.pad(latents.astype(np.float64), ((0, 0), (1, 1), (1, 1)), mode="edge")
        around = np.mean([wide[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], 0)
        i, j = np.triu_indices(C if C <= QUADRATIC else 0)
        columns = [np.ones((1, h, w)), latents, latents[i] * latents[j], around, around[i] * around[j]]
        return np.concatenate(columns).reshape(-1, h * w).T
