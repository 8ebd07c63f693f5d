"""Single files of Stable Diffusion, as Civitai has them: the checkpoint of the folder, and refusals by kind."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from click.testing import CliRunner
from handiffuser.errors import CheckpointError
from handiffuser.models.checkpoint import Checkpoint, clip_tokenizer
from handiffuser.models.layout import read_config
from handiffuser.training import init, single_file
from handiffuser.training.cli import commands
from ldm import single_file as make_file
from safetensors.torch import load_file, save_file
from stable_diffusion import change as change_json
from stable_diffusion import stable_diffusion


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("1.x"))


@pytest.fixture(scope="module")
def file(folder):
    return make_file(folder, folder.with_name("model.safetensors"))


@pytest.fixture(autouse=True)
def small(folder, monkeypatch):
    """The small folder's configurations in place of Stable Diffusion's, and a small hand prior."""
    use(folder, monkeypatch)


def use(folder, monkeypatch, version="1.x"):
    def write_configs(out, version, prediction, channels):
        for path in folder.rglob("*.*"):
            if path.suffix in (".json", ".txt"):
                (out / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, out / path.relative_to(folder))
        change_json(out / "unet/config.json", in_channels=channels)

    monkeypatch.setattr(single_file, "write_configs", write_configs)
    monkeypatch.setattr(single_file, "VERSIONS", {32: version})
    monkeypatch.setattr(init, "PRIOR", (32, 2, 2))


def start_of(source, out, *options):
    result = CliRunner().invoke(commands, ["init", str(source), str(out), *options], catch_exceptions=False)
    assert result.exit_code == 0 and [path.name for path in out.parent.iterdir() if path.name[0] == "."] == []
    return Checkpoint.load(out)


def equal(one, other):
    for name, module in one.modules().items():
        theirs = other.modules()[name].state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in module.state_dict().items()), name
    assert one.scheduler == other.scheduler and one.tokenizer.to_str() == other.tokenizer.to_str()
    assert one.special_tokens == other.special_tokens and one.image_size == other.image_size


def test_it_equals_the_folder_that_it_was_made_from(folder, file, tmp_path):
    made = start_of(file, tmp_path / "one" / "start")
    equal(made, start_of(folder, tmp_path / "two" / "start"))
    assert made.notes["from"] == "model.safetensors"


@pytest.mark.slow
def test_half_precision_is_widened(folder, tmp_path):
    half = make_file(folder, tmp_path / "half.safetensors", dtype=torch.float16)
    made, whole = start_of(half, tmp_path / "made" / "start").unet.state_dict(), load_unet(folder)
    assert all(torch.equal(made[name], value.half().float()) for name, value in whole.items())


@pytest.mark.slow
def test_inpainting(file, tmp_path):
    nine = torch.randn(32, 9, 3, 3, generator=torch.Generator().manual_seed(0))
    save_file(load_file(file) | {single_file.INPUT: nine}, tmp_path / "inpainting.safetensors")
    made = start_of(tmp_path / "inpainting.safetensors", tmp_path / "one" / "start")
    assert torch.equal(made.unet.conv_in.weight, nine)


def load_unet(folder):
    return load_file(folder / "unet/diffusion_pytorch_model.safetensors")


@pytest.mark.slow
def test_two(tmp_path, monkeypatch):
    """2.x has OpenCLIP's text encoder, and must be told what it predicts."""
    folder = stable_diffusion(tmp_path, "v_prediction", linear=True)
    file = make_file(folder, tmp_path / "two.safetensors", open_clip=True)
    use(folder, monkeypatch, "2.x")
    assert "--prediction-type must be given for" in said_of(file)
    equal(
        start_of(file, tmp_path / "one" / "start", "--prediction-type", "v_prediction"),
        start_of(folder, tmp_path / "two" / "start"),
    )
    stated = make_file(folder, tmp_path / "s.safetensors", open_clip=True, **{"modelspec.prediction_type": "v"})
    single_file.to_folder(stated, tmp_path / "stated")  # the file says it itself


