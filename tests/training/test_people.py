"""`hd-train --num-people 2` goes on from a checkpoint of one person, through every stage."""

from __future__ import annotations

import json

import pytest
import torch
from commands import hd_train
from handiffuser.data.hands import hand_rows, people_rows, plain_features, present
from handiffuser.data.samples import Sample, person, read, write_shards
from handiffuser.demo.human_dataset import sample_of, scene_of
from handiffuser.models.checkpoint import Checkpoint
from handiffuser.models.hand_features import make_basis
from handiffuser.models.smplh import SMPLH

RECIPE = """
num-people = 2
held-out = 0.2
prompts = ["two people shaking hands"]
[hand-prior]
steps = 6
batch = 8
learning_rate = 1e-3
warmup = 0
log_every = 1
[encoder]
steps = 3
batch = 4
[pictures]
steps = 3
batch = 4
finger_weight = 2.0
[distill]
runs = [2]
teacher_steps = 4
trajectories = 64
steps = 2
batch = 4
[distill-hands]
runs = [2]
teacher_steps = 4
trajectories = 64
steps = 2
batch = 4
"""


@pytest.mark.slow
def test_every_stage_trains_for_two(tiny_checkpoint_folder, tmp_path):
    scenes = [scene_of(1, number, pairs=0.7) for number in range(12)]
    assert not write_shards((sample_of(*scene, f"pair-{i}", 64) for i, scene in enumerate(scenes)), tmp_path / "data")
    samples = [sample for sample in read(tmp_path / "data") if isinstance(sample, Sample)]
    assert sum(sample.people == 2 for sample in samples) >= 6
    features = plain_features(SMPLH.load(Checkpoint.load(tiny_checkpoint_folder).body), make_basis())
    for sample in (sample for sample in samples if sample.people == 2 and present(sample.hands).any(1).all()):
        people = [person(sample.hands, i) for i in range(2)]
        rows = people_rows([people], features, 2)["params"].view(2, -1)
        assert torch.equal(rows, hand_rows(people, features)["params"]), "the world draws them from left to right"
    (tmp_path / "two.toml").write_text(RECIPE)
    common = ("--recipe", tmp_path / "two.toml", "--data", tmp_path / "data", "--run", tmp_path / "run",
              "--start", tiny_checkpoint_folder, "--processes", 1)  # fmt: skip
    for stage in ("hand-prior", "encoder", "pictures", "distill", "distill-hands"):
        result = hd_train(stage, *common, "--output", tmp_path / stage)
        assert result.returncode == 0, (stage, result.stderr)
    lines = [json.loads(line) for line in (tmp_path / "run/hand-prior/log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0], losses
    start, made = Checkpoint.load(tiny_checkpoint_folder), Checkpoint.load(tmp_path / "distill-hands")
    assert made.num_people == 2 and made.hand_prior.person[1].any() and made.defaults["hand_steps"] == 2
    assert torch.equal(made.vae.encoder.conv_in.weight, start.vae.encoder.conv_in.weight)
    one = hd_train("hand-prior", *common[2:], "--recipe", tmp_path / "two.toml", "--num-people", 1, "--steps", 9)
    assert one.returncode == 1 and "must be of this network, got another. Name another --run." in one.stderr, one.stderr
    shrunk = hd_train("hand-prior", *common[:4], "--start", tmp_path / "distill-hands", "--run", tmp_path / "other",
                      "--num-people", 1)  # fmt: skip
    assert shrunk.returncode == 1 and "num_people must be at least 2" in shrunk.stderr, shrunk.stderr


def test_an_adapter_for_more_people_than_its_start_is_refused_at_once(tiny_checkpoint_folder, tmp_path):
    assert not write_shards([sample_of(*scene_of(1, 0), "one", 32)], tmp_path / "data")
    words = ("--data", tmp_path / "data", "--run", tmp_path / "run", "--start", tiny_checkpoint_folder, "--lora", 2,
             "--num-people", 2, "--output", tmp_path / "adapter.safetensors")  # fmt: skip
    refused = hd_train("pictures", "--recipe", "demo", *words)
    assert refused.returncode == 1 and "num_people must be at most 1 with --lora" in refused.stderr, refused.stderr
    assert "Train a checkpoint of more people without --lora" in refused.stderr
    assert not list((tmp_path / "run").glob("**/*.safetensors")) and not (tmp_path / "adapter.safetensors").exists()
