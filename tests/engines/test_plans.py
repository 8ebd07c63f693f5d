"""The engine cache: what hits, what is built again and why, and what happens to plans that are no good."""

from __future__ import annotations

import errno
import json
from dataclasses import replace

import pytest
from click.testing import CliRunner
from handiffuser.contract import Manifest
from handiffuser.engines.build import fitting, wanted_plans
from handiffuser.engines.cli import commands, stale
from handiffuser.engines.inspect import find_plans
from handiffuser.engines.plans import PlanStore, Wanted, belongs, key_of, parts, user_cache
from handiffuser.engines.tensorrt import Options
from handiffuser.errors import EngineError
from handiffuser.shipped import bundle_path

BASE = {"backend": "tensorrt", "version": "11.0", "target": "GPU A", "options": Options()}


@pytest.fixture
def manifest(toy_bundle):
    return Manifest.load(toy_bundle)


def all_parts(manifest, sizes=(1, 4), dynamic=False, shared=False, **changes):
    plans = wanted_plans(manifest, Wanted(tuple(sizes), dynamic, shared))
    return [parts(manifest, name, batch, **{**BASE, **changes}) for name, batch in plans]


def build(store, wanted):
    """What building does, without a backend: returns {(graph, sizes): why} of what had to be built."""
    built = {}
    for one in wanted:
        if store.find(one) is None:
            built[one["name"], one["sizes"]] = store.why(one)
            store.add(one, b"plan of " + repr(sorted(one.items())).encode(), {"types": {}}, 1.0)
    return built


def other_weights(manifest, graph):
    files = dict(manifest.files)
    files[manifest.graphs[graph].file] = "0" * 64
    return replace(manifest, files=files)


