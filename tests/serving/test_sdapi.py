"""The API of AUTOMATIC1111's web UI: requests as its clients send them, and pictures equal to the other API's."""

from __future__ import annotations

import base64
import io
import json
import threading

import httpx
import numpy as np
import pytest
from handiffuser.serving.messages import Takes
from handiffuser.serving.service import Front, Limits
from PIL import Image
from served import serving

# What each client sends, by its sources: fields that it sets unasked.
OPEN_WEBUI = {"batch_size": 1, "width": 32, "height": 32, "steps": 3}
SILLY_TAVERN = {
    "url": "http://localhost:8000", "auth": "", "negative_prompt": "", "sampler_name": "Euler",
    "scheduler": "automatic", "steps": 3, "cfg_scale": 3,
    "width": 32, "height": 32, "restore_faces": False, "enable_hr": False,
    "hr_upscaler": "Latent", "hr_scale": 1, "denoising_strength": 0.7, "hr_second_pass_steps": 0,
    "override_settings": {"CLIP_stop_at_last_layers": 1}, "override_settings_restore_afterwards": True, "clip_skip": 1,
    "save_images": True, "send_images": True, "do_not_save_grid": False, "do_not_save_samples": False,
}  # fmt: skip
WEBUIAPI = {
    "enable_hr": False, "hr_scale": 2, "hr_upscaler": "Latent", "hr_second_pass_steps": 0, "hr_resize_x": 0,
    "hr_resize_y": 0, "hr_checkpoint_name": None, "hr_sampler_name": None, "hr_scheduler": None, "hr_prompt": "",
    "hr_negative_prompt": "", "denoising_strength": 0.7, "firstphase_width": 0, "firstphase_height": 0, "styles": [],
    "subseed": -1, "subseed_strength": 0.0, "seed_resize_from_h": 0, "seed_resize_from_w": 0, "batch_size": 1,
    "n_iter": 1, "steps": 3, "cfg_scale": 3.0, "width": 32, "height": 32, "restore_faces": False, "tiling": False,
    "do_not_save_samples": False, "do_not_save_grid": False, "negative_prompt": "", "eta": 1.0, "s_churn": 0,
    "s_tmax": 0, "s_tmin": 0, "s_noise": 1, "override_settings": {}, "override_settings_restore_afterwards": True,
    "sampler_name": "Euler a", "scheduler": "automatic", "sampler_index": "Euler a", "script_name": None,
    "script_args": [], "send_images": True, "save_images": False, "alwayson_scripts": {"ControlNet": {"args": []}},
}  # fmt: skip
KRITA = {
    "width": 32, "height": 32, "steps": 3, "sampler_name": "DDIM", "seed": "7", "subseed": "-1",
    "subseed_strength": 0.0, "n_iter": 1, "batch_size": 1,
    "enable_hr": False, "cfg_scale": 3.0, "negative_prompt": "", "styles": [],
    "override_settings": {"sd_model_checkpoint": "toy", "sd_vae": "Automatic"},
    "override_settings_restore_afterwards": False,
}  # fmt: skip


def decoded(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def paint(served, prompt="a fist", **fields):
    return served.client.post("/sdapi/v1/txt2img", json={"prompt": prompt, "seed": 7, **fields})


@pytest.mark.parametrize(
    ("fields", "warned"),
    [(OPEN_WEBUI, []), (SILLY_TAVERN, []), (WEBUIAPI, ["The sampler Euler a is not here."]), (KRITA, [])],
    ids=["Open WebUI", "SillyTavern", "webuiapi", "Krita"],
)
def test_the_requests_of_clients(served, fields, warned):
    answer = paint(served, **fields).json()
    info = json.loads(answer["info"])
    same = {"num_inference_steps": 3, "guidance_scale": fields.get("cfg_scale"), "seed": 7}
    solver = {"Euler": "euler", "DDIM": "ddim"}.get(fields.get("sampler_name"))
    other = served.generate(**same, solver=solver).json()["data"][0]
    assert len(answer["images"]) == 1 and np.array_equal(decoded(answer["images"][0]), decoded(other["b64_json"]))
    assert info["seed"] == 7 and info["steps"] == 3 and info["all_seeds"] == [7] and info["width"] == 32
    assert "Seed: 7, Size: 32x32, Model: toy" in info["infotexts"][0]
    assert Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))).text["parameters"] == info["infotexts"][0]
    assert [sentence.split(" The ")[0] for sentence in info["warnings"]] == warned
    assert answer["parameters"]["prompt"] == "a fist" and "url" not in answer["parameters"]