def said_of(path, *options):
    result = CliRunner().invoke(commands, ["init", str(path), str(path.parent / "none"), *options])
    assert isinstance(result.exception, CheckpointError), (result.output, result.exception)
    assert len(str(result.exception).splitlines()) == 1
    return str(result.exception)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": 4}, "is a LoRA.* hd-export --lora"),
        ({"emb_params": 4}, "is a textual inversion.* --embedding"),
        ({"control_model.input_hint_block.0.weight": 4}, "is a ControlNet"),
        ({"conditioner.embedders.1.model.ln_final.bias": 4, single_file.INPUT: 4}, "is SDXL"),
        ({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": 4}, "is Stable Diffusion 3"),
        ({"double_blocks.0.img_attn.qkv.weight": 4}, "is Flux"),
        ({"model.diffusion_model.blocks.0.cross_attn.k.weight": 4}, "is another transformer"),
        ({"first_stage_model.decoder.conv_in.weight": 4}, "holds a VAE only: it lacks the UNet and the text encoder"),
        ({"decoder.conv_in.weight": 4, "quant_conv.weight": 4}, "holds a VAE only"),
        ({"conv_in.weight": 4, "down_blocks.0.resnets.0.conv1.weight": 4}, "holds a UNet only"),
        ({"text_model.embeddings.token_embedding.weight": 4}, "holds a text encoder only"),
        ({"something.else": 4}, "holds no model that is known here .something.else"),
    ],
)
def test_it_names_what_is_no_stable_diffusion(keys, said, tmp_path):
    save_file({key: torch.zeros(size, 4, 1, 1) for key, size in keys.items()}, tmp_path / "x.safetensors")
    assert re.search(said, said_of(tmp_path / "x.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t | {single_file.INPUT: torch.zeros(32, 8, 3, 3)}, "is an InstructPix2Pix UNet"),
        (lambda t: t | {single_file.CONTEXT: torch.zeros(32, 99)}, "must read words of 768 or 1024 numbers, got 99"),
        (lambda t: {k: v for k, v in t.items() if "first_stage" not in k}, "it lacks the VAE. Take the whole model"),
        (lambda t: {k: v for k, v in t.items() if ".out.2." not in k}, "must hold all tensors .* lacks some"),
        (lambda t: {k: v for k, v in t.items() if "final_layer_norm" not in k}, "lacks .*final_layer_norm"),
        (lambda t: {k: v for k, v in t.items() if "decoder.norm_out" not in k}, "must hold all tensors .* lacks some"),
        (lambda t: t | {"model.diffusion_model.out.2.weight": torch.zeros(9, 9)}, "conv_out|9"),
        (lambda t: t | {"model.diffusion_model.out.2.bias": torch.full((4,), torch.nan)}, "must be finite"),
    ],
)
def test_files_that_are_nearly_right(file, change, said, tmp_path):
    save_file(change(load_file(file)), tmp_path / "x.safetensors")
    assert re.search(said, said_of(tmp_path / "x.safetensors"))


def test_files_that_are_damaged(file, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(file.read_bytes()[:-100])
    assert "is truncated, damaged or no safetensors file" in said_of(path)
    path.write_bytes(b"<html>not found</html>" * 100)
    assert "is truncated, damaged or no safetensors file" in said_of(path)
    pickled = tmp_path / "model.ckpt"
    torch.save({"state_dict": load_file(file)}, pickled)
    said = said_of(pickled)
    assert "got a pickle, which can run code when opened" in said
    exec(said.partition('python -c "')[2].rstrip('"'), {})  # the way out works
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(file).keys()


def test_options_that_do_not_fit(folder, file, tmp_path):
    for source, option, said in (
        (file, ["--variant", "fp16"], "--variant must be left out for a single file"),
        (folder, ["--prediction-type", "epsilon"], "--prediction-type must be left out for a folder"),
    ):
        result = CliRunner().invoke(commands, ["init", str(source), str(tmp_path / "out"), *option])
        assert said in str(result.exception)


@pytest.mark.parametrize(
    ("version", "prediction", "size"),
    [("1.x", "epsilon", 64), ("1.x", "v_prediction", 64), ("2.x", "epsilon", 64), ("2.x", "v_prediction", 96)],
)
def test_our_configurations_are_whole(version, prediction, size, tmp_path, monkeypatch):
    """They have the entries of the folders on the Hub that shape the networks; the tokenizer is CLIP's own."""
    monkeypatch.undo()
    single_file.write_configs(tmp_path, version, prediction)
    unet = read_config("UNet2DConditionModel", tmp_path / "unet")
    clip = read_config("CLIPTextModel", tmp_path / "text_encoder")
    vae = read_config("AutoencoderKL", tmp_path / "vae")
    for config in (unet, vae):  # diffusers' conversion reads them from the file
        assert {"layers_per_block", "block_out_channels", "down_block_types", "up_block_types"} <= config.keys()
    assert unet["sample_size"] == size and unet["cross_attention_dim"] == clip["hidden_size"]
    _, schedule = init.read_schedule(tmp_path, json.loads((tmp_path / "model_index.json").read_text()))
    assert schedule["prediction_type"] == prediction and schedule["steps_offset"] == 1
    words = clip_tokenizer(tmp_path / "tokenizer")
    # Ids that CLIP's users know, such as from the documentation of its first code.
    assert words("a photo of a cat")["input_ids"] == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert words.pad_token_id == (0 if version == "2.x" else 49407) and len(words.get_vocab()) == 49408