CHANGES = {
    "weights of the unet": (lambda m: all_parts(other_weights(m, "unet")), "graph or its weights", {"unet"}),
    "weights of the decoder": (
        lambda m: all_parts(other_weights(m, "image_decoder")),
        "graph or its weights",
        {"image_decoder"},
    ),
    "version": (lambda m: all_parts(m, version="11.1"), "version changed from 11.0 to 11.1", "all"),
    "gpu": (lambda m: all_parts(m, target="GPU B"), "GPU changed from GPU A to GPU B", "all"),
    "options": (lambda m: all_parts(m, options=Options(level=5)), "build options changed", "all"),
    "backend": (lambda m: all_parts(m, backend="tensorrt-rtx"), "backend changed", "all"),
    "precision": (lambda m: all_parts(replace(m, precision="fp16")), "precision changed from fp32 to fp16", "all"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_builds_what_it_touches_and_says_why(manifest, tmp_path, change):
    store = PlanStore(tmp_path)
    first = build(store, all_parts(manifest))
    assert {why.removesuffix(",G=2") for why in first.values()} == {
        "never built", "never built for B=4", "never built for B=1,G=1", "never built for B=4,G=1"
    }  # fmt: skip
    assert len(first) == 19  # eight graphs for each size, the hand prior also with one branch, and the time rows
    assert build(store, all_parts(manifest)) == {}
    make, words, touched = CHANGES[change]
    again = build(store, make(manifest))
    graphs = set(manifest.graphs) if touched == "all" else touched
    assert {graph for graph, _ in again} == graphs
    assert all(words in why for why in again.values()), again
    # What was there before is there still: going back builds nothing.
    assert build(store, all_parts(manifest)) == {}


def test_another_batch_size_builds_only_that(manifest, tmp_path):
    store = PlanStore(tmp_path)
    build(store, all_parts(manifest))
    again = build(store, all_parts(manifest, (1, 2, 4)))
    assert {sizes for _, sizes in again} == {"B=2", "B=2,G=2", "B=2,G=1"} and len(again) == 9
    assert all(why == f"never built for {sizes}" for (_, sizes), why in again.items())
    dynamic = build(store, all_parts(manifest, (1, 8), dynamic=True))
    shared = build(store, all_parts(manifest, (1, 8), shared=True))
    assert {sizes for _, sizes in shared} == {"B=1+8", "B=1+8,G=2", "B=1+8,G=1"}
    assert {tuple(plan.batches) for plan in store if "+" in plan.parts["sizes"]} == {(1, 8)}
    with pytest.raises(EngineError, match="leave out --dynamic or --shared-weights"):
        wanted_plans(manifest, Wanted((1, 8), dynamic=True, shared=True))
    assert {sizes for _, sizes in dynamic} == {"B=1-8-8", "B=1-8-8,G=2", "B=1-8-8,G=1"}


def test_without_guidance_the_unet_is_built_on_request(manifest):
    def single(**options):
        return {name for name, sizes in wanted_plans(manifest, Wanted((1, 4), **options)) if sizes.get("G") == 1}

    assert single() == {"hand_prior"} and single(guidance_free=True) == {"hand_prior", "unet"}


def test_plans_from_when_tf32_was_on_are_built_again(manifest, tmp_path):
    store = PlanStore(tmp_path)
    wanted = all_parts(manifest, (1,))
    for one in wanted:
        store.add({name: value for name, value in one.items() if name != "tf32"}, b"plan", {}, 1.0)
    assert not any(belongs(plan, manifest) for plan in store)
    assert {stale(plan, manifest, {}) for plan in store} == {"stale: built when float32 was computed in TF32"}
    again = build(store, wanted)
    assert len(again) == len(wanted) and set(again.values()) == {"TF32 in float32 layers changed from on to off"}
    assert sum(belongs(plan, manifest) for plan in store) == len(wanted)


@pytest.mark.parametrize(
    "damage", ["truncated", "empty", "flipped", "missing", "no record", "bad record", "foreign record"]
)
def test_damaged_plans_are_found_built_again_and_never_read(manifest, tmp_path, damage):
    store = PlanStore(tmp_path)
    wanted = all_parts(manifest)
    build(store, wanted)
    plan = next(plan for plan in store if plan.graph == "unet")
    record = plan.path.with_suffix(".json")
    if damage == "truncated":
        plan.path.write_bytes(plan.path.read_bytes()[:-5])
    elif damage == "empty":
        plan.path.write_bytes(b"")
    elif damage == "flipped":
        content = bytearray(plan.path.read_bytes())
        content[3] ^= 1
        plan.path.write_bytes(content)
    elif damage == "missing":
        plan.path.unlink()
    elif damage == "no record":
        record.unlink()
    elif damage == "bad record":
        record.write_text('{"graph": ')
    else:
        record.write_text(json.dumps({"something": "else"}))
    if damage in ("truncated", "empty", "flipped", "missing"):
        with pytest.raises(EngineError, match="hd-engines build"):
            store.read(plan)
        assert store.problem(plan, verify=True)
    else:
        assert store.strays()
    # A changed byte costs a hash to find, which a build does and the start of a run does when it reads the plan.
    if damage == "flipped":
        assert store.find(plan.parts) and not store.find(plan.parts, verify=True)
        plan.path.unlink()
    again = build(store, wanted)
    assert list(again) == [("unet", plan.parts["sizes"])]
    assert not store.strays()


def test_full_disk_leaves_nothing_half_written(manifest, tmp_path, monkeypatch):
    store = PlanStore(tmp_path)
    wanted = all_parts(manifest)
    build(store, wanted[:3])

    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full)
        with pytest.raises(EngineError, match=r"disk is full.*same command again"):
            build(store, wanted)
    assert len(list(store)) == 3 and not store.strays()
    assert len(build(store, wanted)) == 16


WRONG = {
    "parts is text": lambda r: {**r, "parts": "text"},
    "parts is nested": lambda r: {**r, "parts": {**r["parts"], "sizes": {"B": 1}}},
    "parts lacks one": lambda r: {**r, "parts": {k: v for k, v in r["parts"].items() if k != "sizes"}},
    "parts has another": lambda r: {**r, "parts": {**r["parts"], "colour": "red"}},
    "sizes without numbers": lambda r: keyed({**r, "parts": {**r["parts"], "sizes": "B"}}),
    "sizes are huge": lambda r: keyed({**r, "parts": {**r["parts"], "sizes": "B=1" + "0" * 5000}}),
    "graph is a list": lambda r: {**r, "graph": ["unet"]},
    "graph is another": lambda r: {**r, "graph": "unet_time"},
    "key of other parts": lambda r: {**r, "key": "0" * 16},
    "sha256 is a number": lambda r: {**r, "sha256": 7},
    "size is text": lambda r: {**r, "size": "7"},
    "size is true": lambda r: {**r, "size": True},
    "size is negative": lambda r: {**r, "size": -1},
    "seconds is null": lambda r: {**r, "seconds": None},
    "seconds is not a number": lambda r: {**r, "seconds": float("nan")},
    "proof is a list": lambda r: {**r, "proof": []},
    "types in proof are text": lambda r: {**r, "proof": {"types": {"HALF": "many"}}},
    "a list": lambda r: [r],
    "null": lambda r: None,
    "an entry more": lambda r: {**r, "more": 1},
    "an entry less": lambda r: {k: v for k, v in r.items() if k != "proof"},
}


def keyed(record):
    return {**record, "key": key_of(record["parts"])}


@pytest.mark.parametrize("wrong", [*WRONG, "deep", "large", "bytes"])
def test_a_wrong_record_is_a_stray_with_a_sentence(manifest, tmp_path, wrong):
    store = PlanStore(tmp_path)
    wanted = all_parts(manifest, (1,))
    build(store, wanted)
    plan = next(plan for plan in store if plan.graph == "image_decoder")
    record = plan.path.with_suffix(".json")
    if wrong in WRONG:
        record.write_text(json.dumps(WRONG[wrong](json.loads(record.read_text()))))
    else:
        record.write_bytes({"deep": b"[" * 100_000, "large": b" " * (17 << 20), "bytes": b"\xff\xfe\0"}[wrong])
    assert plan.graph not in {plan.graph for plan in store}
    assert "its record of a plan is wrong" in store.strays()[record] and "\n" not in store.strays()[record]
    assert list(build(store, wanted)) == [("image_decoder", "B=1")] and not store.strays()


def test_sizes_that_make_no_sense(manifest):
    for sizes in ((0,), (5000,)):
        with pytest.raises(EngineError, match="batch_sizes must be 1 to 4096, got"):
            wanted_plans(manifest, Wanted(sizes))


def test_plans_of_the_shipped_demo_are_in_the_user_s_cache(tmp_path, monkeypatch):
    """An installation is not written to, and may be read-only; all commands look where they are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shipped = bundle_path()
    before = sorted(path.name for path in shipped.iterdir())
    manifest = Manifest.load(shipped, verify=False)
    wanted = parts(manifest, "unet", {"B": 4, "G": 2}, "tensorrt-rtx", "1.7", "any GPU", Options())
    for named in (shipped, str(shipped), shipped.parent / "." / "bundle"):
        assert PlanStore(named).folder == tmp_path / "handiffuser" / "demo" / "plans"
    plan = PlanStore(shipped).add(wanted, b"a plan", {"layers": []}, 1.0)
    assert plan.path.is_relative_to(tmp_path) and sorted(path.name for path in shipped.iterdir()) == before
    run = CliRunner()
    assert "unet" in run.invoke(commands, ["list", "demo"]).output
    assert "and 1 plans are sound" in run.invoke(commands, ["verify", "demo"]).output
    assert find_plans(shipped)[0].path == find_plans(plan.path)[0].path == plan.path
    assert not list(user_cache()), "what runs compile by themselves, and clear by age, is apart"
    plan.path.write_bytes(b"damaged")
    assert run.invoke(commands, ["verify", "demo"], standalone_mode=False).return_value == 1
    assert "removed unet" in run.invoke(commands, ["prune", "demo"]).output
    assert not plan.path.exists() and not list(PlanStore(shipped))
    own = tmp_path / "demo"
    assert PlanStore(own).folder == own / "plans", "a user's folder of that name is the user's"


def test_a_card_that_a_copy_for_each_size_does_not_fit_gets_one_plan(toy_bundle):
    """By default: who names an option, or has the room, gets what was asked for."""
    weights = (toy_bundle / "unet.onnx").stat().st_size

    class Card:
        def __init__(self, copies: float) -> None:
            self.copies = copies

        def memory(self) -> int:
            return int(self.copies * weights)

    small, large = Card(7), Card(9)
    asked, why = fitting(toy_bundle, Wanted(), small)
    assert asked == Wanted(shared=True) and "4 copies" in why and "--shared-weights" in why and "--batch-sizes" in why
    for wanted, card in [
        (Wanted(), large), (Wanted(), None), (Wanted((1,)), Card(0.1)), (Wanted(dynamic=True), small),
        (Wanted(shared=True), small), (Wanted((1, 2)), small),
    ]:  # fmt: skip
        assert fitting(toy_bundle, wanted, card) == (wanted, "")
    assert fitting(toy_bundle, Wanted((1, 2), guidance_free=True), small)[0].shared
