"""A checkpoint of other latents and other words goes on from what another one has learned.

    grow(checkpoint, donor, images)         # hd-train grow CHECKPOINT FROM OUT --data FOLDER

CHECKPOINT has the sizes, the tokenizer, the body and a trained autoencoder; FROM gives all that fits between them:

- Words: a token gets the mean of the vectors of its pieces in the donor's tokenizer (Gee et al. 2022, Fast Vocabulary
  Transfer, section 3), so words that both know keep their vectors.
- Latents: the UNet goes on in a subspace of the new latents. Orthogonal Procrustes (Schönemann 1966) finds the one that
  is most like the donor's latents of the same pictures. An orthonormal map keeps white noise white, so the UNet sees
  its own noise there; the other directions of its output start at zero.
- The hand prior's weights, without their normalisation: training measures that on its data.
- People: a donor of one person gives all it knows to each of several (`with_people`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from ..contract import NUM_PARAMS
from ..errors import TrainingError
from ..models.checkpoint import Checkpoint
from .sample import means_of

EMBEDDING = "embeddings.token_embedding.weight"
WORD_END = "</w>"  # of a tokenizer's last pieces


@torch.no_grad()
def grow(checkpoint: Checkpoint, donor: Checkpoint, images: Tensor) -> None:
    """Copies what `donor` has learned into `checkpoint`, in place.

    images: uint8 [N, H, W, 3] of the checkpoint's size, on which the autoencoders are compared.
    Raises TrainingError for parts of different sizes, and for latents of different heights or widths; CheckpointError
    for a UNet of inpainting.
    """
    for one in (checkpoint, donor):
        one.check_paints("hd-train grow")
    if checkpoint.latent_size != donor.latent_size:
        raise TrainingError(
            "Both checkpoints must have latents of one height and width, got {}x{} and {}x{}. Choose another "
            "size of pictures, or another autoencoder.".format(*checkpoint.latent_size, *donor.latent_size)
        )
    donor = with_people(donor, checkpoint.num_people)
    pieces = pieces_of(checkpoint.tokenizer, donor.tokenizer)
    for name in ("text_encoder", "text_hand_encoder"):
        state = donor.modules()[name].state_dict()
        key = next(key for key in state if key.endswith(EMBEDDING))
        rows = torch.stack([state[key][of].mean(0) for of in pieces])
        new: Any = checkpoint.modules()[name].state_dict()[key].clone()
        if rows.shape[1:] != new.shape[1:]:
            raise _unlike(name, key, rows, new)
        new[: len(rows)] = rows
        _take(checkpoint.modules()[name], {**state, key: new}, name)
    prior = donor.hand_prior.state_dict()
    unmeasured = {"mean": torch.zeros_like(prior["mean"]), "std": torch.ones_like(prior["std"])}
    _take(checkpoint.hand_prior, {**prior, **unmeasured}, "hand_prior")
    if checkpoint.position_kernel is not None and donor.position_kernel is not None:
        _take(checkpoint.position_kernel, donor.position_kernel.state_dict(), "position_kernel")
    unet, basis = donor.unet.state_dict(), subspace(checkpoint, donor, images)  # [old, new]
    unet["conv_in.weight"] = torch.einsum("oikl,ij->ojkl", unet["conv_in.weight"], basis)
    unet["conv_out.weight"] = torch.einsum("oikl,oj->jikl", unet["conv_out.weight"], basis)
    unet["conv_out.bias"] = unet["conv_out.bias"] @ basis
    _take(checkpoint.unet, unet, "unet")
    checkpoint.words = sorted({*checkpoint.words, *donor.words}) if checkpoint.words else []
    checkpoint.notes = {**checkpoint.notes, "grown_from": donor.name}


@torch.no_grad()
def with_people(checkpoint: Checkpoint, num_people: int) -> Checkpoint:
    """The checkpoint for pictures of up to `num_people` people. All weights are copies, and each new person has the
    normalisation of the last one; the vectors that tell people apart start near zero.

    Raises TrainingError for fewer people than the checkpoint has.
    """
    known = checkpoint.num_people
    if num_people < known:
        raise TrainingError(
            f"num_people must be at least {known}, as {checkpoint.name} has it, got {num_people}. Give another --start."
        )
    if num_people == known:
        return checkpoint
    made: dict[str, Any] = {}
    with torch.random.fork_rng(devices=()):  # all processes, and all runs, start from the same numbers
        torch.manual_seed(num_people)
        for name in ("hand_prior", "text_hand_encoder"):
            module: Any = getattr(checkpoint, name)
            config = {key: value for key, value in module.config.items() if not key.startswith("_")}
            made[name] = type(module)(**{**config, "num_people": num_people})
    for name, module in made.items():
        state = getattr(checkpoint, name).state_dict()
        if name == "hand_prior":
            more = num_people - known
            state |= {key: torch.cat([state[key], state[key][-NUM_PARAMS:].repeat(more)]) for key in ("mean", "std")}
        if "person" in module.state_dict():  # an encoder without hand cues has none
            module.person[:known] = state.pop("person", 0.0)
        module.load_state_dict({**module.state_dict(), **state})
        module.eval().requires_grad_(False)
    return replace(checkpoint, **made)


def subspace(checkpoint: Checkpoint, donor: Checkpoint, images: Tensor) -> Tensor:
    """The orthonormal rows [C of the donor, C] that turn new latents most nearly into the donor's."""
    height, width = donor.image_size
    small = F.interpolate(images.permute(0, 3, 1, 2).float(), (height, width), mode="area")
    small = small.round().to(torch.uint8).permute(0, 2, 3, 1)
    new, old = (
        ((means_of(one, shown) - (one.vae.config.shift_factor or 0.0)) * one.vae.config.scaling_factor)
        for one, shown in ((checkpoint, images), (donor, small))
    )
    u, _, v = torch.linalg.svd(torch.einsum("nohw,njhw->oj", old.double(), new.double()), full_matrices=False)
    return (u @ v).float()


def pieces_of(tokenizer: Tokenizer, other: Tokenizer) -> list[list[int]]:
    """For each token of a tokenizer, by its id: the ids of another tokenizer that spell it."""
    known = other.get_vocab()
    out = []
    for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]):
        if token in known:
            out.append([known[token]])
            continue
        letters = token.removesuffix(WORD_END)  # of the alphabet of bytes, which both know
        out.append(_spelled(letters, token[len(letters) :], known))
    return out


def _spelled(letters: str, end: str, known: dict[str, int]) -> list[int]:
    """The longest known pieces from the left; the last one ends the word where `end` is given."""
    ids: list[int] = []
    while letters:
        for length in range(len(letters), 0, -1):
            last = length == len(letters)
            found = known.get(letters[:length] + (end if last else ""))
            if found is not None:
                ids.append(found)
                letters = letters[length:]
                break
        else:
            raise TrainingError(
                f"The donor's tokenizer must know all bytes, but lacks {letters[0]!r}. Take a checkpoint of Stable "
                "Diffusion or of hd-train."
            )
    return ids


def _take(module: nn.Module, state: dict[str, Tensor], name: str) -> None:
    own = module.state_dict()
    for key, value in own.items():
        if key not in state or state[key].shape != value.shape:
            raise _unlike(name, key, state.get(key), value)
    module.load_state_dict({key: state[key] for key in own})


def _unlike(part: str, key: str, found: Tensor | None, wanted: Tensor) -> TrainingError:
    said = "none" if found is None else str(list(found.shape))
    return TrainingError(
        f"{key} in {part} must have the shape {list(wanted.shape)} in both checkpoints, got {said}. Take a checkpoint "
        "of the same networks."
    )
