"""Checkpoint folders: what is saved comes back, and what is unsafe or does not fit is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from handiffuser.errors import CheckpointError
from handiffuser.models.checkpoint import Checkpoint, load_tokenizer, random_checkpoint
from handiffuser.models.configs import CONFIGS
from handiffuser.models.position_kernel import PositionKernel
from handiffuser.models.vocabulary import make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer


def test_round_trip(body_path, tmp_path):
    tiny_checkpoint = random_checkpoint(CONFIGS["tiny"], seed=3, body=body_path)
    tiny_checkpoint.save(tmp_path / "tiny")
    loaded = Checkpoint.load(tmp_path / "tiny")
    assert loaded.image_size == (32, 48) and loaded.latent_size == (16, 24)
    for name, module in tiny_checkpoint.modules().items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, loaded.modules()[name].state_dict()[key]), f"{name}.{key}"
    text = "A right hand"
    assert loaded.tokenizer.encode(text).ids == tiny_checkpoint.tokenizer.encode(text).ids
    assert loaded.special_tokens == tiny_checkpoint.special_tokens
    assert loaded.scheduler["prediction_type"] == "v_prediction" and loaded.body is not None


def test_parts_are_what_the_libraries_read(tiny_checkpoint_folder):
    UNet2DConditionModel.from_pretrained(tiny_checkpoint_folder / "unet")
    AutoencoderKL.from_pretrained(tiny_checkpoint_folder / "vae")
    CLIPTextModel.from_pretrained(tiny_checkpoint_folder / "text_encoder")
    AutoTokenizer.from_pretrained(tiny_checkpoint_folder / "tokenizer")


def test_half_precision_saves_space_and_leaves_the_module_alone(tmp_path):
    checkpoint = random_checkpoint(CONFIGS["tiny"])
    before = checkpoint.unet.conv_in.weight.clone()
    checkpoint.save(tmp_path / "half", half=True)
    assert torch.equal(checkpoint.unet.conv_in.weight, before)
    loaded = Checkpoint.load(tmp_path / "half")
    assert torch.equal(loaded.unet.conv_in.weight, before.half().float())


def test_without_a_kernel_the_unet_is_plain(tmp_path):
    checkpoint = random_checkpoint(replace(CONFIGS["tiny"], frequencies=()))
    checkpoint.save(tmp_path / "plain")
    assert not (tmp_path / "plain/position_kernel").exists()
    assert Checkpoint.load(tmp_path / "plain").position_kernel is None


@pytest.fixture
def copy(tiny_checkpoint_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint_folder, tmp_path / "copy"))


def test_a_pickle_is_refused_with_the_way_to_convert_it(copy):
    weights = next((copy / "unet").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match=r"pickle .*safetensors\.torch\.save_file"):
        Checkpoint.load(copy)


def test_incomplete_and_foreign_folders(copy, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="model_index"):
        Checkpoint.load(tmp_path / "empty")
    shutil.rmtree(copy / "vae")
    with pytest.raises(CheckpointError, match="lacks vae"):
        Checkpoint.load(copy)


def test_parts_that_do_not_fit(copy):
    other = random_checkpoint(replace(CONFIGS["tiny"], text_width=64))
    other.hand_prior.save_pretrained(copy / "hand_prior")
    with pytest.raises(CheckpointError, match=r"text_encoder's width is 32, hand_prior's text_width is 64"):
        Checkpoint.load(copy)


def test_an_image_size_that_does_not_fit(copy):
    index = json.loads((copy / "model_index.json").read_text())
    index["_image_size"] = [30, 48]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="multiples of 4"):
        Checkpoint.load(copy)


@pytest.mark.parametrize("text", ["a hand", "手を開く", "🖐🏽 ёж", "x" * 500, "\x00\n\t"])
def test_the_tokenizer_reads_any_script(text):
    tokenizer = make_tokenizer(["a hand making a fist"], 700)
    encoded = tokenizer.encode(text, add_special_tokens=False)
    assert text.strip("\x00\n\t") == "" or len(encoded.ids) > 0
    letters = {c for c in text if not c.isspace()}
    covered = {c for start, end in encoded.offsets for c in text[start:end]}
    assert letters <= covered, "no character is dropped"


def test_the_papers_size_is_a_configuration():
    """Parameter counts of Stable Diffusion 1.5's parts, without allocating them."""
    with torch.device("meta"):
        checkpoint = random_checkpoint(CONFIGS["sd15"])
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in checkpoint.modules().items()}
    assert counts["unet"] == 859_520_964
    assert counts["text_encoder"] == 123_060_480
    assert counts["vae"] == 83_653_863
    assert checkpoint.latent_size == (64, 64)


