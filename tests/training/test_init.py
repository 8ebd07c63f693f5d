"""From Stable Diffusion: before any training, without hands, our pictures are those of diffusers' own pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from handiffuser import HanDiffuser, Request
from handiffuser.export.bundle import export_bundle
from handiffuser.hands import save_hands
from handiffuser.models.checkpoint import Checkpoint
from handiffuser.runtime.noise import LATENTS, normal
from handiffuser.training import init
from handiffuser.training.cli import commands
from kept import kept
from stable_diffusion import stable_diffusion


@pytest.fixture(scope="module", params=["1.x", pytest.param("2.x", marks=pytest.mark.slow)])
def start(request, tmp_path_factory):
    """A folder with a Stable Diffusion folder, `sd`, and the checkpoint that `hd-train init` makes of it, `start`."""
    two = request.param == "2.x"

    def make(folder):
        source = stable_diffusion(folder, "v_prediction" if two else "epsilon", two)
        with pytest.MonkeyPatch.context() as patch:  # the prior's own size would take most of the time
            patch.setattr(init, "PRIOR", (32, 2, 2))
            result = CliRunner().invoke(commands, ["init", str(source), str(folder / "start")])
        assert result.exit_code == 0, result.output

    return kept(tmp_path_factory, f"stable-diffusion-{request.param}", make, "training")


@pytest.fixture(scope="module")
def bundle_of_start(start, tmp_path_factory):
    """The checkpoint's bundle."""

    def make(folder):
        export_bundle(Checkpoint.load(start / "start"), folder)

    return kept(tmp_path_factory, f"{start.name}-bundle", make, "training")


@pytest.fixture(scope="module")
def no_hands(tmp_path_factory):
    path = tmp_path_factory.mktemp("hands") / "none.hands.npz"
    arrays = {name: np.zeros(n, np.float32) for name, n in (("global_orient", 3), ("body_pose", 63), ("betas", 10))}
    arrays |= {f"{side}_hand_pose": np.zeros(45, np.float32) for side in ("left", "right")}
    save_hands(path, {**arrays, "placement": np.array([[0, 0, 0, -0.7]] * 2, np.float32)})
    return str(path)


SCHEDULERS = {
    "plms": lambda c: PNDMScheduler.from_config(c),
    "ddim": lambda c: DDIMScheduler.from_config(c, clip_sample=False),
    "ddpm": lambda c: DDPMScheduler.from_config(c, clip_sample=False),
    "euler": lambda c: EulerDiscreteScheduler.from_config(c),
    "dpm++2m": lambda c: DPMSolverMultistepScheduler.from_config(c),
    "dpm++2m-karras": lambda c: DPMSolverMultistepScheduler.from_config(c, use_karras_sigmas=True),
}


@pytest.mark.parametrize("solver", SCHEDULERS)
def test_without_hands_it_is_stable_diffusion(start, bundle_of_start, no_hands, solver, monkeypatch):
    """The exported graphs. (test_init_as_diffusers.py compares the checkpoint's picture in PyTorch.)"""
    ours = HanDiffuser.load(bundle_of_start, device="cpu", threads=1)
    prompts = ["a photo of a cat", "two hands on a table"]
    asked = [Request(p, solver=solver, steps=6, guidance=5.0, seed=3, hands=no_hands) for p in prompts]
    pictures = ours.generate(asked)

    theirs = StableDiffusionPipeline.from_pretrained(start / "sd", local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = SCHEDULERS[solver](theirs.scheduler.config)
    shape = ours.manifest.latent_size
    if solver == "ddpm":  # its noise is drawn inside: give it ours
        from diffusers.schedulers import scheduling_ddpm

        drawn = iter(range(1, 100))
        monkeypatch.setattr(
            scheduling_ddpm,
            "randn_tensor",
            lambda *_, **__: torch.from_numpy(normal(3, LATENTS, next(drawn), shape))[None],
        )
    for prompt, picture in zip(prompts, pictures, strict=True):
        if solver == "ddpm":
            drawn = iter(range(1, 100))
        latents = torch.from_numpy(normal(3, LATENTS, 0, shape))[None]
        image = theirs(prompt, latents=latents, num_inference_steps=6, guidance_scale=5.0, output_type="np").images[0]
        expected = (image * 255).round().astype(int)
        assert np.abs(picture.image.astype(int) - expected).max() <= 1
        assert expected.std() > 10, "a grey picture would prove nothing"
    assert np.abs(pictures[0].image.astype(int) - pictures[1].image).max() > 10


@pytest.mark.slow
def test_without_hands_every_size_is_stable_diffusion(start, bundle_of_start, no_hands):
    """All sizes share the loop, and the own size among them."""
    prompt, sizes = "a photo of a cat", ("32x32", "48x32", "32x48", "16x64", "64x40")
    ours = HanDiffuser.load(bundle_of_start, device="cpu", threads=1)
    asked = [
        Request(prompt, solver="euler", steps=6, guidance=5.0, seed=3, hands=no_hands, size=size) for size in sizes
    ]
    theirs = StableDiffusionPipeline.from_pretrained(start / "sd", local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = SCHEDULERS["euler"](theirs.scheduler.config)
    for size, picture in zip(sizes, ours.generate(asked), strict=True):
        width, height = map(int, size.split("x"))
        shape = (4, height // 2, width // 2)
        assert ours.bundle.manifest.latents_at((height, width)) == shape
        latents = torch.from_numpy(normal(3, LATENTS, 0, shape))[None]
        image = theirs(prompt, latents=latents, num_inference_steps=6, guidance_scale=5.0, output_type="np").images[0]
        expected = (image * 255).round().astype(int)
        assert picture.image.shape == (height, width, 3) and expected.std() > 10
        assert np.abs(picture.image.astype(int) - expected).max() <= 1, size


def test_hands_enter_through_a_gate_that_starts_closed(start):
    checkpoint = Checkpoint.load(start / "start")
    encoder, unet = checkpoint.text_hand_encoder, checkpoint.unet
    torch.manual_seed(0)
    ids = torch.full((1, 77), checkpoint.special_tokens["eos"])
    hands = {
        "joints": torch.rand(1, 2, 21, 2),
        "rotations": torch.randn(1, 2, 16, 6),
        "bps": torch.rand(1, 2, 512) / 10,
    }
    latents = torch.randn(1, 4, *checkpoint.latent_size)

    def predicted(visibility):
        return unet(latents, 500, encoder(ids, **hands, visibility=torch.tensor([visibility]))).sample

    none, some = predicted([0.0, 0.0]), predicted([1.0, 1.0])
    away = (some - none).norm() / none.norm()
    assert 0 < away < 0.02
    with torch.no_grad():
        for gate in checkpoint.position_kernel.gates:
            gate.zero_()
    assert (predicted([1.0, 1.0]) - none).norm() / none.norm() > 3 * away
    torch.testing.assert_close(predicted([0.0, 0.0]), none)  # absent hands do not come through an open gate
    # And the gate learns from the first step.
    for gate in checkpoint.position_kernel.gates:
        gate.requires_grad_(True)
    predicted([1.0, 1.0]).square().sum().backward()
    assert all(gate.grad.abs().sum() > 0 for gate in checkpoint.position_kernel.gates)


def test_a_second_init_overwrites_nothing(start):
    result = CliRunner().invoke(commands, ["init", str(start / "sd"), str(start / "start")])
    assert result.exit_code == 1 and "got a checkpoint" in str(result.exception)
