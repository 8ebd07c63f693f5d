"""What hands do: gestures as Gaussians over the 45 finger angles, and a wide one for all other hands.

    poses = Poses.of(bundle)              # the bundle's own, or the one that ships: the gestures of the demo's worlds
    poses = Poses.made(names, angles)     # of a dataset: `hd-data poses FOLDER BUNDLE/poses.npz`

Angles are those of `fingers.axes`, in radians, of left hands: thumb to little finger, three joints each, bend, side and
twist. So they serve any body.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from ..errors import DetectionError
from ..files import written

FILE = Path(__file__).with_name("poses.npz")
FLOOR = np.radians(2.5)  # no dataset varies as people do: an angle's least standard deviation in a gesture
WIDE_FLOOR = np.radians(4.0)  # the same among all hands
OTHER = 0.1  # of all hands show no gesture that the file knows


@dataclass(frozen=True)
class Poses:
    """names: [K], "" for the wide Gaussian. mean: [K, 45]. covariance: [K, 45, 45]. weight: [K], their sum is 1."""

    names: tuple[str, ...]
    mean: np.ndarray
    covariance: np.ndarray
    weight: np.ndarray

    @cached_property
    def precision(self) -> np.ndarray:
        """[K, 45, 45], the inverse of the covariance."""
        return np.linalg.inv(self.covariance)

    @cached_property
    def log_weight(self) -> np.ndarray:
        """[K], the logarithm of a component's largest density."""
        return np.log(self.weight) - 0.5 * np.linalg.slogdet(self.covariance)[1]

    @classmethod
    def made(cls, names: Sequence[str], angles: np.ndarray) -> Poses:
        """Of hands [N, 45] with the gesture of each; "" for a hand without a name."""
        known = sorted({name for name in names if name})
        labels = np.array(names)
        groups = [angles[labels == name] for name in known]
        mean = [group.mean(0) for group in groups] + [angles.mean(0)]
        spread = [np.diag(group.var(0) + FLOOR**2) for group in groups]
        wide = np.cov(angles.T, bias=True) + WIDE_FLOOR**2 * np.eye(45)
        weight = np.full(len(known) + 1, (1 - OTHER) / max(len(known), 1))
        weight[-1] = OTHER if known else 1.0
        return cls((*known, ""), np.stack(mean), np.stack([*spread, wide]), weight)

    def only(self, name: str | None) -> Poses:
        """The prior of a hand whose gesture is known; None: of any hand."""
        if name is None:
            return self
        rows = [k for k, own in enumerate(self.names) if own == name]
        if not rows or not name:
            known = ", ".join(sorted({own for own in self.names if own}))
            raise DetectionError(f"gesture must be one of {known}, got {name!r}. Choose one of them.")
        weight = self.weight[rows] / self.weight[rows].sum()
        return Poses(tuple(name for _ in rows), self.mean[rows], self.covariance[rows], weight)

    def told(self, parts: np.ndarray, log: np.ndarray) -> dict[str, float]:
        """Gestures and their probabilities, the likeliest first, of solved hands: components [N], log evidence [N]."""
        best = np.full(len(self.names), -np.inf)
        np.maximum.at(best, parts, log)
        share = np.exp(best - best.max())
        total: dict[str, float] = {}
        for name, one in zip(self.names, (share / share.sum()).tolist(), strict=True):
            total[name] = total.get(name, 0.0) + one
        return {name: one for name, one in sorted(total.items(), key=lambda pair: -pair[1]) if one > 0.001}

    def save(self, path: str | Path) -> None:
        """Writes an .npz of plain arrays. Raises DetectionError where that fails."""
        buffer = io.BytesIO()
        held = {name: np.asarray(getattr(self, name), np.float32) for name in ("mean", "covariance", "weight")}
        np.savez_compressed(buffer, names=np.array(self.names), **held)  # type: ignore[arg-type]
        try:
            with written(Path(path)) as temporary:
                temporary.write_bytes(buffer.getvalue())
        except OSError as error:
            raise DetectionError(f"{path} cannot be written: {error.strerror or error}. Name another file.") from error

    @classmethod
    def of(cls, bundle: str | Path) -> Poses:
        """Of a bundle's folder: its poses.npz, or the one that ships. Raises DetectionError."""
        own = Path(bundle) / FILE.name
        return cls.load(own if own.is_file() else FILE)

    @classmethod
    def load(cls, path: str | Path = FILE) -> Poses:
        """Reads what `save` wrote; by default the file that ships. Raises DetectionError."""
        return _load(str(path))


@lru_cache(maxsize=8)
def _load(path: str) -> Poses:
    try:
        with np.load(path, allow_pickle=False) as held:
            names = tuple(held["names"].tolist())
            mean, covariance, weight = (held[name].astype(np.float64) for name in ("mean", "covariance", "weight"))
    except Exception as error:  # a bad file fails numpy and zipfile in many ways; pickles are not opened
        why = getattr(error, "strerror", None) or type(error).__name__
        raise DetectionError(
            f"{path} must be an .npz that hd-data poses wrote, got {why}. Make it: hd-data poses FOLDER {path}"
        ) from None
    count = len(names)
    good = (mean.shape, covariance.shape, weight.shape) == ((count, 45), (count, 45, 45), (count,))
    if not good or not all(np.isfinite(array).all() for array in (mean, covariance, weight)) or (weight <= 0).any():
        raise DetectionError(f"{path} must hold gestures of 45 angles, got other arrays. Make it: hd-data poses")
    return Poses(names, mean, covariance, weight / weight.sum())
