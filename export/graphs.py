"""The exported form of every stage: thin wrappers around the models, one per graph of the contract.

A step graph does the whole step: input scaling, both guidance branches in one batch, the network, the guidance
combine and the solver update with the row's numbers. Latents, history and rows are float32; only the network's input
is cast to the network's precision. `unet_time` depends on the timestep alone and `unet_context` on the prompt alone, so
both run outside the loop.

    for graph in graphs(checkpoint, body, PRECISIONS["fp16"]): ...
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.export import Dim

from ..contract import (
    BRANCHES,
    CONTEXT,
    IMAGE_ENCODER,
    MAX_ROWS,
    MAX_SIDE,
    NUM_HISTORY,
    ROW_HEAD,
    SIDES,
    TensorSpec,
)
from ..models.checkpoint import Checkpoint
from ..models.configs import latent_factor
from ..models.hand_features import HandFeatures
from ..models.hand_prior import HandPrior
from ..models.position_kernel import CrossAttention, Grid, attach, cross_attentions
from ..models.smplh import SMPLH
from ..models.text_hand_encoder import CUES, TextHandEncoder, encode_text, word_states

# What `hd-export --precision` takes -> the type that the networks compute in.
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def update(row: Tensor, x: Tensor, m: Tensor, history: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The solver update as a transposed shift register (see `ROW_HEAD` in the contract), float32.

    row: [B, 6 + 2 K]; x, m, noise: [B, ...]; history: [B, K, ...]. Returns x' and history'.
    """
    columns = row[(...,) + (None,) * (x.dim() - 1)].unbind(1)  # 6 + 2 K tensors [B, 1, ...]
    a, b, d = columns[3:6]
    p, q = columns[len(ROW_HEAD) :: 2], columns[len(ROW_HEAD) + 1 :: 2]
    states = (*history.unbind(1), torch.zeros_like(x))
    new_x = a * x + b * m + states[0] + d * noise
    shifted = [p[k] * x + q[k] * m + states[k + 1] for k in range(len(p))]
    return new_x, torch.stack(shifted, 1)


def branched(x: Tensor, branches: int = 2) -> Tensor:
    """[B, ...] -> [G B, ...]: each row once per guidance branch, the unconditional and the conditional one."""
    return x[:, None].expand(-1, branches, *x.shape[1:]).flatten(0, 1)


def guided(output: Tensor, row: Tensor) -> Tensor:
    """Network output [G B, ...] -> u + guidance * (c - u) [B, ...], float32. With one branch u is c."""
    output = output.float().reshape(row.shape[0], -1, *output.shape[1:])
    u, c = output[:, 0], output[:, -1]
    guidance = row[:, 2][(...,) + (None,) * (u.dim() - 1)]
    return u + guidance * (c - u)


def scaled(x: Tensor, row: Tensor) -> Tensor:
    return x * row[:, 1][(...,) + (None,) * (x.dim() - 1)]


def finite(x: Tensor) -> Tensor:
    """[B, ...] -> [B] float32: 1 for rows that are finite throughout, 0 for others.

    By comparison, because a maximum or a difference may lose a NaN in an optimised kernel; both NaN and infinity
    compare false.
    """
    return (x.abs() <= torch.finfo(torch.float32).max).flatten(1).float().amin(1)


