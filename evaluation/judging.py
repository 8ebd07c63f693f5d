"""The demo's judge on single pictures, where labels say what they should show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..demo.dataset import LABELS
from ..demo.judge import load_judge, read
from ..errors import EvaluationError


class Judged:
    """A judge that `python -m handiffuser.demo.report` trained. It knows the demo's world only, and our renders."""

    def __init__(self, folder: Path) -> None:
        """Raises EvaluationError for a folder without one."""
        if not folder.is_dir():
            raise EvaluationError(
                f"There is no folder {folder}. A judge is trained by: python -m handiffuser.demo.report"
            )
        self.judge = load_judge(folder)

    def __call__(self, image: np.ndarray, labels: dict[str, str]) -> dict[str, float]:
        """uint8 [H, W, 3] and what it should show -> 1 or 0 for each label that both know."""
        known = {name: word for name, word in labels.items() if word in LABELS.get(name, ())}
        if not known:
            return {}
        seen = read(self.judge, torch.tensor(image)[None])[0].tolist()
        return {
            name: float(LABELS[name][seen[column]] == known[name])
            for column, name in enumerate(LABELS)
            if name in known
        }
