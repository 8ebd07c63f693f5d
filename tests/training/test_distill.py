"""Distillation: targets lead where the teacher went, a bank is made once by any number of processes, the command ends
in a checkpoint that paints in few runs."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from commands import invoke, run_command
from diffusers import DDIMScheduler
from handiffuser.data.latents import LatentCache, make_latents
from handiffuser.demo.dataset import make
from handiffuser.errors import TrainingError
from handiffuser.models.checkpoint import Checkpoint, random_checkpoint
from handiffuser.models.configs import CONFIGS
from handiffuser.training import distill, draws
from handiffuser.training.distill import (
    HandBank,
    PictureBank,
    becomes_hand_student,
    becomes_student,
    few_steps,
    grid,
    hand_jump_stage,
    jump_inputs,
    jump_stage,
)
from handiffuser.training.draws import Draws
from handiffuser.training.recipe import DistillHandsPlan, DistillPlan, Recipe
from handiffuser.training.run import Run
from handiffuser.training.sample import sample_hands
from torch.utils._pytree import tree_leaves

PLAN = DistillPlan(runs=(2, 1), teacher_steps=4, trajectories=8, drop_hands=0.5, first=0.5)

HANDS = DistillHandsPlan(runs=(2, 1), teacher_steps=4, trajectories=8, drop_text=0.3)


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "PER_FILE", 4)
        patch.setattr(distill, "BATCH", 2)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "world"
    make(folder, 24, size=64, processes=1)
    return folder


@pytest.fixture(scope="module")
def teacher():
    from handiffuser import shipped

    body = shipped.checkpoint_path() / "body" / "smplh.npz"
    checkpoint = random_checkpoint(replace(CONFIGS["tiny"], guidance=2.0), seed=3, body=body)
    checkpoint.hand_prior.mean += 0.1  # as one that was trained
    for module in checkpoint.modules().values():
        module.eval().requires_grad_(False)
    checkpoint.attach_kernel()
    return checkpoint


@pytest.fixture(scope="module")
def cache(world, teacher):
    make_latents(teacher, world, pictures=False, bf16=True)
    return LatentCache.open(teacher, world, pictures=False, bf16=True)


def bank_of(folder, teacher, cache, plan=PLAN, **more):
    bank = PictureBank(folder, teacher, cache, cache.usable, plan, "a digest")
    bank.make(**more)
    return bank


def test_a_target_leads_to_the_teachers_next_kept_state(small, teacher, cache, tmp_path):
    """By diffusers' own step, on the student's grid, from each kept state."""
    bank = bank_of(tmp_path / "bank", teacher, cache)
    assert bank.kept == [0, 2, 4] and len(bank) == 8
    rows = bank.read(range(8))
    assert rows["states"].shape == (8, 3, 4, *teacher.latent_size) and rows["ids"].shape == (8, 77)
    for runs in PLAN.runs:
        scheduler = DDIMScheduler.from_config(few_steps(teacher.scheduler))
        scheduler.set_timesteps(runs)
        seen = set()
        for step in range(6):
            draws = Draws(0, step, 8, range(8))
            _, _, x, timestep, target, told, weight, lines = jump_inputs(teacher.scheduler, bank, PLAN, runs)(
                rows, draws
            )
            assert told.tolist() == weight.tolist() == [1] * 8 and lines.shape == (8, *teacher.latent_size)
            for i in range(8):
                jump = scheduler.timesteps.tolist().index(int(timestep[i]))
                seen.add(jump)
                states = rows["states"][i, :: 2 // runs].float()
                assert torch.equal(x[i], states[jump])
                there = scheduler.step(target[i], timestep[i], x[i]).prev_sample
                torch.testing.assert_close(there, states[jump + 1], rtol=1e-3, atol=2e-3)
        assert seen == set(range(runs))


def test_jumps_are_made_where_the_rows_are(small, teacher, cache, tmp_path, monkeypatch):
    """ "meta" stands for a GPU."""
    own = draws.generator_for
    monkeypatch.setattr(draws, "generator_for", lambda *parts, device="cpu": own(*parts) if device == "cpu" else None)
    bank = bank_of(tmp_path / "bank", teacher, cache)
    rows = {name: value.to("meta") for name, value in bank.read([5, 0, 3]).items()}
    made = jump_inputs(teacher.scheduler, bank, PLAN, 2)(rows, Draws(0, 0, 3, range(3), "meta"))
    assert {value.device.type for value in tree_leaves(list(made))} == {"meta"}


def test_an_unguided_teacher_is_its_own_student(small, teacher, cache, tmp_path):
    """On the teacher's own grid there is nothing to learn, and of another one there is."""
    plain = replace(teacher, defaults={**teacher.defaults, "guidance": 1.0})
    plan = msgspec.structs.replace(PLAN, runs=(4, 1))
    bank = bank_of(tmp_path / "bank", plain, cache, plan)
    rows = bank.read(range(8))
    asked = bank_of(tmp_path / "asked", teacher, cache, msgspec.structs.replace(plan, teacher_guidance=1.0))
    assert torch.equal(asked.read(range(8))["states"], rows["states"])
    assert bool((rows["visibility"].sum(1) == 0).any()) and bool((rows["visibility"].sum(1) > 0).any())
    losses = {}
    for runs in plan.runs:
        stage = jump_stage(plain, bank, plan, runs, f"distill-{runs}")
        assert not any(p.requires_grad for p in stage.module.text_hand_encoder.parameters())
        losses[runs] = float(stage.module(*stage.inputs(rows, Draws(0, 0, 8, range(8)))).detach())
    assert losses[4] < 1e-4 < 1e-2 < losses[1]
    plain.unet.requires_grad_(False)


