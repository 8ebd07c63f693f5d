"""What `hd-train init` reads of schedulers and tokenizers: pictures and ids are those of diffusers' own pipeline."""

from __future__ import annotations

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from handiffuser.errors import CheckpointError
from handiffuser.models.checkpoint import Checkpoint
from handiffuser.models.layout import SCHEDULERS, read_layout
from handiffuser.tokens import PromptTokenizer
from handiffuser.training import init
from handiffuser.training.cli import commands
from stable_diffusion import change, our_picture, stable_diffusion, their_picture, write

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = {**BETAS, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
TRAINED = (np.linspace(0.03, 0.12, 1000) ** 2).tolist()
PROMPT = "a photo of a cat"


@pytest.fixture(scope="module", autouse=True)
def small_prior():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(init, "PRIOR", (32, 2, 2))
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def folder(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "sd")


def start_of(folder):
    """The checkpoint that the command makes of a folder, and where."""
    start = folder.with_name("start")
    result = CliRunner().invoke(commands, ["init", str(folder), str(start)], catch_exceptions=False)
    assert result.exit_code == 0
    return Checkpoint.load(start), start


def without_networks(folder):
    """The pipeline's scheduler and tokenizer, in a part of the time."""
    return StableDiffusionPipeline.from_pretrained(
        folder, unet=None, vae=None, text_encoder=None, local_files_only=True
    )


def set_scheduler(folder, kind, config):
    """The file as it stands in old folders: what is not said is absent."""
    with open(folder / "scheduler/scheduler_config.json", "w", encoding="utf-8") as file:
        json.dump({"_class_name": kind, "_diffusers_version": "0.14.0", **config}, file)  # infinity, too
    change(folder / "model_index.json", scheduler=["diffusers", kind])


@pytest.mark.parametrize(
    ("kind", "config", "solver"),
    [
        ("DPMSolverMultistepScheduler", {**BETAS, "lambda_min_clipped": -float("inf")}, "dpm++2m"),
        ("DPMSolverMultistepScheduler", {**BETAS, "use_karras_sigmas": True}, "dpm++2m-karras"),
        ("DPMSolverMultistepScheduler", {**BETAS, "timestep_spacing": "leading"}, "dpm++2m"),
        ("DDIMScheduler", BETAS, "ddim"),
        ("DDIMScheduler", {**BETAS, "clip_sample": True, "steps_offset": 0, "set_alpha_to_one": False}, "ddim"),
        ("DDIMScheduler", {"trained_betas": TRAINED}, "ddim"),
        ("PNDMScheduler", {**BETAS, "skip_prk_steps": True}, "plms"),
        ("EulerDiscreteScheduler", BETAS, "euler"),
        ("EulerDiscreteScheduler", {**V, "timestep_spacing": "trailing"}, "euler"),
        ("EulerDiscreteScheduler", {**BETAS, "timestep_spacing": "leading"}, "euler"),
    ],
)
def test_a_scheduler_paints_as_its_pipeline(folder, kind, config, solver):
    set_scheduler(folder, kind, config)
    theirs = their_picture(folder, PROMPT)
    ours = our_picture(*start_of(folder), PROMPT, solver)
    assert np.abs(theirs.astype(int) - ours).max() <= 1
    assert theirs.std() > 10, "a grey picture would prove nothing"


def test_model_index_names_the_schedulers_class(folder):
    """diffusers takes this one, and its defaults, where the two files differ."""
    change(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    change(folder / "scheduler/scheduler_config.json", set_alpha_to_one=None, steps_offset=None)
    checkpoint, start = start_of(folder)
    assert np.abs(their_picture(folder, PROMPT).astype(int) - our_picture(checkpoint, start, PROMPT, "ddim")).max() <= 1


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_every_known_class_has_its_own_defaults(folder, kind):
    if kind == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    set_scheduler(folder, kind, {})
    pipeline = without_networks(folder)
    theirs = dict(pipeline.scheduler.config)
    index = json.loads((folder / "model_index.json").read_text())
    name, ours = init.read_schedule(folder, index)
    assert name == kind and ours["clip_sample"] is False
    for key, value in ours.items():
        if key in theirs:
            assert value == theirs[key], key


@pytest.mark.parametrize(
    "kind",
    [
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "EDMEulerScheduler",
        "CMStochasticIterativeScheduler",
        "IPNDMScheduler",
        "DDIMInverseScheduler",
        "UnCLIPScheduler",
        "VQDiffusionScheduler",
        "NoSuchScheduler",
    ],
)
def test_schedulers_of_other_networks_are_refused(folder, kind, monkeypatch):
    monkeypatch.setattr(init, "load_part", None)  # before any weight is read
    set_scheduler(folder, kind, BETAS)
    with pytest.raises(CheckpointError, match=f"must be a scheduler of Stable Diffusion .* got '{kind}'"):
        init.from_stable_diffusion(folder)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"beta_end": float("nan")}, "beta_end must be .* got nan"),
        ({"beta_start": float("inf")}, "beta_start must be .* got inf"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps"),
        ({"trained_betas": TRAINED[:10]}, "trained_betas must be 1000 numbers, got 10"),
        ({"prediction_type": "flow_prediction"}, "prediction_type"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas must be False, got True"),
        ({"thresholding": True}, "thresholding"),
    ],
)
def test_schedules_that_cannot_be_sampled_are_refused(folder, config, words, monkeypatch):
    monkeypatch.setattr(init, "load_part", None)
    set_scheduler(folder, "DPMSolverMultistepScheduler", {**BETAS, **config})
    with pytest.raises(CheckpointError, match=words):
        init.from_stable_diffusion(folder)


