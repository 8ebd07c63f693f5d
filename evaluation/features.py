"""Feature extractors turn each picture into a vector. FID and KID compare two sets of such vectors.

    extractor = load_extractor(None)                       # fixed random filters
    extractor = load_extractor(Path("inception.safetensors"))     # Inception V3, with the user's weights
    extractor = load_extractor(Path("inception.pt"))       # a TorchScript file, such as NVIDIA's of Inception V3
    extractor([image, image])                              # float32 [2, D]

An extractor has a name, settings, and a call. Published figures come from the Inception V3 network of 2015; its weights
are the user's file. Without that file random filters take its place. Naeem et al. 2020 (arXiv 2002.09797, section 4)
find that random embeddings rank pictures unlike ImageNet at least as well. Compare such figures with each other only.
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
    """Describes pictures. Every table shows `settings`, and `warning` where it is not empty."""

    name: str
    settings: dict[str, Any]
    warning: str

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 pictures [H, W, 3] of any sizes -> float32 [N, D]."""


class RandomFilters:
    """Three layers of fixed random filters. Features: mean and spread of each channel, scaled to one length."""

    name = "random filters"
    warning = NOT_COMPARABLE

    def __init__(self, size: int = 96, levels: Sequence[tuple[int, int]] = LEVELS) -> None:
        self.size = size
        self.settings: dict[str, Any] = {"seed": SEED, "resized to": size, "resize": "bilinear, antialiased"}
        # numpy keeps Philox's bits across versions, but not its normal numbers.
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
        # With one length, large backgrounds do not dominate KID's cubes.
        length = features.norm(dim=1, keepdim=True).clamp_min(1e-6)
        return (features / length * features.shape[1] ** 0.5).numpy()


def resized(image: np.ndarray, size: int) -> Tensor:
    """uint8 [H, W, 3] -> float32 [1, 3, size, size] in [0, 255]."""
    x = torch.tensor(image).permute(2, 0, 1)[None].float()
    if x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x, (size, size), mode="bilinear", align_corners=False, antialias=True)


class TorchScript:
    """A network that the user saved as TorchScript: uint8 pictures [N, 3, 299, 299] -> features [N, D].

    NVIDIA's file of Inception V3 gives its 2048 features with `return_features`, which is set where the network has it.
    """

    def __init__(self, path: Path, size: int = 299) -> None:
        """Raises EvaluationError for a file that is not TorchScript."""
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except FileNotFoundError:
            raise EvaluationError(f"--weights must be a file, got {path}, which does not exist.") from None
        except (OSError, zipfile.BadZipFile) as error:
            raise EvaluationError(f"--weights must be .safetensors or TorchScript, got {path}. {HOW}") from error
        if not any("/code/" in f"/{name}" for name in names):  # files of torch.save are archives, too, of pickles
            raise EvaluationError(f"--weights must not be a pickle, got {path}. {HOW}")
        try:
            self.network = torch.jit.load(str(path), map_location="cpu").eval()
        except RuntimeError as error:
            raise EvaluationError(f"--weights {path} is damaged: {str(error).splitlines()[0][:200]}") from error
        self.path, self.size, self.name = path, size, path.name
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.settings: dict[str, Any] = {
            "weights": path.name, "sha256": digest[:16], "resized to": size, "resize": "bilinear, antialiased",
        }  # fmt: skip
        self.warning = "Comparable only with figures of the same weights, number of pictures and way of resizing."
        asked = [argument.name for argument in self.network.forward.schema.arguments]
        self._more = {"return_features": True} if "return_features" in asked else {}

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        x = torch.cat([resized(image, self.size) for image in images]).round().clamp(0, 255).to(torch.uint8)
        try:
            found = self.network(x, **self._more)
        except RuntimeError as error:
            raise EvaluationError(
                f"--weights must take pictures, uint8 [N, 3, {self.size}, {self.size}]. {self.path} does not: "
                f"{str(error).strip().splitlines()[-1][:200]}"
            ) from error
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
            raise EvaluationError(f"--weights must give a row of features for each picture. {self.path} does not.")
        return found.float().numpy()


def load_extractor(path: Path | None) -> Extractor:
    """The user's network, or random filters without one. Raises EvaluationError for an unusable file."""
    if path is None:
        return RandomFilters()
    if path.suffix == ".safetensors":
        from .inception import Inception

        return Inception(path)
    return TorchScript(path)