class TextEncoderGraph(nn.Module):
    """What the hand prior reads of a prompt, computed once and not at each of its steps."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.text_encoder, self.eos = checkpoint.text_encoder, checkpoint.special_tokens["eos"]
        self.prior = checkpoint.hand_prior

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = encode_text(self.text_encoder, input_ids)
        return self.prior.read(word_states(hidden, input_ids, self.eos, input_ids.shape[1])).float()


class HandPriorStep(nn.Module):
    def __init__(self, prior: HandPrior) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, x: Tensor, history: Tensor, noise: Tensor, text: Tensor, row: Tensor) -> tuple[Tensor, ...]:
        dtype = self.prior.text.weight.dtype
        branches = text.shape[1]
        sample, timestep = branched(scaled(x, row), branches), branched(row[:, 0], branches)
        output = self.prior.denoise(sample.to(dtype), timestep, text.flatten(0, 1).to(dtype))
        x, history = update(row, x, guided(output, row), history, noise)
        return x, history, finite(x)


class HandFeaturesGraph(nn.Module):
    """float32 always: kinematics in half precision move finger tips by millimetres."""

    outputs = ("joints", "rotations", "bps", "visibility", "vertices", "joints_3d", "camera")

    def __init__(self, features: HandFeatures) -> None:
        super().__init__()
        self.features = features

    def forward(self, x: Tensor, span: Tensor) -> tuple[Tensor, ...]:
        features = self.features(x, span)
        return tuple(features[name] for name in self.outputs)


class TextHandEncoderGraph(nn.Module):
    """Both branches in one call: the negative (or empty) prompt without hands, and the prompt with its hands. Or the
    prompt alone."""

    def __init__(self, encoder: TextHandEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        names = {"joints": "joints", "rotations": "rotations", "vertices": "bps"}
        self.cues = [names[cue] for cue in CUES if cue in encoder.config.cues]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *hands: Tensor) -> Tensor:
        dtype, branches = self.encoder.final_layer_norm.weight.dtype, input_ids.shape[1]
        text = {"input_ids": input_ids.flatten(0, 1), "attention_mask": attention_mask.flatten(0, 1)}
        if not hands:
            return self.encoder(**text).unflatten(0, (-1, branches))
        named = {name: branched(value, branches) for name, value in zip((*self.cues, "visibility"), hands, strict=True)}
        # The first of each pair of rows is the unconditional branch, which has no hands.
        shown = (torch.arange(branches, device=input_ids.device) == branches - 1).float()
        visibility = (hands[-1][:, None] * shown[:, None]).flatten(0, 1)
        cues = {name: named[name].to(dtype) for name in self.cues if name != "joints"}
        if "joints" in self.cues:
            cues["joints"] = named["joints"]  # float32: half of a pixel matters to the position codes
        return self.encoder(**text, **cues, visibility=visibility).unflatten(0, (-1, branches))


class UNetContext(nn.Module):
    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, context: Tensor) -> tuple[Tensor, ...]:
        flat, out = context.flatten(0, 1), []
        for layer in cross_attentions(self.unet):
            processor = layer.processor
            assert isinstance(processor, CrossAttention)
            key, value = processor.keys_values(layer, flat)
            # TensorRT's fused attention needs keys and values of one width: zeros stand beside the position code.
            value = nn.functional.pad(value, (0, key.shape[-1] - value.shape[-1]))
            out += [tensor.unflatten(0, (-1, context.shape[1])) for tensor in (key, value)]
        return tuple(out)


def timed_blocks(unet: UNet2DConditionModel) -> list[ResnetBlock2D]:
    """The blocks that add a projection of the time embedding, in the order of `modules`."""
    return [m for m in unet.modules() if isinstance(m, ResnetBlock2D) and m.time_emb_proj is not None]


class UNetTime(nn.Module):
    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, timesteps: Tensor) -> Tensor:
        unet = self.unet
        embedded = unet.time_embedding(unet.time_proj(timesteps).to(unet.conv_in.weight.dtype))
        embedded = nn.functional.silu(embedded)
        return torch.cat([block.time_emb_proj(embedded) for block in timed_blocks(unet)], -1)


class TimeRow:
    """Holds the time row of the step that is being traced."""

    value: Tensor


class TimeSlice(nn.Module):
    """Stands in for a block's `time_emb_proj`: reads its part of the precomputed row."""

    def __init__(self, row: TimeRow, start: int, stop: int) -> None:
        super().__init__()
        self.row, self.start, self.stop = row, start, stop

    def forward(self, temb: Tensor) -> Tensor:
        return self.row.value[:, self.start : self.stop]


