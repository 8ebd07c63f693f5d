"""`hd-train` as it is typed: from a dataset to checkpoints that load, whole, as an adapter, stage by stage, again."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from commands import hd_train, invoke
from datasets import made_sample
from handiffuser import HanDiffuser, Request
from handiffuser.benchmarks.peers import load_eager
from handiffuser.contract import Manifest
from handiffuser.data.samples import picture, read, write_shards
from handiffuser.models.checkpoint import Checkpoint, decode, random_checkpoint
from handiffuser.models.configs import CONFIGS
from handiffuser.training.draws import spread_over
from handiffuser.training.sample import encode
from handiffuser.training.stages import images_to_float
from PIL import Image
from safetensors.torch import load_file

TINY = """
new = "tiny"
held-out = 0.2
prompts = ["a left hand", "two open hands"]
stages = ["vae", "hand-prior", "encoder", "pictures"]

[vae]
steps = 2
batch = 4
crop = 16

[hand-prior]
steps = 2
batch = 8
wordings = "first"

[encoder]
steps = 2
batch = 4

[pictures]
steps = 2
batch = 4
finger_weight = 2.0
colour_weight = 1.0
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "world"
    result = invoke("data.cli", "demo", folder, "--scenes", 40, "--size", 64, "--processes", 1)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """Every stage, two steps each, from nothing."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "tiny.toml").write_text(TINY)
    arguments = ("all", "--recipe", folder / "tiny.toml", "--data", world, "--run", folder / "run",
                 "--output", folder / "checkpoint", "--processes", 1)  # fmt: skip
    result = hd_train(*arguments)
    assert result.returncode == 0, result.stderr
    return folder, arguments, result.stderr


def test_every_stage_runs_and_the_checkpoint_loads(trained):
    folder, _, said = trained
    checkpoint = Checkpoint.load(folder / "checkpoint")
    assert set(checkpoint.notes["trained"]) == {"vae", "hand-prior", "encoder", "pictures"}
    assert checkpoint.body is not None and 0.1 < checkpoint.vae.config.scaling_factor < 100
    assert checkpoint.hand_prior.mean.any()
    assert {"hand", "left", "fist"} <= set(checkpoint.words) and not any(
        word != word.lower() for word in checkpoint.words
    )
    grids = {path.name.split("-")[0] for path in (folder / "run/samples").glob("*.png")}
    assert grids == {"vae", "pictures"}
    for stage in ("vae", "hand-prior", "encoder", "pictures"):
        lines = [json.loads(line) for line in (folder / "run" / stage / "log.jsonl").read_text().splitlines()]
        assert any("validation_loss" in line for line in lines) and list((folder / "run" / stage).glob("tensorboard/*"))
        assert f"{stage}: step 2/2" in said and "left" in said
    assert "finger_weight = 2.0" in (folder / "run/recipe.toml").read_text()


def test_a_second_run_does_nothing_again(trained):
    _, arguments, _ = trained
    result = hd_train(*arguments)
    assert result.returncode == 0 and result.stderr.count("done already") == 4


def test_more_of_one_stage_goes_on(trained):
    arguments = trained[1]
    result = hd_train("hand-prior", *arguments[1:7], "--steps", 3, "--processes", 1)
    assert result.returncode == 0 and "goes on at step 2 of 3" in result.stderr, result.stderr


def test_a_stage_that_is_done_with_other_settings_says_so(trained):
    arguments = trained[1]
    result = hd_train("encoder", *arguments[1:7], "--learning-rate", 0.5, "--processes", 1)
    assert result.returncode == 0, result.stderr
    assert "done already, with other settings: learning_rate" in result.stderr and "(now 0.5)" in result.stderr


def test_stage_1_needs_no_pictures(trained, world, tmp_path):
    """Also samples without hands, and prompts alone."""
    samples = list(read(world))
    for i, sample in enumerate(samples):
        sample.image = None
        if i % 5 == 0:
            sample.hands = None
    assert not write_shards(samples, tmp_path / "texts")
    result = hd_train("hand-prior", "--data", tmp_path / "texts", "--start", trained[0] / "checkpoint",
                      "--run", tmp_path / "run", "--steps", 2, "--batch", 8, "--precision", "fp32",
                      "--output", tmp_path / "out", "--processes", 1)  # fmt: skip
    assert result.returncode == 0, result.stderr
    before, after = Checkpoint.load(trained[0] / "checkpoint"), Checkpoint.load(tmp_path / "out")
    assert torch.equal(before.hand_prior.mean, after.hand_prior.mean), "a trained prior knows its own"
    assert any(
        not torch.equal(a, b)
        for a, b in zip(before.hand_prior.parameters(), after.hand_prior.parameters(), strict=True)
    )
    for name in ("unet", "vae", "text_hand_encoder"):
        one, other = before.modules()[name].state_dict(), after.modules()[name].state_dict()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    result = hd_train("pictures", "--data", tmp_path / "texts", "--start", trained[0] / "checkpoint",
                      "--run", tmp_path / "run", "--processes", 1)  # fmt: skip
    assert result.returncode == 1 and "pictures must have one sample to train on" in result.stderr, result.stderr


@pytest.mark.slow
def test_an_autoencoder_on_patches_then_stage_2(world, body_path, tmp_path):
    """As benchmarks/people.sh does, at toy size: hd-train vae, grow, pictures; the autoencoder comes first."""
    config = replace(CONFIGS["tiny"], image_size=(64, 64), latent_channels=6, vae_patch=2)
    random_checkpoint(config, body=body_path).save(tmp_path / "new")
    common = ("--data", world, "--precision", "fp32", "--accumulate", 1, "--workers", 0, "--processes", 1)
    pictures = ("pictures", *common, "--steps", 2, "--batch", 4, "--set", "gradient_checkpointing=false")
    result = hd_train(*pictures, "--start", tmp_path / "new", "--run", tmp_path / "early")
    assert result.returncode == 1 and "must be trained before stage 2" in result.stderr, result.stderr
    vae = ("vae", *common, "--start", tmp_path / "new", "--run", tmp_path / "run", "--output", tmp_path / "eyes",
           "--batch", 4, "--set", "crop=32", "--set", "kl_weight=2.5e-4")  # fmt: skip
    assert hd_train(*vae, "--steps", 2, "--set", "save_every=2").returncode == 0
    result = hd_train(*vae, "--steps", 4)
    assert result.returncode == 0 and "goes on at step 2 of 4" in result.stderr, result.stderr
    seen = Checkpoint.load(tmp_path / "eyes")
    images = torch.from_numpy(np.stack([picture(sample) for sample in read(world) if sample.image][:8]))
    latents = encode(seen, images_to_float(images))
    assert 0.5 < float(latents.std()) < 2 and abs(float(latents.mean())) < 0.5
    error = (decode(seen, latents).float() - images.float()).square().mean()
    assert 10 * float((255**2 / error).log10()) > 25
    # A checkpoint of four channels gives its UNet: it has latents of the same height and width.
    random_checkpoint(replace(CONFIGS["tiny"], image_size=(32, 32)), body=body_path).save(tmp_path / "donor")
    result = invoke("training.cli", "grow", tmp_path / "eyes", tmp_path / "donor", tmp_path / "start", "--data", world)
    assert result.returncode == 0, result.stderr
    result = hd_train(
        *pictures, "--start", tmp_path / "start", "--run", tmp_path / "run2", "--output", tmp_path / "out"
    )
    assert result.returncode == 0, result.stderr
    assert Checkpoint.load(tmp_path / "out").unet.config.in_channels == 6


@pytest.mark.slow
def test_an_adapter_is_trained_exported_and_run(trained, world, tmp_path):
    """hd-train pictures --lora, hd-export --lora FILE:1, hd-run: the pictures of the merged checkpoint."""
    start = trained[0] / "checkpoint"
    common = ("pictures", "--data", world, "--start", start, "--run", tmp_path / "run", "--steps", 3, "--batch", 4,
              "--learning-rate", "1e-2", "--precision", "fp32", "--accumulate", 1, "--lora", 2, "--processes", 1,
              "--set", "warmup=0")  # fmt: skip
    result = hd_train(*common, "--output", tmp_path / "style.safetensors")
    assert result.returncode == 0 and (tmp_path / "style.safetensors").exists(), result.stderr
    assert hd_train(*common, "--output", tmp_path / "merged").returncode == 0
    bundle = tmp_path / "bundle"
    result = invoke("export.cli", start, bundle, "--lora", f"{tmp_path / 'style.safetensors'}:1")
    assert result.returncode == 0, result.stderr
    result = invoke("runtime.cli", bundle, "two open hands", "--seed", 3, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    manifest = Manifest.load(bundle)
    assert manifest.words == Checkpoint.load(start).words
    picture = next(p for p in (tmp_path / "out").glob("*.png") if not p.name.endswith(".hands.png"))
    adapted = np.asarray(Image.open(picture)).astype(int)
    # The others in PyTorch, which needs no export.
    requests = HanDiffuser.load(bundle, device="cpu").prepare([Request("two open hands", seed=3)])[0]
    merged, plain = (
        load_eager(str(checkpoint), None, bundle, manifest)(requests, lambda: None)[0]
        for checkpoint in (tmp_path / "merged", start)
    )
    assert np.abs(adapted - merged).max() <= 1 and np.abs(adapted - plain).max() > 1


@pytest.mark.slow
def test_torchrun_starts_it_on_several_processes(trained, world, tmp_path):
    folder, _, _ = trained
    arguments = ("hand-prior", "--data", world, "--start", folder / "checkpoint", "--run", tmp_path / "run",
                 "--steps", 2, "--batch", 8, "--precision", "fp32", "--output", tmp_path / "out")  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "handiffuser.training.cli"]
    command = [*launch, "--", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert Checkpoint.load(tmp_path / "out").notes["trained"]["hand-prior"]["steps"] == 2
    assert result.stderr.count("hand-prior: step 2/2  loss") == 1, "one process speaks"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("pictures", "--data", "nowhere"), "--start CHECKPOINT"),
        (("pictures", "--data", "nowhere", "--recipe", "demo"), "nowhere does not exist"),
        (("pictures", "--data", "nowhere", "--recipe", "huge"), "got huge"),
        (("hand-prior", "--data", "nowhere", "--recipe", "demo", "--set", "speed=3"), "got speed"),
        (("hand-prior", "--data", "nowhere", "--recipe", "demo", "--batch", "0"), "batch must be"),
        (("hand-prior", "--data", "nowhere", "--recipe", "demo", "--set", "speed"), "must be NAME=VALUE"),
    ],
)
def test_bad_input_is_one_clear_sentence(arguments, words, tmp_path):
    result = hd_train(*arguments, "--run", tmp_path / "run")
    assert result.returncode == 1 and words in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_the_encoder_needs_labels(trained, world, tmp_path):
    samples = list(read(world))
    for sample in samples:
        sample.meta = {}
    write_shards(samples, tmp_path / "plain")
    result = hd_train("encoder", "--data", tmp_path / "plain", "--start", trained[0] / "checkpoint",
                      "--run", tmp_path / "run", "--processes", 1)  # fmt: skip
    assert result.returncode == 1 and "must have samples with labels" in result.stderr, result.stderr


@pytest.mark.parametrize("bf16", [True, False])
def test_training_takes_the_latents_that_are_there(tiny_checkpoint_folder, tmp_path, monkeypatch, bf16):
    """Those of `hd-data latents`, with --bf16 or without, whatever is faster on this machine."""
    from handiffuser.data.latents import make_latents
    from handiffuser.training import run as module
    from handiffuser.training.recipe import Recipe

    write_shards([made_sample(i) for i in range(4)], tmp_path / "set")
    checkpoint = Checkpoint.load(tiny_checkpoint_folder)
    make_latents(checkpoint, tmp_path / "set", bf16=bf16)
    made = module.Run(tmp_path / "run", tmp_path / "set", Recipe.load("sd15"), tiny_checkpoint_folder)
    monkeypatch.setattr(module, "make_latents", lambda *_, **__: pytest.fail("it has latents"))
    for fast in ("bf16", "fp32"):
        monkeypatch.setattr(module, "usable", lambda _, fast=fast: fast)
        for make in (True, False):
            assert len(made.latents(checkpoint, "pictures", make)) == 4


def test_mirror_images_follow_the_samples_and_are_held_out_with_them(tiny_checkpoint_folder, tmp_path):
    from handiffuser.data.latents import encode_prompts
    from handiffuser.training.recipe import Recipe
    from handiffuser.training.run import Run

    said = [replace(made_sample(i), prompts=[f"a left hand, number {i}"]) for i in range(12)]
    assert write_shards(said, tmp_path / "set", per_shard=7) == []
    recipe = msgspec.structs.replace(Recipe.load("sd15"), held_out=0.3)
    plain = Run(tmp_path / "plain", tmp_path / "set", recipe, tiny_checkpoint_folder)
    both = Run(tmp_path / "both", tmp_path / "set", msgspec.structs.replace(recipe, mirrored=True),
               tiny_checkpoint_folder)  # fmt: skip
    kept = {name for name in ("vae", "encoder", "hand-prior", "pictures", "distill") if both.data(name) == plain.digest}
    assert kept == {"vae", "encoder"}  # the others are other runs: their order of samples differs
    checkpoint = Checkpoint.load(tiny_checkpoint_folder)
    cache = both.latents(checkpoint, "pictures")
    assert cache.samples.tolist() == [*range(12), *range(12)]
    assert len(plain.latents(checkpoint, "pictures")) == 12
    rows, images = (cache.rows(range(first, first + 12)) for first in (0, 12))
    seen = rows["visibility"].bool()
    assert seen.any()
    there = rows["joints"].flip(1) * torch.tensor([-1.0, 1.0]) + torch.tensor([1.0, 0.0])
    torch.testing.assert_close(images["joints"][seen.flip(1)], there[seen.flip(1)], atol=2e-2, rtol=0)
    prompts = [f"a right hand, number {i}" for i in range(12)]
    assert torch.equal(images["ids"][:, 0], encode_prompts(prompts, checkpoint.tokenizer, checkpoint.special_tokens))
    stage = both.stage("pictures")
    held = {*cache.samples[stage.held]}
    assert held and held.isdisjoint(cache.samples[stage.train]) and len(stage.held) == 2 * len(held)
    assert len(both.stage("encoder").train) == len(stage.train) / 2


def test_the_first_rows_are_not_all_that_is_measured():
    """Mirror images come last: a mean of the first rows would know one side's hands alone."""
    rows = np.arange(100, 200)
    assert spread_over(rows, 5).tolist() == [100, 124, 149, 174, 199]
    assert spread_over(rows, 300).tolist() == rows.tolist()


