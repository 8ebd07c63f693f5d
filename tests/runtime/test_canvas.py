"""Requests that bring a picture: what is read of it, where they start, what they keep, and who refuses them."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from handiffuser import HanDiffuser, Request, RequestError
from handiffuser.contract import IMAGE_ENCODER, Manifest
from handiffuser.runtime import cli
from handiffuser.runtime.bundle import Bundle
from handiffuser.runtime.canvas import Blend, canvas_of
from handiffuser.runtime.noise import LATENTS
from handiffuser.runtime.requests import Resolver, absolute, default_id, picture_key
from PIL import Image
from whole import SOLVERS, mixed

H = W = 32  # of the toy bundle's pictures; its latents are 8 x 8


def content(image: Image.Image, form: str = "PNG", **more) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **more)
    return buffer.getvalue()


def photo(height=H, width=W, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def half(height=H, width=W) -> np.ndarray:
    """A mask that paints the left half."""
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = 255
    return mask


@pytest.fixture(scope="module")
def pipeline(toy_bundle):
    return HanDiffuser.load(toy_bundle, device="cpu")


@pytest.fixture(scope="module")
def manifest(toy_bundle):
    return Manifest.load(toy_bundle)


# What is read.


@pytest.mark.parametrize(
    "mask",
    [
        content(Image.fromarray(half())),
        content(Image.fromarray(half()).convert("RGB"), "JPEG", quality=100),
        content(Image.merge("RGBA", [*[Image.new("L", (W, H), 9)] * 3, Image.fromarray(255 - half())])),
        content(Image.fromarray(half()).convert("1")),
    ],
    ids=["grey", "RGB", "transparent", "1 bit"],
)
def test_white_or_transparent_is_painted(manifest, mask):
    canvas = canvas_of(content(Image.fromarray(photo())), mask, manifest)
    np.testing.assert_array_equal(canvas.binary, canvas.mask.round())
    np.testing.assert_allclose(canvas.mask[0], np.repeat([[1, 0]], 4, 1).repeat(8, 0), atol=0.01)
    assert (canvas.hidden[:, : W // 2] == 128).all() and (canvas.hidden[:, W // 2 :] == photo()[:, W // 2 :]).all()
    assert canvas.pixels.shape == (H, W, 3) and not canvas.warnings


def test_a_soft_mask_stays_soft(manifest):
    ramp = np.tile(np.linspace(0, 255, W).round().astype(np.uint8), (H, 1))
    canvas = canvas_of(content(Image.fromarray(photo())), content(Image.fromarray(ramp)), manifest)
    np.testing.assert_allclose(canvas.mask[0, 3] * 255, ramp[0].reshape(8, 4).mean(1), atol=0.6)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_size_and_orientation_become_the_models(manifest, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    canvas = canvas_of(content(Image.fromarray(photo(64, 96)), "JPEG", exif=exif), None, manifest)
    assert canvas.pixels.shape == (H, W, 3)
    size = "64x96" if orientation >= 5 else "96x64"
    assert canvas.warnings == [
        f"The image is {size} and was stretched to 32x32, another shape. Crop it first to keep its proportions."
    ]
    assert not canvas_of(content(Image.fromarray(photo(64, 64))), None, manifest).warnings


def test_a_mask_too_small_to_act_is_mentioned(manifest):
    mask = np.zeros((320, 320), np.uint8)
    mask[5:9, 5:9] = 255
    canvas = canvas_of(content(Image.new("RGB", (320, 320))), content(Image.fromarray(mask)), manifest)
    assert "smaller than 40 x 40 pixels" in canvas.warnings[0]


BOMB = content(Image.new("1", (20_000, 20_000)))
CUT = content(Image.fromarray(photo(200, 200)))[:-500]


@pytest.mark.parametrize(
    ("image", "mask", "words"),
    [
        (photo(), half()[:20], "mask must have the size of its image, 32x32, got 32x20"),
        (photo(), half() * 0, "mask must be white where to paint, got black alone"),
        (b"no picture", None, "image cannot be decoded: not a picture"),
        (photo(), b"", "mask cannot be decoded"),
        (CUT, None, "image cannot be decoded: "),
        (BOMB, None, "image (must have at most 89 million pixels|cannot be decoded: .*decompression bomb)"),
        ("missing.png", None, "image must be a picture, got missing.png, which does not exist"),
        (".", None, "image . cannot be read: It is not a regular file"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(pipeline, image, mask, words):
    with pytest.raises(RequestError, match=words) as caught:
        pipeline.generate(Request("a", image=image, mask=mask))
    assert str(caught.value).endswith(".") and str(caught.value).count(". ") <= 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mask": half()}, "mask must come with an image"),
        ({"strength": 0.5}, "strength must come with an image"),
        ({"image": photo().astype(float)}, r"image must be an array of uint8 \[H, W, 3\], got float64\[32, 32, 3\]"),
        ({"image": photo()[..., :2]}, r"got uint8\[32, 32, 2\]"),
        ({"image": Image.new("CMYK", (4, 4))}, "image must be in mode L, RGB or RGBA, got CMYK"),
        ({"image": 3}, "image must be a path, bytes, a picture or an array, got int"),
        ({"image": "a\0b"}, "image must be the name of a picture's file"),
        ({"image": photo(), "strength": 1.5}, "strength must be a number from 0 to 1, got 1.5"),
    ],
)
def test_fields_that_cannot_be(values, words):
    with pytest.raises(RequestError, match=words) as caught:
        Request("a", **values)
    assert caught.value.param in values


def test_too_low_a_strength_leaves_no_step(pipeline):
    with pytest.raises(RequestError, match=r"at least one of the 4 steps, got 0\.2\. Take 0\.25 or more"):
        pipeline.generate(Request("a", image=photo(), strength=0.2, steps=4))


def test_a_bundle_without_the_encoder_runs_and_refuses_pictures(toy_copy):
    manifest = Manifest.load(toy_copy)
    file = manifest.graphs.pop(IMAGE_ENCODER).file
    del manifest.files[file]
    manifest.save(toy_copy)
    (toy_copy / file).unlink()
    pipeline = HanDiffuser.load(toy_copy, device="cpu")
    assert pipeline.generate("a")[0].image.any()
    with pytest.raises(RequestError, match=r"lacks the graph image_encoder.*Export it again: hd-export"):
        pipeline.generate("a", image=photo())


# Who is who.


def test_all_ways_to_give_a_picture_are_the_same_request(pipeline, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(photo()).save(path, compress_level=1)
    given = [path, str(path), path.read_bytes(), photo(), Image.fromarray(photo())]
    made = [pipeline.generate(Request("a", seed=1, image=image, mask=half() > 0))[0] for image in given]
    assert all(np.array_equal(made[0].image, picture.image) for picture in made)
    assert len({picture.id for picture in made}) == 1, "the content makes the id"
    assert b"sha256 " in made[2].save(tmp_path / "b.png").read_bytes()


def test_content_decides_the_key_and_plain_requests_keep_theirs():
    plain = Request("a", seed=1)
    assert "image" not in {**vars(plain)} or picture_key(plain) == picture_key(replace(plain, image=None))
    keys = [picture_key(Request("a", seed=1, **more)) for more in ({"image": photo()}, {"image": photo(seed=1)}, {})]
    assert len(set(keys)) == 3
    assert default_id(replace(plain, image=photo())) != default_id(plain)


def test_the_strength_is_diffusers_default():
    defaults = {"steps": 4, "solver": "ddim", "guidance": 1.0, "hand_steps": 2, "hand_solver": "ddim"}
    each = Resolver({**defaults, "hand_guidance": 1.0}).each
    for more, strength in (({}, None), ({"image": photo()}, 0.8), ({"image": photo(), "mask": half()}, 1.0)):
        (filled,) = each(Request("a", **more))
        assert filled.strength == strength


# The loop.


def test_in_company_as_alone(pipeline, all_at_once):
    """Requests with a picture, a mask, both and neither share every batch."""
    requests = [
        replace(request, **more)
        for request, more in zip(
            mixed(8),
            [{}, {"image": photo()}, {"image": photo(), "mask": half()}, {"image": photo(seed=2), "strength": 0.5}] * 2,
            strict=True,
        )
    ]
    together = {picture.request.seed: picture for picture in pipeline.generate(requests)}
    for request in requests:
        (alone,) = pipeline.generate(request)
        difference = together[request.seed].image.astype(int) - alone.image
        assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("solver", [*SOLVERS, "dpm++2m-karras", "lcm", "ddim-early"])
def test_what_is_black_comes_back_and_the_rest_does_not(pipeline, solver):
    """The toy's encoder and decoder are no inverses: the kept part is what the decoder makes of the encoded picture."""
    (picture,) = pipeline.generate("a", image=photo(), mask=half(), solver=solver, steps=6)
    latents = pipeline.loop.engines[IMAGE_ENCODER]({"image": photo()[None]})["latents"]
    kept = pipeline.loop.engines["image_decoder"]({"latents": latents})["image"][0]
    np.testing.assert_array_equal(picture.image[:, W // 2 :], kept[:, W // 2 :])
    assert np.abs(picture.image[:, : W // 2].astype(int) - kept[:, : W // 2]).max() > 5


def test_a_unet_of_inpainting_sees_mask_and_picture(toy_inpainter):
    """And all grey where nothing is given."""
    pipeline = HanDiffuser.load(toy_inpainter, device="cpu")
    kinds = [{}, {"image": photo()}, {"image": photo(), "mask": half()}, {"image": photo(seed=1), "mask": half()}]
    requests = [Request("a", seed=1, strength=1.0 if more else None, **more) for more in kinds]
    made = [picture.image for picture in pipeline.generate(requests)]
    assert np.array_equal(made[0], made[1]), "nothing of the picture is seen"
    assert (made[1] != made[2]).any() and (made[2][:, W // 2 :] != made[3][:, W // 2 :]).any()


def test_a_picture_is_encoded_once_for_all_its_requests(pipeline, monkeypatch):
    encoder, calls = pipeline.loop.engines[IMAGE_ENCODER], []
    monkeypatch.setitem(pipeline.loop.engines, IMAGE_ENCODER, lambda feeds: calls.append(1) or encoder(feeds))
    pipeline.loop._latents.clear()
    pipeline.generate("a", images_per_prompt=4, image=photo(seed=7))
    assert len(calls) == 1


def test_each_step_leaves_the_kept_part_at_its_level(toy_bundle):
    """In the state's own scale, which for Euler's is sigma space's."""
    bundle = Bundle.load(toy_bundle)
    abar = bundle._schedules["unet"].alphas_cumprod()
    z0, noise = np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float32)
    for solver in ("ddim", "ddpm", "euler", "dpm++2m", "plms"):
        request = Request("a", seed=0, solver=solver, steps=5, guidance=1.0, strength=0.8, image=photo())
        table, shares = bundle.table(LATENTS, request), bundle.shares(request)
        blend = Blend(z0, noise, np.zeros((1, 8, 8), np.float32), shares)
        for i, t in enumerate(table.timesteps):
            scale = table.rows[i, 1]
            alpha = np.sqrt(np.interp(t, np.arange(1000), abar))
            expected = alpha * z0 + np.sqrt(1 - alpha**2) * noise
            state = blend.start() if i == 0 else blend(i - 1, np.full_like(z0, 7))
            np.testing.assert_allclose(scale * state, expected, atol=1e-5)
        np.testing.assert_array_equal(blend(len(table.rows) - 1, np.full_like(z0, 7)), z0)


def test_a_file_that_changes_during_the_run_fails_alone(pipeline, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(photo(seed=3)).save(path)
    requests, refused = pipeline.prepare([Request("a", image=str(path)), Request("b")])
    assert not refused
    path.unlink()
    results = {result.request.prompt: result for result in pipeline.run(requests)}
    assert "does not exist" in results["a"].sentence and results["b"].image.any()


def test_nan_of_the_encoder_fails_alone(pipeline, monkeypatch):
    monkeypatch.setitem(
        pipeline.loop.engines, IMAGE_ENCODER, lambda feeds: {"latents": np.full((1, 4, 8, 8), np.nan, np.float32)}
    )
    pipeline.loop._latents.clear()
    requests, _ = pipeline.prepare([Request("a", image=photo()), Request("b")])
    results = {result.request.prompt: result for result in pipeline.run(requests)}
    pipeline.loop._latents.clear()
    assert "image_encoder gave NaN" in results["a"].sentence and results["b"].image.any()


# The command.


def run(*arguments) -> int:
    return cli.run.main([str(argument) for argument in arguments], standalone_mode=False)


def test_hd_run_paints_pictures_again(toy_bundle, tmp_path, capsys):
    """By options, by lines of a .jsonl with names relative to it, and a second time from where it was."""
    Image.fromarray(photo(48, 64)).save(tmp_path / "a.jpg")
    Image.fromarray(half(48, 64)).save(tmp_path / "m.png")
    lines = [
        {"prompt": "one", "image": "a.jpg", "mask": "m.png"},
        {"prompt": "two", "image": "a.jpg", "strength": 0.5},
        {"prompt": "three"},
        {"prompt": "four", "image": "m.jpg"},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = (toy_bundle, "--prompts", tmp_path / "p.jsonl", "-o", tmp_path / "out")
    assert run(*command) == 0
    said = capsys.readouterr().err
    assert "line 4: image must be a picture" in said and "stretched to 32x32" in said
    records = {r["prompt"]: r for r in map(json.loads, (p.read_text() for p in (tmp_path / "out").glob("*.json")))}
    assert records.keys() == {"one", "two", "three"}
    assert (records["one"]["strength"], records["two"]["strength"], records["three"]["strength"]) == (1.0, 0.5, None)
    assert records["one"]["image"].endswith("a.jpg")
    assert run(*command) == 0 and "3 skipped" in capsys.readouterr().err

    options = ("--init-image", tmp_path / "a.jpg", "--mask", tmp_path / "m.png", "--strength", "1")
    assert run(toy_bundle, "one", *options, "-o", tmp_path / "again") == 0
    one, again = (next(folder.glob("one*[0-9a-f].png")) for folder in (tmp_path / "out", tmp_path / "again"))
    assert one.name == again.name
    assert np.array_equal(*(np.asarray(Image.open(path)) for path in (one, again)))


def test_one_sentence_for_a_picture_that_all_prompts_share(toy_bundle, tmp_path):
    with pytest.raises(RequestError, match=r"image must be a picture, got .*no.png, which does not exist"):
        run(toy_bundle, "one", "two", "--init-image", tmp_path / "no.png", "-o", tmp_path / "out")


def test_files_have_absolute_names_for_other_processes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    request = absolute(Request("a", image="a.png", mask=photo()[..., 0], hands="none"))
    assert request.image == str(tmp_path / "a.png") and isinstance(request.mask, bytes) and request.hands == "none"
