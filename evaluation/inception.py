"""Inception V3 as FID uses it: TensorFlow's network of 2015 with its padding, pooling and way of resizing.

    features = Inception(Path("inception.safetensors"))(images)        # float32 [N, 2048]

The weights are the user's file from pytorch-fid or torch-fidelity, whose names this network has. Convert it once:

    safetensors.torch.save_file(torch.load(FILE, weights_only=True), "inception.safetensors")

Szegedy et al. 2016 (arXiv 1512.00567). Comments mark what differs, after pytorch-fid's notes. torch-fidelity, whose
network torchmetrics takes, opens its weights as a pickle or downloads them, and needs torchvision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import EvaluationError

SIZE = 299
Step = tuple[str, int, Any]  # name, channels, kernel
Chain = list[Step | list[Step]]  # an inner list: convolutions side by side, concatenated


class Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, before: int, after: int, kernel: Any, stride: int = 1, padding: Any = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(after, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Chains of convolutions side by side, and a pooled one. reduce: the last step of each chain halves the picture."""

    def __init__(self, before: int, chains: list[Chain], pool: str, pooled: int = 0, reduce: bool = False) -> None:
        super().__init__()
        self.pool, self.chains = pool, [[_names(step) for step in chain] for chain in chains]
        for chain in chains:
            channels = before
            for step in chain:
                last = reduce and step is chain[-1]
                for name, after, kernel in step if isinstance(step, list) else [step]:
                    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
                    padding = (0, 0) if last else (sides[0] // 2, sides[1] // 2)
                    setattr(self, name, Conv(channels, after, sides, 2 if last else 1, padding))
                channels = sum(one[1] for one in step) if isinstance(step, list) else step[1]
        if pooled:
            self.branch_pool = Conv(before, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for chain in self.chains:
            y = x
            for names in chain:
                y = torch.cat([getattr(self, name)(y) for name in names], 1)
            out.append(y)
        if self.pool == "halve":
            return torch.cat([*out, F.max_pool2d(x, 3, 2)], 1)
        # TensorFlow's average leaves the padding out. Its last block takes the maximum instead, by mistake.
        y = F.max_pool2d(x, 3, 1, 1) if self.pool == "max" else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat([*out, self.branch_pool(y)], 1)


def _names(step: Any) -> list[str]:
    return [name for name, _, _ in step] if isinstance(step, list) else [step[0]]


def _chain(name: str, *steps: tuple[int, Any]) -> Chain:
    return [(f"{name}_{number}", channels, kernel) for number, (channels, kernel) in enumerate(steps, 1)]


def _a(before: int, pooled: int) -> Block:
    chains: list[Chain] = [
        [("branch1x1", 64, 1)],
        _chain("branch5x5", (48, 1), (64, 5)),
        _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3)),
    ]
    return Block(before, chains, "average", pooled)


def _c(n: int) -> Block:
    row, column = (1, 7), (7, 1)
    chains: list[Chain] = [
        [("branch1x1", 192, 1)],
        _chain("branch7x7", (n, 1), (n, row), (192, column)),
        _chain("branch7x7dbl", (n, 1), (n, column), (n, row), (n, column), (192, row)),
    ]
    return Block(768, chains, "average", 192)


def _e(before: int, pool: str) -> Block:
    def split(name: str) -> list[Step]:
        return [(f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))]

    chains: list[Chain] = [
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), split("branch3x3_2")],
        [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), split("branch3x3dbl_3")],
    ]
    return Block(before, chains, pool, 192)


class Network(nn.Module):
    """float32 pictures [N, 3, 299, 299] in [-1, 1] -> features [N, 2048]."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        halved: list[Chain] = [[("branch3x3", 384, 3)], _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3))]
        self.Mixed_6a = Block(288, halved, "halve", reduce=True)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = _c(128), _c(160), _c(160), _c(192)
        halved = [
            _chain("branch3x3", (192, 1), (320, 3)),
            _chain("branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)),
        ]
        self.Mixed_7a = Block(768, halved, "halve", reduce=True)
        self.Mixed_7b, self.Mixed_7c = _e(1280, "average"), _e(2048, "max")

    def forward(self, x: Tensor) -> Tensor:
        for name, module in self.named_children():
            if name in ("Conv2d_3b_1x1", "Mixed_5b"):
                x = F.max_pool2d(x, 3, 2)
            x = module(x)
        return x.mean((2, 3))


def resized_as_tensorflow(x: Tensor, size: int = SIZE) -> Tensor:
    """[N, 3, H, W] -> [N, 3, size, size]: bilinear between pixel corners without smoothing, as in TensorFlow 1."""
    for axis in (2, 3):
        length = x.shape[axis]
        place = torch.arange(size, dtype=torch.float64) * length / size
        first = place.floor().long()
        share = (place - first).to(x.dtype).view(-1, *[1] * (3 - axis))
        second = (first + 1).clamp(max=length - 1)
        x = x.index_select(axis, first) * (1 - share) + x.index_select(axis, second) * share
    return x


class Inception:
    """An `Extractor` with the user's weights."""

    name = "Inception V3"
    warning = ""

    def __init__(self, path: Path) -> None:
        """Raises EvaluationError for a file that is missing, damaged, or of another network."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            content = path.read_bytes()
            weights = load(content)
        except FileNotFoundError:
            raise EvaluationError(f"--weights must be a file, got {path}, which does not exist.") from None
        except SafetensorError as error:
            raise EvaluationError(f"--weights must be a safetensors file, got {path}: {error}.") from error
        self.network = Network().eval().requires_grad_(False)
        wanted = {name: value.shape for name, value in self.network.state_dict().items() if "num_batches" not in name}
        other = [name for name, shape in wanted.items() if name not in weights or weights[name].shape != shape]
        if other:
            raise EvaluationError(
                f"--weights must be the Inception V3 of pytorch-fid or torch-fidelity, got {path}, which lacks "
                f"{other[0]} or has it in another shape."
            )
        self.network.load_state_dict({name: weights[name].float() for name in wanted}, strict=False)
        self.settings: dict[str, Any] = {
            "weights": path.name,
            "sha256": hashlib.sha256(content).hexdigest()[:16],
            "features": 2048,
            "resized to": SIZE,
            "resize": "bilinear as TensorFlow 1",
        }

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 pictures [H, W, 3] of any sizes -> float32 [N, 2048]."""
        out = []
        for start in range(0, len(images), 8):
            some = [torch.tensor(image).permute(2, 0, 1)[None].float() for image in images[start : start + 8]]
            x = torch.cat([resized_as_tensorflow(one) for one in some])
            out.append(self.network((x - 128) / 128))
        return torch.cat(out).numpy()