def rewrite(folder: Path, part: str, change) -> None:
    """Changes the tensors of a part's file in place."""
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def sentence_of(folder: Path) -> str:
    """What `load` refuses a folder with: one line, which hints at no model hub."""
    with pytest.raises(CheckpointError) as refused:
        Checkpoint.load(folder)
    said = str(refused.value)
    assert len(said.splitlines()) == 1 and len(said) < 600, said
    assert not any(word in said.lower() for word in ("hugging", "hub", "http", "internet", "offline")), said
    return said


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["text_encoder", "hand_prior", "vae"])
def test_a_weight_that_is_not_finite_is_named(copy, part, value):
    def spoil(tensors):
        name = sorted(tensors)[2]
        tensors[name].view(-1)[-1] = value
        names.append(name)

    names: list[str] = []
    rewrite(copy, part, spoil)
    said = sentence_of(copy)
    assert "NaN or infinity" in said and part in said and names[0].removeprefix("text_model.") in said


def test_large_weights_are_not_broken(copy):
    """Their sum overflows, they do not."""
    rewrite(copy, "vae", lambda tensors: next(iter(tensors.values())).fill_(3e38))
    Checkpoint.load(copy)


@pytest.mark.parametrize("part", ["text_encoder", "unet"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: (1 << 40).to_bytes(8, "little") + data[8:],  # a header of a tebibyte
        lambda data: data[:-5],
        lambda data: data[:100],
        lambda data: b"",
        lambda data: data[:8] + b"[" + data[9:],
        lambda data: data.replace(b'"F32"', b'"F99"'),
    ],
    ids=["header of 2^40", "short by 5 bytes", "100 bytes", "empty", "no JSON", "type F99"],
)
def test_damaged_files_are_one_sentence(copy, part, damage):
    file = next((copy / part).glob("*.safetensors"))
    file.write_bytes(damage(file.read_bytes()))
    said = sentence_of(copy)
    assert "truncated or damaged" in said and file.name in said and part in said


@pytest.mark.parametrize("part", ["text_encoder", "hand_prior", "unet"])
def test_tensors_that_do_not_fit_are_one_sentence(copy, part):
    def lose(tensors):
        for name in sorted(tensors)[:5]:
            del tensors[name]

    def add(tensors):
        tensors["stranger.weight"] = torch.zeros(3)

    def reshape(tensors):
        for name in sorted(tensors):
            tensors[name] = torch.zeros(*tensors[name].shape, 2)

    for change, says in ((lose, "lacks"), (add, "has no place for stranger.weight"), (reshape, "differs in the shape")):
        folder = Path(shutil.copytree(copy, copy.with_name(change.__name__)))
        rewrite(folder, part, change)
        said = sentence_of(folder)
        assert says in said and part in said
        if change is not add:
            assert " more" in said, "the first few names are enough"


