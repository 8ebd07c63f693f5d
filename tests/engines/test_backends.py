"""The table of backends: what each line says is true, commands follow from it, and one more line is enough."""

from __future__ import annotations

import sys
from importlib import import_module, metadata
from types import ModuleType

import numpy as np
import pytest
from click import Command
from handiffuser import HanDiffuser
from handiffuser.engines import backends
from handiffuser.engines.backends import BACKENDS, CHOICES, PLANNED, Backend
from handiffuser.engines.loading import open_engine
from handiffuser.engines.tensorrt import NAMES
from handiffuser.errors import EngineError
from handiffuser.runtime.loading import choose

HOST, GPU = ("host_engines",), ("device_engines",)
BUILD = ("build", "check_build", "version", "elsewhere")


@pytest.mark.parametrize("name", BACKENDS)
def test_a_module_gives_what_its_line_says(name):
    one = BACKENDS[name]
    needed = {one.host: HOST, one.plans: BUILD}
    if one.measured:
        needed[one.host] += ("inference", "shelf_of")
    if one.gpu and one.host:
        needed[one.host] += ("device_for",)
    for module, functions in [*needed.items(), (one.gpu, (*GPU, *(["check_plans"] if one.auto else [])))]:
        found = import_module(f"handiffuser.engines.{module}") if module else None
        assert found is None or all(callable(getattr(found, function)) for function in functions), (module, functions)
    assert one.devices and one.precisions[0] in backends.PRECISIONS


def test_extras_are_those_of_the_package():
    extras = metadata.metadata("handiffuser").get_all("Provides-Extra") or []
    assert {one.extra for one in BACKENDS.values()} <= set(extras)


def test_every_command_offers_the_table():
    for name in ("runtime", "serving", "evaluation", "benchmarks", "export"):
        commands = [one for one in vars(import_module(f"handiffuser.{name}.cli")).values() if isinstance(one, Command)]
        choices = [p.type.choices for one in commands for p in one.params if p.name == "backend"]
        assert choices == [CHOICES], name
    engines = import_module("handiffuser.engines.cli")
    for command, names in ((engines.build, PLANNED), (engines.compare, NAMES)):
        assert next(p.type.choices for p in command.params if p.name == "backend") == ("auto", *names)


@pytest.mark.parametrize(
    ("name", "device", "words"),
    [
        ("openvino", "cuda", r"openvino runs on CPUs only. Leave out --device cuda"),
        ("tensorrt", "cpu", r"tensorrt runs on NVIDIA GPUs only. .*--backend onnxruntime"),
        ("tensorrt-rtx", "cpu", "NVIDIA GPUs only"),
        ("trt", "auto", "backend must be one of auto, onnxruntime, .*got 'trt'"),
        ("onnxruntime", "tpu", "device must be one of auto, cpu, cuda, got 'tpu'"),
    ],
)
def test_what_cannot_be(toy_bundle, name, device, words):
    with pytest.raises(EngineError, match=words):
        choose(toy_bundle, name, device)


def test_one_line_more_is_a_backend(toy_bundle, monkeypatch):
    """Its module gives engines; ONNX Runtime runs the graphs that it leaves out."""
    calls = []

    class Plain:
        device, batches = "cpu", (1,)

        def __init__(self, path, spec):
            self.spec, self.engine = spec, open_engine(path, spec, threads=1)

        def prepare(self, sizes):
            calls.append(sizes)

        def __call__(self, feeds):
            calls.append("run")
            return self.engine(feeds)

    def host_engines(folder, manifest, threads, slots, pictures):
        calls.append((threads, slots, pictures))
        return {"unet": Plain(folder / manifest.graphs["unet"].file, manifest.graphs["unet"])}

    toy = ModuleType("handiffuser.engines.toy")
    toy.host_engines = host_engines
    monkeypatch.setitem(sys.modules, toy.__name__, toy)
    monkeypatch.setitem(BACKENDS, "toy", Backend("toy", "json", "cpu", host="toy", auto=True))
    monkeypatch.setattr("handiffuser.runtime.loading.CHOICES", ("auto", *BACKENDS))
    with HanDiffuser.load(toy_bundle, threads=1, batch_size=2, backend="onnxruntime") as exact:
        wanted = exact.generate("a fist", steps=2, seed=1)[0].image
    with HanDiffuser.load(toy_bundle, threads=1, batch_size=2, backend="toy") as pipeline:
        np.testing.assert_array_equal(pipeline.generate("a fist", steps=2, seed=1)[0].image, wanted)
    assert calls[0] == (1, 2, 1) and calls.count("run") == 2
    monkeypatch.setitem(BACKENDS, "openvino", Backend("openvino", "no_such_module", "openvino", host="openvino"))
    assert choose(toy_bundle, "auto", "cpu").backend == "toy"
    monkeypatch.setitem(BACKENDS, "toy", Backend("toy", "no_such_module", "cpu", host="toy", auto=True))
    assert choose(toy_bundle, "auto", "cpu").backend == "onnxruntime"
