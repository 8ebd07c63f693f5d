"""A checkpoint painted by its PyTorch modules and diffusers' schedulers: the same requests and noise as hd-run's.

    painter = Torch(Path("checkpoint"), {"body": None, "threads": 1, "device": "auto"})

This is what a bundle is measured against: no graph, no engine, nothing rewritten.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..benchmarks.peers import Eager, scheduler_of, solve
from ..data.latents import encode_prompts
from ..errors import CheckpointError
from ..hands import hand_arrays, keep_camera, load_hands
from ..models.checkpoint import Checkpoint
from ..models.smplh import SMPLH
from ..runtime.noise import LATENTS, initial
from ..runtime.requests import Request, Resolver, resolve
from ..runtime.results import Picture
from .pictures import Painter

BATCH = 8


class Torch(Painter):
    """A checkpoint folder."""

    def __init__(self, folder: Path, options: dict[str, Any], what: str = "") -> None:
        """options: body, threads, device. what: as the user named it. Raises CheckpointError without a body."""
        self.checkpoint = Checkpoint.load(folder)
        body = options["body"] or self.checkpoint.body
        if body is None:
            raise CheckpointError("This checkpoint has no body of its own. Give one: --body FILE.")
        if options["threads"]:
            torch.set_num_threads(options["threads"])
        device = "cuda" if options["device"] != "cpu" and torch.cuda.is_available() else "cpu"
        # Its tokens come from `encode_prompts`, so that it needs no bundle's tokenizer.
        self.eager = Eager(self.checkpoint, SMPLH.load(body), None, device)  # type: ignore[arg-type]
        self.what = what or folder.name
        self.name = f"{self.what} (checkpoint in PyTorch, float32)"
        digest = hashlib.sha256()
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".safetensors", ".json"):
                digest.update(path.relative_to(folder).as_posix().encode() + hashlib.sha256(path.read_bytes()).digest())
        self.digest = digest.hexdigest()[:16]

    def prepare(self, requests: Sequence[Request]) -> tuple[list[Request], list[Any]]:
        def check(request: Request) -> None:
            scheduler_of(request.solver or "", {}, 1)
            if request.hands is not None:
                load_hands(request.hands)

        return resolve(requests, Resolver(self.checkpoint.defaults, bundle=self.digest, check=check))

    def run(self, requests: Sequence[Request]) -> Iterator[Picture]:
        """Requests with the same settings are painted together, up to BATCH of them."""
        names = ("steps", "solver", "guidance", "hand_steps", "hand_solver", "hand_guidance", "noise_offset")
        waiting: dict[tuple[Any, ...], list[Request]] = {}
        for request in requests:
            alike = waiting.setdefault((*(getattr(request, name) for name in names), request.hands is None), [])
            alike.append(request)
            if len(alike) == BATCH:
                yield from self._paint(alike)
                alike.clear()
        for alike in waiting.values():
            if alike:
                yield from self._paint(alike)

    @torch.no_grad()
    def _paint(self, requests: Sequence[Request]) -> list[Picture]:
        first, checkpoint, eager, start = requests[0], self.checkpoint, self.eager, time.perf_counter()
        assert first.steps and first.solver and first.guidance is not None

        def tokens(texts: Sequence[str]) -> Tensor:
            return encode_prompts(texts, checkpoint.tokenizer, checkpoint.special_tokens).to(eager.device)

        def noise(stream: str, *shape: int, offset: float = 0.0) -> Tensor:
            drawn = np.stack(
                [initial(request.seed or 0, stream, shape, offset, request.prompt) for request in requests]
            )
            return torch.from_numpy(drawn).to(eager.device)

        negative, asked = tokens([r.negative_prompt for r in requests]), tokens([r.prompt for r in requests])
        mean, std = checkpoint.hand_prior.mean.float().cpu(), checkpoint.hand_prior.std.float().cpu()
        if first.hands is None:
            x, features, draws = eager.hands(requests, asked, tokens([""]))
        else:
            x = torch.stack([self._given(str(request.hands), mean, std) for request in requests]).to(eager.device)
            features, draws = eager.features(x), [0] * len(requests)
        without, given = eager.context(torch.stack([negative, asked], 1), features)
        scheduler = scheduler_of(first.solver, checkpoint.scheduler, first.steps)
        shape = (checkpoint.unet.config.in_channels, *checkpoint.latent_size)
        latents = noise(LATENTS, *shape, offset=first.noise_offset or 0.0)
        images = eager.decode(solve(scheduler, eager.unet, latents, given, without, first.guidance, _nothing))
        params = (x.cpu() * std + mean).numpy()
        seconds = (time.perf_counter() - start) / len(requests)
        pictures = []
        for row, request in enumerate(requests):
            hands = {"params": params[row], **hand_arrays(params[row])}
            for name, called in (("joints", "joints_2d"), ("visibility", "visibility"), ("camera", "camera")):
                hands[called] = features[name][row].float().cpu().numpy()
            made_by = {"bundle": self.digest, "torch": torch.__version__}
            image = images[row].cpu().numpy()
            pictures.append(
                Picture(str(request.id), request, image, hands, seconds, made_by=made_by, hand_draws=draws[row])
            )
        return pictures

    def _given(self, path: str, mean: Tensor, std: Tensor) -> Tensor:
        """Normalised parameters [P] of hands from a file, placed as their camera sees them."""
        hands = load_hands(path)
        params = hands.params
        if hands.camera is not None:
            x = ((torch.from_numpy(params) - mean) / std)[None].to(self.eager.device)
            params = keep_camera(hands, self.eager.features(x)["joints_3d"][0].cpu().numpy())
        return (torch.from_numpy(params).float() - mean) / std


def _nothing() -> None: ...