def hand_bank(folder, teacher, cache, plan=HANDS, **more):
    bank = HandBank(folder, teacher, cache, cache.usable, plan, "a digest")
    bank.make(**more)
    return bank


def test_jumps_of_hands_lead_to_the_teachers_next_kept_state(small, teacher, cache, tmp_path):
    bank = hand_bank(tmp_path / "bank", teacher, cache)
    rows = bank.read(range(8))
    empty = (rows["ids"] == teacher.special_tokens["eos"]).int().argmax(1) == 1
    assert rows["states"].shape == (8, 3, len(teacher.hand_prior.mean)) and 0 < empty.sum() < 8
    for runs in HANDS.runs:
        stage = hand_jump_stage(teacher, bank, HANDS, runs, f"distill-hands-{runs}")
        ids, x, timestep, target = stage.inputs(rows, Draws(0, 0, 8, range(8)))
        assert torch.equal(ids, rows["ids"]) and x.shape == target.shape == (8, runs, len(teacher.hand_prior.mean))
        scheduler = DDIMScheduler.from_config(few_steps(teacher.hand_scheduler))
        scheduler.set_timesteps(runs)
        states = rows["states"][:, :: 2 // runs]
        for jump, time in enumerate(scheduler.timesteps):
            assert bool((timestep[:, jump] == time).all()) and torch.equal(x[:, jump], states[:, jump])
            there = scheduler.step(target[:, jump], time, x[:, jump]).prev_sample
            torch.testing.assert_close(there, states[:, jump + 1], rtol=1e-4, atol=1e-4)
    teacher.hand_prior.requires_grad_(False)


def test_a_bank_of_hands_ends_where_sampling_ends(small, teacher, cache, tmp_path):
    """With the teacher's guidance: its own from the checkpoint, or another one that was asked for."""
    plan = msgspec.structs.replace(HANDS, drop_text=0.0)
    for asked in (0.0, 1.5):
        bank = hand_bank(tmp_path / str(asked), teacher, cache, msgspec.structs.replace(plan, teacher_guidance=asked))
        rows = bank.read(range(8))
        few = {"hand_steps": 4, "hand_guidance": asked or teacher.defaults["hand_guidance"]}
        like = replace(teacher, defaults={**teacher.defaults, **few}, hand_scheduler=few_steps(teacher.hand_scheduler))
        found = sample_hands(like, rows["ids"], noise=rows["states"][:, 0])
        torch.testing.assert_close(found, rows["states"][:, -1], rtol=1e-4, atol=1e-4)


def test_an_unguided_prior_is_its_own_student_and_reads_as_before(small, teacher, cache, tmp_path):
    plain = replace(teacher, defaults={**teacher.defaults, "hand_guidance": 1.0})
    plan = msgspec.structs.replace(HANDS, runs=(4, 1))
    bank = hand_bank(tmp_path / "bank", plain, cache, plan)
    rows = bank.read(range(8))
    losses = {}
    for runs in plan.runs:
        stage = hand_jump_stage(plain, bank, plan, runs, "distill-hands")
        losses[runs] = float(stage.module(*stage.inputs(rows, Draws(0, 0, 8, range(8)))).detach())
    assert losses[4] < 1e-9 < 1e-6 < losses[1]
    for part in stage.fixed:
        part.requires_grad_(False)
    learned = {name for name, p in stage.module.named_parameters() if p.requires_grad}
    assert not any("text" in name or "key_value" in name for name in learned)
    assert any("query" in name for name in learned)
    plain.hand_prior.requires_grad_(False)


def test_a_bank_of_hands_is_the_same_from_any_process(small, teacher, cache, tmp_path):
    whole = hand_bank(tmp_path / "one", teacher, cache).read(range(8))
    for rank in (1, 0):
        hand_bank(tmp_path / "two", teacher, cache, rank=rank, world=2)
    two = hand_bank(tmp_path / "two", teacher, cache).read(range(8))
    assert all(torch.equal(value, two[name]) for name, value in whole.items())
    with pytest.raises(TrainingError, match="this teacher's and grid's bank"):
        hand_bank(tmp_path / "one", teacher, cache, msgspec.structs.replace(HANDS, teacher_guidance=7.0))


def test_an_untrained_prior_has_nothing_to_teach(teacher, world, tmp_path):
    body = teacher.body
    random_checkpoint(CONFIGS["tiny"], seed=3, body=body).save(tmp_path / "start")
    run = Run(tmp_path / "run", world, Recipe.load("demo"), tmp_path / "start")
    run.prepare()
    with pytest.raises(TrainingError, match=r"must be trained\. Train it first"):
        run.train("distill-hands")


def test_a_bank_is_the_same_from_any_process_and_goes_on(small, teacher, cache, tmp_path):
    whole = bank_of(tmp_path / "one", teacher, cache).read(range(8))
    for rank in (1, 0):
        bank_of(tmp_path / "two", teacher, cache, rank=rank, world=2)
    two = bank_of(tmp_path / "two", teacher, cache).read(range(8))
    kept = tmp_path / "one" / "00000.safetensors"
    before = kept.stat().st_mtime_ns
    (tmp_path / "one" / "00001.safetensors").unlink()
    again = bank_of(tmp_path / "one", teacher, cache).read([7, 0])
    assert kept.stat().st_mtime_ns == before, "what is there is not made again"
    for name, value in whole.items():
        assert torch.equal(value, two[name]) and torch.equal(value[[7, 0]], again[name]), name


def test_a_bank_is_of_one_teacher_and_damage_is_named(small, teacher, cache, tmp_path):
    bank = bank_of(tmp_path / "bank", teacher, cache)
    with pytest.raises(TrainingError, match="this teacher's and grid's bank"):
        PictureBank(tmp_path / "bank", teacher, cache, cache.usable, PLAN, "another digest")
    with pytest.raises(TrainingError, match="this teacher's and grid's bank"):
        PictureBank(
            tmp_path / "bank", teacher, cache, cache.usable, msgspec.structs.replace(PLAN, runs=(4,)), "a digest"
        )
    (tmp_path / "bank" / "00001.safetensors").write_bytes(b"nothing")
    with pytest.raises(TrainingError, match=r"00001.safetensors cannot be read.*Remove it"):
        bank.read([5])
    assert len(bank.read([3])["ids"]) == 1


def test_the_grid():
    assert grid(DistillPlan(runs=(4, 2), teacher_steps=12)) == [0, 3, 6, 9, 12]
    assert grid(DistillPlan(runs=(3, 2), teacher_steps=12)) == [0, 4, 6, 8, 12]
    with pytest.raises(TrainingError, match="teacher_steps=15"):
        grid(DistillPlan(runs=(5,), teacher_steps=12))


@pytest.mark.slow
def test_the_command_makes_a_checkpoint_of_few_runs(teacher, world, tmp_path):
    teacher.save(tmp_path / "teacher")
    common = ("distill", "--data", world, "--start", tmp_path / "teacher", "--run", tmp_path / "run", "--processes", 2,
              "--workers", 1, "--batch", 4, "--accumulate", 1, "--precision", "fp32", "--set", "teacher_steps=4",
              "--set", "trajectories=64")  # fmt: skip
    out = tmp_path / "fast"
    result = run_command("training.cli", *common, "--runs", "2,1", "--steps", 2, "--output", out)
    assert result.returncode == 0 and "64 of 64 trajectories" in result.stderr, result.stderr
    fast = Checkpoint.load(out)
    assert (fast.defaults["steps"], fast.defaults["guidance"], fast.defaults["solver"]) == (1, 1.0, "ddim")
    assert fast.scheduler["timestep_spacing"] == "trailing" and fast.notes["trained"]["distill"]["runs"] == [2, 1]
    before, after = teacher.unet.state_dict(), fast.unet.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for name in ("text_hand_encoder", "vae", "hand_prior"):
        one, other = teacher.modules()[name].state_dict(), fast.modules()[name].state_dict()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    assert {path.name.rpartition("-")[0] for path in (tmp_path / "run/samples").glob("*.png")} == {
        "distill-2", "distill-1"}  # fmt: skip
    again = run_command("training.cli", *common, "--runs", "2,1", "--steps", 2, "--output", out)
    assert again.returncode == 0 and "distill: done already" in again.stderr, again.stderr
    wrong = run_command("training.cli", *common, "--runs", "3")
    assert wrong.returncode == 1 and "must divide the teacher's 4 steps" in wrong.stderr, wrong.stderr
    hands = ("distill-hands", "--data", world, "--start", out, "--run", tmp_path / "hands", "--processes", 2, "--batch",
             4, "--runs", "2", "--steps", 2, "--set", "teacher_steps=4", "--set", "trajectories=64")  # fmt: skip
    result = run_command("training.cli", *hands, "--output", tmp_path / "faster")
    assert result.returncode == 0 and "distill-hands: 64 of 64 trajectories" in result.stderr, result.stderr
    faster = Checkpoint.load(tmp_path / "faster")
    assert {key: faster.defaults[key] for key in ("steps", "hand_steps", "hand_guidance", "hand_solver")} == {
        "steps": 1, "hand_steps": 2, "hand_guidance": 1.0, "hand_solver": "ddim"}  # fmt: skip
    assert set(faster.notes["trained"]) >= {"distill", "distill-hands"}
    one, other = fast.hand_prior.state_dict(), faster.hand_prior.state_dict()
    same = {name for name in one if torch.equal(one[name], other[name])}
    assert {"text.weight", "mean"} <= same < set(one)
    out = tmp_path / "faster"
    bundle = invoke("export.cli", out, tmp_path / "bundle")
    assert bundle.returncode == 0, bundle.stderr
    made = invoke("runtime.cli", tmp_path / "bundle", "two open hands", "-o", tmp_path / "pictures")
    assert made.returncode == 0, made.stderr


def test_a_student_keeps_all_other_settings(teacher):
    student = replace(teacher)
    becomes_student(student, 2)
    changed = {name for name, value in student.defaults.items() if teacher.defaults[name] != value}
    assert changed <= {"steps", "guidance", "solver"} and student.defaults["steps"] == 2
    hands = replace(teacher)
    becomes_hand_student(hands, 1)
    changed = {name for name, value in hands.defaults.items() if teacher.defaults[name] != value}
    assert changed <= {"hand_steps", "hand_guidance", "hand_solver"} and hands.defaults["hand_steps"] == 1
    assert np.isfinite(student.defaults["guidance"]) and teacher.defaults["guidance"] == 2.0
