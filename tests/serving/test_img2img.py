"""img2img of AUTOMATIC1111's web UI: requests as its clients send them, and where their pictures are painted."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from handiffuser.serving.img2img import Img2Img, around, brought, filled, whole
from handiffuser.serving.service import Front
from PIL import Image, ImageDraw
from served import serving

SIZE = 32  # of the toy's pictures

# What each client sends, by its sources.
WEBUIAPI = {
    "resize_mode": 0, "denoising_strength": 0.75, "mask_blur": 4, "inpainting_fill": 0, "inpaint_full_res": True,
    "inpaint_full_res_padding": 0, "inpainting_mask_invert": 0, "initial_noise_multiplier": 1, "styles": [],
    "subseed": -1, "subseed_strength": 0, "seed_resize_from_h": 0, "seed_resize_from_w": 0, "batch_size": 1,
    "n_iter": 1, "steps": 4, "cfg_scale": 3.0, "image_cfg_scale": 1.5, "width": SIZE, "height": SIZE,
    "restore_faces": False, "tiling": False, "do_not_save_samples": False, "do_not_save_grid": False,
    "negative_prompt": "", "eta": 1.0, "s_churn": 0, "s_tmax": 0, "s_tmin": 0, "s_noise": 1, "override_settings": {},
    "override_settings_restore_afterwards": True, "sampler_name": "Euler", "scheduler": "automatic",
    "sampler_index": "Euler", "include_init_images": False, "script_name": None, "script_args": [],
    "send_images": True, "save_images": False, "alwayson_scripts": {},
}  # fmt: skip
KRITA = {
    "mask_blur": 4, "inpainting_mask_invert": 0, "inpainting_fill": 1, "inpaint_full_res": 0,
    "inpaint_full_res_padding": 32, "denoising_strength": 0.75, "width": SIZE, "height": SIZE, "steps": 4,
    "sampler_name": "Euler", "subseed": "-1", "subseed_strength": 0.0, "n_iter": 1, "batch_size": 1,
    "enable_hr": False, "cfg_scale": 3.0, "negative_prompt": "", "styles": [], "refiner": "None",
    "override_settings": {"sd_model_checkpoint": "toy", "sd_vae": "Automatic", "img2img_color_correction": False},
    "override_settings_restore_afterwards": False,
}  # fmt: skip
FULL_PAYLOAD = {
    "comments": {}, "disable_extra_networks": False, "image_cfg_scale": 1.5, "initial_noise_multiplier": 1.0,
    "inpaint_full_res": 0, "inpaint_full_res_padding": 32, "inpainting_fill": 1, "mask_blur_x": 4, "mask_blur_y": 4,
    "mask_round": True, "resize_mode": 0, "s_tmax": None, "steps": 4, "width": SIZE, "height": SIZE,
    "sampler_name": "Euler", "cfg_scale": 3.0,
    "alwayson_scripts": {"Refiner": {"args": [False, "", 0.8]}, "ControlNet": {"args": [{"enabled": False}]}},
}  # fmt: skip


def noise(height, width, seed=0):
    small = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encoded(array, url=False, **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", **options)
    text = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/png;base64,{text}" if url else text


def spot(height, width, box):
    """A mask that is white in a box of left, top, right, bottom."""
    image = Image.new("L", (width, height))
    ImageDraw.Draw(image).rectangle(box, fill=255)
    return np.asarray(image)


def ask(served, picture, mask=None, **fields):
    pictures = {"init_images": [picture if isinstance(picture, str) else encoded(picture)]}
    if mask is not None:
        pictures["mask"] = mask if isinstance(mask, str) else encoded(mask)
    return served.client.post(
        "/sdapi/v1/img2img", json={"prompt": "a fist", "seed": 7, "steps": 4, **pictures, **fields}
    )


def shown(answer, i=0):
    assert answer.status_code == 200, answer.text[:400]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][i]))))


def warnings(answer):
    return json.loads(answer.json()["info"])["warnings"]


@pytest.mark.parametrize("fields", [WEBUIAPI, KRITA, FULL_PAYLOAD], ids=["webuiapi", "Krita", "the whole form"])
def test_the_requests_of_clients(served, fields):
    picture = noise(SIZE, SIZE)
    answer = ask(served, picture, **fields)
    form = {"prompt": "a fist", "seed": "7", "num_inference_steps": "4", "guidance_scale": "3", "strength": "0.75",
            "solver": "euler"}  # fmt: skip
    content = base64.b64decode(encoded(picture))
    edit = served.client.post("/v1/images/edits", files={"image": content}, data=form).json()["data"][0]
    assert np.array_equal(shown(answer), np.asarray(Image.open(io.BytesIO(base64.b64decode(edit["b64_json"])))))
    assert warnings(answer) == [] and answer.json()["parameters"]["init_images"] is None
    painted = shown(ask(served, picture, spot(SIZE, SIZE, (8, 8, 20, 20)), **fields))
    changed = (painted != picture).any(-1)
    assert changed[10:18, 10:18].mean() > 0.5 and not changed[:, 30:].any()


def test_the_part_around_a_mask_is_painted_in_a_large_picture(served):
    picture = noise(300, 400)
    mask = spot(300, 400, (250, 40, 299, 79))
    answer = ask(served, encoded(picture, True), encoded(mask, True), mask_blur=0, inpaint_full_res_padding=8,
                 width=512, height=512, include_init_images=True, denoising_strength=1)  # fmt: skip
    out, changed = shown(answer), (shown(answer) != picture).any(-1)
    assert out.shape == picture.shape and not changed[mask == 0].any() and changed[mask > 0].mean() > 0.9
    info = json.loads(answer.json()["info"])
    assert (info["width"], info["height"]) == (400, 300) and "Denoising strength: 1" in info["infotexts"][0]
    assert answer.json()["parameters"]["mask"].startswith("data:image/png")
    assert "looks soft" in warnings(ask(served, picture, mask, inpainting_mask_invert=1))[0]
    # An opaque spot on a transparent layer is the same mask; so is the inverse one.
    layer = np.dstack([np.zeros((300, 400, 3), np.uint8), mask])
    same = {"mask_blur": 0, "inpaint_full_res_padding": 8, "denoising_strength": 1}
    assert np.array_equal(shown(ask(served, picture, layer, **same)), out)
    assert np.array_equal(shown(ask(served, picture, 255 - mask, inpainting_mask_invert=1, **same)), out)


def test_what_fills_the_mask_counts_below_full_strength(served):
    picture, mask = noise(SIZE, SIZE), spot(SIZE, SIZE, (8, 8, 22, 22))
    made = [shown(ask(served, picture, mask, inpainting_fill=fill, denoising_strength=0.5)) for fill in (0, 1, 3)]
    assert not any(np.array_equal(made[i], made[i - 1]) for i in range(3))


def test_sizes_of_any_shape(toy_bundle, tmp_path):
    picture = noise(90, 60)
    with serving(toy_bundle, tmp_path, front=Front(any_size=True)) as served:
        for mode in (0, 1, 2):
            answer = ask(served, picture, width=48, height=64, resize_mode=mode, batch_size=2)
            assert shown(answer, 1).shape == (64, 48, 3) and "bars" not in "".join(warnings(answer))
        kept = shown(ask(served, picture, spot(90, 60, (0, 0, 10, 10)), inpaint_full_res=False, width=48, height=64))
        assert np.array_equal(kept[40:], brought(picture, (64, 48), 0)[40:])
        answer = ask(served, encoded(picture, icc_profile=b"colours"), width=48, height=64)
        assert Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0]))).info["icc_profile"] == b"colours"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"init_images": []}, "init_images must have at least 1 item"),
        ({"init_images": ["a", "b"]}, "init_images must be one picture, got 2."),
        ({"init_images": ["https://example.org/x.png"]}, "init_images must be base64, got a URL."),
        ({"init_images": ["hand.png"]}, "init_images must be base64, got 'hand.png'."),
        ({"init_images": ["aGFuZA=="]}, "init_images must be PNG, JPEG or WebP."),
        ({"mask": encoded(np.zeros((5, 6), np.uint8))}, "mask must have the size of its image, 32x32, got 6x5."),
        ({"mask": encoded(np.zeros((SIZE, SIZE), np.uint8))}, "mask must be white where to paint"),
        ({"resize_mode": 3}, "resize_mode must be one of 0 (just resize), 1 (crop and resize)"),
        ({"inpainting_fill": 2}, "This server fills with no latent noise"),
        ({"denoising_strength": 0.1}, "denoising_strength must leave at least one of the 4 steps, got 0.1."),
        ({"denoising_strength": 2}, "denoising_strength must be less than or equal to 1, got 2."),
        ({"latent_mask": "x"}, 'latent_mask must be "", got "x".'),
        ({"width": 64}, "width and height must be 32x32, got '64x32'."),
    ],
)
def test_refusals(served, fields, words):
    answer = ask(served, noise(SIZE, SIZE), **fields)
    assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text


def test_windows():
    for size, shape in (((90, 60), (32, 32)), ((60, 90), (32, 64)), ((50, 50), (32, 32))):
        window = whole(size, shape)
        assert window.width / window.height == pytest.approx(shape[1] / shape[0])
        assert window.x <= 0 and window.y <= 0 and min(-window.x, -window.y) == 0
    window = around(spot(300, 400, (380, 290, 399, 299)), 10, (32, 32))
    assert (window.width, window.height, window.x, window.y) == (30, 30, 370, 270)  # within the picture
    wide = around(spot(100, 400, (0, 0, 399, 99)), 10, (32, 32))
    assert (wide.width, wide.height, wide.x, wide.y) == (400, 400, 0, -150)


def test_a_hole_takes_the_colours_around_it():
    picture = np.zeros((80, 80, 3), np.uint8)
    picture[:, :40], picture[:, 40:] = (200, 0, 0), (0, 200, 0)
    hole = spot(80, 80, (30, 30, 50, 50))
    picture[hole > 0] = 255
    out = filled(picture, hole)
    assert np.array_equal(out[hole == 0], picture[hole == 0]) and out[hole > 0].max() < 210
    assert out[40, 33, 0] > out[40, 33, 1] and out[40, 47, 1] > out[40, 47, 0] and out[hole > 0][:, 2].max() < 20
    assert (filled(picture, np.full((80, 80), 255, np.uint8)) == 128).all()


def test_the_mask_of_the_web_ui_is_sharp_before_it_is_blurred():
    from handiffuser.serving.img2img import mask_in

    body = Img2Img(prompt="a", init_images=["x"], mask=encoded(np.full((9, 9), 130, np.uint8)), mask_blur=0)
    assert (mask_in(body, (9, 9), 100) == 255).all()
