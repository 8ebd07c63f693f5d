"""An autoencoder for many latent channels: AutoencoderKL on patches of pixels, beside a linear code of blocks.

    vae = PatchAutoencoderKL(patch_size=2, block_out_channels=(32, 64, 96), latent_channels=16)
    vae.begin(images)                                   # pictures [N, 3, H, W]: it encodes well before any training

A convolution costs most on the finest level. Patches of 2 x 2 pixels become channels (pixel unshuffle), as in
diffusers' AutoencoderKLWan, so the networks see a quarter of the places. The linear code starts as the principal
components of 8 x 8 blocks; the networks start at zero and learn what the code loses.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn

START_LOGVAR = -5.0  # of the posterior before training: little noise, which the divergence then raises


class PatchEncoder(Encoder):
    """Pictures [N, C, H, W] -> mean and log variance of latents [N, 2 L, H / f, W / f]."""

    def __init__(self, patch: int, channels: int, latents: int, levels: tuple[int, ...], **others: Any) -> None:
        super().__init__(channels * patch**2, latents, block_out_channels=levels, double_z=True, **others)
        self.patch, self.block = patch, patch * 2 ** (len(levels) - 1)
        self.linear = nn.Conv2d(channels * self.block**2, latents, 1)

    def forward(self, sample: Tensor) -> Tensor:
        mean, logvar = super().forward(F.pixel_unshuffle(sample, self.patch)).chunk(2, 1)
        return torch.cat([mean + self.linear(F.pixel_unshuffle(sample, self.block)), logvar], 1)


class PatchDecoder(Decoder):
    """Latents [N, L, h, w] -> pictures [N, C, f h, f w]."""

    def __init__(self, patch: int, channels: int, latents: int, levels: tuple[int, ...], **others: Any) -> None:
        super().__init__(latents, channels * patch**2, block_out_channels=levels, **others)
        self.patch, self.block = patch, patch * 2 ** (len(levels) - 1)
        self.linear = nn.Conv2d(latents, channels * self.block**2, 1)

    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        drawn = F.pixel_shuffle(super().forward(sample, latent_embeds), self.patch)
        return drawn + F.pixel_shuffle(self.linear(sample), self.block)


class PatchAutoencoderKL(AutoencoderKL):
    """AutoencoderKL with PatchEncoder and PatchDecoder: pictures in [-1, 1] [N, 3, H, W], latents [N, L, H/f, W/f].

    The factor f is patch_size times two for each level but the last; H and W must be multiples of it. Other arguments
    are diffusers' own. Without training and without `begin` it decodes to grey.
    """

    @register_to_config
    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 3,
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 3,
        block_out_channels: tuple[int, ...] = (32, 64, 96),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 16,
        norm_num_groups: int = 16,
        sample_size: int = 256,
        scaling_factor: float = 1.0,
        shift_factor: float | None = None,
        force_upcast: bool = False,
        mid_block_add_attention: bool = True,
    ) -> None:
        shared: dict[str, Any] = {
            "layers_per_block": layers_per_block,
            "act_fn": act_fn,
            "norm_num_groups": norm_num_groups,
            "mid_block_add_attention": mid_block_add_attention,
        }
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            latent_channels=latent_channels,
            sample_size=sample_size,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            force_upcast=force_upcast,
            use_quant_conv=False,
            use_post_quant_conv=False,
            **shared,
        )
        levels = tuple(block_out_channels)
        self.encoder = PatchEncoder(
            patch_size, in_channels, latent_channels, levels, down_block_types=tuple(down_block_types), **shared
        )
        self.decoder = PatchDecoder(
            patch_size, out_channels, latent_channels, levels, up_block_types=tuple(up_block_types), **shared
        )
        for linear in self.linears:
            _zero(linear)

    @property
    def linears(self) -> tuple[nn.Conv2d, nn.Conv2d]:
        """The linear code of blocks: the encoder's half and the decoder's."""
        return self.encoder.linear, self.decoder.linear

    @property
    def begun(self) -> bool:
        return bool(self.encoder.linear.weight.any())

    @torch.no_grad()
    def begin(self, images: Tensor) -> None:
        """Sets the linear code to the principal components of pictures' blocks, and the networks beside it to zero.

        images: [N, 3, H, W] in [-1, 1]. The variance of the latents is 1 on average; a channel's deviation is the root
        of its component's: half way to whitening, so that details neither vanish nor outweigh.
        """
        encode, decode = self.linears
        assert encode.bias is not None and decode.bias is not None
        blocks = F.pixel_unshuffle(images.double(), self.encoder.block).movedim(1, -1).flatten(0, 2)
        mean = blocks.mean(0)
        variance, axes = torch.linalg.eigh((blocks - mean).T @ (blocks - mean) / len(blocks))
        count = self.config.latent_channels
        deviation, axes = variance.flip(0)[:count].clamp_min(1e-12).sqrt(), axes.flip(1)[:, :count].T  # largest first
        scale = (deviation * deviation.mean()).sqrt()[:, None]
        encode.load_state_dict({"weight": (axes / scale)[..., None, None], "bias": -(axes / scale) @ mean})
        decode.load_state_dict({"weight": (axes * scale).T[..., None, None], "bias": mean})
        for last in (self.encoder.conv_out, self.decoder.conv_out):
            _zero(last)
        self.encoder.conv_out.bias[count:] = START_LOGVAR


def _zero(layer: nn.Module) -> None:
    for value in layer.parameters():
        nn.init.zeros_(value)
