"""Adapters merged into a bundle without PyTorch: the numbers, the cache, and what is refused. On the shipped demo."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from handiffuser.adapters import Added
from handiffuser.contract import WEIGHTS, Manifest
from handiffuser.engines import adapted, cli
from handiffuser.engines.adapted import adapted_bundle, chosen, key_of, make_bundle, shrink
from handiffuser.engines.initializers import OnnxWeights
from handiffuser.errors import BundleError, CheckpointError, EngineError, HanDiffuserError
from handiffuser.export.source import changed as why_exported
from handiffuser.schema import MisfitError
from handiffuser.shipped import bundle_path
from handiffuser.tensors import TensorFile, narrowed, widened
from handiffuser.weights import Place, WeightMap, changed, phases
from onnx import numpy_helper
from safetensors.numpy import save_file

TO_Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
TO_K = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "down_blocks.1.resnets.0.conv1"
TIME = "down_blocks.1.resnets.0.time_emb_proj"


def pair(name, seed=0, rank=2):
    """A layer's pair in diffusers' names."""
    shape = WeightMap.load(bundle_path()).shapes[f"unet.{name}.weight"]
    random = np.random.default_rng(seed)
    down = random.normal(0, 0.1, (rank, *shape[1:]))
    up = random.normal(0, 0.1, (shape[0], rank, *(1,) * (len(shape) - 2)))
    both = {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    return {name: value.astype(np.float32) for name, value in both.items()}


def adapter(path: Path, *names, seed=0) -> Path:
    tensors = {}
    for number, name in enumerate(names):
        tensors |= pair(name, seed + number)
    save_file(tensors, path)
    return path


def delta(name, seed=0):
    down, up = pair(name, seed).values()
    return (up.reshape(len(up), -1) @ down.reshape(len(down), -1)).reshape(len(up), *down.shape[1:])


@pytest.fixture()
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "handiffuser" / "adapted"


def numbers(folder, graph):
    model = onnx.load(folder / f"{graph}.onnx")
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_merged_weights_stand_in_the_graphs_that_hold_them(tmp_path, cache):
    """Of self-attention, of cross-attention, of a convolution, and of the time; twice, and half of the strength off."""
    first = adapter(tmp_path / "first.safetensors", TO_Q, TO_K, CONV, TIME)
    second = adapter(tmp_path / "second.safetensors", TO_Q, seed=9)
    made = adapted_bundle(bundle_path(), chosen([f"{first}:0.5", str(second), f"{second}:0"]))
    base, weights = Manifest.load(bundle_path()), WeightMap.load(bundle_path())
    manifest = Manifest.load(made)  # which hashes every file
    written = {name for name in base.files if base.files[name] != manifest.files[name]}
    assert written == {"unet.onnx", "unet_context.onnx", "unet_time.onnx"}
    assert all((made / name).samefile(bundle_path() / name) for name in base.files.keys() - written), "links"
    for name, graph in ((TO_Q, "unet"), (TO_K, "unet_context"), (CONV, "unet"), (TIME, "unet_time")):
        (place,) = weights.places[f"unet.{name}.weight"]
        assert place.graph == graph
        before, after = (numbers(folder, graph)[place.initializer] for folder in (bundle_path(), made))
        assert after.dtype == np.float32, "half of the base's storage does not round what is merged"
        wanted = before.astype(np.float32).T if place.form == "transposed" else before.astype(np.float32)
        wanted = wanted + np.float32(0.5) * delta(name, [TO_Q, TO_K, CONV, TIME].index(name))
        wanted = wanted + delta(TO_Q, 9) if name == TO_Q else wanted
        np.testing.assert_array_equal(after.T if place.form == "transposed" else after, wanted)
        onnx.checker.check_model(str(made / f"{graph}.onnx"))
    assert [one.split()[0] for one in manifest.made_by["adapters"]] == ["first.safetensors:0.5", "second.safetensors:1"]
    assert adapted_bundle(bundle_path(), chosen([f"{first}:0"])) == bundle_path()


def test_made_once_by_content_and_again_where_damaged(tmp_path, cache, monkeypatch):
    path = adapter(tmp_path / "a.safetensors", TO_K)
    made = adapted_bundle(bundle_path(), chosen([str(path)]))
    other = Path(shutil.copy(path, tmp_path / "another name.safetensors"))
    before = (made / "manifest.json").stat().st_mtime_ns
    assert adapted_bundle(bundle_path(), chosen([str(other)])) == made
    assert (made / "manifest.json").stat().st_mtime_ns == before
    keys = {key_of(Manifest.load(bundle_path()), chosen([text])) for text in (str(path), f"{path}:0.9", f"{path}:-1")}
    assert len(keys) == 3
    right = (made / "unet_context.onnx").read_bytes()
    (made / "unet_context.onnx").write_bytes(right[:-1] + b"?")
    assert adapted_bundle(bundle_path(), chosen([str(path)])) == made
    assert (made / "unet_context.onnx").read_bytes() == right
    # An interruption leaves nothing half, and the least recently used goes.
    monkeypatch.setattr(adapted, "file_digest", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        adapted_bundle(bundle_path(), chosen([f"{path}:0.5"]))
    assert [*cache.iterdir()] == [made]
    shrink(cache, 0)
    assert made.exists(), "it is spared while it may be in use"
    os.utime(made, (0, 0))
    shrink(cache, 10**9)
    assert made.exists()
    shrink(cache, 10**4)
    assert not made.exists()


def test_hd_engines_merges_into_a_folder(tmp_path, capfd):
    path, out = adapter(tmp_path / "a.safetensors", TO_K), tmp_path / "out"
    assert cli.commands.main(["merge", "demo", str(out), "--lora", f"{path}:2"], standalone_mode=False) == 0
    assert "Merged a.safetensors at 2: 1 layers of unet." in capfd.readouterr().err
    manifest, base = Manifest.load(out), Manifest.load(bundle_path())
    assert "source" in base.made_by and why_exported(out, base.made_by["source"]), "hd-export does not call it current"
    again = make_bundle(tmp_path / "again", out, chosen([f"{path}:-1"]))
    said = Manifest.load(again).made_by["adapters"]
    assert [one.split()[0] for one in said] == ["a.safetensors:2", "a.safetensors:-1"]
    assert [name for name in base.files if manifest.files[name] != base.files[name]] == ["unet_context.onnx"]
    for arguments, words in ((["--lora", str(path)], "a new or an empty folder"), (["--lora", "no"], "does not exist")):
        with pytest.raises(HanDiffuserError, match=words):
            cli.commands.main(["merge", "demo", str(out), *arguments], standalone_mode=False)


def test_a_full_disk_is_one_sentence(tmp_path, small_disk, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_disk))
    with pytest.raises(EngineError, match=r"a.safetensors cannot be written to .*: the disk is full\. Make room there"):
        adapted_bundle(bundle_path(), chosen([str(adapter(tmp_path / "a.safetensors", CONV))]))
    assert not [*(small_disk / "handiffuser" / "adapted").iterdir()]


def test_refusals(tmp_path, cache):
    path = adapter(tmp_path / "a.safetensors", TO_Q)
    old = tmp_path / "old"
    shutil.copytree(bundle_path(), old)
    (old / WEIGHTS).unlink()
    with pytest.raises(BundleError, match=r"lacks weights.json: an older version exported it\. Export it again"):
        adapted_bundle(old, chosen([str(path)]))
    whole = json.loads((bundle_path() / WEIGHTS).read_text())
    del whole["places"][f"unet.{TO_Q}.weight"]
    (old / WEIGHTS).write_text(json.dumps(whole))
    with pytest.raises(CheckpointError, match=r"in another form, such as quantised\. Merge it when you export"):
        adapted_bundle(old, chosen([str(path)]))
    (old / WEIGHTS).write_text('{"shapes": {}, "places": {"a": [{"graph": "unet"}]}}')
    with pytest.raises(BundleError, match=r"weights\.json cannot be read"):
        adapted_bundle(old, chosen([str(path)]))
    save_file({name: value * np.float32(1e25) for name, value in pair(TO_Q).items()}, path)
    with pytest.raises(CheckpointError, match=f"makes unet.{TO_Q} infinite"):
        adapted_bundle(bundle_path(), chosen([str(path)]))
    for said, words in (("nothing.safetensors", "does not exist"), (str(tmp_path), "got a folder"),
                        (f"{path}:11", "from -10 to 10"), (f"{path}:nan", "from -10 to 10")):  # fmt: skip
        with pytest.raises(CheckpointError, match=words):
            chosen([said])


def test_taps_and_columns_change_with_their_parameter():
    random = np.random.default_rng(0)
    weight, change = (random.normal(size=(3, 4, 3, 3)).astype(np.float32) for _ in range(2))
    added = Added(lambda: change, 0.5)
    for number, taps in enumerate(phases(weight)):
        new = changed(taps, Place("unet", "x", f"taps_{number}"), weight.shape, added)
        np.testing.assert_allclose(new, phases(weight + np.float32(0.5) * change)[number], atol=1e-6)
    kernel = random.normal(size=(2, 1, 8)).astype(np.float32)
    new = changed(kernel, Place("unet", "x", "columns", 4, 10.0), (2, 3), Added(lambda: np.ones((2, 3)), 0.5))
    np.testing.assert_allclose(new - kernel, [[[0, 0, 0, 0, 5, 5, 5, 0]]] * 2, atol=1e-6)


@pytest.mark.parametrize("beside", [False, True])
def test_initializers_as_onnx_reads_them(beside, tmp_path):
    model, path = onnx.load(bundle_path() / "unet_time.onnx"), tmp_path / "graph.onnx"
    brain = numpy_helper.to_array(model.graph.initializer[0])
    onnx.save(model, path, save_as_external_data=beside, location="graph.onnx.data", size_threshold=100)
    weights = OnnxWeights(path)
    theirs = numbers(bundle_path(), "unet_time")
    assert weights.shapes == {name: value.shape for name, value in theirs.items() if value.dtype.kind == "f"}
    assert brain.dtype == np.float32
    for name in weights.shapes:
        np.testing.assert_array_equal(weights.read(name), theirs[name].astype(np.float32))
    half, wide, *_ = (name for name, value in theirs.items() if value.dtype == np.float16)
    new = {name: weights.read(name) + np.float32(1e-3) for name in (half, wide)}
    (tmp_path / "new").mkdir()
    weights.write(tmp_path / "new" / "graph.onnx", new, frozenset({wide}))
    after = numbers(tmp_path / "new", "graph")
    np.testing.assert_array_equal(after.pop(half), new[half].astype(np.float16))
    np.testing.assert_array_equal(after.pop(wide), new[wide])
    assert all(np.array_equal(value, theirs[name]) for name, value in after.items())
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(BundleError, match="is not an ONNX graph"):
        OnnxWeights(path)


def test_tensor_files(tmp_path):
    """The bits of bfloat16 are rounded to even; damaged headers are refused before anything is read."""
    path, values = tmp_path / "a.safetensors", np.random.default_rng(0).normal(0, 100, (3, 5)).astype(np.float32)
    brain, half = values.astype(ml_dtypes.bfloat16), values.astype(np.float16)
    tensors = {"half": half, "brain": brain, "one": np.float32(2)}
    header: dict = {"__metadata__": {"made": "here"}}
    content = b""
    for name, kind in (("half", "F16"), ("brain", "BF16"), ("one", "F32")):
        value = tensors[name].tobytes()
        offsets = [len(content), len(content) + len(value)]
        header[name] = {"dtype": kind, "shape": tensors[name].shape, "data_offsets": offsets}
        content += value
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)
    file = TensorFile(path)
    assert file.shapes == {"half": (3, 5), "brain": (3, 5), "one": ()} and file.metadata == {"made": "here"}
    np.testing.assert_array_equal(file.read("half"), half)
    np.testing.assert_array_equal(file.read("brain"), brain.astype(np.float32))
    np.testing.assert_array_equal(widened(narrowed(values)), brain.astype(np.float32))
    assert np.isnan(widened(narrowed(np.float32([np.nan])))).all()
    content = path.read_bytes()
    for damaged in (content[:6], content[:40], content[:-1], b"\xff" * 8 + content[8:], content.replace(b"F16", b"F64"),
                    content.replace(b"[3,5]", b"[3,6]"), content.replace(b"[3,5]", b"-3,5]")):  # fmt: skip
        path.write_bytes(damaged)
        with pytest.raises(MisfitError):
            TensorFile(path)
