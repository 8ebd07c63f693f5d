"""Textual inversion: what diffusers' load_textual_inversion reads, `hd-train init --embedding` reads alike."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from handiffuser.errors import CheckpointError
from handiffuser.models.checkpoint import Checkpoint
from handiffuser.training import embeddings, init
from handiffuser.training.cli import commands
from safetensors.torch import save_file
from stable_diffusion import our_picture, stable_diffusion, their_picture

WIDTH = 32
ONE, THREE = torch.linspace(-3, 3, WIDTH), torch.linspace(-3, 3, 3 * WIDTH).view(3, WIDTH)
AUTOMATIC = {"string_to_token": {"*": 265}, "string_to_param": {"*": THREE}, "name": "<toy>", "step": 500}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("plain"))


@pytest.fixture(autouse=True)
def small_prior(monkeypatch):
    monkeypatch.setattr(init, "PRIOR", (32, 2, 2))


@pytest.mark.parametrize(
    ("name", "content", "token", "prompt"),
    [
        ("toy.safetensors", {"<toy>": ONE}, None, "a photo of a <toy>"),
        ("toy.safetensors", {"<toy>": THREE}, None, "a <toy> and two <toy> hands"),
        ("toy.pt", AUTOMATIC, None, "a photo of a <toy>"),
        ("learned_embeds.bin", {"<other>": THREE.half()}, "<toy>", "a photo of a <toy>"),
        ("toy.pt", THREE, "<toy>", "a photo of a <toy>"),
    ],
)
def test_pictures_are_those_of_diffusers(folder, tmp_path, name, content, token, prompt):
    file = tmp_path / name
    if file.suffix == ".safetensors":
        save_file(content, file)
    else:
        torch.save(content, file)
    start = tmp_path / "start"
    asked = f"{file}:{token}" if token else str(file)
    result = CliRunner().invoke(commands, ["init", str(folder), str(start), "--embedding", asked])
    assert result.exit_code == 0, result.exception
    assert "<toy>" in result.output
    ours = our_picture(Checkpoint.load(start), start, prompt, "plms")
    theirs = their_picture(folder, prompt, lambda pipeline: pipeline.load_textual_inversion(str(file), token=token))
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    without = their_picture(folder, prompt)
    assert np.abs(ours.astype(int) - without).max() > 10


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize(
    ("name", "content", "token", "words"),
    [
        ("a.safetensors", {"<a>": torch.zeros(768)}, None, "vectors of 32 numbers, as wide as this .* got 768"),
        ("a.safetensors", {"clip_g": ONE, "clip_l": ONE.clone()}, None, "SDXL's two text encoders"),
        ("a.safetensors", {"a": ONE, "b": ONE.clone()}, None, "with one tensor, got 2"),
        ("a.safetensors", {"<a>": torch.full((WIDTH,), torch.nan)}, None, "of finite numbers"),
        ("a.safetensors", {"<a>": torch.zeros(0, WIDTH)}, None, "one vector or more"),
        ("a.safetensors", {"<a>": torch.zeros(WIDTH).int()}, None, "must be a textual inversion"),
        ("a.safetensors", {"<a>": ONE}, "<|endoftext|>", "must be new to the tokenizer"),
        ("a.safetensors", b"no such file", None, "cannot be read as an embedding"),
        ("a.pt", {"x": Evil()}, None, "cannot be read as an embedding"),
        ("a.pt", ONE, None, "must come with its placeholder"),
        ("a.pt", {"string_to_param": 3}, None, "must be a textual inversion"),
        ("a.pt", [1], None, "by name"),
        ("a.txt", b"x", None, r"must be a .safetensors or .pt file"),
        ("a.pt", b"version https://git-lfs.github.com/spec/v1\noid", None, "Git LFS pointer"),
        ("a.pt", None, None, "does not exist"),
    ],
)
def test_other_files_are_one_sentence(folder, tmp_path, name, content, token, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif file.suffix == ".safetensors":
        save_file(content, file)
    elif isinstance(content, dict) and "x" in content:
        file.write_bytes(pickle.dumps(content))
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=words) as refused:
        init.from_stable_diffusion(folder, added=[(file, token)])
    assert len(str(refused.value).splitlines()) == 1
    assert not Path("ran").exists(), "a pickle must run nothing"


def test_one_file_twice_needs_another_placeholder(folder, tmp_path):
    file = tmp_path / "toy.safetensors"
    save_file({"<toy>": THREE}, file)
    with pytest.raises(CheckpointError, match=r"must be new to the tokenizer, got <toy>"):
        init.from_stable_diffusion(folder, added=[(file, None), (file, None)])
    made = init.from_stable_diffusion(folder, added=[(file, None), (file, "<other>")])
    assert made.notes["placeholders"] == [f"{n}{k}" for n in ("<toy>", "<other>") for k in ("", "_1", "_2")]


def test_a_file_without_a_name_is_named_by_itself(tmp_path):
    save_file({"emb_params": THREE}, tmp_path / "EasyNegative.safetensors")
    named, vectors = embeddings.read(tmp_path / "EasyNegative.safetensors")
    assert named == "EasyNegative" and torch.equal(vectors, THREE)


def test_a_colon_in_a_path(tmp_path):
    from handiffuser.training.cli import _embeddings

    (tmp_path / "a:b.pt").touch()
    assert _embeddings(None, None, (str(tmp_path / "a:b.pt"), "c.pt:<c>", "d.pt")) == [
        (tmp_path / "a:b.pt", None),
        (type(tmp_path)("c.pt"), "<c>"),
        (type(tmp_path)("d.pt"), None),
    ]
