"""Requests with adapters: alone, mixed, one after the other in little memory, and by hd-run. On the toy bundle, whose
UNet and context have a number each that adapters change; and on the shipped demo."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import weakref
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from adaptable import adaptable, write
from handiffuser import HanDiffuser, Request
from handiffuser.engines import adapted
from handiffuser.errors import CheckpointError, RequestError
from handiffuser.runtime import adapting, cli, reporting
from handiffuser.runtime.outputs import OutputFolder
from handiffuser.runtime.requests import picture_key
from handiffuser.runtime.results import Failure
from handiffuser.shipped import bundle_path
from handiffuser.weights import WeightMap
from PIL import Image
from safetensors.numpy import save_file


@pytest.fixture(scope="module")
def toy(sized_bundle, tmp_path_factory):
    return adaptable(sized_bundle, tmp_path_factory.mktemp("adaptable") / "bundle")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {name: write(folder / f"{name}.safetensors", word) for name, word in (("s", "conv_in"), ("k", "to_k"))}


@pytest.fixture()
def pipeline(toy):
    with HanDiffuser.load(toy, device="cpu", backend="onnxruntime", threads=1, batch_size=4) as pipeline:
        yield pipeline


def test_mixed_pictures_are_those_of_each_alone(pipeline, toy, files, all_at_once):
    kinds = [None, files["s"], (f"{files['k']}:2", f"{files['s']}:-1.0000001"), f"{files['s']}:0.5", [Path(files["k"])]]
    sizes = [None, "64x32"]
    alone = {(k, s): pipeline.generate("a fist", seed=1, lora=kinds[k], size=s)[0].image.astype(int)
             for k in range(5) for s in sizes}  # fmt: skip
    assert len({image.tobytes() for image in alone.values()}) == 10, "each is seen"
    order = [(k, s) for s in sizes for k in (0, 1, 2, 1, 3, 4, 0, 4)]
    requests = [Request("a fist", seed=1, lora=kinds[k], size=s, id=f"r{i}") for i, (k, s) in enumerate(order)]
    steps = []
    results = list(
        pipeline.run(pipeline.prepare(requests)[0], lambda kind, n: steps.append(n) if kind == "steps" else None)
    )
    assert len(results) == 16 and max(steps) > 1, "those of a kind share batches"
    for result in results:
        np.testing.assert_allclose(result.image, alone[order[int(result.id[1:])]], rtol=0, atol=1)
    assert pipeline.timings["unet"] > 0
    with HanDiffuser.load(toy, "cpu", 1, 1, "onnxruntime", lora=kinds[2]) as loaded:
        (picture,) = loaded.generate("a fist", seed=1)
        np.testing.assert_array_equal(picture.image, alone[2, None])
        assert loaded.digest == pipeline.digest and picture.request.lora == kinds[2], "to the last digit"
        with pytest.raises(RequestError, match=r"lora must be k.safetensors:2 s.safetensors:-1, as these .* got s"):
            loaded.generate("a fist", lora=files["s"])


def test_others_go_on_while_adapters_are_merged(pipeline, files, monkeypatch):
    """Plain requests, and those of another set that is there. A request that waits can be cancelled."""
    late, there = f"{files['s']}:0.21", files["k"]
    (want,) = pipeline.generate("a fist", seed=1, lora=late)
    pipeline.generate("a fist", seed=1, lora=there)
    pipeline.loop.adapting._loaded.pop(adapting.key_of(adapted.chosen([late])))
    merge, may = adapting.adapted_bundle, threading.Event()

    def slow(folder, adapters):
        assert may.wait(60)
        return merge(folder, adapters)

    monkeypatch.setattr(adapting, "adapted_bundle", slow)
    names = {"first": late, "gone": late, "plain": None, "other": there, "second": late}
    requests = [Request("a fist", seed=1, lora=lora, id=id) for id, lora in names.items()]
    results = pipeline.run(pipeline.prepare(requests)[0])
    done = [next(results).id, next(results).id]
    assert sorted(done) == ["other", "plain"], "they do not wait"
    pipeline.cancel("gone")
    gone = next(results)
    assert gone.id == "gone" and gone.sentence == "It was cancelled." and pipeline.peek("first").step == 0
    may.set()
    rest = {result.id: result.image for result in results}
    assert sorted(rest) == ["first", "second"] and all(np.array_equal(image, want.image) for image in rest.values())


def test_what_was_merged_for_a_cancelled_request_ends_no_wait(pipeline):
    """It stays until another request asks for it; a wait for others must not turn into a busy loop."""
    ready, going = Future(), Future()
    ready.set_result(None)
    pipeline.loop.adapting._merging |= {"left": ready, "going": going}
    started = time.perf_counter()
    pipeline.loop.adapting.wait(0.2)
    assert time.perf_counter() - started >= 0.19
    threading.Timer(0.05, going.set_result, [None]).start()
    pipeline.loop.adapting.wait(60)
    assert time.perf_counter() - started < 30


def test_an_adapter_in_use_is_not_dropped_from_the_disk(pipeline, toy, files):
    """The age of its folder is that of its last use, whether its engines are loaded by requests or with all others."""
    name = f"{files['s']}:0.31"
    made = adapted.adapted_bundle(toy, adapted.chosen([name]))
    for loaded in (pipeline, HanDiffuser.load(toy, "cpu", 1, 1, "onnxruntime", lora=name)):
        loaded.generate("a fist", seed=1, lora=name, steps=1)
        os.utime(made, (1, 1))
        loaded.generate("a fist", seed=2, lora=name, steps=1)
        assert made.stat().st_mtime > time.time() - 100
        adapted.shrink(made.parent, 0)
        assert made.is_dir()


def test_what_a_picture_says_is_what_was_merged(pipeline, files, tmp_path):
    """An adapter's file may change or go while its picture is painted."""
    style = tmp_path / "style.safetensors"
    shutil.copyfile(files["s"], style)
    (picture,) = pipeline.generate("a fist", seed=1, lora=str(style), steps=1)
    said, key = picture.request.said(picture.adapters), picture_key(picture.request, pipeline.digest)
    assert said["lora"] == [f"style.safetensors:1 sha256 {adapted.digest_of(style)}"]
    style.unlink()
    assert picture.request.said(picture.adapters) == said
    assert picture_key(picture.request, pipeline.digest, picture.adapters) == key
    with OutputFolder(tmp_path / "out") as folder:
        folder.save(picture)
        folder.flush()
    assert json.loads((tmp_path / "out" / f"{picture.id}.json").read_text())["lora"] == said["lora"]


