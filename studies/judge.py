"""A judge of pictures: a small classifier trained on renders only, never on generated pictures.

It reads gesture, side, skin, background and view, and the right hand's gesture where there are two. Its verdict counts
only where it reads well itself: every report gives its `accuracy` on held-out renders.

    judge(images)["gesture"]   # logits [N, 24] from float images [N, 3, 128, 128] in [-1, 1]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from handiffuser.data.dataset import Index
from handiffuser.data.samples import Sample, picture
from handiffuser.demo.dataset import LABELS, class_numbers
from handiffuser.errors import EvaluationError
from handiffuser.training.draws import Draws
from handiffuser.training.loop import Stage, fit
from handiffuser.training.recipe import Plan
from handiffuser.training.stages import images_to_float
from handiffuser.training.state import averages
from torch import Tensor, nn

PLAN = Plan(steps=4000, batch=128, learning_rate=2e-3, precision="bf16")


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
            F.cross_entropy(
                logits[label].float(), labels[:, column], label_smoothing=0.05, reduction="none", ignore_index=-1
            )
            for column, label in enumerate(LABELS)
        ]
        return torch.stack(losses).sum(0).mean()  # a mean over rows, also where some of them say nothing


def judge_inputs(rows: dict[str, Tensor], draws: Draws) -> tuple[Tensor, Tensor]:
    """Renders with a little blur, noise and shift, so that it reads shapes and not the renderer's pixels.

    rows: images uint8 [n, H, W, 3], labels [n, 6].
    """
    images = rows["images"]
    pictures = F.avg_pool2d(images_to_float(images), images.shape[1] // 64)
    dy, dx = draws.one(7) - 3, draws.one(7) - 3
    pictures = F.pad(pictures, (3, 3, 3, 3), mode="replicate")[:, :, 3 + dy : 67 + dy, 3 + dx : 67 + dx]
    if draws.one(10) < 3:
        pictures = F.avg_pool2d(pictures, 3, 1, 1, count_include_pad=False)
    noise, amount = draws.normal(*pictures.shape[1:]), 0.08 * draws.uniform()[:, None, None, None]
    return pictures + amount * noise, rows["labels"]


def train_judge(world: Path, folder: Path, plan: Plan = PLAN) -> Judge:
    """Trains the judge on a world's renders; resumable, and loaded where it is finished."""
    index = Index.open(world)
    numbers = range(len(index))

    def rows(some: Sequence[int]) -> dict[str, Tensor]:
        images, labels = [], []
        for number in some:
            sample = index.sample(number)
            assert isinstance(sample, Sample), sample
            images.append(picture(sample))
            labels.append(class_numbers(sample.meta["labels"]))
        return {"images": torch.from_numpy(np.stack(images)), "labels": torch.tensor(labels)}

    loss = JudgeLoss(Judge())
    fit(Stage("judge", loss, rows, judge_inputs, numbers, data=index.digests()[0]), plan, folder)
    return loss.judge.eval().requires_grad_(False)


def load_judge(folder: Path) -> Judge:
    """The judge that was trained in a folder."""
    loss = JudgeLoss(Judge())
    loss.load_state_dict(averages(folder))
    return loss.judge.eval().requires_grad_(False)


@torch.no_grad()
def read(judge: Judge, images: Tensor, batch: int = 64) -> Tensor:
    """uint8 images [N, H, W, 3] -> class numbers [N, 6] in the order of LABELS."""
    rows = []
    for part in images.split(batch):
        logits = judge(images_to_float(part))
        rows.append(torch.stack([logits[label].argmax(1) for label in LABELS], 1))
    return torch.cat(rows)


class Judged:
    """A judge that `python studies/report.py` trained. It knows the renders of the demo's world only."""

    def __init__(self, folder: Path) -> None:
        """Raises EvaluationError for a folder without one."""
        if not folder.is_dir():
            raise EvaluationError(
                f"The judge's folder must exist, got {folder}. Train a judge: python studies/report.py"
            )
        self.judge = load_judge(folder)

    def __call__(self, image: np.ndarray, labels: dict[str, str]) -> dict[str, float]:
        """uint8 [H, W, 3] and its wanted labels -> 1 or 0 for each label that the judge knows, too."""
        known = {name: word for name, word in labels.items() if word in LABELS.get(name, ())}
        if not known:
            return {}
        seen = read(self.judge, torch.tensor(image)[None])[0].tolist()
        return {
            name: float(LABELS[name][seen[column]] == known[name])
            for column, name in enumerate(LABELS)
            if name in known
        }