def test_a_distilled_network_takes_few_steps(folder):
    set_scheduler(folder, "LCMScheduler", BETAS)
    defaults = start_of(folder)[0].defaults
    assert (defaults["solver"], defaults["steps"], defaults["guidance"]) == ("lcm", 4, 1.0)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_infinity_that_counts_for_nothing_is_left_out(folder, part):
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mark": -float("inf"), "other": float("nan")}))
    start = start_of(folder)[1]
    written = (start / part / "config.json").read_text()
    json.loads(written, parse_constant=pytest.fail)
    assert "mark" not in written


def test_infinity_that_counts_is_refused(folder):
    path = folder / "vae/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": float("inf")}))
    with pytest.raises(CheckpointError, match=r"scaling_factor must be .* got inf"):
        init.from_stable_diffusion(folder)


def saved_and_read(checkpoint, start):
    checkpoint.save(start)
    init.read_back(start, checkpoint.tokenizer, checkpoint.special_tokens)


def test_a_result_that_cannot_be_exported_is_no_checkpoint(folder, tmp_path):
    """The same command goes on once it can."""
    checkpoint = init.from_stable_diffusion(folder)
    checkpoint.defaults["steps"] = 0
    with pytest.raises(CheckpointError, match=r"cannot read the written checkpoint: .*steps"):
        saved_and_read(checkpoint, tmp_path / "start")
    assert not (tmp_path / "start/model_index.json").exists()
    checkpoint.defaults["steps"] = 4
    saved_and_read(checkpoint, tmp_path / "start")
    assert read_layout(tmp_path / "start").defaults["steps"] == 4


def test_the_size_of_unets_from_before_diffusers_0_9(folder):
    change(folder / "unet/config.json", _diffusers_version="0.6.0")
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    checkpoint = init.from_stable_diffusion(folder)
    assert checkpoint.unet.config.sample_size == pipeline.unet.config.sample_size == 64
    assert checkpoint.image_size == (128, 128)


# Tokenizers.

PROMPTS = ["", "a photo of a <cat-toy>", "a cat!", "<cat-toy>, two <Dog> hands!!", "<cat-toy>" * 60, "<dog> é 手 <cat>"]
TOKENIZERS = {
    "1.x": {},
    "2.x": {"pad": "!", "linear": True},
    "placeholder": {"added": ["<cat-toy>", "<Dog>"]},
    "several vectors": {"added": ["<cat-toy>", "<cat-toy>_1", "<cat-toy>_2", "<Dog>"]},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The folder with one of TOKENIZERS."""
    return functools.cache(lambda name: stable_diffusion(tmp_path_factory.mktemp("source"), **TOKENIZERS[name]))


@pytest.mark.parametrize("written", ["older files", "tokenizer.json", "decoder"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_are_those_of_the_pipeline(tmp_path, sources, name, written):
    folder = shutil.copytree(sources(name), tmp_path / "sd")
    pipeline = without_networks(folder)
    if written == "tokenizer.json":  # as transformers 5 writes it
        shutil.rmtree(folder / "tokenizer")
        pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    if written == "decoder":  # as transformers from 4.34 on wrote it
        decoder = {
            str(number): token.__getstate__() for number, token in pipeline.tokenizer.added_tokens_decoder.items()
        }
        change(folder / "tokenizer/tokenizer_config.json", added_tokens_decoder=decoder)
        change(folder / "tokenizer/tokenizer_config.json", pad_token=pipeline.tokenizer.pad_token)
    pipeline = without_networks(folder)
    checkpoint, start = start_of(folder)
    ours = PromptTokenizer(start / "tokenizer/tokenizer.json", checkpoint.special_tokens)
    for prompt in PROMPTS:
        asked = pipeline.maybe_convert_prompt(prompt, pipeline.tokenizer)
        theirs = pipeline.tokenizer(asked, padding="max_length", max_length=77, truncation=True).input_ids
        assert ours.encode(prompt)[0].tolist() == theirs, prompt
    if written != "older files":
        return
    prompt = PROMPTS[1]
    difference = their_picture(folder, prompt).astype(int) - our_picture(checkpoint, start, prompt, "plms")
    assert np.abs(difference).max() <= 1


def test_tokens_and_vectors_must_be_as_many(folder):
    write(folder / "tokenizer/added_tokens.json", {"<cat>": 10**4})
    with pytest.raises(CheckpointError, match="must have a vector for each of the tokenizer's"):
        init.from_stable_diffusion(folder)


def test_vectors_without_their_tokens_are_refused(tmp_path):
    folder = stable_diffusion(tmp_path, added=["<cat-toy>"])
    (folder / "tokenizer/added_tokens.json").unlink()
    with pytest.raises(CheckpointError, match=r"must have a token for each .* added_tokens.json"):
        init.from_stable_diffusion(folder)


# Weights in other files.


@pytest.mark.parametrize("how", ["sharded", "fp16", "sharded fp16"])
def test_weights_in_other_files_are_taken(folder, how):
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    for part in ("unet", "vae", "text_encoder"):
        for path in (folder / part).glob("*.safetensors"):
            path.unlink()
    if "fp16" in how:
        pipeline.to(dtype=torch.float16)
    arguments = {"max_shard_size": "100KB"} if "sharded" in how else {}
    pipeline.save_pretrained(folder, variant="fp16" if "fp16" in how else None, **arguments)
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1 or "sharded" not in how
    checkpoint = init.from_stable_diffusion(folder)
    for name, value in pipeline.unet.state_dict().items():
        assert torch.equal(checkpoint.unet.state_dict()[name], value.float())
    for name, value in pipeline.text_encoder.state_dict().items():
        assert torch.equal(checkpoint.text_encoder.state_dict()[name], value.float())