def test_little_memory_holds_one_after_the_other(pipeline, files):
    adapting = pipeline.loop.adapting
    names = [files["s"], f"{files['s']}:0.5", files["k"], None, f"{files['s']}:0.7", files["s"]]
    requests = [Request("a fist", seed=i, lora=name, id=f"r{i}") for i, name in enumerate(names * 2)]
    much = {result.id: result.image for result in pipeline.generate(requests)}
    size = max(one.size for one in adapting._loaded.values())
    assert len(adapting._loaded) == 4
    adapting.close()
    adapting.memory = size  # of one UNet
    load, loaded = adapting._load, []

    def loading(made, graphs):
        assert not any(engine() for engine in loaded), "what has to go is freed before the next is loaded"
        found = load(made, graphs)
        loaded.extend(map(weakref.ref, found.values()))
        return found

    adapting._load = loading
    little = {result.id: result.image for result in pipeline.generate(requests)}
    assert all(np.array_equal(little[id], much[id]) for id in much)
    assert sum(one.size for one in adapting._loaded.values()) <= size
    gone = {"r1": "It was cancelled.", "r2": "It was cancelled."}  # while they wait for memory
    heard = lambda kind, _: [pipeline.cancel(id) for id in gone]  # noqa: E731
    results = pipeline.run(pipeline.prepare(requests)[0], heard)
    assert {result.id: result.sentence for result in results if isinstance(result, Failure)} == gone
    adapting.close()
    adapting.memory = 10
    results = {r.id: r for r in pipeline.run(pipeline.prepare(requests[:4])[0])}
    assert all("--lora-memory must be at least" in results[f"r{i}"].sentence for i in (0, 1, 2))
    assert results["r3"].image.any(), "the others go on"


