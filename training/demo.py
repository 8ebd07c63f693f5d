"""Trains the whole demo: tokenizer, data, judge, VAE, hand prior, Text+Hand encoder, UNet. All resumable.

    hd-train demo --run runs/demo --output checkpoint            # everything, some three hours on two cores
    hd-train demo --run runs/demo --only pictures --steps 6000   # one stage, longer
    hd-train demo --run runs/more --start demo --only judge --only pictures --only report --output checkpoint

A stage reads what the others left in the run folder, never their memory, so that stages can be trained apart.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn

from ..demo.body import make_body
from ..demo.prompts import is_held_out, sample_spec, write_prompt
from ..demo.scenes import sample_scenes
from ..models.checkpoint import Checkpoint, random_checkpoint, special_tokens
from ..models.configs import CONFIGS
from ..models.hand_features import HandFeatures
from ..models.smplh import SMPLH
from .data import LABELS, Dataset, encode_prompts, image_grid, images_to_float, make_dataset, scene_tensors
from .judge import Judge, JudgeLoss, judge_loss
from .loop import Plan, console, finished, fit
from .sample import decode, encode, sample_pictures
from .stages import (
    EncoderLoss,
    PictureLoss,
    PriorLoss,
    VAELoss,
    encoder_loss,
    picture_loss,
    prior_loss,
    set_normalisation,
    vae_loss,
)

SCENES = 24_000
# Per process and step: pictures or parameter vectors. Plans are for two processes on a CPU.
BATCH = {"judge": 64, "vae": 16, "prior": 128, "encoder": 32, "pictures": 24}
PLANS = {
    "judge": Plan(steps=4000, learning_rate=2e-3, bf16=True),
    "vae": Plan(steps=1400, learning_rate=1.5e-3, bf16=True, save_every=250),
    "prior": Plan(steps=2500, learning_rate=1e-3, ema=0.998, bf16=True),
    "encoder": Plan(steps=1500, learning_rate=1e-3, bf16=True),
    "pictures": Plan(steps=4000, learning_rate=1.2e-3, bf16=True, save_every=200, log_every=20),
}
STAGES = tuple(PLANS)
SEED = 1


class Run:
    """A run folder: `body.npz`, data, one folder a stage, sample grids."""

    def __init__(self, folder: Path, scenes: int = SCENES, config: str = "demo", begin: Path | None = None) -> None:
        """begin: a checkpoint folder to train on from, instead of an untrained one."""
        self.folder, self.scenes, self.config, self.begin = folder, scenes, CONFIGS[config], begin
        folder.mkdir(parents=True, exist_ok=True)
        self.body = folder / "body.npz"
        if not self.body.exists():
            make_body(self.body)

    def start(self) -> Checkpoint:
        """What training begins with: a given checkpoint, or an untrained one that knows the grammar's words."""
        if self.begin is not None:
            return Checkpoint.load(self.begin)
        rng = np.random.default_rng(SEED)
        prompts = [write_prompt(sample_spec(rng), rng) for _ in range(4000)]
        checkpoint = random_checkpoint(self.config, SEED, texts=prompts, body=self.body)
        # BPE training breaks ties at random: each run keeps the one tokenizer that its data was encoded with.
        path = self.folder / "tokenizer.json"
        if not path.exists():
            checkpoint.tokenizer.save(str(path))
        checkpoint.tokenizer = Tokenizer.from_file(str(path))
        checkpoint.special_tokens = special_tokens(checkpoint.tokenizer, self.config.text_length)
        if checkpoint.position_kernel is not None:
            checkpoint.position_kernel.focus()
        return checkpoint

    def data(self, checkpoint: Checkpoint) -> Dataset:
        cache = self.folder / "data.safetensors"
        size = self.config.image_size[0]
        return make_dataset(
            self.scenes, checkpoint.tokenizer, checkpoint.special_tokens, size=size, seed=SEED, cache=cache
        )

    def trained(self) -> Checkpoint:
        """The checkpoint with every stage that has been trained so far."""
        checkpoint = self.start()
        for stage, module in self.modules(checkpoint).items():
            self.load(stage, module)
        normalisation = self.folder / "normalisation.safetensors"
        if normalisation.exists():
            scale = load_file(normalisation)
            checkpoint.vae.register_to_config(
                scaling_factor=float(scale["scaling_factor"]), shift_factor=float(scale["shift_factor"])
            )
        for module in checkpoint.modules().values():
            module.eval().requires_grad_(False)
        return checkpoint

    def modules(self, checkpoint: Checkpoint) -> dict[str, nn.Module]:
        """What each stage trains, sharing the checkpoint's own modules."""
        return {
            "vae": VAELoss(checkpoint.vae),
            "prior": PriorLoss(checkpoint),
            "encoder": EncoderLoss(checkpoint.text_hand_encoder, [len(names) for names in LABELS.values()]),
            "pictures": PictureLoss(checkpoint),
        }

    def load(self, stage: str, module: nn.Module) -> bool:
        """Loads a stage's moving average, where there is one."""
        path = self.folder / stage / "state.safetensors"
        if not path.exists():
            return False
        state = {k[4:]: v for k, v in load_file(path).items() if k.startswith("ema.")}
        module.load_state_dict(state)
        return True

    def judge(self) -> Judge:
        """The trained judge."""
        loss = JudgeLoss(Judge())
        if not self.load("judge", loss):
            raise FileNotFoundError("The judge has not been trained yet: hd-train demo --only judge.")
        return loss.judge.eval().requires_grad_(False)

    def features(self, checkpoint: Checkpoint, normalised: bool = True) -> HandFeatures:
        """Hand features of the prior's samples, or of plain parameters."""
        height, width = checkpoint.image_size
        mean, std = checkpoint.hand_prior.mean, checkpoint.hand_prior.std
        if not normalised:
            mean, std = torch.zeros_like(mean), torch.ones_like(std)
        return HandFeatures(SMPLH.load(self.body), mean, std, checkpoint.text_hand_encoder.basis, width / height)


