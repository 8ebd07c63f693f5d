"""How a plan is picked and put to work, with a stand-in for TensorRT: what can be tested of it without a GPU."""

from __future__ import annotations

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
from fake_cuda import FakeCuda
from handiffuser.contract import GRAPHS, GraphSpec, Manifest, TensorSpec
from handiffuser.engines import build
from handiffuser.engines.build import wanted_plans
from handiffuser.engines.plans import PlanStore, parts
from handiffuser.engines.tensorrt import EVERYWHERE, Backend, LoadedPlan, Options, Scratch, TensorRTEngine
from handiffuser.errors import EngineError
from handiffuser.runtime.loading import check_bfloat16, enough, powers_of_two, usable_plans

SPEC = GraphSpec(
    "toy.onnx",
    [TensorSpec("x", "float32", ("B", 3)), TensorSpec("row", "float32", ("B", 2))],
    [TensorSpec("x", "float32", ("B", 3)), TensorSpec("finite", "float32", ("B",))],
)


class FakeContext:
    def __init__(self):
        self.shapes, self.addresses, self.runs = {}, {}, []

    def set_device_memory(self, pointer, size):
        self.memory = (pointer, size)

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name, pointer):
        self.addresses[name] = pointer
        return True

    def execute_async_v3(self, stream):
        self.runs.append(stream)
        return True


class FakePlan:
    """A deserialised engine for batches of 4."""

    device_memory_size_v2 = 1000

    def __init__(self, names=("x", "row", "next_x", "finite")):
        self.names = names
        self.num_io_tensors = len(names)

    def get_tensor_name(self, i):
        return self.names[i]

    def get_tensor_shape(self, name):
        return (4, {"x": 3, "row": 2}[name])

    def create_execution_context(self, strategy):
        assert strategy == "user managed"
        self.context = FakeContext()
        return self.context


