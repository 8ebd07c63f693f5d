"""`hd-train` from nothing to a checkpoint that loads, with two steps a stage."""

from __future__ import annotations

import pytest
import torch
from commands import run_command
from handiffuser.demo.prompts import is_held_out
from handiffuser.demo.scenes import sample_scenes
from handiffuser.models.checkpoint import Checkpoint
from handiffuser.training.data import LABELS, SHARD, WORDINGS, encode_prompts, shard_scenes
from handiffuser.training.demo import SEED, Run
from handiffuser.training.judge import Judge


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    result = run_command(
        "training.cli", "demo", "--run", folder / "run", "--output", folder / "checkpoint", "--scenes", 100,
        "--steps", 2, *(word for s in ("vae", "prior", "encoder", "pictures") for word in ("--only", s)), timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder


def test_every_stage_runs_and_the_checkpoint_loads(trained):
    checkpoint = Checkpoint.load(trained / "checkpoint")
    fresh = Run(trained / "run").start()
    for name in ("unet", "vae", "hand_prior", "text_hand_encoder", "text_encoder"):
        old, new = fresh.modules()[name].state_dict(), checkpoint.modules()[name].state_dict()
        assert any(not torch.equal(old[key].half(), new[key].half()) for key in old), name
    assert checkpoint.body is not None and 0.1 < checkpoint.vae.config.scaling_factor < 100
    grids = {path.name.split("-")[0] for path in (trained / "run/samples").glob("*.png")}
    assert grids == {"vae", "pictures"}


def test_a_second_run_does_nothing_again(trained):
    result = run_command(
        "training.cli", "demo", "--run", trained / "run", "--scenes", 100, "--steps", 2, "--only", "vae", timeout=120
    )
    assert result.returncode == 0 and "done already" in result.stderr


def test_a_stage_that_needs_another_says_which(tmp_path, trained):
    (tmp_path / "data.safetensors").symlink_to(trained / "run/data.safetensors")
    result = run_command("training.cli", "demo", "--run", tmp_path, "--only", "pictures", "--steps", 1, timeout=120)
    assert result.returncode == 1 and "--only vae" in result.stderr and "Traceback" not in result.stderr


def test_held_out_prompts_are_not_in_the_data(trained):
    """A shard drops the scenes whose prompts are held out, and only those; other wordings are not held out either."""
    scenes = sample_scenes(SHARD, seed=SEED * 100_003)
    kept = [scene.prompt for scene in scenes if not is_held_out(scene.prompt)]
    run = Run(trained / "run", 100)
    checkpoint = run.start()
    data = run.data(checkpoint)
    assert 0.85 * SHARD < len(kept) < 0.95 * SHARD
    assert torch.equal(data["ids"][:, 0], encode_prompts(kept, checkpoint.tokenizer, checkpoint.special_tokens))
    _, prompts = shard_scenes(SEED, 0)
    assert prompts[::WORDINGS] == kept and not any(map(is_held_out, prompts))
    assert torch.equal(
        data["ids"][0, 1:], encode_prompts(prompts[1:4], checkpoint.tokenizer, checkpoint.special_tokens)
    )
    assert len(data["images"]) == len(data["labels"]) == len(data["params"]) == len(kept)


def test_the_judge_reads_every_label():
    logits = Judge()(torch.zeros(2, 3, 128, 128))
    assert {label: value.shape[1] for label, value in logits.items()} == {k: len(v) for k, v in LABELS.items()}