class UNetStep(nn.Module):
    """One sampling step over latents. It changes the UNet: slices replace its time projections.

    inpaints: the UNet reads a mask and masked latents behind the latents, which come before keys and values. grid: of
    its positional kernel, which takes the size of the latents.
    """

    def __init__(self, unet: UNet2DConditionModel, inpaints: bool = False, grid: Grid | None = None) -> None:
        super().__init__()
        self.grid = grid
        self.pictures = 2 if inpaints else 0
        self.unet, self.row, start = unet, TimeRow(), 0
        for block in timed_blocks(unet):
            width = block.time_emb_proj.out_features
            block.time_emb_proj = TimeSlice(self.row, start, start + width)
            start += width

    def forward(
        self, latents: Tensor, history: Tensor, noise: Tensor, time: Tensor, row: Tensor, *given: Tensor
    ) -> tuple[Tensor, ...]:
        if self.grid is not None:
            self.grid.resize(*latents.shape[2:])
        pictures, keys_values = given[: self.pictures], given[self.pictures :]
        branches = keys_values[0].shape[1]
        shown = torch.cat([scaled(latents, row), *pictures], 1) if pictures else scaled(latents, row)
        sample = branched(shown, branches).to(self.unet.conv_in.weight.dtype)
        self.row.value = branched(time, branches)
        flat = [tensor.flatten(0, 1) for tensor in keys_values]
        context = list(zip(flat[::2], flat[1::2], strict=True))
        # Only the replaced projections used the timestep, so the exporter drops it.
        output = self.unet(sample, torch.zeros(1, device=sample.device), context).sample
        latents, history = update(row, latents, guided(output, row), history, noise)
        return latents, history, finite(latents)


class ImageDecoder(nn.Module):
    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        image = self.vae.decode(latents.to(self.vae.decoder.conv_in.weight.dtype)).sample.float()
        pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1)
        return pixels.to(torch.uint8), finite(image)  # uint8 last: TensorRT knows it as an output only


class ImageEncoder(nn.Module):
    """The decoder's inverse: the mean of the posterior, without noise."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        config, dtype = self.vae.config, self.vae.encoder.conv_in.weight.dtype
        pixels = (image.float() / 127.5 - 1).permute(0, 3, 1, 2)  # uint8 is cast first: TensorRT demands it
        mean = self.vae.encode(pixels.to(dtype)).latent_dist.mean.float()
        latents = (mean - (config.shift_factor or 0.0)) * config.scaling_factor
        return latents, finite(latents)


@dataclass
class Graph:
    """One graph to be exported."""

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]  # example inputs, in order
    outputs: tuple[str, ...]
    free: str = "B"  # the first axis of every input and output
    branched: tuple[str, ...] = ()  # tensors whose second axis is free, too: the branches of guidance
    # Tensors whose height and width are free, too, and what each side is a multiple of. See SIDES in the contract.
    sized: tuple[str, ...] = ()
    multiple: int = 1
    worded: Mapping[str, int] = field(default_factory=dict)  # tensor -> its axis of tokens, which is free, too

    def sides(self, name: str) -> dict[int, str]:
        """The axes of a tensor that are the picture's sides or the context's tokens, with their names."""
        if name in self.worded:
            return {self.worded[name]: CONTEXT}
        if name not in self.sized:
            return {}
        if name == "image":  # channels last
            return {1: SIDES[2], 2: SIDES[3]}
        rank = 5 if name == "history" else 4
        return {rank - 2: SIDES[0], rank - 1: SIDES[1]}

    def multiple_of(self, side: str) -> int:
        """What the size of a free axis is a multiple of."""
        return 1 if side == CONTEXT else self.multiple

    def spec(self, name: str, value: Tensor) -> TensorSpec:
        """The contract of an input or output with this value."""
        shape: list[int | str] = [self.free, *value.shape[1:]]
        if name in self.branched:
            shape[1] = BRANCHES
        for axis, side in self.sides(name).items():
            shape[axis] = side
        return TensorSpec(name, str(value.dtype).removeprefix("torch."), tuple(shape))

    def dynamic_shapes(self, rows: int | None = None) -> tuple[Any, ...]:
        """The free axes of every input as `torch.export` takes them: nested like the arguments of `forward`, with *args
        as a tuple. rows: fixes the first axis."""
        first = {} if rows is not None else {0: Dim(self.free, min=1, max=MAX_ROWS)}
        second = {1: Dim(BRANCHES, min=1, max=2)}
        most = MAX_SIDE // self.multiple
        sides: dict[str, Any] = {side: self.multiple * Dim(f"{side}_", min=1, max=most) for side in SIDES}
        sides[CONTEXT] = Dim(f"{CONTEXT}_", min=1, max=MAX_SIDE)
        axes = [
            first
            | (second if name in self.branched else {})
            | ({axis: sides[side] for axis, side in self.sides(name).items()} if rows is None else {})
            for name in self.inputs
        ]
        parameters = inspect.signature(self.module.forward).parameters.values()
        named = sum(parameter.kind is not parameter.VAR_POSITIONAL for parameter in parameters)
        packed = tuple(axes[named:])
        return (*axes[:named], *((packed,) if packed else ()))


def in_precision(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a module for inference with weights of `dtype`. It shares weights that are of `dtype` already."""
    own: dict[int, Any] = {}  # what deepcopy takes as copied
    for tensor in (*module.parameters(), *module.buffers()):
        value = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
        own[id(tensor)] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
    return copy.deepcopy(module, own).eval()


