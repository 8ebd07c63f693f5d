"""Options that other programs have, and what to type here."""

from __future__ import annotations

from importlib import import_module

import click
import pytest
from handiffuser.hints import INSTEAD, OTHERS, explained, hint

COMMANDS = {
    "hd-run": ("runtime.cli", "run"),
    "hd-serve": ("serving.cli", "serve"),
    "hd-train": ("training.cli", "commands"),
}


def said(line: str) -> str:
    """What the command line says, without running anything."""
    name, *arguments = line.split()
    module, attribute = COMMANDS[name]
    command = getattr(import_module(f"handiffuser.{module}"), attribute)
    with pytest.raises(click.ClickException) as caught:
        command.main(arguments, prog_name=name, standalone_mode=False)
    return explained(caught.value).format_message()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("hd-run demo fist -n 2", "It is --images-per-prompt here."),
        ("hd-run demo fist --negative_prompt x", "It is --negative-prompt here."),
        ("hd-run demo fist --height 512", "Say the size of pictures as size: WIDTHxHEIGHT"),
        ("hd-run demo fist --width=512", "Say the size of pictures as size: WIDTHxHEIGHT"),
        ("hd-serve demo --lora x", "It is --lora-folder here."),
        ("hd-run demo fist --gpus 2", "CUDA_VISIBLE_DEVICES"),
        ("hd-run demo fist --lr 1", "hd-train trains"),
        ("hd-serve demo --gpus 2", "It is --devices here."),
        ("hd-serve demo -n 2", "--max-n bounds it"),
        ("hd-serve demo --guidance-scale 2", "Each request says it, as guidance_scale."),
        ("hd-train pictures --lr 1", "It is --learning-rate here."),
        ("hd-train --lr 1", "It is --learning-rate here. It belongs after the command"),
        ("hd-train pictures --gpus 2", "torchrun --nproc-per-node"),
    ],
)
def test_hints(line, words):
    message = said(line)
    assert message.startswith("No such option: -") and words in message


def test_diffusers_names_of_settings_are_accepted_and_not_shown():
    command = import_module("handiffuser.runtime.cli").run
    line = ["demo", "--num-inference-steps", "3", "--guidance-scale", "2", "--num-images-per-prompt", "4"]
    with command.make_context("hd-run", line) as context:
        assert [context.params[name] for name in ("steps", "guidance", "images_per_prompt")] == [3, 2.0, 4]
        assert "num-inference-steps" not in command.get_help(context)


def test_what_nobody_knows_is_left_to_click():
    assert "No such option" in said("hd-run demo fist --stepps 3") and "--steps" in said("hd-run demo fist --stepps 3")
    assert hint("--frobnicate", "hd-run", ["--steps"]) == ""


def test_each_hint_names_what_there_is():
    """Every option that OTHERS maps to is one of some command, so that a hint cannot outlive it."""
    modules = {**COMMANDS, "hd-export": ("export.cli", "command"), "hd-bench": ("benchmarks.cli", "bench")}
    modules["hd-data"] = ("data.cli", "commands")
    has = set()
    for module, attribute in modules.values():
        command = getattr(import_module(f"handiffuser.{module}"), attribute, None)
        for one in [command, *getattr(command, "commands", {}).values()]:
            has |= {option.lstrip("-") for parameter in one.params for option in parameter.opts}
    assert not set(OTHERS) - has
    assert not {name for others in INSTEAD.values() for name in others} - {*modules, "hd-engines", "request"}