@pytest.mark.parametrize(
    ("sampler", "scheduler", "solver", "warned"),
    [
        ("DPM++ 2M", "Automatic", "dpm++2m-karras", ""),
        ("DPM++ 2M", "karras", "dpm++2m-karras", ""),
        ("DPM++ 2M", "Uniform", "dpm++2m", ""),
        ("DPM++ 2M Karras", None, "dpm++2m-karras", ""),
        ("LCM", "", "lcm", ""),
        ("plms", None, "plms", ""),
        ("Euler", "karras", "euler", "The scheduler karras has no effect"),
        ("DPM++ SDE Karras", None, None, "The sampler DPM++ SDE Karras is not here."),
        (None, "sgm_uniform", None, "The scheduler sgm_uniform has no effect"),
    ],
)
def test_samplers(sampler, scheduler, solver, warned):
    from handiffuser.serving.txt2img import Txt2Img

    found, said = Txt2Img(prompt="a", sampler_name=sampler, scheduler=scheduler).solver()
    assert found == solver and bool(said) == bool(warned) and warned in "".join(said)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sampler_name": "Magic"}, "sampler_name must be one of DDIM, DDPM, Euler, "),
        ({"scheduler": "magic"}, "scheduler must be one of automatic, karras, uniform, got 'magic'."),
        ({"enable_hr": True}, "enable_hr must be false, got true."),
        ({"styles": ["anime"]}, 'styles must be [], got ["anime"].'),
        ({"init_images": ["x"]}, "Send pictures to /sdapi/v1/img2img."),
        ({"alwayson_scripts": {"ControlNet": {"args": [{"enabled": True}]}}}, "got 'ControlNet'"),
        ({"alwayson_scripts": {"ControlNet": {"args": [{"enabled": False}, {"image": "x"}]}}}, "got 'ControlNet'"),
        ({"alwayson_scripts": {"Refiner": {"args": [True, "", 0.8]}}}, "got 'Refiner'"),
        ({"steps": 1001}, "steps must be"),
        ({"steps": 101}, "steps must be at most 100 on this server, got 101."),
        ({"cfg_scale": -1}, "cfg_scale must be"),
        ({"width": 512, "height": 512}, "width and height must be 32x32, got '512x512'. hd-serve --any-size"),
        ({"batch_size": 4, "n_iter": 4}, "batch_size * n_iter must be at most 8, got 16."),
        ({"prompt": " "}, "The prompt is empty."),
        ({"override_settings": {"sd_model_checkpoint": "other"}}, "sd_model_checkpoint must be toy, got 'other'."),
    ],
)
def test_refusals(served, fields, words):
    answer = paint(served, **fields)
    assert answer.status_code in (400, 404) and words in answer.json()["error"]["message"]


def test_what_changes_the_look_alone_is_named(served):
    asked = {
        "prompt": "a fist <lora:style:0.8>", "restore_faces": True, "eta": 0.5, "colour": "red", "save_images": True,
        "override_settings": {"CLIP_stop_at_last_layers": 2, "sd_vae": None},
    }  # fmt: skip
    answer = paint(served, **asked).json()
    said = json.loads(answer["info"])["warnings"]
    for words in ("CLIP_stop_at_last_layers", "restore_faces", "field eta", "field colour is unknown", "adapter style"):
        assert sum(words in sentence for sentence in said) == 1, (words, said)
    assert len(said) == 5 and np.array_equal(decoded(answer["images"][0]), decoded(paint(served).json()["images"][0]))


def test_several_pictures_have_seeds_that_count_up(served):
    answer = paint(served, batch_size=2, n_iter=2, steps=2).json()
    assert json.loads(answer["info"])["all_seeds"] == [7, 8, 9, 10] and len(answer["images"]) == 4
    assert paint(served, send_images=False, steps=2).json()["images"] == []
    drawn = [json.loads(paint(served, seed=-1, steps=1).json()["info"])["seed"] for _ in range(2)]
    assert drawn[0] != drawn[1]


def test_lists(served):
    def get(name):
        answer = served.client.get(f"/sdapi/v1/{name}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    assert [model["title"] for model in get("sd-models")] == ["toy"]
    assert {"name": "Euler", "aliases": ["euler"], "options": {}} in get("samplers")
    assert get("options")["sd_model_checkpoint"] == "toy" and get("embeddings")["loaded"] == {}
    assert get("loras") == get("sd-vae") == get("upscalers") == get("face-restorers") == []
    assert get("progress")["state"]["job_count"] == 0 and get("progress")["progress"] == 0
    assert served.client.get("/queue/status").json()["queue_size"] == 0
    # Open WebUI posts what it got; SillyTavern and webuiapi post the model alone.
    for options in (get("options"), {"sd_model_checkpoint": "toy"}):
        assert served.client.post("/sdapi/v1/options", json=options).status_code == 200
    assert served.client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "x"}).status_code == 404
    refused = served.client.post("/sdapi/v1/options", json={"CLIP_stop_at_last_layers": 2})
    assert refused.status_code == 400 and "CLIP_stop_at_last_layers must be left out" in refused.text
    assert served.client.post("/sdapi/v1/refresh-checkpoints").status_code == 200


