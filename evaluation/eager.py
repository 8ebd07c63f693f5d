"""A checkpoint in PyTorch with diffusers' schedulers: the same requests and noise as hd-run's, without graph or engine.

    painter = Torch(Path("checkpoint"), {"body": None, "threads": 1, "device": "auto"})

`hd-eval` measures a bundle against it, and it is the first of `hd-bench`'s peers.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from torch import Tensor

from ..contract import shown_size
from ..data.latents import count_tokens, encode_prompts
from ..errors import CheckpointError, RequestError
from ..hands import by_person, hand_arrays, keep_camera, load_hands
from ..models.checkpoint import Checkpoint, decode
from ..models.hand_features import HandFeatures
from ..models.smplh import SMPLH
from ..models.text_hand_encoder import FEATURES, word_states
from ..prompts import marked
from ..runtime.clash import clash
from ..runtime.noise import HANDS, LATENTS, drawn_again, initial
from ..runtime.requests import Request, Resolver, resolve
from ..runtime.results import Picture
from ..settings import SETTINGS

BATCH = 8  # pictures that `Torch` paints at once
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
}
Network = Callable[..., Tensor]  # x, timestep [N], condition -> output
Encode = Callable[[Sequence[str]], Tensor]  # prompts -> token ids, int64 [N, 77]
Mark = Callable[[], None]  # called at every step of stage 2


def scheduler_of(solver: str, config: dict[str, Any], steps: int) -> Any:
    """diffusers' scheduler for one of our solvers, with its timesteps set.

    Raises RequestError for a solver that adds noise in its steps: diffusers draws other numbers.
    """
    if solver not in SCHEDULERS:
        raise RequestError(
            f"PyTorch cannot paint the same pictures: {solver} adds noise that diffusers draws differently. "
            f"Choose --solver {', '.join(SCHEDULERS)}."
        )
    name, settings = SCHEDULERS[solver]
    scheduler = getattr(diffusers, name).from_config({**config, **settings})
    scheduler.set_timesteps(steps)
    return scheduler


def solve(
    scheduler: Any, network: Network, noise: Tensor, given: Tensor, without: Tensor, guidance: float, mark: Mark
) -> Tensor:
    """The sampling loop of diffusers' pipelines. Both guidance branches run in one batch, or one alone for guidance 1.

    noise: [B, ...]. given, without: conditions of the prompt and of the negative prompt [B, ...].
    """
    both = torch.cat([without, given]) if guidance != 1 else given
    x = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        mark()
        shown = scheduler.scale_model_input(torch.cat([x, x]) if guidance != 1 else x, timestep)
        output = network(shown, timestep.expand(len(shown)).to(shown.device), both)
        if guidance != 1:
            u, c = output.chunk(2)
            output = u + guidance * (c - u)
        x = scheduler.step(output, timestep, x).prev_sample
    return x


class Painted(NamedTuple):
    """What `Eager.paint` gives."""

    images: np.ndarray  # uint8 [B, H, W, 3]
    x: Tensor  # normalised hand parameters [B, P]
    features: dict[str, Tensor]  # see `HandFeatures`
    draws: list[int]  # how often stage 1 drew the hands of each request, 0 for given hands


class Eager:
    """PyTorch modules and diffusers' schedulers. The networks can be replaced: compiled, or by an ONNX session.

    device, dtype: where the networks run, and what they compute in. Kinematics and sampling stay float32. The
    checkpoint's modules move to the device.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        body: SMPLH,
        encode: Encode,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        checkpoint.check_paints("a comparison with PyTorch")
        self.checkpoint, self.encode, self.device, self.dtype = checkpoint, encode, device, dtype
        height, width = checkpoint.image_size
        prior, encoder = checkpoint.hand_prior, checkpoint.text_hand_encoder
        self.mean, self.std = prior.mean.float().cpu(), prior.std.float().cpu()
        features = HandFeatures(body, self.mean, self.std, encoder.basis.float().cpu(), width / height).eval()
        self.features: Callable[[Tensor], dict[str, Tensor]] = features.to(device)
        for module in checkpoint.modules().values():
            module.to(device, dtype)
        self.prior: Network = lambda x, timestep, text: prior(x.to(dtype), timestep, text.to(dtype)).float()
        self.unet: Network = self.network(checkpoint.unet)
        self.decode: Callable[[Tensor], Tensor] = lambda latents: decode(checkpoint, latents.to(dtype))

    def network(self, unet: Callable[..., Any]) -> Network:
        """A diffusers UNet, perhaps compiled, as float32 in, float32 out."""
        dtype = self.dtype
        return lambda x, timestep, context: unet(x.to(dtype), timestep, context.to(dtype)).sample.float()

    def text(self, ids: Tensor) -> Tensor:
        """Token ids [N, 77] -> the states that the hand prior reads [N, 77, W]."""
        hidden = self.checkpoint.text_encoder(ids).last_hidden_state
        return word_states(hidden, ids, self.checkpoint.special_tokens["eos"], ids.shape[1]).float()

    def context(self, ids: Tensor, hands: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Token ids [B, 2, 77] and hand features -> unconditional and conditional context [B, L, W]."""
        # Joints stay float32: half of a pixel matters to the position codes.
        cues = {name: hands[name] if name == "joints" else hands[name].to(self.dtype) for name in FEATURES}
        blank = {**cues, "visibility": torch.zeros_like(cues["visibility"])}
        encoder = self.checkpoint.text_hand_encoder
        return encoder(ids[:, 0], **blank), encoder(ids[:, 1], **cues)

    def hands(self, requests: Sequence[Request], asked: Tensor) -> tuple[Tensor, dict[str, Tensor], list[int]]:
        """Stage 1 of requests with the same settings: x [B, P], hand features, and how often each was drawn.

        asked: ids of the prompts [B, 77].
        """
        first, device = requests[0], self.device
        assert first.hand_steps and first.hand_solver and first.hand_guidance is not None
        given = self.text(asked)
        without = self.text(self.encode([""]).to(device)).expand_as(given) if first.hand_guidance != 1 else given
        x = torch.empty(len(requests), len(self.mean), device=device)
        draws, drawing = [0] * len(requests), list(range(len(requests)))
        while drawing:
            starts = [
                initial(requests[row].seed or 0, drawn_again(HANDS, draws[row]), (len(self.mean),)) for row in drawing
            ]
            noise = torch.from_numpy(np.stack(starts)).to(device)
            scheduler = scheduler_of(first.hand_solver, self.checkpoint.hand_scheduler, first.hand_steps)
            x[drawing] = solve(
                scheduler, self.prior, noise, given[drawing], without[drawing], first.hand_guidance, _nothing
            )
            features = self.features(x)
            joints, seen = (features[name].float().cpu().numpy() for name in ("joints_3d", "visibility"))
            params = (x.cpu() * self.std + self.mean).numpy()
            for row in drawing:
                draws[row] += 1
            drawing = [
                row
                for row in drawing
                if draws[row] <= (requests[row].hand_redraws or 0) and clash(joints[row], seen[row], params[row])
            ]
        return x, features, draws

    @torch.no_grad()
    def paint(self, requests: Sequence[Request], mark: Mark, given: Tensor | None = None) -> Painted:
        """Paints requests that differ in prompt, seed and hands alone.

        given: normalised hand parameters [B, P]; without them stage 1 makes the hands.
        """
        first, checkpoint, device = requests[0], self.checkpoint, self.device
        assert first.steps and first.solver and first.guidance is not None
        negative, asked = (
            self.encode(texts).to(device)
            for texts in ([r.negative_prompt for r in requests], [r.prompt for r in requests])
        )
        if given is None:
            x, features, draws = self.hands(requests, asked)
        else:
            x, features, draws = given, self.features(given), [0] * len(requests)
        without, context = self.context(torch.stack([negative, asked], 1), features)
        shape, offset = (checkpoint.unet.config.in_channels, *checkpoint.latent_size), first.noise_offset or 0.0
        noise = np.stack([initial(r.seed or 0, LATENTS, shape, offset, r.prompt) for r in requests])
        scheduler = scheduler_of(first.solver, checkpoint.scheduler, first.steps)
        start = torch.from_numpy(noise).to(device)
        latents = solve(scheduler, self.unet, start, context, without, first.guidance, mark)
        return Painted(self.decode(latents).cpu().numpy(), x, features, draws)

    def __call__(self, requests: Sequence[Request], mark: Mark) -> np.ndarray:
        """Requests that differ in prompt and seed alone -> their pictures, uint8 [B, H, W, 3]."""
        return self.paint(requests, mark).images


class Torch:
    """Paints with a checkpoint folder: a `Painter` beside `Engines`."""

    def __init__(self, folder: Path, options: dict[str, Any], what: str = "") -> None:
        """options: body, threads, device. what: as the user named it. Raises CheckpointError without a body."""
        self.checkpoint = checkpoint = Checkpoint.load(folder)
        body = options["body"] or checkpoint.body
        if body is None:
            raise CheckpointError("This checkpoint has no body of its own. Give one: --body FILE.")
        if options["threads"]:
            torch.set_num_threads(options["threads"])
        device = "cuda" if options["device"] != "cpu" and torch.cuda.is_available() else "cpu"

        def encode(texts: Sequence[str]) -> Tensor:
            return encode_prompts(texts, checkpoint.tokenizer, checkpoint.special_tokens)

        self.eager = Eager(checkpoint, SMPLH.load(body), encode, device)
        self.what = what or folder.name
        self.name = f"{self.what} (checkpoint in PyTorch, float32)"
        digest = hashlib.sha256()
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".safetensors", ".json"):
                digest.update(path.relative_to(folder).as_posix().encode() + hashlib.sha256(path.read_bytes()).digest())
        self.digest = digest.hexdigest()[:16]

    def prepare(self, requests: Sequence[Request]) -> tuple[list[Request], list[Any]]:
        found = partial(check, checkpoint=self.checkpoint)
        return resolve(requests, Resolver(self.checkpoint.defaults, bundle=self.digest, check=found))

    def run(self, requests: Sequence[Request]) -> Iterator[Picture]:
        """Paints requests with the same settings together, up to BATCH of them."""
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

    def close(self) -> None: ...

    @torch.no_grad()
    def _paint(self, requests: Sequence[Request]) -> list[Picture]:
        eager, start = self.eager, time.perf_counter()
        given = None
        if requests[0].hands is not None:
            given = torch.stack([self._given(str(request.hands)) for request in requests]).to(eager.device)
        painted = eager.paint(requests, _nothing, given)
        params = (painted.x.cpu() * eager.std + eager.mean).numpy()
        seconds = (time.perf_counter() - start) / len(requests)
        made_by = {"bundle": self.digest, "torch": torch.__version__}
        pictures = []
        for row, request in enumerate(requests):
            hands = {"params": params[row], **hand_arrays(params[row])}
            for name, called in (("joints", "joints_2d"), ("visibility", "visibility"), ("camera", "camera")):
                hands[called] = painted.features[name][row].float().cpu().numpy()
            hands = by_person(hands, self.checkpoint.num_people)
            pictures.append(
                Picture(str(request.id), request, painted.images[row], hands, seconds, made_by=made_by,
                        hand_draws=painted.draws[row])
            )  # fmt: skip
        return pictures

    def _given(self, path: str) -> Tensor:
        """Normalised parameters [P] of hands from a file, placed as their camera sees them."""
        hands, eager = load_hands(path).of(self.checkpoint.num_people), self.eager
        params = hands.params.reshape(-1)
        if hands.camera is not None:
            x = ((torch.from_numpy(params) - eager.mean) / eager.std)[None].to(eager.device)
            params = keep_camera(hands, eager.features(x)["joints_3d"][0].cpu().numpy()).reshape(-1)
        return (torch.from_numpy(params).float() - eager.mean) / eager.std


def check(request: Request, checkpoint: Checkpoint) -> None:
    """Raises RequestError for a request with what bundles alone can do, and for what a checkpoint cannot paint."""
    scheduler_of(request.solver or "", {}, 1)
    own = {"size": shown_size(checkpoint.image_size), "guidance_interval": SETTINGS["guidance_interval"].default}
    for name in ("image", "lora", "size", "guidance_interval"):
        if getattr(request, name) not in (None, own.get(name)):
            raise RequestError(
                f"{name} must be left out for a checkpoint in PyTorch, got one. Export it, and name the bundle.",
                name,
            )
    for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
        if not request.plain_prompts and marked(text):
            raise RequestError(
                f"{name} must have no weights and no BREAK for a checkpoint in PyTorch, got {text!r}. "
                "Set plain_prompts, which reads them as text, or export the checkpoint.",
                name,
            )
        room = checkpoint.special_tokens["length"] - 2
        if not request.plain_prompts and (tokens := count_tokens(text, checkpoint.tokenizer)) > room:
            raise RequestError(
                f"{name} must have at most {room} tokens for a checkpoint in PyTorch, got {tokens}. Set plain_prompts, "
                "which cuts it, or export the checkpoint.",
                name,
            )
    if request.hands is not None:
        load_hands(request.hands).of(checkpoint.num_people)


def _nothing() -> None: ...
