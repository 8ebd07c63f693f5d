"""Where a model's parameters are in a bundle's graphs: what `hd-run --lora` needs to change them without PyTorch.

    weights = WeightMap.load(folder)
    weights.shapes["unet.conv_in.weight"]      # (320, 4, 3, 3), as PyTorch has it
    weights.places["unet.conv_in.weight"]      # [Place("unet", "unet.conv_in.weight", "plain")]

Export writes it beside the graphs. Keys and values of cross-attention are in `unet_context`, and the projections of
time in `unet_time`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from msgspec import Meta

from .adapters import Change
from .contract import WEIGHTS, Word
from .errors import BundleError
from .files import written
from .schema import MisfitError, fit, one_of, read_json

_Size = Annotated[int, Meta(ge=0, lt=2**31)]
# Of a doubled row 2 i + phase: which taps fall on the same small row, the upper of the two first; and where they begin.
TAPS = (((0,), (1, 2)), ((0, 1), (2,)))
# How a graph holds a parameter: with the same numbers in order, transposed (the exporter turns products around), as the
# taps of one of four small convolutions (`export.upsampling`), or in columns of a wider constant, the positional
# kernel's.
FORMS = ("plain", "transposed", "taps_0", "taps_1", "taps_2", "taps_3", "columns")


@dataclass(frozen=True)
class Place:
    """An initializer of a graph that holds a parameter, and how. Columns begin at `column` of the last axis and hold
    `factor` times the parameter."""

    graph: Word
    initializer: Annotated[str, Meta(max_length=500)]
    form: Annotated[str, one_of(*FORMS)]
    column: _Size = 0
    factor: Annotated[float, Meta(ge=-1e6, le=1e6)] = 1.0


@dataclass(frozen=True)
class WeightMap:
    """shapes: of all parameters that an adapter may change. places: of those that a graph holds."""

    shapes: Annotated[dict[Word, Annotated[tuple[_Size, ...], Meta(max_length=8)]], Meta(max_length=100_000)]
    places: Annotated[dict[Word, Annotated[list[Place], Meta(max_length=100)]], Meta(max_length=100_000)]

    def save(self, folder: Path) -> None:
        with written(folder / WEIGHTS) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=0) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> WeightMap:
        """Raises BundleError for a bundle without it, which an older version exported, and for a damaged one."""
        try:
            return fit(read_json(folder / WEIGHTS), cls)
        except FileNotFoundError:
            raise BundleError(
                f"{folder} must say where its weights are, for adapters at run time, and lacks {WEIGHTS}: an older "
                "version exported it. Export it again: hd-export CHECKPOINT OUT."
            ) from None
        except (OSError, MisfitError) as error:
            why = getattr(error, "strerror", None) or error
            raise BundleError(f"{folder / WEIGHTS} cannot be read: {why} Export the bundle again.") from None


def written_as(value: np.ndarray, form: str) -> np.ndarray:
    """A parameter in one of the first FORMS. They are linear maps."""
    if form == "plain":
        return value
    return value.T if form == "transposed" else phases(value)[int(form.removeprefix("taps_"))]


def changed(stored: np.ndarray, place: Place, shape: Sequence[int], change: Change) -> np.ndarray:
    """An initializer after a change of the parameter that it holds. shape: the parameter's."""
    if place.form != "columns":
        return change(stored, shape, lambda value: written_as(value, place.form).reshape(stored.shape))
    new, width = stored.reshape(-1, stored.shape[-1]).copy(), shape[-1] if len(shape) > 1 else 1
    columns = slice(place.column, place.column + width)
    own, factor = new[:, columns], np.float32(place.factor)
    new[:, columns] = factor * change(own / factor, shape, lambda value: value.reshape(own.shape))
    return new.reshape(stored.shape)


def phases(weight: np.ndarray) -> list[np.ndarray]:
    """[O, C, 3, 3] -> four of [O, C, 2, 2]: for the upper left, upper right, lower left and lower right pixel."""
    exact = weight.astype(np.float64)
    rows = [np.stack([exact[:, :, list(taps)].sum(2) for taps in pair], 2) for pair in TAPS]  # [O, C, 2, 3]
    found = [np.stack([half[..., list(taps)].sum(3) for taps in pair], 3) for half in rows for pair in TAPS]
    return [one.astype(weight.dtype) for one in found]