def test_progress_and_interruption(toy_bundle, tmp_path, slow):
    slow(0.02)
    with serving(toy_bundle, tmp_path, batch=1) as served:
        answers = []

        def ask(**fields):
            thread = threading.Thread(target=lambda: answers.append(paint(served, **fields)))
            thread.start()
            return thread

        def progress():
            return served.client.get("/sdapi/v1/progress").json()

        asking = ask(batch_size=2, steps=50)
        served.wait(lambda: 0.5 < progress()["progress"] < 0.9)  # of two pictures, one after the other
        now = progress()
        assert now["state"]["job_count"] == 2 and now["state"]["job_no"] == 1 and now["eta_relative"] > 0
        assert decoded(now["current_image"]).shape == (32, 32, 3) and 0 < now["state"]["sampling_step"] < 50
        assert served.client.get("/sdapi/v1/progress?skip_current_image=true").json()["current_image"] is None
        stranger = httpx.post(
            f"{served.url}/sdapi/v1/interrupt", headers={"x-forwarded-for": "10.0.0.9"}
        )  # from a proxy on this machine: the server believes it
        assert stranger.status_code == 200 and progress()["state"]["job_count"] == 2
        crossing = {"sec-fetch-site": "cross-site", "origin": "http://evil.example"}
        assert served.client.post("/sdapi/v1/interrupt", headers=crossing).status_code == 400
        assert served.client.post("/sdapi/v1/interrupt").status_code == 200
        asking.join(20)
        assert answers[0].status_code == 200 and len(answers[0].json()["images"]) == 1  # the one that was done
        asking = ask(steps=100)
        served.wait(lambda: progress()["progress"] > 0)
        served.client.post("/sdapi/v1/interrupt")
        asking.join(20)
        assert answers[1].status_code == 409 and "interrupted" in answers[1].json()["error"]["message"]
        served.wait(lambda: served.dispatcher.idle)
        assert progress()["state"]["job_count"] == 0


def test_keys_sizes_and_the_default_negative_prompt(toy_bundle, tmp_path):
    (tmp_path / "keys").write_text("alice: 0123456789\n")
    front = Front(any_size=True, negative_prompt="blur")
    with serving(toy_bundle, tmp_path / "s", keys=tmp_path / "keys", front=front, limits=Limits(timeout=30)) as served:
        assert paint(served).status_code == 401 and served.client.get("/sdapi/v1/options").status_code == 401
        served.client.auth = ("user", "0123456789")  # as the clients' field "user:password" is sent
        answer = paint(served, width=64, height=48, steps=2, cfg_scale=3).json()
        info = json.loads(answer["info"])
        assert decoded(answer["images"][0]).shape == (48, 64, 3) and "scaled to 64x48" in info["warnings"][0]
        assert info["negative_prompt"] == "blur" and (info["width"], info["height"]) == (64, 48)
        assert json.loads(paint(served, steps=2, cfg_scale=1).json()["info"])["warnings"] == []
        own = paint(served, steps=2, cfg_scale=3, negative_prompt="fog").json()
        assert json.loads(own["info"])["negative_prompt"] == "fog"


def test_a_default_negative_prompt_that_engines_cannot_read_ends_the_server(sized_bundle, tmp_path):
    long = Front(negative_prompt="blur " * 90)
    with serving(sized_bundle, tmp_path / "s", front=long) as served:
        service, takes = served.service, Takes(None, "", 1, False, True)
        assert service.misfit() is None, "a CPU reads several chunks"
        before = (service.bundle.reader.engine_chunks, service.bundle.adapts, service.bundle.room.free)
        try:
            service.learn(takes)
            said = service.dispatcher.fatal
            assert said.startswith("--default-negative-prompt must fit into 1 chunk of 75 tokens with these engines")
            assert "start hd-serve with --plain-prompts" in said
            service.front = Front(negative_prompt="blur " * 90, plain_prompts=True)
            assert service.misfit() is None
        finally:
            service.dispatcher.fatal = None
            service.bundle.reader.engine_chunks, service.bundle.adapts, service.bundle.room.free = before


def test_weights_and_long_prompts(sized_bundle, tmp_path):
    """As the web UI's clients write them. The server's owner may have them read as text."""
    long = {"prompt": "a (fist:1.3), [blur] BREAK " + "b" * 90, "steps": 2}
    for folder, plain, said in ((sized_bundle, False, []), (sized_bundle, True, ["prompt is longer than 75 tokens"])):
        with serving(folder, tmp_path / f"{plain}", front=Front(plain_prompts=plain)) as served:
            info = json.loads(paint(served, **long).json()["info"])
            assert info["prompt"] == long["prompt"] and len(info["warnings"]) == len(said)
            assert all(words in warning for words, warning in zip(said, info["warnings"], strict=True))
            refused = paint(served, prompt="a (fist:11)")
            assert refused.status_code == (200 if plain else 400)
            if not plain:
                assert "prompt must have weights from -10 to 10" in refused.json()["error"]["message"]
                body = {"prompt": "a (fist:11)", "plain_prompts": True}
                assert served.client.post("/v1/images/generations", json=body).status_code == 200