def empty_ids(checkpoint: Checkpoint) -> torch.Tensor:
    """Token ids of the empty prompt [77]."""
    return encode_prompts([""], checkpoint.tokenizer, checkpoint.special_tokens)[0]


def train(folder: Path, stage: str, changes: dict[str, Any], scenes: int, config: str, begin: Path | None) -> None:
    """Trains one stage in this process (one of several, perhaps)."""
    run = Run(folder, scenes, config, begin)
    checkpoint = run.trained()
    plan = replace(PLANS[stage], **changes)
    batch = BATCH[stage]
    if stage in ("encoder", "pictures"):
        data = picture_data(run, checkpoint)
    else:
        data = run.data(checkpoint)
    empty = empty_ids(checkpoint)
    grids = folder / "samples"
    grids.mkdir(exist_ok=True)

    def write(name: str, step: int, images: torch.Tensor, columns: int = 8) -> None:
        Image.fromarray(image_grid(images, columns).numpy()).save(grids / f"{name}-{step:06d}.png")

    if stage == "judge":
        fit(stage, JudgeLoss(Judge()), judge_loss(data, batch), plan, folder / stage)
    elif stage == "vae":
        probe = images_to_float(data["images"][:8])

        def reconstruct(average: nn.Module, step: int) -> None:
            checkpoint.vae.load_state_dict(average.vae.state_dict())  # type: ignore[union-attr]
            pair = torch.cat([data["images"][:8], decode(checkpoint, encode(checkpoint, probe))])
            write("vae", step, pair)

        loss = vae_loss(data, batch, checkpoint.vae)
        fit(stage, VAELoss(checkpoint.vae, decoder_only=begin is not None), loss, plan, folder / stage, reconstruct)
    elif stage == "prior":
        if begin is None:  # a given checkpoint's network knows its own
            set_normalisation(checkpoint, data["params"])
        loss = prior_loss(data, batch, checkpoint, empty)
        fit(stage, PriorLoss(checkpoint), loss, plan, folder / stage)
    elif stage == "encoder":
        data["labels"] = run.data(checkpoint)["labels"]
        fit(stage, run.modules(checkpoint)[stage], encoder_loss(data, batch, empty), plan, folder / stage)
    else:
        ids, hands = probe_hands(run, checkpoint)

        def pictures(average: nn.Module, step: int) -> None:
            shown = replace(checkpoint, unet=average.unet, text_hand_encoder=average.text_hand_encoder)  # type: ignore
            shown.position_kernel = average.position_kernel  # type: ignore[assignment]
            shown.attach_kernel()
            write("pictures", step, sample_pictures(shown, ids, empty, hands))

        loss = picture_loss(data, batch, checkpoint, empty)
        fit(stage, PictureLoss(checkpoint), loss, plan, folder / stage, pictures)