def picture_graph(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, batch: int = 3, seed: int = 0) -> Graph:
    """The graph that reads pictures; its examples are gradients with noise on them."""
    height, width = checkpoint.image_size
    generator = torch.Generator().manual_seed(seed)
    slope = torch.linspace(0, 200, height)[:, None, None] * torch.linspace(0, 1, width)[:, None]
    noise = torch.randint(0, 56, (batch, height, width, 3), generator=generator)
    image = (slope + noise).to(torch.uint8)
    module = in_precision(ImageEncoder(checkpoint.vae), dtype)
    sized, multiple = ("image", "latents"), latent_factor(checkpoint.vae.config)
    return Graph(IMAGE_ENCODER, module, {"image": image}, ("latents", "finite"), sized=sized, multiple=multiple)


@torch.no_grad()
def graphs(
    checkpoint: Checkpoint, body: SMPLH, dtype: torch.dtype = torch.float32, batch: int = 3, seed: int = 0
) -> Iterator[Graph]:
    """Every graph of the contract with example inputs, in the order in which data flows; `image_encoder` comes last.

    dtype: of the networks, see PRECISIONS. The examples come from the float32 stages before, so the check against
    PyTorch sees values of the right size. Nothing is computed in half, which is slow on PyTorch's CPU. Each module is a
    copy that shares the checkpoint's weights where they are of `dtype`; drop it after use.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def stage(module: nn.Module) -> nn.Module:
        return in_precision(module, dtype)

    special, length = checkpoint.special_tokens, checkpoint.special_tokens["length"]
    ids = torch.randint(0, min(special["bos"], special["eos"]), (batch, 2, length), generator=generator)
    ids[:, :, 0], ids[:, :, length // 2 :] = special["bos"], special["eos"]

    def row(steps_of: str) -> Tensor:
        numbers = 0.5 * normal(batch, len(ROW_HEAD) + 2 * NUM_HISTORY[steps_of])
        head = torch.tensor([[400.0, 1.0, 2.0, 0.9, -0.4, 0.1]]) * (1 + 0.1 * torch.arange(batch)[:, None])
        return torch.cat([head, numbers[:, len(ROW_HEAD) :]], 1)

    text_graph = TextEncoderGraph(checkpoint)
    yield Graph("text_encoder", stage(text_graph), {"input_ids": ids[:, 1]}, ("text",))

    text = text_graph(ids.flatten(0, 1)).unflatten(0, (-1, 2))
    x = normal(batch, len(checkpoint.hand_prior.mean))
    history = 0.1 * normal(batch, NUM_HISTORY["hand_prior"], x.shape[1])
    inputs = {"x": x, "history": history, "noise": normal(*x.shape), "text": text, "row": row("hand_prior")}
    step = stage(HandPriorStep(checkpoint.hand_prior))
    yield Graph("hand_prior", step, inputs, ("x", "history", "finite"), branched=("text",))

    height, width = checkpoint.image_size
    prior, encoder = checkpoint.hand_prior, checkpoint.text_hand_encoder
    features = HandFeaturesGraph(HandFeatures(body, prior.mean, prior.std, encoder.basis, width / height)).eval()
    span = torch.tensor([1.0, 0.6, 1.5]).repeat(batch)[:batch]
    yield Graph("hand_features", features, {"x": 0.5 * x, "span": span}, features.outputs)

    values = dict(zip(features.outputs, features(0.5 * x, span), strict=True))
    shown = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]).repeat(batch, 1)
    values["visibility"] = torch.cat([shown.roll(-i, 0)[:batch] for i in range(checkpoint.num_people)], 1)
    both = TextHandEncoderGraph(encoder)
    hands = {name: values[name] for name in (*both.cues, "visibility")} if both.cues else {}
    mask = (torch.arange(length) != 2).to(torch.int64).expand_as(ids)  # the third token is not read
    inputs = {"input_ids": ids, "attention_mask": mask, **hands}
    yield Graph("text_hand_encoder", stage(both), inputs, ("context",), branched=(*list(inputs)[:2], "context"))

    context = both(*inputs.values())
    unet = stage(checkpoint.unet)
    grid = attach(unet, copy.deepcopy(checkpoint.position_kernel), checkpoint.latent_size)
    names = tuple(f"{kind}_{i:02}" for i in range(len(cross_attentions(unet))) for kind in ("key", "value"))
    inputs, worded = {"context": context.to(dtype)}, {"context": 2} | dict.fromkeys(names, 3)
    yield Graph("unet_context", UNetContext(unet), inputs, names, branched=tuple(worded), worded=worded)

    yield Graph("unet_time", UNetTime(unet), {"timesteps": torch.tensor([999.0, 500.5, 1.0])}, ("time",), free="S")

    exact = [tensor.to(dtype) for tensor in UNetContext(checkpoint.unet)(context)]
    keys_values = dict(zip(names, exact, strict=True))
    time = UNetTime(checkpoint.unet)(torch.linspace(999, 1, batch)).to(dtype)
    shape = (batch, checkpoint.vae.config.latent_channels, *checkpoint.latent_size)
    latents, noise = normal(*shape), normal(*shape)
    history = 0.1 * normal(batch, NUM_HISTORY["unet"], *shape[1:])
    inputs = {"latents": latents, "history": history, "noise": noise, "time": time, "row": row("unet")}
    if checkpoint.inpaints:
        mask = (normal(batch, 1, *checkpoint.latent_size) > 0).float()
        inputs |= {"mask": mask, "masked_latents": normal(*shape)}
    inputs |= keys_values
    step = UNetStep(unet, checkpoint.inpaints, grid)
    sized, outputs = ("latents", "history", "noise", "mask", "masked_latents"), ("latents", "history", "finite")
    multiple = checkpoint.size_multiple // latent_factor(checkpoint.vae.config)
    yield Graph("unet", step, inputs, outputs, "B", names, sized, multiple, worded)
    del unet, step

    decoder = stage(ImageDecoder(checkpoint.vae))
    yield Graph("image_decoder", decoder, {"latents": latents}, ("image", "finite"), sized=("latents", "image"))
    yield picture_graph(checkpoint, dtype, batch, seed)