def test_integers_are_no_weights(copy):
    rewrite(copy, "unet", lambda tensors: tensors.update({"conv_in.bias": tensors["conv_in.bias"].to(torch.int8)}))
    assert "conv_in.bias (I8)" in sentence_of(copy)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_floats_are_read(copy, dtype):
    rewrite(copy, "unet", lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))
    assert Checkpoint.load(copy).unet.conv_in.weight.dtype == torch.float32


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_missing_files_are_one_sentence(copy, part):
    weights = next((copy / part).glob("*.safetensors"))
    config = (copy / part / "config.json").rename(copy / "config.json")
    assert f"{copy / part} must have a config.json" in sentence_of(copy)
    config.rename(copy / part / "config.json")
    other = weights.rename(weights.with_suffix(".non_ema.safetensors"))
    assert f"must have a {weights.name}" in (said := sentence_of(copy)) and other.name in said
    variant = other.rename(weights.with_suffix(".fp16.safetensors"))
    Checkpoint.load(copy)
    variant.unlink()
    assert f"must have a {weights.name}" in sentence_of(copy)
    (copy / part / f"{weights.name}.index.json").write_text('{"weight_map": []}')
    assert "must be an index of weights" in sentence_of(copy)
    (copy / part / f"{weights.name}.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert "lacks gone.safetensors" in sentence_of(copy)


def change(folder: Path, file: str, **entries) -> None:
    """Changes entries of a JSON file; None takes one out."""
    value = json.loads((folder / file).read_text())
    value |= entries
    (folder / file).write_text(json.dumps({name: entry for name, entry in value.items() if entry is not None}))


CONFIGURATIONS = [
    *(f"{part}/config.json" for part in ("text_encoder", "hand_prior", "text_hand_encoder", "unet", "vae")),
    "position_kernel/config.json",
    "scheduler/scheduler_config.json",
    "hand_scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
    "model_index.json",
]


@pytest.mark.parametrize("content", [b"[]", b"null", b"", b"{", b"\xff", b"3", b'"text"', b"[" * 10**6])
@pytest.mark.parametrize("file", CONFIGURATIONS)
def test_a_configuration_that_is_none(copy, file, content, monkeypatch):
    """Is found before any weight is read, and so in milliseconds."""
    monkeypatch.setattr("handiffuser.models.checkpoint.load_part", None)
    (copy / file).write_bytes(content)
    said = sentence_of(copy)
    assert str(copy / file) in said
    assert any(words in said for words in ("cannot be read", "cannot be used", "must hold a JSON object"))


@pytest.mark.parametrize("file", CONFIGURATIONS)
def test_a_configuration_that_is_missing(copy, file, monkeypatch):
    monkeypatch.setattr("handiffuser.models.checkpoint.load_part", None)
    (copy / file).unlink()
    assert f"must have a {Path(file).name}" in sentence_of(copy)


SCHEDULES = [
    ({"clip_sample": True}, "clip_sample"),
    ({"thresholding": True}, "thresholding"),
    ({"beta_schedule": "foo"}, "beta_schedule must be one of linear"),
    ({"prediction_type": "flow_prediction"}, "prediction_type"),
    ({"timestep_spacing": []}, "timestep_spacing must be"),
    ({"num_train_timesteps": 10**9}, "num_train_timesteps must be"),
    ({"num_train_timesteps": 2}, "steps must be from 1 to 2"),  # fewer than the defaults take
    ({"trained_betas": [0.1]}, "trained_betas"),
    ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start <= beta_end"),
    ({"timestep_spacing": "leading", "steps_offset": 999}, "fewer steps"),
    ({"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, "zero terminal SNR"),
    ({"beta_schedule": "linear", "beta_start": 1e-300, "beta_end": 1e-300}, "not finite numbers"),
]


@pytest.mark.parametrize(("entries", "words"), SCHEDULES)
@pytest.mark.parametrize("name", ["scheduler", "hand_scheduler"])
def test_a_schedule_that_the_runtime_would_refuse(copy, name, entries, words, monkeypatch):
    monkeypatch.setattr("handiffuser.models.checkpoint.load_part", None)
    change(copy, f"{name}/scheduler_config.json", **entries)
    said = sentence_of(copy)
    assert words in said and f"{copy / name} cannot be sampled with" in said


@pytest.mark.parametrize("name", ["scheduler", "hand_scheduler"])
def test_schedulers_are_known_by_their_class(copy, name):
    """Their absent keys are never filled with another class's defaults."""
    file = f"{name}/scheduler_config.json"
    for kind in ("FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", 3):
        change(copy, file, _class_name=kind)
        assert f"got {kind!r}" in sentence_of(copy)
    change(copy, file, _class_name="PNDMScheduler", timestep_spacing=None)
    assert "must state timestep_spacing: PNDMScheduler" in sentence_of(copy)
    scheduler = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.save_pretrained(copy / name)
    assert "-Infinity" in (copy / file).read_text()
    assert Checkpoint.load(copy).name == "copy"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"_image_size": [128]}, "_image_size"),
        ({"_image_size": "128x128"}, "_image_size"),
        ({"_image_size": [0, 0]}, "_image_size"),
        ({"_image_size": [128, 128, 3]}, "_image_size"),
        ({"_image_size": [10**18, 128]}, "_image_size"),
        ({"_image_size": 128}, "_image_size"),
        ({"_defaults": []}, "_defaults"),
        ({"_defaults": {"steps": 0}}, "steps"),
        ({"_defaults": {"steps": 1001}}, "steps"),
        ({"_defaults": {"guidance": "strong"}}, "guidance"),
        ({"_defaults": {"solver": "heun"}}, "got 'heun'"),
        ({"_defaults": {"hand_solver": "plms"}}, "plms"),
        ({"_notes": 1}, "_notes"),
        ({"_words": "a fist"}, "_words"),
    ],
)
def test_an_index_that_makes_no_sense(copy, entries, words, monkeypatch):
    monkeypatch.setattr("handiffuser.models.checkpoint.load_part", None)
    change(copy, "model_index.json", **entries)
    assert words in sentence_of(copy)