def probe_hands(run: Run, checkpoint: Checkpoint) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sixteen held-out prompts with their true hands, for the sample grid."""
    scenes = [scene for scene in sample_scenes(400, seed=99) if is_held_out(scene.prompt)][:16]
    ids = encode_prompts([scene.prompt for scene in scenes], checkpoint.tokenizer, checkpoint.special_tokens)
    with torch.no_grad():
        return ids, run.features(checkpoint, normalised=False)(scene_tensors(scenes, 16)["params"])


@torch.no_grad()
def picture_data(run: Run, checkpoint: Checkpoint) -> Dataset:
    """Latents and hand features of the training pictures; made once from the trained VAE, then cached."""
    cache = run.folder / "latents.safetensors"
    if cache.exists():
        return load_file(cache)
    if run.begin is None and not (run.folder / "vae" / "state.safetensors").exists():
        raise FileNotFoundError("Train the VAE first: hd-train demo --only vae.")
    data = run.data(checkpoint)
    features = run.features(checkpoint, normalised=False)
    kept: dict[str, list[torch.Tensor]] = {n: [] for n in ("latents", "joints", "rotations", "bps", "visibility")}
    fresh = run.begin is None  # a given checkpoint's networks know its own normalisation
    if fresh:
        checkpoint.vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    for images, params in zip(data["images"].split(64), data["params"].split(64), strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            kept["latents"].append(encode(checkpoint, images_to_float(images)).half())
        hands = features(params)
        for name in ("joints", "rotations", "bps", "visibility"):
            kept[name].append(hands[name].half())
    out = {name: torch.cat(parts) for name, parts in kept.items()}
    if fresh:  # the network sees latents of mean 0 and spread 1
        shift, spread = out["latents"].float().mean(), out["latents"].float().std()
        out["latents"] = ((out["latents"].float() - shift) / spread).half().contiguous()
        save_file({"scaling_factor": 1 / spread, "shift_factor": shift}, run.folder / "normalisation.safetensors")
    else:
        out["latents"] = out["latents"].contiguous()
    out["ids"] = data["ids"]
    save_file(out, cache.with_suffix(".tmp"))
    cache.with_suffix(".tmp").replace(cache)
    return out


def assemble(run: Run, output: Path) -> Checkpoint:
    """Writes the checkpoint folder of a run; weights in half precision, as it ships."""
    missing = [s for s in ("vae", "prior", "encoder", "pictures") if not finished(run.folder / s, 1)]
    if missing and run.begin is None:
        raise FileNotFoundError(f"Nothing trained yet for {', '.join(missing)}.")
    checkpoint = run.trained()
    report = run.folder / "report.json"
    if report.exists():
        checkpoint.notes = json.loads(report.read_text())
    checkpoint.save(output, half=True)
    console.print(f"checkpoint: {output}")
    return checkpoint
