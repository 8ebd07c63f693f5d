"""CLIP score: how well a picture fits its prompt, by the user's CLIP model (Hessel et al. 2021, arXiv 2104.08718).

    score = Clip(Path("clip-vit-base-patch32"))
    score(image, "a right hand making a fist")       # 100 x the cosine, not below 0

The folder is one of Hugging Face's: config.json, model.safetensors, tokenizer.json. Nothing is
downloaded, and no pickle is opened. (torchmetrics 1.9 scores only models of transformers 4: version 5 returns its
features as an object.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import EvaluationError

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's, for all CLIP models


class Clip:
    """A CLIP model and its tokenizer."""

    def __init__(self, folder: Path) -> None:
        """Raises EvaluationError for a folder without a CLIP model."""
        from tokenizers import Tokenizer
        from transformers import CLIPModel

        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            if not (folder / name).is_file():
                raise EvaluationError(
                    f"--clip must be a CLIP model's folder, got {folder}, which lacks {name}. Name a folder with "
                    "config.json, model.safetensors and tokenizer.json; pickles are never opened."
                )
        try:
            self.model: Any = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # transformers and tokenizers fail on bad files in many ways
            raise EvaluationError(f"--clip must be a CLIP model's folder, got {folder}: {str(error)[:200]}") from error
        self.length = self.model.config.text_config.max_position_embeddings
        self.size = self.model.config.vision_config.image_size
        self.tokenizer.enable_truncation(self.length)
        self.settings = {"model": folder.name, "resized to": self.size, "resize": "bicubic, cut to a square"}

    @torch.no_grad()
    def __call__(self, image: np.ndarray, prompt: str) -> float:
        """image: uint8 [H, W, 3]."""
        ids = torch.tensor([self.tokenizer.encode(prompt).ids])
        text = self.model.text_projection(self.model.text_model(input_ids=ids).pooler_output)
        seen = self.model.visual_projection(self.model.vision_model(pixel_values=self._pixels(image)).pooler_output)
        return max(100 * float(torch.cosine_similarity(text, seen)), 0.0)

    def _pixels(self, image: np.ndarray) -> torch.Tensor:
        height, width = image.shape[:2]
        side = min(height, width)
        left, top = (width - side) // 2, (height - side) // 2
        square = Image.fromarray(image[top : top + side, left : left + side])
        small = np.asarray(square.resize((self.size, self.size), Image.Resampling.BICUBIC), np.float32) / 255
        return torch.from_numpy((small - np.array(MEAN, np.float32)) / np.array(STD, np.float32)).permute(2, 0, 1)[None]
