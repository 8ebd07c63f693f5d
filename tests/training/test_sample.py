"""Sampling for grids and reports, with parts on different devices: "meta" stands for a GPU."""

from __future__ import annotations

import torch
from handiffuser.models.checkpoint import Checkpoint
from handiffuser.models.configs import DEMO_SCHEDULE
from handiffuser.training.sample import ddim, decode


def test_timesteps_go_where_the_noise_is():
    seen = []

    def network(x, timestep):
        seen.append((x.device, timestep.device, timestep.shape))
        return x

    assert ddim(network, torch.zeros(3, 4, device="meta"), DEMO_SCHEDULE, 5).device.type == "meta"
    assert seen == [(torch.device("meta"), torch.device("meta"), (3,))] * 5


def test_latents_go_to_the_decoder(tiny_checkpoint_folder):
    """A stage moves its own modules to the GPU; the pictures' stage does not train the VAE."""
    checkpoint = Checkpoint.load(tiny_checkpoint_folder)  # its own: it is spoilt
    latents = torch.zeros(2, 4, *checkpoint.latent_size)
    here = decode(checkpoint, latents)
    checkpoint.vae.to("meta")
    there = decode(checkpoint, latents)
    assert here.device.type == "cpu" and there.device.type == "meta" and here.shape == there.shape
