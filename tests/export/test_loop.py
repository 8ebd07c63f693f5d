"""The exported loop against diffusers' own loop: our rows and graphs, its schedulers and PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from handiffuser.engines import load_engines
from handiffuser.models.configs import DEMO_SCHEDULE, SD_SCHEDULE
from handiffuser.runtime.sampler import Job, StepSampler
from handiffuser.schedules import NoiseSchedule, rows

STEPS, GUIDANCE = 20, 2.5
TOLERANCE = 1e-4  # of the largest value
VELOCITY = {**SD_SCHEDULE, "prediction_type": "v_prediction"}  # as Stable Diffusion 2.1

CASES = {
    "ddim": (DDIMScheduler, {}, (SD_SCHEDULE, VELOCITY, DEMO_SCHEDULE)),
    "ddpm": (DDPMScheduler, {}, (SD_SCHEDULE, VELOCITY)),
    "euler": (EulerDiscreteScheduler, {}, (SD_SCHEDULE, VELOCITY)),
    "dpm++2m": (DPMSolverMultistepScheduler, {}, (SD_SCHEDULE, VELOCITY)),
    "dpm++2m-karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, (SD_SCHEDULE,)),
    "plms": (PNDMScheduler, {"skip_prk_steps": True}, (SD_SCHEDULE,)),
}


@pytest.fixture(scope="module")
def engines(tiny_bundle):
    return load_engines(tiny_bundle, "cpu")[1]


@pytest.fixture(scope="module")
def contexts(tiny_checkpoint):
    """Three requests' contexts [3, 2, L, W] from PyTorch."""
    generator = torch.Generator().manual_seed(5)
    encoder = tiny_checkpoint.text_hand_encoder
    return torch.randn(3, 2, encoder.num_tokens, encoder.context_width, generator=generator)


def latents(batch: int) -> torch.Tensor:
    return torch.randn(batch, 4, 16, 24, generator=torch.Generator().manual_seed(7))


def step_noise(request: int, step: int) -> np.ndarray:
    return np.random.default_rng([request, step]).standard_normal((4, 16, 24)).astype(np.float32)


def by_diffusers(
    checkpoint, kind, extra, schedule, context, start, request, monkeypatch, steps=STEPS, guidance=GUIDANCE
):
    """One request alone, as a diffusers pipeline would run it. Returns the final latents [4, h, w]."""
    scheduler = kind.from_config({**schedule, **extra})
    scheduler.set_timesteps(steps)
    draws = iter(range(steps))

    def noise(shape, **_):
        return torch.from_numpy(step_noise(request, next(draws)))[None]

    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", noise)
    x = start[None] * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, timestep)
        with torch.no_grad():
            output = checkpoint.unet(torch.cat([scaled, scaled]), timestep, context).sample
        without, given = output.chunk(2)
        x = scheduler.step(without + guidance * (given - without), timestep, x).prev_sample
    return x[0].numpy()


def job(engines, solver, schedule, context, start, request, steps=STEPS, guidance=GUIDANCE):
    """The same request as a job of our sampler."""
    table = rows(NoiseSchedule.from_config(schedule), solver, steps, guidance, 4)
    keys = engines["unet_context"]({"context": context[None].numpy()})
    time = engines["unet_time"]({"timesteps": table.timesteps.astype(np.float32)})["time"]
    return Job(
        key=request,
        state=start.numpy() * np.float32(table.init_sigma),
        rows=table.rows,
        steps={"time": time},
        constants={name: value[0] for name, value in keys.items()},
        noise=(lambda step: step_noise(request, step)) if table.stochastic else None,
    )


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("solver", CASES)
@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_twenty_steps_equal_diffusers(tiny_checkpoint, engines, contexts, solver, batch, monkeypatch):
    kind, extra, schedules = CASES[solver]
    tiny_checkpoint.attach_kernel()
    for schedule in schedules:
        sampler = StepSampler(engines["unet"], "latents", 4, batch)
        start = latents(batch)
        jobs = [job(engines, solver, schedule, contexts[i], start[i], i) for i in range(batch)]
        got = {result.key: result.state for result in sampler.run(jobs)}
        for i in range(batch):
            wanted = by_diffusers(tiny_checkpoint, kind, extra, schedule, contexts[i], start[i], i, monkeypatch)
            assert relative(got[i], wanted) < TOLERANCE, schedule["prediction_type"]


def test_mixed_solvers_and_steps_in_one_batch(tiny_checkpoint, engines, contexts, monkeypatch):
    """Five requests of four solvers and other lengths share three slots; each equals diffusers alone."""
    tiny_checkpoint.attach_kernel()
    plan = [("ddim", 20), ("euler", 7), ("plms", 9), ("dpm++2m", 12), ("ddim", 3)]
    start = latents(len(plan))
    sampler = StepSampler(engines["unet"], "latents", 4, 3)
    jobs = [
        job(engines, solver, SD_SCHEDULE, contexts[i % 3], start[i], i, steps) for i, (solver, steps) in enumerate(plan)
    ]
    got = {result.key: result.state for result in sampler.run(jobs)}
    for i, (solver, steps) in enumerate(plan):
        kind, extra, _ = CASES[solver]
        wanted = by_diffusers(
            tiny_checkpoint, kind, extra, SD_SCHEDULE, contexts[i % 3], start[i], i, monkeypatch, steps
        )
        assert relative(got[i], wanted) < TOLERANCE, (solver, steps)


def test_without_guidance_the_conditional_branch_runs_alone(tiny_checkpoint, engines, contexts, monkeypatch):
    tiny_checkpoint.attach_kernel()
    start, unet = latents(2), engines["unet"]
    assert unet.spec.branched
    sampler = StepSampler(unet, "latents", 4, 2, branched=unet.spec.branched)
    jobs = [job(engines, "ddim", SD_SCHEDULE, contexts[i], start[i], i, 5, guidance=1.0) for i in range(2)]
    widths = []
    sampler._engine = lambda feeds: widths.append(feeds["key_00"].shape[1]) or unet(feeds)
    got = {result.key: result.state for result in sampler.run(jobs)}
    assert set(widths) == {1}
    for i in range(2):
        wanted = by_diffusers(
            tiny_checkpoint, DDIMScheduler, {}, SD_SCHEDULE, contexts[i], start[i], i, monkeypatch, 5, guidance=1.0
        )
        assert relative(got[i], wanted) < TOLERANCE


def test_the_hand_prior_equals_diffusers(tiny_checkpoint, engines):
    """Stage 1: x0 prediction, a text for each branch."""
    schedule = tiny_checkpoint.hand_scheduler
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(2, 77, tiny_checkpoint.text_encoder.config.hidden_size, generator=generator)
    with torch.no_grad():
        read = tiny_checkpoint.hand_prior.read(text)
    start = torch.randn(330, generator=generator)
    table = rows(NoiseSchedule.from_config(schedule), "ddim", STEPS, GUIDANCE, 1)
    sampler = StepSampler(engines["hand_prior"], "x", 1, 1)
    sampler.submit(Job("hands", start.numpy(), table.rows, {}, {"text": read.numpy()}))
    got = None
    while sampler.active:
        for result in sampler.step():
            got = result.state
    scheduler = DDIMScheduler.from_config(schedule)
    scheduler.set_timesteps(STEPS)
    x = start[None]
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            output = tiny_checkpoint.hand_prior(torch.cat([x, x]), timestep.expand(2), text)
        without, given = output.chunk(2)
        x = scheduler.step(without + GUIDANCE * (given - without), timestep, x).prev_sample
    assert relative(got, x[0].numpy()) < TOLERANCE
