"""Feature extractors: pictures in, one vector each out, between whose sets FID and KID are taken.

    extractor = load_extractor(None)                       # fixed random filters: always there, not comparable
    extractor = load_extractor(Path("inception.safetensors"))     # Inception V3, with the user's weights
    extractor = load_extractor(Path("inception.pt"))       # a TorchScript file, such as NVIDIA's of Inception V3
    extractor([image, image])                              # float32 [2, D]

An extractor is anything with a name, settings, and a call. Published figures are of the Inception V3 network of 2015,
whose weights no package brings along: they are the user's file. Without it, random filters stand in (Naeem et al. 2020,
arXiv 2002.09797, section 4: random embeddings rank sets of pictures that are unlike ImageNet at least as well). Such
numbers compare pictures with pictures here, and are never comparable with published ones.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import EvaluationError

NOT_COMPARABLE = "Random filters, not Inception: these numbers are not comparable with published ones."
SEED = 2015
LEVELS = ((3, 32), (32, 64), (64, 128))  # channels in and out
HOW = (
    "Where you trust it, convert it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), "
    '"inception.safetensors"); or take NVIDIA\'s inception-2015-12-05.pt, which is TorchScript.'
)


class Extractor(Protocol):
    """Describes pictures. `settings` goes into every table; `warning` does, where it is not empty."""

    name: str
    settings: dict[str, Any]
    warning: str

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 pictures [H, W, 3] of any sizes -> float32 [N, D]."""


class RandomFilters:
    """Four layers of fixed random filters; each layer's mean and spread of every channel over the picture,
    brought to one length."""

    name = "random filters"
    warning = NOT_COMPARABLE

    def __init__(self, size: int = 96, levels: Sequence[tuple[int, int]] = LEVELS) -> None:
        self.size = size
        self.settings: dict[str, Any] = {"seed": SEED, "resized to": size, "resize": "bilinear, antialiased"}
        # Philox's bits are the same in every version of numpy; its own normal numbers need not be.
        bits = np.random.Generator(np.random.Philox(SEED))
        self.weights = []
        for before, after in levels:
            uniform = bits.random((after, before, 3, 3)) - 0.5
            uniform -= uniform.mean((1, 2, 3), keepdims=True)  # edges and textures, not brightness
            self.weights.append(torch.from_numpy(uniform * np.sqrt(24 / (9 * before))).float())
        self.settings["features"] = 6 + 2 * sum(after for _, after in levels)

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        x = torch.cat([resized(image, self.size) for image in images]) / 127.5 - 1
        found = [x.mean((2, 3)), x.std((2, 3))]
        for weight in self.weights:
            x = F.relu(F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), weight, stride=2))
            found += [x.mean((2, 3)), x.std((2, 3))]
        features = torch.cat(found, 1)
        # Of one length, or the colours of large backgrounds would drown everything else in KID's cubes.
        length = features.norm(dim=1, keepdim=True).clamp_min(1e-6)
        return (features / length * features.shape[1] ** 0.5).numpy()


def resized(image: np.ndarray, size: int) -> Tensor:
    """uint8 [H, W, 3] -> float32 [1, 3, size, size] in [0, 255]."""
    x = torch.tensor(image).permute(2, 0, 1)[None].float()
    if x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x, (size, size), mode="bilinear", align_corners=False, antialias=True)


class TorchScript:
    """A network that the user saved as TorchScript: uint8 pictures [N, 3, 299, 299] -> features [N, D]. NVIDIA's file
    of Inception V3 gives its 2048 features when it is asked for them, and is."""

    def __init__(self, path: Path, size: int = 299) -> None:
        """Raises EvaluationError for what is no TorchScript."""
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except FileNotFoundError:
            raise EvaluationError(f"There is no file {path}.") from None
        except (OSError, zipfile.BadZipFile) as error:
            raise EvaluationError(f"{path} is no TorchScript, and a pickle is never opened. {HOW}") from error
        if not any("/code/" in f"/{name}" for name in names):  # torch.save's files are archives, too: of pickles
            raise EvaluationError(f"{path} holds weights as a pickle, which is never opened. {HOW}")
        try:
            self.network = torch.jit.load(str(path), map_location="cpu").eval()
        except RuntimeError as error:
            raise EvaluationError(f"{path} is damaged: {str(error).splitlines()[0][:200]}") from error
        self.path, self.size, self.name = path, size, path.name
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.settings: dict[str, Any] = {
            "weights": path.name, "sha256": digest[:16], "resized to": size, "resize": "bilinear, antialiased",
        }  # fmt: skip
        self.warning = "Comparable with figures of the same weights, number of pictures and way of resizing alone."
        asked = [argument.name for argument in self.network.forward.schema.arguments]
        self._more = {"return_features": True} if "return_features" in asked else {}

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        x = torch.cat([resized(image, self.size) for image in images]).round().clamp(0, 255).to(torch.uint8)
        try:
            found = self.network(x, **self._more)
        except RuntimeError as error:
            raise EvaluationError(
                f"{self.path} does not take pictures, uint8 [N, 3, {self.size}, {self.size}]: "
                f"{str(error).strip().splitlines()[-1][:200]}"
            ) from error
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
            raise EvaluationError(f"{self.path} does not give a row of features for each picture.")
        return found.float().numpy()


def load_extractor(path: Path | None) -> Extractor:
    """The user's network, or random filters where there is none. Raises EvaluationError for a file that is unfit."""
    if path is None:
        return RandomFilters()
    if path.suffix == ".safetensors":
        from .inception import Inception

        return Inception(path)
    return TorchScript(path)