def test_what_a_request_may_say(pipeline, files, tmp_path):
    strange = tmp_path / "strange.safetensors"
    save_file({"unet.nothing.lora_A.weight": np.ones((2, 2), np.float32)}, strange)
    for said, words in ((3, "lora must be FILE"), (["a"] * 17, "list of 1 to 16"), ("no.safetensors", "does not exist"),
                        (".", "must be a file, got a folder"),
                        (files["s"] + ":20", "from -10 to 10"), (strange, "which lacks layers for")):  # fmt: skip
        with pytest.raises(RequestError, match=words):
            pipeline.generate("a fist", lora=said)
    pipeline.bundle.adapts = False  # as on a GPU
    with pytest.raises(RequestError, match=r"lora must be left out, as these engines were loaded, got s.safetensors:1"):
        pipeline.generate("a fist", lora=files["s"])
    for said, words in ((str(strange), "does not fit this model"), ("nothing.safetensors", "does not exist")):
        with pytest.raises(CheckpointError, match=words):
            HanDiffuser.load(pipeline.bundle.folder, "cpu", lora=Path(said))


def test_an_adapter_that_changes_while_a_run_waits_fails_alone(pipeline, tmp_path):
    name = write(tmp_path / "a.safetensors", "conv_in")
    requests, _ = pipeline.prepare([Request("a fist", id="a"), Request("a fist", lora=name, id="b")])
    Path(name).unlink()
    results = {result.id: result for result in pipeline.run(requests)}
    assert results["a"].image.any() and "does not exist" in results["b"].sentence


def test_hd_run_says_which_adapters_and_goes_on(toy, files, tmp_path, capsys, monkeypatch):
    """Names in a .jsonl are relative to it. An adapter's content decides whether a picture is done, not its name."""
    shutil.copy(files["k"], tmp_path / "b.safetensors")
    lines = [{"prompt": "a fist"}, {"prompt": "a fist", "lora": "b.safetensors:0.5"}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def run(*arguments):
        command = [str(toy), "-o", str(tmp_path / "out"), "--threads", "1", "--seed", "1", "--device", "cpu"]
        code = cli.run.main([*command, *map(str, arguments)], standalone_mode=False)
        said = capsys.readouterr()
        return code, said.out + said.err

    assert "2 pictures in" in run("--prompts", tmp_path / "list.jsonl")[1]
    code, said = run("a fist", "--lora", f"{files['k']}:0.5")
    assert code == 0 and "1 skipped" in said and "Merged k.safetensors at 0.5: 1 layers of unet." in said
    monkeypatch.setattr(reporting, "SECONDS_A_LINE", -1.0)
    said = run("a fist", "--lora", f"{files['k']}:0.77", "-o", tmp_path / "other")[1]
    assert 0 <= said.index("merging adapters: 1 of 1 weights") < said.index("Merged k.safetensors at 0.77")
    records = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
    (record,) = [record for record in records if "lora" in record]
    assert len(records) == 2 and record["lora"][0].startswith("b.safetensors:0.5 sha256 ")
    assert record["lora"][0] in Image.open(tmp_path / "out" / f"{record['id']}.png").text["lora"]
    monkeypatch.setattr(adapted, "adapted_bundle", None)  # what differs by its adapters alone is another picture
    assert run("a fist")[1].count("1 skipped") == 1


@pytest.mark.slow
def test_adapters_of_the_demo(tmp_path):
    """Of all layers, of cross-attention, of the time; mixed, each is what it is alone."""
    random, few, files = np.random.default_rng(0), {"steps": 3, "hand_steps": 2}, []
    for word in ("", "attn2", "time_emb"):
        tensors = {}
        for name, shape in WeightMap.load(bundle_path()).shapes.items():
            if name.startswith("unet.") and word in name and len(shape) > 1:
                for end, size in (("A", (2, *shape[1:])), ("B", (shape[0], 2, *(1,) * (len(shape) - 2)))):
                    tensors[f"{name.removesuffix('.weight')}.lora_{end}.weight"] = random.normal(0, 0.05, size)
        files.append(str(tmp_path / f"{word or 'all'}.safetensors"))
        save_file({name: value.astype(np.float32) for name, value in tensors.items()}, files[-1])
    with HanDiffuser.load("demo", "cpu", 1, 4, "onnxruntime") as demo:
        kinds = [None, files[0], (files[1], f"{files[2]}:-0.5"), f"{files[0]}:-0.3"]
        alone = [demo.generate("two open hands", seed=2, lora=kind, **few)[0].image.astype(int) for kind in kinds]
        assert all(np.abs(one - alone[0]).mean() > 0.05 for one in alone[1:])
        mixed = demo.generate(
            [Request("two open hands", seed=2, lora=kinds[i % 4], id=f"r{i}", **few) for i in range(8)]
        )
        for number, picture in enumerate(mixed):
            np.testing.assert_allclose(picture.image, alone[number % 4], rtol=0, atol=1)
