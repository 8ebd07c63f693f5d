"""What is given in the place of a Stable Diffusion folder or a checkpoint: one sentence, with the way out."""

from __future__ import annotations

import shlex
import shutil

import pytest
import torch
from click.testing import CliRunner
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from handiffuser.errors import CheckpointError
from handiffuser.export.cli import command as export
from handiffuser.models.foreign import check_stable_diffusion
from handiffuser.training import init
from handiffuser.training.cli import commands
from handiffuser.training.init import from_stable_diffusion
from safetensors.torch import load_file
from stable_diffusion import change, stable_diffusion, write
from transformers import T5Config, T5EncoderModel

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3438167540\n"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def folder(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "sd")


def said_by(command, *arguments):
    """The one line that a command refuses with, before any weight is read."""
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert isinstance(result.exception, CheckpointError), result.exception
    said = str(result.exception)
    assert len(said.splitlines()) == 1 and len(said) < 700, said
    return said


def put(folder, part, model):
    shutil.rmtree(folder / part)
    model.save_pretrained(folder / part)


def drop(folder, part, **entries):
    shutil.rmtree(folder / part)
    change(folder / "model_index.json", **{part: None, **entries})


def add(folder, part, kind, pipeline):
    (folder / part).mkdir()
    change(folder / "model_index.json", **{part: ["diffusers", kind], "_class_name": pipeline})


def sdxl(folder):
    add(folder, "text_encoder_2", "CLIPTextModelWithProjection", "StableDiffusionXLPipeline")


def flux(folder):
    drop(folder, "unet")
    add(folder, "transformer", "FluxTransformer2DModel", "FluxPipeline")
    add(folder, "text_encoder_2", "T5EncoderModel", "FluxPipeline")


def channels(number):
    return lambda folder: change(folder / "unet/config.json", in_channels=number)


def pointer(name):
    return lambda folder: (folder / name).write_text(POINTER)