@pytest.mark.parametrize(
    ("part", "entries", "words"),
    [
        ("text_encoder", {"hidden_size": "wide"}, "hidden_size must be a whole number"),
        ("text_encoder", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("text_encoder", {"num_attention_heads": 3}, "multiple of its 3 heads"),
        ("text_encoder", {"hidden_act": "nothing"}, "config.json"),
        ("text_encoder", {"max_position_embeddings": 50}, "differs in the shape of"),
        ("text_encoder", {"hidden_size": 65536, "intermediate_size": 65536}, "must be the"),
        ("hand_prior", {"width": 0}, "width must be"),
        ("hand_prior", {"num_heads": 5}, "multiple of its 5 heads"),
        ("text_hand_encoder", {"cues": ["joints", "smell"]}, "cues"),
        ("text_hand_encoder", {"cues": "joints"}, "cues"),
        ("text_hand_encoder", {"frequencies": [0]}, "frequencies"),
        ("text_hand_encoder", {"hide": True, "frequencies": []}, "positional kernel"),
        ("unet", {"block_out_channels": [16, -32]}, "block_out_channels"),
        ("unet", {"block_out_channels": [16, 32, 64]}, "config.json"),
        ("unet", {"block_out_channels": [10, 20]}, "config.json"),
        ("unet", {"layers_per_block": 10**6}, "layers_per_block"),
        ("unet", {"down_block_types": ["DownBlock2D", "MagicBlock2D"]}, "down_block_types"),
        ("unet", {"class_embed_type": "timestep"}, "must be None, got 'timestep'"),
        ("unet", {"act_fn": "gelu"}, "must be 'silu', got 'gelu'"),
        ("unet", {"resnet_skip_time_act": True}, "resnet_skip_time_act"),
        ("unet", {"cross_attention_dim": [32, 32]}, "cross_attention_dim"),
        ("position_kernel", {"heads": 2}, "heads"),
        ("vae", {"scaling_factor": 0}, "scaling_factor"),
        ("vae", {"out_channels": 4}, "must be 3, got 4"),
        ("vae", {"latents_mean": [0, 0, 0, 0]}, "latents_mean"),
        ("vae", {"sample_size": [1]}, "sample_size"),
    ],
)
def test_a_network_that_is_none_of_ours(copy, part, entries, words):
    change(copy, f"{part}/config.json", **entries)
    said = sentence_of(copy)
    assert words in said and part in said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{}", "cannot be read as a tokenizer"),
        (b"", "cannot be read"),
        (b"[1]", "cannot be read"),
        (None, "must have a"),
    ],
)
def test_a_tokenizer_that_is_none(copy, content, words):
    path = copy / "tokenizer/tokenizer.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    said = sentence_of(copy)
    assert words in said and "tokenizer" in said


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"model_max_length": 78}, "model_max_length is 78"),
        ({"model_max_length": 50}, "model_max_length is 50"),
        ({"model_max_length": -1}, "model_max_length must be"),
        ({"model_max_length": "77"}, "model_max_length must be"),
        ({"bos_token": "<stranger>"}, "lacks its bos token '<stranger>'"),
        ({"bos_token": 5}, "bos_token"),
        ({"eos_token": {"text": "x"}}, "eos_token"),
    ],
)
def test_a_tokenizer_that_does_not_fit(copy, entries, words):
    change(copy, "tokenizer/tokenizer_config.json", **entries)
    assert words in sentence_of(copy)


