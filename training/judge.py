"""A judge of pictures: a small classifier trained on renders only, never on generated pictures.

It reads gesture, side, skin and background. Its verdict counts only where it is good itself: `accuracy` on held-out
renders is part of every report.

    judge(images)["gesture"]   # logits [N, 24] from float images [N, 3, 128, 128] in [-1, 1]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import LABELS, Dataset, images_to_float
from .loop import Loss
from .stages import pick


class Judge(nn.Module):
    """A plain convolutional network over pictures brought to 64 x 64."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out in (width, 2 * width, 3 * width, 4 * width):
            layers += [
                nn.Conv2d(channels, out, 3, padding=1, bias=False),
                nn.GroupNorm(8, out),
                nn.SiLU(),
                nn.Conv2d(out, out, 3, stride=2, padding=1, bias=False),
                nn.GroupNorm(8, out),
                nn.SiLU(),
            ]
            channels = out
        self.body = nn.Sequential(*layers)
        self.mix = nn.Sequential(nn.Linear(channels * 16, 256), nn.SiLU())
        # Colours are read where they are: skin and background do not need the deep features' place.
        self.heads = nn.ModuleDict({label: nn.Linear(256, len(names)) for label, names in LABELS.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images: [N, 3, H, W] in [-1, 1] -> logits by label."""
        features = self.mix(self.body(F.adaptive_avg_pool2d(images, 64)).flatten(1))
        return {label: head(features) for label, head in self.heads.items()}


class JudgeLoss(nn.Module):
    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        logits = self.judge(images)
        losses = [
            F.cross_entropy(logits[label].float(), labels[:, column], label_smoothing=0.05)
            for column, label in enumerate(LABELS)
        ]
        return torch.stack(losses).sum()


def judge_loss(data: Dataset, batch: int) -> Loss:
    """Renders with a little blur, noise and shift, so that it reads shapes and not the renderer's pixels."""

    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        images, labels = pick(data, generator, batch, "images", "labels")
        pictures = F.avg_pool2d(images_to_float(images), images.shape[1] // 64)
        dy, dx = (int(v) for v in torch.randint(-3, 4, (2,), generator=generator))
        pictures = F.pad(pictures, (3, 3, 3, 3), mode="replicate")[:, :, 3 + dy : 67 + dy, 3 + dx : 67 + dx]
        if torch.rand((), generator=generator) < 0.3:
            pictures = F.avg_pool2d(pictures, 3, 1, 1, count_include_pad=False)
        noise = torch.randn(pictures.shape, generator=generator)
        amount = 0.08 * torch.rand(batch, 1, 1, 1, generator=generator)
        return module(pictures + amount * noise, labels)

    return loss


@torch.no_grad()
def read(judge: Judge, images: Tensor, batch: int = 64) -> Tensor:
    """uint8 images [N, H, W, 3] -> class numbers [N, 4] in the order of LABELS."""
    rows = []
    for part in images.split(batch):
        logits = judge(images_to_float(part))
        rows.append(torch.stack([logits[label].argmax(1) for label in LABELS], 1))
    return torch.cat(rows)
