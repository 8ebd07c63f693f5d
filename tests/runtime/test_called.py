"""The pipeline called as diffusers' users call theirs: names, order of pictures, and what is refused by name."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from handiffuser import HanDiffuser, RequestError, shipped
from handiffuser.runtime import called
from hub_server import hub_in_place


@pytest.fixture(scope="module")
def pipeline():
    with HanDiffuser.from_pretrained("demo", device="cpu", threads=1, backend="onnxruntime") as pipeline:
        yield pipeline


def test_pictures_are_those_of_generate(pipeline):
    asked = {"negative_prompt": "red", "num_inference_steps": 3, "guidance_scale": 2.0}
    output = pipeline(["a fist", "two open hands"], num_images_per_prompt=2, seed=7, **asked)
    assert output.seeds == [7, 8, 9, 10] and len(output.images) == len(output.hands) == 4
    ours = {"negative_prompt": "red", "steps": 3, "guidance": 2.0}
    for picture, prompt, seed in zip(
        output.pictures, ["a fist"] * 2 + ["two open hands"] * 2, output.seeds, strict=True
    ):
        (alone,) = pipeline.generate(prompt, seed=seed, **ours)
        assert (picture.request.prompt, picture.request.seed) == (prompt, seed)
        assert np.abs(picture.image.astype(int) - alone.image).max() <= 1
    assert (np.asarray(output.images[0]) == output.pictures[0].image).all()
    assert output.hands[0]["right_hand_pose"].shape == (45,)


def test_generators_seeds_and_arrays(pipeline):
    one = pipeline("a fist", generator=torch.Generator().manual_seed(5), output_type="np", num_inference_steps=1)
    height, width = pipeline.manifest.image_size
    assert one.images.shape == (1, height, width, 3) and one.images.dtype == np.float32 and one.seeds == [5]
    assert one.images.min() >= 0 and one.images.max() <= 1
    two = [torch.Generator().manual_seed(seed) for seed in (5, 9)]
    both = pipeline(["a fist", "a fist"], generator=two, output_type="np", num_inference_steps=1)
    assert both.seeds == [5, 9] and np.abs(both.images[0] - one.images[0]).max() <= 1.01 / 255
    negative = called.seeds_of(torch.Generator().manual_seed(-3), None, 1)
    assert 0 <= negative[0] < 2**63
    new = {tuple(called.seeds_of(None, None, 2)) for _ in range(4)}
    assert len(new) == 4  # new pictures each time, as in diffusers


def test_negative_prompts_one_for_each(pipeline):
    output = pipeline(["a fist", "a palm"], negative_prompt=["red", "blue"], seed=1, num_inference_steps=1)
    assert [picture.request.negative_prompt for picture in output.pictures] == ["red", "blue"]


def test_the_callback_sees_each_step(pipeline):
    seen = []

    def callback(pipe, step, timestep, kwargs):
        seen.append((step, timestep, None if kwargs["latents"] is None else kwargs["latents"].shape))
        assert pipe is pipeline
        return kwargs

    pipeline("a fist", num_inference_steps=4, seed=1, callback_on_step_end=callback)
    table = pipeline.bundle.table("latents", pipeline.prepare([called.Request("a fist", steps=4)])[0][0])
    shape = (1, *pipeline.manifest.latent_size)
    assert seen == [(n, float(table.timesteps[n]), shape if n < 3 else None) for n in range(4)]
    seen.clear()
    pipeline(["a fist", "a palm", "two hands"], num_inference_steps=4, seed=1, callback_on_step_end=callback)
    assert sorted(step for step, *_ in seen) == sorted([0, 1, 2, 3] * 3)


def test_the_callback_may_stop_and_not_change(pipeline):
    def stop(pipe, step, timestep, kwargs):
        raise KeyError("enough")

    def change(pipe, step, timestep, kwargs):
        return {"latents": 0}

    def interrupt(pipe, step, timestep, kwargs):
        pipe._interrupt = True

    asked = {"num_inference_steps": 3, "seed": 1}
    with pytest.raises(KeyError, match="enough"):
        pipeline("a fist", callback_on_step_end=stop, **asked)
    for callback in (change, interrupt):
        with pytest.raises(RequestError, match=r"must not change latents or set _interrupt"):
            pipeline("a fist", callback_on_step_end=callback, **asked)
    assert len(pipeline("a fist", **asked).images) == 1  # and it goes on


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"output_type": "pt"}, r"output_type must be one of pil, np, got 'pt'"),
        ({"return_dict": False}, r"return_dict must be True"),
        ({"height": 500}, r"size must be multiples of \d+ up to 4096 pixels, got \d+x500"),
        ({"height": 512, "size": "512x512"}, r"size must be left out with height and width"),
        ({"seed": 1, "generator": torch.Generator()}, r"must not both be given"),
        ({"generator": [torch.Generator()] * 3}, r"one for each of 1 pictures, got 3"),
        ({"generator": 7}, r"generator must be a torch.Generator, got int"),
        ({"seed": "7"}, r"seed must be a whole number"),
        ({"num_images_per_prompt": 0}, r"num_images_per_prompt must be at least 1"),
        ({"negative_prompt": ["a", "b"]}, r"one for each of 1 prompts, got 2"),
        ({"steps": 3, "num_inference_steps": 3}, r"num_inference_steps must be given under one name"),
        ({"num_inference_steps": 0}, r"must be a whole number from 1 to 1000, got 0"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, r"must be \['latents'\]"),
        ({"stepz": 3}, r"The argument 'stepz' is unknown"),
        *(({name: object()}, rf"must be called without {name}\. ") for name in called.ARGUMENTS),
    ],
)
def test_refused_by_name(pipeline, arguments, said):
    with pytest.raises(RequestError, match=said):
        pipeline("a fist", **arguments)


def test_every_argument_of_diffusers_is_known():
    """Taken, or refused with what is meant here: none of them is merely unknown."""
    from diffusers import StableDiffusionPipeline

    theirs = set(inspect.signature(StableDiffusionPipeline.__call__).parameters) - {"self", "kwargs"}
    ours = set(inspect.signature(called.call).parameters) | {"callback", "callback_steps"}
    assert theirs <= ours | set(called.ARGUMENTS)
    assert set(inspect.signature(HanDiffuser.__call__).parameters) - {"self"} <= ours


def test_what_diffusers_pipelines_have_beside(pipeline):
    with pytest.raises(AttributeError, match=r'HanDiffuser has no to\. Choose when you load: .*device="cuda"'):
        pipeline.to("cuda")
    with pytest.raises(AttributeError, match=r"has no scheduler\. Choose a solver in the call"):
        _ = pipeline.scheduler
    assert not hasattr(pipeline, "enable_attention_slicing") and not hasattr(pipeline, "nothing")


def test_from_pretrained(tmp_path, monkeypatch):
    for arguments, said in (
        ({"torch_dtype": torch.float16}, r"without torch_dtype\. A bundle has its precision"),
        ({"token": "x"}, r"without token\. Log in"),
        ({"revision": "v1"}, r"revision must be left out for a folder"),
        ({"nothing": 1}, r"The argument 'nothing' is unknown"),
    ):
        with pytest.raises(RequestError, match=said):
            HanDiffuser.from_pretrained("demo", **arguments)
    with hub_in_place(monkeypatch, tmp_path / "cache") as server:
        repo = server.add("org/tiny", shipped.bundle_path())
        with HanDiffuser.from_pretrained("org/tiny", revision=repo.sha, device="cpu", threads=1) as pipeline:
            assert len(pipeline("a fist", num_inference_steps=1).images) == 1
