"""The autoencoder on patches: its linear code, its folder, its graph, and what is refused of it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from handiffuser.errors import CheckpointError
from handiffuser.models.autoencoder import PatchAutoencoderKL
from handiffuser.models.checkpoint import Checkpoint, decode, random_checkpoint
from handiffuser.models.configs import CONFIGS, latent_factor

CONFIG = replace(CONFIGS["tiny"], image_size=(32, 48), latent_channels=6, vae_patch=2, vae_channels=(8, 16))


def pictures(count: int = 5, size: tuple[int, int] = (24, 32)) -> torch.Tensor:
    """Smooth noise in [-1, 1]: blocks with a few strong components, as photographs have."""
    noise = torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0))
    return (2 * F.avg_pool2d(noise, 5, 1, 2) + noise.mean(1, keepdim=True) / 4).clamp(-1, 1)


def made(latents: int, patch: int = 2, **others) -> PatchAutoencoderKL:
    torch.manual_seed(1)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    settings = {"block_out_channels": (8, 16), "norm_num_groups": 4, **blocks, **others}
    return PatchAutoencoderKL(patch_size=patch, latent_channels=latents, **settings).eval()


@torch.no_grad()
def through(vae: PatchAutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    return vae.decode(vae.encode(images).latent_dist.mean).sample


def test_as_many_latents_as_pixels_lose_nothing():
    vae, images = made(48), pictures()  # 4 x 4 pixels of 3 colours
    assert not vae.begun
    vae.begin(images)
    assert vae.begun
    torch.testing.assert_close(through(vae, images), images, rtol=0, atol=2e-5)


def test_fewer_latents_lose_the_smallest_components():
    """Against NumPy's singular values of the same blocks."""
    vae, images = made(6), pictures()
    vae.begin(images)
    latents = vae.encode(images).latent_dist
    blocks = F.pixel_unshuffle(images, 4).permute(0, 2, 3, 1).reshape(-1, 48).double().numpy()
    values = np.linalg.svd(blocks - blocks.mean(0), compute_uv=False)
    lost = (values[6:] ** 2).sum() / blocks.size
    assert float((through(vae, images) - images).square().mean()) == pytest.approx(lost, rel=1e-4)
    mean = latents.mean.detach()
    assert float(mean.square().mean()) == pytest.approx(1, rel=1e-4)
    deviations = mean.std((0, 2, 3))
    assert (deviations.diff() < 1e-6).all(), "largest first"
    np.testing.assert_allclose((deviations[0] / deviations[5]) ** 2, values[0] / values[5], rtol=1e-3)
    assert torch.allclose(latents.std, torch.tensor(-2.5).exp())


def test_the_networks_learn_beside_the_code():
    """Every weight has a gradient after one step, the zeros at the ends of the networks too."""
    vae, images = made(6), pictures()
    vae.begin(images)
    optimizer = torch.optim.SGD(vae.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        (vae.decode(vae.encode(images).latent_dist.mean).sample - images).square().mean().backward()
        optimizer.step()
    still = [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()]
    # A bias before a normalisation or a softmax changes nothing. The mean alone was decoded.
    assert all(name.endswith(("conv1.bias", "to_k.bias", "conv_shortcut.bias", "conv2.bias")) for name in still), still


def test_one_level_less_for_each_doubling_of_the_patch():
    for patch in (1, 2, 4):
        vae = made(6, patch)
        assert latent_factor(vae.config) == 2 * patch
        assert vae.encode(pictures()).latent_dist.mean.shape == (5, 6, 24 // (2 * patch), 32 // (2 * patch))
        assert through(vae, pictures()).shape == (5, 3, 24, 32)
    assert latent_factor(AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4,
                                       down_block_types=("DownEncoderBlock2D",) * 2,
                                       up_block_types=("UpDecoderBlock2D",) * 2).config) == 2  # fmt: skip


@pytest.fixture(scope="module")
def folder(body_path, tmp_path_factory):
    checkpoint = random_checkpoint(CONFIG, seed=3, body=body_path)
    checkpoint.vae.begin(pictures())
    for last in (checkpoint.vae.encoder.conv_out, checkpoint.vae.decoder.conv_out):
        torch.nn.init.normal_(last.weight, std=0.05)
    folder = tmp_path_factory.mktemp("patched") / "checkpoint"
    checkpoint.save(folder)
    return folder


def test_a_folder_says_whose_class_it_needs(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["vae"] == ["handiffuser", "PatchAutoencoderKL"]
    checkpoint = Checkpoint.load(folder)
    assert checkpoint.latent_size == (8, 12) and checkpoint.unet.config.in_channels == 6
    assert isinstance(checkpoint.vae, PatchAutoencoderKL) and checkpoint.vae.config.patch_size == 2
    again = PatchAutoencoderKL.from_pretrained(folder / "vae")
    for name, value in again.state_dict().items():
        assert torch.equal(value, checkpoint.vae.state_dict()[name]), name
    latents = torch.randn(2, 6, 8, 12, generator=torch.Generator().manual_seed(0))
    assert decode(checkpoint, latents).shape == (2, 32, 48, 3)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"patch_size": 0}, "patch_size"),
        ({"patch_size": "2"}, "patch_size"),
        ({"patch_size": 4}, "config.json"),
        ({"in_channels": 4}, "must be 3, got 4"),
        ({"use_quant_conv": True}, "use_quant_conv"),
        ({"latent_channels": 8}, "config.json"),
    ],
)
def test_another_network_is_refused(folder, tmp_path, entries, words):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / "vae/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.load(copy)


def test_a_size_that_the_patches_do_not_divide(folder):
    checkpoint = Checkpoint.load(folder)
    with pytest.raises(CheckpointError, match="multiples of 8"):  # 2 for patches, 2 for each network's level
        replace(checkpoint, image_size=(36, 48)).check()


@pytest.mark.slow
def test_the_graphs_compute_what_pytorch_does(folder, tmp_path):
    from handiffuser.export import bundle

    checkpoint = Checkpoint.load(folder)
    graphs = {g.name: g for g in bundle.graphs(checkpoint, bundle.SMPLH.load(checkpoint.body))}
    for name, most, shape in (
        ("image_decoder", 1 / 255, ["B", "H", "W", 3]),  # at most one level of a pixel
        ("image_encoder", 1e-5, ["B", 6, "h", "w"]),
    ):
        spec = bundle.export_graph(graphs[name], tmp_path, 23)
        error, _ = bundle.parity(graphs[name], graphs[name].module, tmp_path / spec.file)
        assert error <= most, name
        assert [list(output.shape) for output in spec.outputs] == [shape, ["B"]]
