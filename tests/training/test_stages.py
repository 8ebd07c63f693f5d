"""What the stages learn from: which timesteps, which weights, what is dropped; and that a batch may be cut in parts."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from handiffuser.data.latents import encode_prompts
from handiffuser.errors import TrainingError
from handiffuser.models.autoencoder import PatchAutoencoderKL
from handiffuser.models.checkpoint import Checkpoint
from handiffuser.training import draws
from handiffuser.training.draws import Draws
from handiffuser.training.loop import Stage, fit
from handiffuser.training.recipe import EncoderPlan, HandPriorPlan, PicturesPlan, VaePlan
from handiffuser.training.stages import (
    EncoderLoss,
    HandPriorLoss,
    PictureLoss,
    VaeLoss,
    alphas_cumprod,
    conditions,
    edges,
    emphasis,
    encoder_inputs,
    hand_prior_inputs,
    images_to_float,
    picture_inputs,
    snr_weight,
    timesteps,
    vae_inputs,
)
from torch.utils._pytree import tree_leaves


@pytest.fixture
def checkpoint(tiny_checkpoint_folder):
    return Checkpoint.load(tiny_checkpoint_folder)


@pytest.fixture
def empty(checkpoint):
    return encode_prompts([""], checkpoint.tokenizer, checkpoint.special_tokens)[0]


def rows_of(checkpoint, count):
    """Made up rows, as a cache gives them."""
    draw = Draws(5, 0, count, range(count))
    h, w = checkpoint.latent_size
    prompts = [f"a {side} hand, {i}" for i in range(count) for side in ("left", "right")]
    ids = encode_prompts(prompts, checkpoint.tokenizer, checkpoint.special_tokens).unflatten(0, (count, 2))
    return {
        "images": (draw.normal(32, 48, 3) * 40 + 128).clamp(0, 255).to(torch.uint8),
        "params": draw.normal(330),
        "ids": ids,
        "mean": draw.normal(4, h, w).half(),
        "std": draw.normal(4, h, w).abs().half(),
        "joints": draw.normal(2, 21, 2).sigmoid(),
        "rotations": draw.normal(2, 16, 6),
        "bps": draw.normal(2, 512).abs() / 10,
        "visibility": (draw.normal(2) > 0).float(),
        "labels": draw.normal(2).abs().long().clamp_max(2) - 1,
    }


def stages(checkpoint, empty):
    """(module, what its inputs are made by) of every stage."""
    pictures = PicturesPlan(finger_weight=4.0, colour_weight=8.0, weighting="min-snr", timestep_shift=2.5)
    return {
        "vae": (VaeLoss(checkpoint, VaePlan(crop=16)), vae_inputs(checkpoint, VaePlan(crop=16))),
        "hand-prior": (HandPriorLoss(checkpoint), hand_prior_inputs(checkpoint, HandPriorPlan(), empty)),
        "encoder": (EncoderLoss(checkpoint.text_hand_encoder, [2, 2]), encoder_inputs(EncoderPlan(), empty)),
        "pictures": (PictureLoss(checkpoint, pictures), picture_inputs(checkpoint, pictures, empty)),
    }


@pytest.mark.parametrize("name", ["vae", "hand-prior", "encoder", "pictures"])
def test_a_loss_is_the_mean_of_its_parts(checkpoint, empty, name):
    """So several processes, and parts of a batch, have the gradients of the whole."""
    torch.manual_seed(0)
    module, inputs = stages(checkpoint, empty)[name]
    module.requires_grad_(True)
    rows = rows_of(checkpoint, 6)

    def gradients(parts):
        module.zero_grad()
        total = 0.0
        for places in parts:
            some = {key: value[places] for key, value in rows.items()}
            loss = module(*inputs(some, Draws(0, 3, 6, places))) / len(parts)
            loss.backward()
            total += loss.item()
        return total, {key: p.grad.clone() for key, p in module.named_parameters() if p.grad is not None}

    whole, of_whole = gradients([[0, 1, 2, 3, 4, 5]])
    parts, of_parts = gradients([[0, 3], [1, 4], [2, 5]])
    assert whole == pytest.approx(parts, rel=1e-4)
    for key, value in of_whole.items():
        torch.testing.assert_close(of_parts[key], value, rtol=1e-3, atol=1e-5 + 1e-4 * float(value.abs().max()))


def test_timesteps_are_spread_over_a_batch():
    for shift in (1.0, 4.0):
        t = timesteps(Draws(0, 0, 100, range(100)), 1000, shift).sort().values.double() / 1000
        assert t.min() >= 0 and t.max() < 1
        even = t / (shift - (shift - 1) * t)  # the shift undone
        assert (even * 100).diff().max() < 2.1  # one in every hundredth
    many = Draws(1, 0, 4000, range(4000))
    uniform, shifted = (timesteps(many, 1000, shift).float().mean() for shift in (1.0, 4.0))
    assert abs(uniform - 499.5) < 2 and shifted > 700


def test_noise_is_what_the_scheduler_adds(checkpoint, empty):
    """Against diffusers' own add_noise and get_velocity."""
    plan = PicturesPlan(posterior="mean", drop_text=0, drop_hands=0, drop_both=0)
    rows = rows_of(checkpoint, 4)
    inputs = picture_inputs(checkpoint, plan, empty)
    _, hands, noisy, timestep, target, told, weight, _ = inputs(rows, Draws(0, 0, 4, range(4)))
    scheduler = DDIMScheduler.from_config(checkpoint.scheduler)
    clean = rows["mean"].float() * checkpoint.vae.config.scaling_factor
    alpha = alphas_cumprod(checkpoint.scheduler)[timestep][:, None, None, None]
    noise = (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
    torch.testing.assert_close(scheduler.add_noise(clean, noise, timestep), noisy, rtol=1e-4, atol=1e-4)
    assert checkpoint.scheduler["prediction_type"] == "v_prediction"
    torch.testing.assert_close(scheduler.get_velocity(clean, noise, timestep), target, rtol=1e-3, atol=1e-3)
    assert told.tolist() == [1] * 4 and weight.tolist() == [1] * 4
    assert torch.equal(hands["visibility"], rows["visibility"])


def test_truncated_snr_weighs_errors_of_the_clean_sample_alone(checkpoint, empty):
    plan = PicturesPlan(posterior="mean", weighting="truncated-snr")
    checkpoint.scheduler = {**checkpoint.scheduler, "prediction_type": "sample"}
    *_, timestep, target, _, weight, _ = picture_inputs(checkpoint, plan, empty)(
        rows := rows_of(checkpoint, 40), Draws(0, 0, 40, range(40))
    )
    torch.testing.assert_close(target, rows["mean"].float() * checkpoint.vae.config.scaling_factor)
    alpha = alphas_cumprod(checkpoint.scheduler)[timestep]
    torch.testing.assert_close(weight, (alpha / (1 - alpha)).clamp(1, 5))
    assert weight.min() == 1 and weight.max() == 5
    checkpoint.scheduler = {**checkpoint.scheduler, "prediction_type": "epsilon"}
    with pytest.raises(TrainingError, match="weighting must be plain or min-snr"):
        picture_inputs(checkpoint, plan, empty)


def test_edges_are_where_the_latents_change(checkpoint, empty):
    clean = torch.zeros(2, 4, 16, 16)
    clean[0, 1, :, 8:] = 3.0  # one picture of two halves, one of one colour
    lines = edges(clean)
    assert (lines[0, :, 7:9] == 1).all() and (lines[0, :, :7] == 0).all() and (lines[0, :, 9:] == 0).all()
    assert (lines[1] == 0).all()
    rows = rows_of(checkpoint, 4)
    plan = PicturesPlan(posterior="mean", finger_weight=0, colour_weight=0)
    given = picture_inputs(checkpoint, plan, empty)(rows, Draws(0, 0, 4, range(4)))
    plain = PictureLoss(checkpoint, plan)(*given)
    weighed = PictureLoss(checkpoint, msgspec.structs.replace(plan, edge_weight=3.0))(*given)
    assert not torch.isclose(plain, weighed, rtol=1e-3)
    # A picture without lines counts as before.
    given[-1].zero_()
    torch.testing.assert_close(PictureLoss(checkpoint, msgspec.structs.replace(plan, edge_weight=3.0))(*given), plain)


def test_text_and_hands_are_dropped_as_often_as_the_plan_says(checkpoint, empty):
    count = 4000
    rows = {key: value[:1].expand(count, *value.shape[1:]) for key, value in rows_of(checkpoint, 2).items()}
    rows["visibility"] = torch.ones(count, 2)
    plan = PicturesPlan(drop_text=0.2, drop_hands=0.1, drop_both=0.3)
    ids, hands = conditions(rows, Draws(0, 0, count, range(count)), empty, plan)
    no_text, no_hands = (ids == empty).all(1), hands["visibility"].sum(1) == 0
    for found, wanted in ((no_text & ~no_hands, 0.2), (no_hands & ~no_text, 0.1), (no_text & no_hands, 0.3)):
        assert abs(found.float().mean() - wanted) < 0.03
    assert {tuple(row) for row in ids[~no_text].tolist()} == {tuple(row) for row in rows["ids"][0].tolist()}


def test_min_snr_caps_what_is_easy():
    """Hang et al. 2023: the weight of the error in x0 is min(snr, gamma), whatever is predicted."""
    alpha = torch.tensor([0.999, 0.9, 0.5, 0.01])
    snr = alpha / (1 - alpha)
    of_x0 = snr_weight(alpha, "sample", 5.0)
    torch.testing.assert_close(of_x0, snr.clamp_max(5.0))
    torch.testing.assert_close(snr_weight(alpha, "epsilon", 5.0) * snr, of_x0)  # an error e in x0 is snr e^2 in epsilon
    torch.testing.assert_close(snr_weight(alpha, "v_prediction", 5.0) * (snr + 1), of_x0)


def test_truncated_snr_counts_noise_as_well():
    """Salimans and Ho 2022: an error in x0 counts at least 1, so that a network learns from pure noise."""
    alpha = torch.tensor([0.999, 0.9, 0.75, 0.5, 0.01])
    torch.testing.assert_close(snr_weight(alpha, "sample", 5.0, 1.0), torch.tensor([5.0, 5.0, 3.0, 1.0, 1.0]))


def test_errors_near_joints_of_visible_hands_count_more():
    joints = torch.rand(3, 2, 21, 2, generator=torch.Generator().manual_seed(0)) * 0.2
    joints[0, 1] = 0.9  # the lower right corner
    visibility = torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    weight = emphasis(joints, visibility, 16, 16, fingers=4.0)
    assert weight.shape == (3, 16, 16) and (weight.mean((1, 2)) - 1).abs().max() < 1e-5
    assert weight[0].argmax() == 14 * 16 + 14  # pixel 14 reaches from 0.875 to 0.9375
    assert weight[0].max() / weight[0].min() > 0.9 * 5
    assert (weight[1] == 1).all()  # without visible hands
    assert weight[2, :5, :5].mean() > 2 * weight[2, 8:, 8:].mean()


def test_a_decoder_is_trained_alone(tmp_path, checkpoint):
    """The UNet of a given checkpoint knows its latents."""
    plan = VaePlan(decoder_only=True, steps=3, batch=2, learning_rate=1e-2, crop=16)
    before = {name: value.clone() for name, value in checkpoint.vae.state_dict().items()}
    module = VaeLoss(checkpoint, plan)
    module.requires_grad_(True)
    rows = rows_of(checkpoint, 4)
    read = lambda numbers: {"images": rows["images"][list(numbers)]}  # noqa: E731
    stage = Stage("vae", module, read, vae_inputs(checkpoint, plan), range(4), fixed=module.fixed)
    fit(stage, plan, tmp_path)
    changed = {name for name, value in checkpoint.vae.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("decoder.") for name in changed)
    assert not any(name.startswith(("encoder.", "quant_conv.")) for name in changed)
    assert isinstance(checkpoint.vae, AutoencoderKL) and msgspec.to_builtins(plan)["decoder_only"]


def test_a_code_of_blocks_learns_slowly(tmp_path, checkpoint):
    """At a tenth of the networks' rate; a run that was stopped goes on to the same weights."""
    torch.manual_seed(0)
    vae = PatchAutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=6,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    rows = rows_of(checkpoint, 6)
    vae.begin(images_to_float(rows["images"]))
    begun = {name: value.clone() for name, value in vae.state_dict().items()}

    def train(steps: int, folder: str) -> dict[str, torch.Tensor]:
        vae.load_state_dict(begun)
        changed = replace(checkpoint, vae=vae)
        plan = VaePlan(steps=4, batch=3, warmup=0, schedule="constant", learning_rate=1e-3, crop=16, ema=0.0)
        plan = msgspec.structs.replace(plan, steps=steps, weight_decay=0.0)
        module = VaeLoss(changed, plan)
        module.requires_grad_(True)
        read = lambda numbers: {"images": rows["images"][list(numbers)]}  # noqa: E731
        stage = Stage("vae", module, read, vae_inputs(changed, plan), range(6), slow=module.slow)
        fit(stage, plan, tmp_path / folder)
        return {name: value.clone() for name, value in vae.state_dict().items()}

    once = train(1, "once")
    moved = {name: float((once[name] - begun[name]).abs().max()) for name in begun}
    assert moved["encoder.linear.weight"] == pytest.approx(1e-4, rel=0.05)  # Adam's first step is the rate
    assert moved["decoder.linear.bias"] == pytest.approx(1e-4, rel=0.05)
    assert moved["decoder.conv_out.weight"] == pytest.approx(1e-3, rel=0.05)
    straight = train(4, "straight")
    train(2, "stopped")
    stopped = train(4, "stopped")
    assert all(torch.equal(straight[name], stopped[name]) for name in straight)


def test_rows_on_a_gpu_make_inputs_there(checkpoint, empty, monkeypatch):
    """With "meta" for a GPU: an operation between its tensors and others is refused there, too."""
    own = draws.generator_for
    monkeypatch.setattr(draws, "generator_for", lambda *parts, device="cpu": own(*parts) if device == "cpu" else None)
    rows = {name: value.to("meta") for name, value in rows_of(checkpoint, 6).items()}
    for inputs in (
        vae_inputs(checkpoint, VaePlan(crop=16)),
        hand_prior_inputs(checkpoint, HandPriorPlan(), empty),
        encoder_inputs(EncoderPlan(), empty),
        picture_inputs(checkpoint, PicturesPlan(weighting="min-snr", timestep_shift=3.0), empty),
    ):
        for value in tree_leaves(list(inputs(rows, Draws(0, 0, 6, range(6), "meta")))):
            assert value.device.type == "meta"
