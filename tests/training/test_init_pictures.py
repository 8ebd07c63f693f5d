"""Pictures that come in: ours are those of diffusers' img2img and inpaint pipelines, of the same folder and noise.

The loop is the product's, on the graphs' own modules in PyTorch; a slow test exports them.
"""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from commands import invoke
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.stable_diffusion import (
    pipeline_stable_diffusion_img2img,
    pipeline_stable_diffusion_inpaint,
)
from handiffuser import HanDiffuser, Request
from handiffuser.contract import GraphSpec
from handiffuser.errors import CheckpointError
from handiffuser.evaluation.eager import Eager
from handiffuser.export.bundle import manifest_of, run_module
from handiffuser.export.graphs import graphs
from handiffuser.models.checkpoint import Checkpoint
from handiffuser.models.smplh import SMPLH
from handiffuser.runtime.bundle import Bundle
from handiffuser.runtime.host import HostLoop
from handiffuser.runtime.noise import LATENTS, normal
from handiffuser.tokens import PromptTokenizer
from handiffuser.training import init
from handiffuser.training.stages import PictureLoss
from PIL import Image
from stable_diffusion import GUIDANCE, SEED, SIZE, change, stable_diffusion, write

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BETAS |= {"timestep_spacing": "leading", "steps_offset": 1}  # as the folder's own scheduler has them
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {**BETAS, "clip_sample": False, "set_alpha_to_one": False}),
    "euler": ("EulerDiscreteScheduler", BETAS),
    "dpm++2m": ("DPMSolverMultistepScheduler", BETAS),
    "plms": ("PNDMScheduler", {**BETAS, "skip_prk_steps": True}),
}
PROMPT, STEPS = "a photo of a cat", 6


class TorchEngine:
    """A graph's own module, as an engine."""

    device, batches = "cpu", None

    def __init__(self, graph):
        self.module, self.names = copy.deepcopy(graph.module), graph.outputs  # later graphs change parts of it
        inputs = [graph.spec(name, value) for name, value in graph.inputs.items()]
        with torch.no_grad():
            made = run_module(self.module, list(graph.inputs.values()))
        outputs = [graph.spec(name, value) for name, value in zip(graph.outputs, made, strict=True)]
        self.spec = GraphSpec(f"{graph.name}.onnx", inputs, outputs)

    @torch.no_grad()
    def __call__(self, feeds):
        inputs = [torch.from_numpy(np.array(feeds[spec.name])) for spec in self.spec.inputs]
        return {name: value.numpy() for name, value in zip(self.names, run_module(self.module, inputs), strict=True)}


@pytest.fixture(scope="module")
def pairs():
    return {}


@pytest.fixture
def pair(request, pairs, tmp_path_factory):
    """A folder of Stable Diffusion, and our loop on the checkpoint that `hd-train init` makes of it."""
    if request.param not in pairs:
        pairs[request.param] = made(int(request.param[0]), tmp_path_factory)
    return pairs[request.param]