def test_a_run_keeps_its_setting_of_mirror_images(trained):
    _, arguments, _ = trained
    result = hd_train("pictures", *arguments[1:], "--steps", 3, "--mirrored")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr and "-mirrored. Take the same as before" in result.stderr


@pytest.mark.slow
def test_stage_2_learns_from_captions_alone_and_stage_1_does_not(tiny_checkpoint_folder, tmp_path):
    """kohya's folder of pictures and texts, to an adapter that is not nothing."""
    from handiffuser.data.cli import commands as data
    from handiffuser.errors import TrainingError
    from handiffuser.training.recipe import Recipe
    from handiffuser.training.run import Run

    folder = tmp_path / "img/10_style"
    folder.mkdir(parents=True)
    for i in range(6):
        (folder / f"{i}.png").write_bytes(made_sample(i, (64, 64)).image)
        (folder / f"{i}.txt").write_text(f"a hand, ink drawing {i}")
    assert data.main(["convert", "captions", str(tmp_path / "img"), str(tmp_path / "set")], standalone_mode=False) == 0
    plan = {
        "steps": 2,
        "batch": 2,
        "lora": 2,
        "precision": "fp32",
        "learning_rate": 1e-2,
        "warmup": 0,
        "accumulate": 1,
        "workers": 0,
    }
    recipe = Recipe.load("sd15").changed("pictures", plan)
    run = Run(tmp_path / "run", tmp_path / "set", recipe, tiny_checkpoint_folder)
    run.prepare()
    run.train("pictures")
    run.save(tmp_path / "style.safetensors")
    learned = load_file(tmp_path / "style.safetensors")
    assert any(value.abs().max() > 0 for name, value in learned.items() if "lora_B" in name)
    with pytest.raises(TrainingError, match="must have annotated hands"):
        run.train("hand-prior")
    samples = [*read(tmp_path / "set"), *(made_sample(i, (64, 64)) for i in range(3))]
    assert write_shards(samples, tmp_path / "mixed") == []
    stage = Run(tmp_path / "run2", tmp_path / "mixed", recipe, tiny_checkpoint_folder).stage("hand-prior")
    assert len(stage.train) + len(stage.held) == 3  # of nine: those whose hands are annotated
