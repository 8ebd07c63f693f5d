"""Latent consistency beside our distillation: its loss is the paper's, and one round of both."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from consistency import ConsistencyLoss, command
from diffusers import DDIMScheduler, LCMScheduler
from handiffuser import shipped
from handiffuser.models.checkpoint import Checkpoint, random_checkpoint
from handiffuser.models.configs import CONFIGS


def teacher(prediction_type: str = "v_prediction") -> Checkpoint:
    body = shipped.checkpoint_path() / "body" / "smplh.npz"
    made = random_checkpoint(replace(CONFIGS["tiny"], guidance=2.0), seed=3, body=body)
    made.scheduler = {**made.scheduler, "prediction_type": prediction_type}
    made.attach_kernel()
    return made


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_its_steps_are_diffusers(kind):
    """x0 and noise lead where DDIM leads, and what it calls consistent is what LCMScheduler calls denoised."""
    made = teacher(kind)
    loss = ConsistencyLoss(made, made, 1.5, torch.zeros(77, dtype=torch.long))
    generator = torch.Generator().manual_seed(1)
    x, output = (torch.randn(1, 4, *made.latent_size, generator=generator) for _ in range(2))
    scheduler = DDIMScheduler.from_config({**made.scheduler, "timestep_spacing": "leading", "steps_offset": 0})
    scheduler.set_timesteps(50)
    at = torch.tensor([480])
    clean, noise = loss.clean_and_noise(output, x, at)
    alpha = loss.alphas[460]
    there = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    torch.testing.assert_close(there, scheduler.step(output, 480, x).prev_sample, rtol=1e-4, atol=1e-4)

    lcm = LCMScheduler.from_config(made.scheduler)
    lcm.set_timesteps(4)
    time = lcm.timesteps[1:2]
    context = torch.randn(1, 77, made.unet.config.cross_attention_dim, generator=generator)
    made.position_kernel = None
    made.attach_kernel()
    with torch.no_grad():
        denoised = lcm.step(made.unet(x, time, context).sample, time[0], x).denoised
        torch.testing.assert_close(loss.consistent(x, time, context), denoised, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_both_are_trained_and_compared(tmp_path):
    from handiffuser.demo.dataset import make

    make(tmp_path / "world", 80, size=64, processes=1)
    teacher().save(tmp_path / "teacher")
    words = [tmp_path / "out", "--teacher", tmp_path / "teacher", "--data", tmp_path / "world", "--runs", 2,
             "--steps", 2, "--batch", 4, "--trajectories", 12, "--count", 6, "--no-detector"]  # fmt: skip
    result = CliRunner().invoke(command, [*map(str, words)], catch_exceptions=False)
    rows = json.loads(result.stdout.splitlines()[-1])["rows"]
    assert list(rows) == ["teacher", "teacher-in-2", "jumps", "consistency"]
    near = {name: row["beside the teacher"]["psnr"] for name, row in rows.items()}
    assert near["teacher"] > 100 > near["jumps"] > near["consistency"], "one adds noise, and has learned two steps"
    assert Checkpoint.load(tmp_path / "teacher").defaults["guidance"] == 2.0