def backend(rtx=False, valid=True, loads=True):
    """A Backend without its module."""
    fake = Backend.__new__(Backend)
    fake.name, fake.version, fake.rtx = ("tensorrt-rtx" if rtx else "tensorrt"), "11.0", rtx
    fake.messages, fake.loaded, fake.logger = [], weakref.WeakSet(), None
    runtime = SimpleNamespace(
        get_engine_validity=lambda plan: ("valid" if valid else "invalid", 0),
        deserialize_cuda_engine=lambda plan: FakePlan() if loads else None,
    )
    fake.module = SimpleNamespace(
        Runtime=lambda logger: runtime,
        EngineValidity=SimpleNamespace(INVALID="invalid"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
    )
    return fake


def loaded(plan):
    return LoadedPlan(backend(), None, plan, "toy")


def arrays(cuda, rows):
    inputs = {"x": cuda.zeros((rows, 3), "float32"), "row": cuda.zeros((rows, 2), "float32")}
    outputs = {"x": cuda.zeros((rows, 3), "float32"), "finite": cuda.zeros((rows,), "float32")}
    return inputs, outputs


def test_tensors_are_bound_by_the_names_in_the_file():
    cuda = FakeCuda()
    plan, scratch = FakePlan(), Scratch(cuda)
    engine = TensorRTEngine(loaded(plan), SPEC, scratch)
    inputs, outputs = arrays(cuda, 4)
    engine.bind(inputs, outputs)
    engine.enqueue(SimpleNamespace(handle=77))
    context = plan.context
    assert context.addresses == {
        "x": inputs["x"].pointer,
        "row": inputs["row"].pointer,
        "next_x": outputs["x"].pointer,
        "finite": outputs["finite"].pointer,
    }
    assert context.runs == [77] and context.memory == (scratch.array.pointer, 1000)


def test_engines_share_scratch_and_a_larger_one_leaves_the_smaller_ones_theirs():
    cuda = FakeCuda()
    scratch = Scratch(cuda)
    first, second, large = FakePlan(), FakePlan(), FakePlan()
    large.device_memory_size_v2 = 5000
    for plan in (first, second, large):
        TensorRTEngine(loaded(plan), SPEC, scratch)
    assert first.context.memory == second.context.memory
    assert large.context.memory[0] != first.context.memory[0] and large.context.memory[1] == 5000


def test_a_shape_outside_the_profile_names_tensor_range_and_remedy():
    cuda = FakeCuda()
    engine = TensorRTEngine(loaded(FakePlan()), SPEC, Scratch(cuda))
    with pytest.raises(EngineError, match=r"toy got x of shape \[2, 3\].*allows \[4, 3\].*--batch-sizes 2"):
        engine.bind(*arrays(cuda, 2))


def test_a_plan_with_other_tensors_than_the_manifest():
    with pytest.raises(EngineError, match=r"not what the manifest says.*hd-engines build"):
        TensorRTEngine(loaded(FakePlan(("x", "row", "next_x"))), SPEC, Scratch(FakeCuda()))


@pytest.mark.parametrize("trouble", [{"valid": False}, {"loads": False}])
def test_a_foreign_plan_is_one_sentence(trouble):
    with pytest.raises(
        EngineError, match=r"unet does not run here \(Fake GPU, compute capability 8\.9.*hd-engines build"
    ):
        backend(**trouble).load(b"plan", "unet", FakeCuda())


@pytest.mark.parametrize(
    ("rtx", "target", "capability", "fits"),
    [
        (True, f"compute capability {EVERYWHERE}", "8.9", True),
        (True, f"compute capability {EVERYWHERE}", "12.1", True),
        (True, f"compute capability {EVERYWHERE}", "9.0", False),
        (True, f"compute capability {EVERYWHERE}", "10.0", False),
        (True, f"compute capability {EVERYWHERE}", "7.5", False),
        (True, "compute capability 7.5", "7.5", True),
        (True, "compute capability 8.9, 12.0", "8.9", True),
        (True, "compute capability 8.9, 12.0", "8.6", False),
        (False, "Fake GPU, compute capability 8.9", "8.9", True),
        (False, "Other GPU, compute capability 8.9", "8.9", False),
    ],
)
def test_which_gpus_a_plan_is_for(rtx, target, capability, fits):
    cuda = FakeCuda()
    cuda.compute_capability = capability
    assert backend(rtx).runs_on(target, cuda) == fits


def on(capability):
    cuda = FakeCuda()
    cuda.compute_capability = capability
    return cuda


@pytest.mark.parametrize(
    ("installed", "cuda", "chosen", "words"),
    [
        (("tensorrt-rtx", "tensorrt"), on("8.9"), "tensorrt-rtx", "Fake GPU"),
        (("tensorrt-rtx", "tensorrt"), on("7.5"), "tensorrt-rtx", "7.5"),
        (("tensorrt-rtx", "tensorrt"), on("9.0"), "tensorrt", "9.0"),
        (("tensorrt",), on("12.0"), "tensorrt", "12.0"),
        (("tensorrt-rtx",), on("10.0"), None, r"does not run on this GPU \(Fake GPU.*10\.0.*--backend tensorrt"),
        (("tensorrt-rtx", "tensorrt"), None, "tensorrt-rtx", "8.x or 12.x"),
        (("tensorrt",), None, None, "no GPU here.*handiffuser\\[tensorrt-rtx\\]"),
        ((), on("8.9"), None, "cannot be imported"),
    ],
)
def test_the_backend_follows_from_the_gpu(monkeypatch, installed, cuda, chosen, words):
    def stand_in(name):
        if name not in installed:
            raise EngineError(f"{name} cannot be imported")
        return backend(rtx=name == "tensorrt-rtx")

    monkeypatch.setattr(build, "Backend", stand_in)
    if chosen is None:
        with pytest.raises(EngineError, match=words):
            build.choose_backend(cuda)
    else:
        name, sentence = build.choose_backend(cuda)
        assert name == chosen and words in sentence


def test_plans_without_named_gpus_are_for_the_gpu_that_is_there():
    rtx, plain = backend(rtx=True), Options(level=1)
    assert rtx.for_gpu(plain, None) == rtx.for_gpu(plain, on("8.6")) == plain
    assert rtx.for_gpu(plain, on("7.5")).compute_capabilities == ("7.5",)
    for_others = Options(compute_capabilities=("8.9",))
    assert rtx.for_gpu(for_others, on("7.5")) == rtx.for_gpu(for_others, on("9.0")) == for_others
    with pytest.raises(EngineError, match=r"does not run on this GPU.*--backend tensorrt.*--compute-capability 8\.9"):
        rtx.for_gpu(plain, on("9.0"))
    with pytest.raises(EngineError, match=r"7\.5 is for no other: build twice"):
        rtx.for_gpu(Options(compute_capabilities=("7.5", "8.9")), None)
    assert backend().for_gpu(plain, on("9.0")) == plain


def test_plans_of_a_backend_that_never_runs_on_the_gpu_are_not_asked_for_again(toy_bundle, tmp_path):
    with pytest.raises(EngineError, match=r"does not run on this GPU.*--backend tensorrt,"):
        usable_plans(PlanStore(tmp_path), Manifest.load(toy_bundle), backend(rtx=True), on("9.0"))


def test_plans_are_picked_by_bundle_backend_version_and_gpu(toy_bundle, tmp_path):
    manifest, store, cuda, module = Manifest.load(toy_bundle), PlanStore(tmp_path), FakeCuda(), backend(rtx=True)
    everywhere = f"compute capability {EVERYWHERE}"

    def add(version, target, sizes, dynamic=False):
        for name, batch in wanted_plans(manifest, sizes, dynamic):
            store.add(parts(manifest, name, batch, module.name, version, target, Options()), b"plan", {}, 1.0)

    with pytest.raises(
        EngineError, match=r"no tensorrt-rtx 11\.0 plans of text_encoder.*hd-engines build .* --backend"
    ):
        usable_plans(store, manifest, module, cuda)
    add("10.9", everywhere, [1])
    add("11.0", "compute capability 12.0", [2])
    with pytest.raises(EngineError, match="no tensorrt-rtx"):
        usable_plans(store, manifest, module, cuda)
    add("11.0", everywhere, [4])
    found = usable_plans(store, manifest, module, cuda)
    assert set(found) == set(GRAPHS) and list(found["unet"]) == [4]
    add("11.0", everywhere, [6], dynamic=True)
    found = usable_plans(store, manifest, module, cuda)
    assert sorted(found["unet"]) == [1, 2, 4, 6]
    damaged = found["unet"][6]
    damaged.path.write_bytes(b"pla")
    assert sorted(usable_plans(store, manifest, module, cuda)["unet"]) == [4]


@pytest.mark.parametrize(
    ("precision", "capability", "runs"),
    [("bf16", "8.0", True), ("bf16", "12.1", True), ("fp16", "7.5", True), ("bf16", "7.5", False)],
)
def test_bfloat16_needs_a_gpu_that_has_it(toy_bundle, precision, capability, runs):
    manifest, cuda = replace(Manifest.load(toy_bundle), precision=precision), FakeCuda()
    cuda.compute_capability = capability
    if runs:
        check_bfloat16(manifest, cuda)
    else:
        with pytest.raises(EngineError, match=r"bfloat16.*Fake GPU, compute capability 7\.5.*--precision fp16"):
            check_bfloat16(manifest, cuda)


@pytest.mark.parametrize(
    ("buckets", "slots", "kept"),
    [([1, 16], 8, [1, 16]), ([1, 2, 4, 8], 4, [1, 2, 4]), ([1, 2, 4, 8], 3, [1, 2, 4]), ([16], 1, [16])],
)
def test_the_buckets_kept_hold_all_slots(buckets, slots, kept):
    assert enough(buckets, slots) == kept


def test_powers_of_two():
    assert powers_of_two(1) == [1] and powers_of_two(5) == [1, 2, 4, 8] and powers_of_two(8) == [1, 2, 4, 8]
