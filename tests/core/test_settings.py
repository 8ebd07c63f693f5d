"""The settings of a request: all front ends know the same set, with the same bounds."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, get_args, get_origin

import click
import msgspec
import pytest
from handiffuser import Request, RequestError
from handiffuser.contract import Manifest
from handiffuser.runtime import options
from handiffuser.runtime.cli import run
from handiffuser.schedules import SOLVERS
from handiffuser.serving import triton
from handiffuser.serving.fields import Generation
from handiffuser.settings import (
    IMAGES_PER_PROMPT,
    SETTINGS,
    Defaults,
    RequestFields,
    Settings,
    checked,
    http_name,
    option,
    table,
    with_defaults,
)
from handiffuser.settings import SOLVERS as NAMES

ROOT = Path(__file__).parents[2]
# What a request is, not how it is made: each front end has its own way to say it.
OWN = {"prompt", "id", "hands", "image", "mask", "lora"}


def test_all_front_ends_know_the_same_set():
    known = set(SETTINGS)
    assert {field.name for field in fields(Request)} == known | OWN
    assert set(Settings.__annotations__) == known | OWN - {"prompt"}
    assert {field.name for field in msgspec.structs.fields(checked())} == known | OWN
    by_name = {parameter.name: parameter.opts for parameter in run.params}
    for name, setting in {**SETTINGS, "images_per_prompt": IMAGES_PER_PROMPT}.items():
        assert by_name[name] == list(option(name, setting))
    assert {http_name(name) for name in known} <= set(Generation.model_fields)
    assert set(Generation(prompt="a", num_inference_steps=3, hand_steps=2).settings()) == {"steps", "hand_steps"}
    assert set(triton.FIELDS.values()) == known | {"prompt", "lora"}
    config = triton.config(Manifest.load(ROOT / "demo/bundle", files=False))
    assert all(f'name: "{name.upper()}" ' in config for name in known)
    assert table() in (ROOT / "docs/run.md").read_text()
    served = (ROOT / "docs/serve.md").read_text()
    assert all(f"`{http_name(name)}`" in served for name in known)


def test_the_defaults_of_request_and_manifest_follow():
    assert tuple(SOLVERS) == NAMES
    for field in fields(RequestFields):
        if field.name in SETTINGS:
            setting = SETTINGS[field.name]
            assert field.default == (None if setting.bundle else setting.default), field.name
    assert Defaults.__optional_keys__ == {"noise_offset", "hand_redraws"}
    assert set(Defaults.__annotations__) == {name for name, setting in SETTINGS.items() if setting.bundle}
    assert with_defaults({"steps": 3, "noise_offset": 0.5}) == {"steps": 3, "noise_offset": 0.5, "hand_redraws": 0}


@pytest.mark.parametrize("name", [name for name, setting in SETTINGS.items() if setting.kind in (int, float)])
def test_bounds_are_the_same_everywhere_and_an_error_names_the_setting(name):
    setting = SETTINGS[name]
    kind = next(parameter.type for parameter in run.params if parameter.name == name)
    assert (kind.min, kind.max) == (setting.least, setting.most)
    schema = Generation.model_json_schema()["properties"][http_name(name)]["anyOf"][0]
    assert (schema["minimum"], schema["maximum"]) == (setting.least, setting.most)
    image = {"image": "a.png"} if name == "strength" else {}
    for value in (setting.least, setting.most):
        assert getattr(Request("a", **{name: setting.kind(value)}, **image), name) == value
    for value in (setting.least - 1, setting.most * 2 + 1, "much"):
        with pytest.raises(RequestError, match=f"^{name} must be {setting.constraint}, got ") as caught:
            Request("a", **{name: value}, **image)
        assert (caught.value.param, caught.value.code) == (name, "invalid_value")


def test_options_become_a_request():
    command = click.Command("x", params=run.params[2:], callback=lambda **options: options)
    line = "--hand-solver euler --guidance-interval 0 0.5 --negative-prompt blur --seed 3 --hand-redraws 2"
    values = command.main(line.split(), standalone_mode=False)
    request = Request("a", **options.given(values))
    assert request == Request(
        "a", hand_solver="euler", guidance_interval=(0, 0.5), negative_prompt="blur", hand_redraws=2
    )


def test_every_annotation_has_a_description():
    for setting in SETTINGS.values():
        assert get_origin(setting.annotation) is Annotated
        assert setting.constraint in [meta.description for meta in get_args(setting.annotation)[1:]]