def test_a_length_that_transformers_gives_for_none(copy):
    change(copy, "tokenizer/tokenizer_config.json", model_max_length=1000000000000000019884624838656)
    assert Checkpoint.load(copy).special_tokens["length"] == 77


def test_a_spread_that_the_runtime_would_refuse(copy):
    rewrite(copy, "hand_prior", lambda tensors: tensors["std"].view(-1)[3:4].zero_())
    assert "mean and std" in sentence_of(copy)


def test_amplitudes_for_another_unet(copy):
    other = PositionKernel(heads=[2, 2], frequencies=[1, 2, 4, 8])
    shutil.rmtree(copy / "position_kernel")
    other.save_pretrained(copy / "position_kernel")
    assert "position_kernel's heads is [2, 2], unet's is" in sentence_of(copy)


def test_older_tokenizers_are_as_transformers_has_them(copy):
    """vocab.json and merges.txt, as Stable Diffusion 1.x came with."""
    folder = copy / "tokenizer"
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    vocabulary = {**model["vocab"], "<|startoftext|>": 590, "<|endoftext|>": 591}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / "tokenizer.json").unlink()
    ours, special = load_tokenizer(folder)
    theirs = CLIPTokenizer.from_pretrained(folder)
    assert special == {"bos": 590, "eos": 591, "pad": 591, "length": 77}
    for text in ("a left hand,  two OPEN hands", "it's 2 ✌️ hands<|endoftext|> x", "手を開く", "é e\u0301", "   ", ""):
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False)
    (folder / "merges.txt").write_bytes(b"\xff")
    assert "cannot be read as a tokenizer" in sentence_of(copy)
    (folder / "merges.txt").unlink()
    assert "must have a tokenizer.json, or a vocab.json and merges.txt" in sentence_of(copy)


def test_the_command_says_so_before_anything_large_is_loaded(copy, tmp_path):
    change(copy, "scheduler/scheduler_config.json", clip_sample=True)
    code = (
        "import sys\n"
        "from handiffuser.export import cli\n"
        f"sys.argv = ['hd-export', {str(copy)!r}, {str(tmp_path / 'out')!r}]\n"
        "try:\n    cli.main()\n"
        "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout == "1 False\n"
    assert result.stderr.startswith("hd-export: ") and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_random_checkpoints_repeat_from_process_to_process(capsys):
    """Also the tokenizer: the trainer of `tokenizers` breaks ties as its hash table falls."""
    code = (
        "import hashlib\n"
        "from handiffuser.models.checkpoint import random_checkpoint\n"
        "from handiffuser.models.configs import CONFIGS\n"
        "made = random_checkpoint(CONFIGS['tiny'], seed=4)\n"
        "digest = hashlib.sha256(made.tokenizer.to_str().encode())\n"
        "for module in made.modules().values():\n"
        "    for name, tensor in module.state_dict().items():\n"
        "        digest.update(name.encode() + tensor.numpy().tobytes())\n"
        "print(digest.hexdigest())\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    exec(code, {})
    assert len(there.stdout) == 65 and there.stdout == capsys.readouterr().out


def test_mapped_weights_are_the_same_and_take_no_memory(tiny_checkpoint_folder, tiny_checkpoint):
    mapped = Checkpoint.load(tiny_checkpoint_folder, mapped=True)
    file = tiny_checkpoint_folder / "unet" / "diffusion_pytorch_model.safetensors"
    before = file.read_bytes()
    for name, module in tiny_checkpoint.modules().items():
        for key, tensor in module.state_dict().items():
            assert torch.equal(mapped.modules()[name].state_dict()[key], tensor)
    weight = mapped.unet.conv_in.weight
    maps = Path("/proc/self/maps").read_text()
    place = next(
        (line for line in maps.splitlines() if _holds(line, weight.data_ptr())), "no such place in this process"
    )
    assert str(file) in place
    weight.data += 1  # in memory alone
    assert file.read_bytes() == before


def _holds(line: str, address: int) -> bool:
    start, stop = (int(part, 16) for part in line.split()[0].split("-"))
    return start <= address < stop