def made(channels, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(init, "PRIOR", (32, 2, 2))
        folder = stable_diffusion(tmp_path_factory.mktemp("sd"), channels=channels)
        checkpoint = init.from_stable_diffusion(folder)
        checkpoint.save(folder.with_name("start"))
    checkpoint = Checkpoint.load(folder.with_name("start"))
    engines = {graph.name: TorchEngine(graph) for graph in graphs(checkpoint, SMPLH.load(checkpoint.body))}
    specs = {name: engine.spec for name, engine in engines.items()}
    manifest = manifest_of(checkpoint, folder.with_name("start"), specs, "fp32", {})
    words = PromptTokenizer(folder.with_name("start") / "tokenizer/tokenizer.json", checkpoint.special_tokens)
    bundle = Bundle(manifest, words)
    return folder, checkpoint, HanDiffuser(bundle, HostLoop(bundle, engines, 4))


def photo() -> Image.Image:
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    waves = np.stack([127 + 120 * np.sin(x / 3), 127 + 120 * np.cos(y / 4), (x * 5 + y * 3) % 256], -1)
    return Image.fromarray(waves.astype(np.uint8))


def mask() -> Image.Image:
    """Aligned to the latents: diffusers picks a pixel of each cell, ours takes its mean."""
    image = np.zeros((SIZE, SIZE), np.uint8)
    image[8:24, 4:20] = 255
    return Image.fromarray(image)


def theirs(kind, folder, solver, monkeypatch, **arguments) -> np.ndarray:
    """diffusers' own picture from our noise, with the mean of the posterior in place of a sample."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    noise = torch.from_numpy(normal(SEED, LATENTS, 0, (4, SIZE // 2, SIZE // 2)))[None]
    for module in (pipeline_stable_diffusion_img2img, pipeline_stable_diffusion_inpaint):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise)
    name, config = SCHEDULERS[solver]
    write(folder / "scheduler/scheduler_config.json", {"_class_name": name, "_diffusers_version": "0.14.0", **config})
    change(folder / "model_index.json", scheduler=["diffusers", name])
    pipeline = kind.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        PROMPT, image=photo(), num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="np", **arguments
    ).images[0]
    return (image * 255).round().astype(np.uint8)


def ours(pipeline, solver, **arguments) -> np.ndarray:
    settings = {"seed": SEED, "steps": STEPS, "solver": solver, "guidance": GUIDANCE, "hands": "none"}
    (picture,) = pipeline.generate(Request(PROMPT, image=photo(), **settings, **arguments))
    return picture.image


def near(one: np.ndarray, other: np.ndarray) -> None:
    assert np.abs(one.astype(int) - other).max() <= 1
    assert other.std() > 10, "a grey picture would prove nothing"


FOUR, NINE = "4 channels", "9 channels"
SLOW, BOTH = pytest.mark.slow, pytest.mark.parametrize("pair", [FOUR, NINE], indirect=True)


@pytest.mark.parametrize("pair", [FOUR], indirect=True)
@pytest.mark.parametrize(
    ("solver", "strength"),
    [
        ("euler", 0.8),
        *(
            pytest.param(solver, strength, marks=SLOW)
            for solver in ("ddim", "euler", "dpm++2m")
            for strength in (1.0, 0.8, 0.35)
        ),
    ],
)
def test_the_whole_picture_painted_again(pair, solver, strength, monkeypatch):
    folder, _, pipeline = pair
    expected = theirs(StableDiffusionImg2ImgPipeline, folder, solver, monkeypatch, strength=strength)
    near(ours(pipeline, solver, strength=strength), expected)


@pytest.mark.parametrize(
    ("pair", "solver", "strength"),
    [
        (FOUR, "dpm++2m", 0.7),
        (NINE, "ddim", 1.0),
        *(
            pytest.param(channels, solver, strength, marks=SLOW)
            for channels in (FOUR, NINE)
            for solver in ("ddim", "euler", "dpm++2m", "plms")
            for strength in (1.0, 0.7)
            if solver != "plms" or strength == 1  # diffusers' PNDMScheduler loses its place where steps are left out
        ),
    ],
    indirect=["pair"],
)
def test_a_part_painted_again(pair, solver, strength, monkeypatch):
    folder, _, pipeline = pair
    expected = theirs(StableDiffusionInpaintPipeline, folder, solver, monkeypatch, strength=strength, mask_image=mask())
    found = ours(pipeline, solver, strength=strength, mask=mask())
    near(found, expected)
    assert not np.array_equal(found, ours(pipeline, solver, strength=strength)), "the mask counts"


@SLOW
@BOTH
def test_the_defaults_of_strength(pair, monkeypatch):
    folder, checkpoint, pipeline = pair
    near(ours(pipeline, "ddim", mask=mask()), theirs(StableDiffusionInpaintPipeline, folder, "ddim", monkeypatch,
         mask_image=mask()))  # fmt: skip
    if not checkpoint.inpaints:
        near(ours(pipeline, "ddim"), theirs(StableDiffusionImg2ImgPipeline, folder, "ddim", monkeypatch))


@pytest.mark.parametrize("pair", [NINE], indirect=True)
def test_rows_of_all_kinds_share_a_batch(pair, all_at_once):
    _, _, pipeline = pair
    settings = {"steps": STEPS, "solver": "ddim", "guidance": GUIDANCE, "hands": "none"}
    kinds = [{}, {"image": photo()}, {"image": photo(), "mask": mask()}, {"image": photo(), "strength": 0.5}]
    requests = [Request(PROMPT, seed=seed, **settings, **more) for seed, more in enumerate(kinds)]
    for request, together in zip(requests, pipeline.generate(requests), strict=True):
        (alone,) = pipeline.generate(request)
        assert np.abs(alone.image.astype(int) - together.image).max() <= 1


@BOTH
def test_what_does_not_feed_a_unet_of_inpainting_says_so(pair):
    _, checkpoint, _ = pair
    if not checkpoint.inpaints:
        PictureLoss(checkpoint, None)
        return
    for make in (lambda: PictureLoss(checkpoint, None), lambda: Eager(checkpoint, None, None)):
        with pytest.raises(CheckpointError, match=r"must take 4 channels for .*, got 9, which is for inpainting"):
            make()


@SLOW
@BOTH
def test_exported_it_paints_the_same(pair, tmp_path):
    """`hd-train init`, `hd-export` and `hd-run` as a user types them."""
    folder, _, pipeline = pair
    result = invoke("export.cli", folder.with_name("start"), tmp_path / "bundle")
    assert result.returncode == 0, result.stderr
    photo().save(tmp_path / "a.png")
    mask().save(tmp_path / "m.png")
    common = ("--seed", SEED, "--steps", STEPS, "--solver", "ddim", "--guidance", GUIDANCE, "--no-hands")
    pictures = ("--init-image", tmp_path / "a.png", "--mask", tmp_path / "m.png")
    result = invoke("runtime.cli", tmp_path / "bundle", PROMPT, *common, *pictures, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    (record,) = (tmp_path / "out").glob("*.json")
    made = np.asarray(Image.open(tmp_path / "out" / f"{json.loads(record.read_text())['id']}.png"))
    near(made, ours(pipeline, "ddim", mask=mask()))