CASES = {
    "model_index is missing": (lambda f: (f / "model_index.json").unlink(), ["must have a model_index.json"]),
    "a part is missing": (lambda f: shutil.rmtree(f / "unet"), ["lacks unet/", "whole pipeline"]),
    "sdxl": (sdxl, ["StableDiffusionXLPipeline", "SDXL", "1.x and 2.x"]),
    "flux": (flux, ["FluxPipeline", "transformer", "lacks unet/"]),
    "controlnet": (
        lambda f: add(f, "controlnet", "ControlNetModel", "StableDiffusionControlNetPipeline"),
        ["controlnet", "without it"],
    ),
    "adapter": (lambda f: add(f, "adapter", "T2IAdapter", "StableDiffusionAdapterPipeline"), ["has adapter"]),
    "inpainting and more": (channels(10), ["a UNet for other inputs", "10 channels"]),
    "no number": (channels([4]), ["[4] channels"]),
    "pix2pix": (channels(8), ["InstructPix2Pix"]),
    "depth": (channels(5), ["depth-to-image"]),
    "upscaler": (channels(7), ["upscaler"]),
    "taesd": (lambda f: put(f, "vae", AutoencoderTiny()), ["must be of class AutoencoderKL, got AutoencoderTiny"]),
    "asymmetric": (
        lambda f: put(f, "vae", AsymmetricAutoencoderKL(norm_num_groups=8, down_block_out_channels=(8,))),
        ["got AsymmetricAutoencoderKL"],
    ),
    "vq": (lambda f: put(f, "vae", VQModel(norm_num_groups=8, block_out_channels=(8,))), ["got VQModel"]),
    "unconditional": (
        lambda f: put(
            f,
            "unet",
            UNet2DModel(
                block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                norm_num_groups=8,
            ),
        ),
        ["must be of class UNet2DConditionModel, got UNet2DModel"],
    ),
    "t5": (
        lambda f: put(f, "text_encoder", T5EncoderModel(T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=2))),
        ["must be of class CLIPTextModel, got T5EncoderModel"],
    ),
    "attention mask": (
        lambda f: change(f / "text_encoder/config.json", use_attention_mask=True),
        ["use_attention_mask"],
    ),
    "class labels": (lambda f: change(f / "unet/config.json", class_embed_type="projection"), ["class_embed_type"]),
    **{
        f"pointer {name}": (pointer(name), [name.rpartition("/")[2], "Git LFS pointer", "git lfs pull"])
        for name in (
            "model_index.json",
            "unet/diffusion_pytorch_model.safetensors",
            "text_encoder/model.safetensors",
            "vae/config.json",
            "tokenizer/vocab.json",
            "scheduler/scheduler_config.json",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_other_folders_are_refused(folder, tmp_path, name, monkeypatch):
    if name not in ("attention mask", "class labels"):  # those are found as their part is read
        monkeypatch.setattr(init, "load_part", None)
    spoil, words = CASES[name]
    spoil(folder)
    said = said_by(commands, "init", folder, tmp_path / "out")
    assert all(word in said for word in words), said
    assert str(folder) in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["hd-train init", "hd-export"])
def test_what_is_no_folder(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def said(path):
        return said_by(commands, "init", path, "out") if command == "hd-train init" else said_by(export, path, "out")

    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x" * 2000)
    if command == "hd-train init":  # which takes single files
        assert "is truncated, damaged or no safetensors file" in said(file)
    else:
        assert "single file" in said(file) and f"hd-train init {file} start" in said(file)
    file.write_text(POINTER)
    assert "Git LFS pointer" in said(file)
    assert "does not exist" in said(tmp_path / "nowhere") and "hf://ORG" in said(f"{tmp_path.name}/nowhere/deep")
    (tmp_path / "bundle").mkdir()
    write(tmp_path / "bundle/manifest.json", {})
    assert "got an exported bundle" in said(tmp_path / "bundle") and "hd-run" in said(tmp_path / "bundle")
    (tmp_path / "files").mkdir()
    (tmp_path / "files/v1-5-pruned.safetensors").touch()
    assert "v1-5-pruned.safetensors" in said(tmp_path / "files")
    ControlNetModel(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), norm_num_groups=8, layers_per_block=1,
        conditioning_embedding_out_channels=(8, 8), attention_head_dim=8,
    ).save_pretrained(tmp_path / "controlnet")  # fmt: skip
    assert "one part (ControlNetModel)" in said(tmp_path / "controlnet")


def test_hd_export_names_hd_train_init(folder, tmp_path):
    said = said_by(export, folder, tmp_path / "out")
    assert "lacks hand_prior" in said and f"hd-train init {folder} start" in said


def test_hd_train_init_names_hd_export(tiny_checkpoint_folder, tmp_path):
    said = said_by(commands, "init", tiny_checkpoint_folder, tmp_path / "out")
    assert "HanDiffuser checkpoint already" in said and f"hd-export {tiny_checkpoint_folder}" in said


@pytest.mark.parametrize(
    ("part", "pickle", "name"),
    [
        ("text_encoder", "pytorch_model.bin", "model.safetensors"),
        ("unet", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
        ("vae", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
    ],
)
def test_the_way_out_of_a_pickle_works(folder, part, pickle, name):
    """The command of the sentence is run as it stands, and the folder is then taken."""
    weights = folder / part / name
    held = load_file(weights)
    torch.save(held, folder / part / pickle)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"as a pickle .* which can run code") as refused:
        check_stable_diffusion(folder)
    python, option, code = shlex.split(str(refused.value).partition("origin: ")[2])
    assert (python, option) == ("python", "-c")
    exec(code, {})
    assert load_file(weights).keys() == held.keys()
    check_stable_diffusion(folder)


def test_the_way_out_of_a_pickle_in_shards(folder):
    model = UNet2DConditionModel.from_pretrained(folder / "unet")
    shutil.rmtree(folder / "unet")
    model.save_pretrained(folder / "unet", safe_serialization=False, max_shard_size="100KB")
    with pytest.raises(CheckpointError, match="as a pickle") as refused:
        check_stable_diffusion(folder)
    exec(shlex.split(str(refused.value).partition("origin: ")[2])[2], {})
    made = from_stable_diffusion(folder).unet.state_dict()
    assert all(torch.equal(value, made[name]) for name, value in model.state_dict().items())
