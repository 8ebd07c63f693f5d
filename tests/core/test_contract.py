"""The manifest of a bundle: what is written comes back, and damage anywhere is found."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from handiffuser.contract import GRAPHS, GraphSpec, Manifest, TensorSpec, _own_digest, file_digest, row_columns
from handiffuser.errors import BundleError

DEFAULTS = {
    "steps": 4,
    "solver": "ddim",
    "guidance": 2.0,
    "hand_steps": 3,
    "hand_solver": "ddim",
    "hand_guidance": 1.0,
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle in name only: its graphs are files of a few bytes."""
    specs = {}
    for name in GRAPHS:
        (tmp_path / f"{name}.onnx").write_bytes(name.encode() * 10)
        tensor = TensorSpec("x", "float32", ("B", 4))
        specs[name] = GraphSpec(f"{name}.onnx", [tensor], [tensor], {"error": 1e-6, "tolerance": 1e-4})
    specs["image_decoder"].inputs = [TensorSpec("latents", "float32", ("B", 4, 16, 24))]
    specs["image_decoder"].outputs = [TensorSpec("image", "uint8", ("B", 32, 48, 3))]
    (tmp_path / "tokenizer.json").write_text("{}")
    Manifest(
        graphs=specs,
        files={path.name: file_digest(path) for path in tmp_path.iterdir()},
        precision="fp32",
        image_size=(32, 48),
        latent_size=(4, 16, 24),
        num_history={"hand_prior": 1, "unet": 4},
        schedules={"hand_prior": {}, "unet": {}},
        defaults=DEFAULTS,
        tokenizer={"bos": 1, "eos": 2, "pad": 2, "length": 77},
        params_mean=[0.1, -0.25] * 165,
        params_std=[1.0, 1 / 3] * 165,
    ).save(tmp_path)
    return tmp_path


def test_round_trip(bundle):
    manifest = Manifest.load(bundle)
    assert manifest.image_size == (32, 48) and manifest.params_std == [1.0, 1 / 3] * 165
    assert manifest.graphs["unet"].inputs == [TensorSpec("x", "float32", ("B", 4))]
    assert str(manifest.graphs["unet"].inputs[0]) == "x: float32[B, 4]"


@pytest.mark.parametrize("name", [*(f"{graph}.onnx" for graph in GRAPHS), "tokenizer.json"])
def test_one_flipped_bit_or_a_missing_file_is_found(bundle, name):
    path = bundle / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} is damaged"):
        Manifest.load(bundle)
    path.unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        Manifest.load(bundle)


def test_a_changed_manifest_is_found(bundle):
    path = bundle / "manifest.json"
    path.write_text(path.read_text().replace("-0.25", "-0.35"))
    with pytest.raises(BundleError, match="changed or damaged"):
        Manifest.load(bundle)
    assert Manifest.load(bundle, verify=False).params_mean[:2] == [0.1, -0.35]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v.update(format=4), "format must be at most 3, got 4"),
        (lambda v: v.pop("format"), "not a bundle's manifest.*lacks 'format'"),
        (lambda v: v["graphs"].pop("unet"), "lacks the graphs unet"),
        (lambda v: v.pop("defaults"), "missing required field defaults"),
        (lambda v: v.update(colour="red"), "'colour' is unknown"),
        (lambda v: v["files"].pop("unet.onnx"), "lacks the hash of unet.onnx"),
        (lambda v: v["files"].update({"../evil": "0" * 64}), "In files"),
    ],
)
def test_other_manifests_are_refused(bundle, change, says):
    path = bundle / "manifest.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(BundleError, match=says):
        Manifest.load(bundle)


WRONG = [
    ("schedules", []),
    ("schedules", {"unet": {}}),
    ("defaults", {}),
    ("defaults", {**DEFAULTS, "steps": 0}),
    ("defaults", {**DEFAULTS, "guidance": "2"}),
    ("latent_size", "4x16x24"),
    ("latent_size", [4, 16, 16]),
    ("num_history", {"hand_prior": 1}),
    ("num_history", {"hand_prior": 1, "unet": 10**9}),
    ("tokenizer", {"bos": 1, "eos": 2, "pad": 2, "length": 10**9}),
    ("tokenizer", {"bos": -1, "eos": 2, "pad": 2, "length": 77}),
    ("tokenizer", None),
    ("image_size", [10**18, 48]),
    ("image_size", [32]),
    ("image_size", [48, 32]),
    ("params_std", [0.0] * 330),
    ("params_std", [1.0] * 329),
    ("params_mean", [1e300] * 330),
    ("num_people", 2),
    ("num_people", 0),
    ("precision", "fp64"),
    ("format", 0),
    ("format", True),
    ("format", 10**300),
    ("files", {"unet.onnx": "0" * 63}),
    ("files", {"unet.onnx": ["0" * 64]}),
    ("graphs", {"unet": {"file": "unet.onnx", "inputs": [{"name": "x", "dtype": "object", "shape": []}]}}),
    ("graphs", dict.fromkeys(GRAPHS)),
    ("made_by", []),
]


@pytest.mark.parametrize(("entry", "value"), WRONG)
def test_an_entry_that_is_not_what_it_should_be(bundle, entry, value):
    """Also with a digest that fits: a newer writer's mistake, or someone's mischief."""
    path = bundle / "manifest.json"
    whole = json.loads(path.read_text())
    whole[entry] = value
    whole["sha256"] = _own_digest(whole)
    path.write_text(json.dumps(whole))
    with pytest.raises(BundleError, match="manifest") as caught:
        Manifest.load(bundle)
    assert len(str(caught.value)) < 500 + len(str(bundle))


@pytest.mark.parametrize(
    "content", [b"[" * 10**6, b"", b"null", b"[]", b"\xff", b'{"format": 1e999}', b" " * (1 << 24)]
)
def test_what_is_no_manifest(bundle, content):
    (bundle / "manifest.json").write_bytes(content + b" ")
    with pytest.raises(BundleError, match=r"manifest\.json (cannot be read|is not)"):
        Manifest.load(bundle)


def test_a_pipe_is_not_waited_for(bundle):
    (bundle / "manifest.json").unlink()
    os.mkfifo(bundle / "manifest.json")
    with pytest.raises(BundleError, match="not a regular file"):
        Manifest.load(bundle)


def test_what_is_no_bundle_says_what_to_do(tmp_path):
    with pytest.raises(BundleError, match="does not exist"):
        Manifest.load(tmp_path / "none")
    with pytest.raises(BundleError, match="hd-export"):
        Manifest.load(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(BundleError, match="is a checkpoint"):
        Manifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="cannot be read"):
        Manifest.load(tmp_path)


def test_row_columns():
    assert row_columns(0) == ("timestep", "scale", "guidance", "a", "b", "d")
    assert row_columns(2)[6:] == ("p1", "q1", "p2", "q2")
