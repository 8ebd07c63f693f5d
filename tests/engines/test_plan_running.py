"""How a plan is picked and put to work, with a stand-in for TensorRT: what can be tested of it without a GPU."""

from __future__ import annotations

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("cuda.bindings.runtime")

from fake_runtime import fake_cuda
from handiffuser.contract import ALL_GRAPHS, GraphSpec, Manifest, TensorSpec
from handiffuser.engines import build
from handiffuser.engines.base import check_gpu, enough, powers_of_two
from handiffuser.engines.build import options_for, wanted_plans
from handiffuser.engines.plans import PlanStore, Wanted, parts
from handiffuser.engines.tensorrt import EVERYWHERE, LoadedPlan, Options, Scratch, TensorRT, TensorRTEngine
from handiffuser.engines.tensorrt_loading import usable_plans
from handiffuser.errors import EngineError

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

    device_memory_size_v2, num_optimization_profiles = 1000, 1

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
    """A TensorRT without its module."""
    fake = TensorRT.__new__(TensorRT)
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
    return LoadedPlan(backend(), None, plan, "toy", fake_cuda())


def arrays(cuda, rows):
    inputs = {"x": cuda.zeros((rows, 3), "float32"), "row": cuda.zeros((rows, 2), "float32")}
    outputs = {"x": cuda.zeros((rows, 3), "float32"), "finite": cuda.zeros((rows,), "float32")}
    return inputs, outputs


def test_tensors_are_bound_by_the_names_in_the_file():
    cuda = fake_cuda()
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
    cuda = fake_cuda()
    scratch = Scratch(cuda)
    first, second, large = FakePlan(), FakePlan(), FakePlan()
    large.device_memory_size_v2 = 5000
    for plan in (first, second, large):
        TensorRTEngine(loaded(plan), SPEC, scratch)
    assert first.context.memory == second.context.memory
    assert large.context.memory[0] != first.context.memory[0] and large.context.memory[1] == 5000


def test_a_shape_outside_the_profile_names_tensor_range_and_remedy():
    cuda = fake_cuda()
    engine = TensorRTEngine(loaded(FakePlan()), SPEC, Scratch(cuda))
    with pytest.raises(EngineError, match=r"toy got x of shape \[2, 3\].*allows \[4, 3\].*--batch-sizes 2"):
        engine.bind(*arrays(cuda, 2))


def test_each_batch_size_takes_its_own_profile_of_a_shared_plan():
    class Shared(FakePlan):
        num_optimization_profiles = 3

        def get_tensor_shape(self, name):
            return (-1, {"x": 3, "row": 2}[name])

        def get_tensor_profile_shape(self, name, profile):
            return [((1, 2, 4)[profile], {"x": 3, "row": 2}[name])] * 3

    cuda, calls = fake_cuda(), []
    call = cuda.call
    cuda.call = lambda *what: calls.append(what) or call(*what)
    plan = LoadedPlan(backend(), None, Shared(), "toy", cuda)
    for rows in (4, 1, 2):
        engine = TensorRTEngine(plan, SPEC, Scratch(cuda))
        engine.context.set_optimization_profile_async = lambda profile, stream: calls.append(profile) is None
        engine.bind(*arrays(cuda, rows))
    chosen = [(what, calls[i + 1]) for i, what in enumerate(calls) if isinstance(what, int)]
    assert chosen == [(number, ("cudaStreamSynchronize", 0)) for number in (2, 0, 1)]
    with pytest.raises(EngineError, match=r"toy got x of shape \[3, 3\].*allows \[1, 3\] or \[2, 3\] or \[4, 3\]"):
        engine.bind(*arrays(cuda, 3))
    engine.context.set_optimization_profile_async = lambda *_: False
    with pytest.raises(EngineError, match="refuses profile 0 of toy"):
        engine.bind(*arrays(cuda, 1))


@pytest.mark.parametrize("setter", ["set_tensor_address", "set_input_shape", "execute_async_v3"])
def test_a_setter_that_says_no_is_heard(setter):
    cuda = fake_cuda()
    engine = TensorRTEngine(loaded(FakePlan()), SPEC, Scratch(cuda))
    setattr(engine.context, setter, lambda *_: False)
    engine.backend.messages.append("Error 7: the reason")
    with pytest.raises(EngineError, match=r"tensorrt 11\.0 (refuses|failed)"):
        engine.bind(*arrays(cuda, 4))
        engine.enqueue(SimpleNamespace(handle=77))


def test_scratch_memory_that_is_refused_is_heard():
    plan, one = FakePlan(), loaded(FakePlan())
    plan = one.engine

    class Context(FakeContext):
        def set_device_memory(self, pointer, size):
            one.backend.messages.append("Error 3: not aligned")

    plan.create_execution_context = lambda strategy: Context()
    with pytest.raises(EngineError, match=r"refuses scratch memory for toy: Error 3: not aligned"):
        TensorRTEngine(one, SPEC, Scratch(fake_cuda()))


@pytest.mark.parametrize(
    ("flag", "message", "words"),
    [
        (16, "", r"unet does not fit into the GPU's memory \(5 MB are free\).*--batch-size"),
        (0, "Error Code 2: OutOfMemory (Requested size was 1 bytes.)", "does not fit into the GPU's memory"),
        (4, "", "update the driver"),
        (0, "CUDA driver version is insufficient for CUDA runtime version", "update the driver"),
        (1, "Error: version tag differs", "built by another version or for other GPUs.*It says: Error: version tag"),
    ],
)
def test_a_plan_that_does_not_load_says_why(flag, message, words):
    diagnostics = SimpleNamespace(INSUFFICIENT_GPU_MEMORY=16, OLD_CUDA_DRIVER=4, VERSION_MISMATCH=1)
    one, cuda = backend(valid=False), fake_cuda()
    one.module.EngineInvalidityDiagnostics, cuda.free_memory = diagnostics, lambda: 5_000_000
    ask = one.module.Runtime(None).get_engine_validity

    def say(plan):
        one.messages.extend([message] if message else [])
        return ask(plan)[0], flag

    one.module.Runtime(None).get_engine_validity = say
    with pytest.raises(EngineError, match=words):
        one.load(b"plan", "unet", cuda)


@pytest.mark.parametrize("kind", ["Builder", "Runtime"])
def test_a_driver_that_refuses_is_one_sentence(kind):
    def refuse(logger):
        one.messages.append("CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    one = backend()
    setattr(one.module, kind, refuse)
    with pytest.raises(EngineError, match=r"tensorrt 11\.0 does not start \(CUDA initialization failure.*nvidia-smi"):
        one.made(kind)


def test_contexts_of_a_plan_share_one_cache_of_kernels_that_is_written_once(tmp_path):
    class Config:
        def set_execution_context_allocation_strategy(self, strategy):
            self.strategy = strategy

        def create_runtime_cache(self):
            caches.append(SimpleNamespace(serialize=lambda: b"kernels", deserialize=read.append))
            return caches[-1]

        def set_runtime_cache(self, cache):
            return True

    class Rtx(FakePlan):
        def create_runtime_config(self):
            return Config()

        def create_execution_context(self, config):
            configs.append(config)
            return FakeContext()

    caches, configs, read, one, kernels = [], [], [], backend(rtx=True), tmp_path / "x.kernels"
    one.module.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
    plan = LoadedPlan(one, None, Rtx(), "toy", fake_cuda(), kernels)
    for _ in range(3):
        TensorRTEngine(plan, SPEC, Scratch(fake_cuda()))
    assert len(caches) == 1 and len(set(map(id, configs))) == 1
    assert configs[0].dynamic_shapes_kernel_specialization_strategy == "eager"
    plan.keep_kernels()
    assert kernels.read_bytes() == b"kernels" and not read
    kernels.unlink()
    plan.keep_kernels()  # nothing new
    assert not kernels.exists()
    plan.context()
    plan.keep_kernels()
    assert kernels.exists()
    again = LoadedPlan(one, None, Rtx(), "toy", fake_cuda(), kernels)
    assert read == [b"kernels"]
    again.close()
    again.close()


def test_closing_lets_go_of_engines_and_plans_without_a_collection():
    one, plan = backend(), FakePlan()
    kept = one.load(b"plan", "unet", fake_cuda())
    engine = TensorRTEngine(kept, SPEC, Scratch(fake_cuda()))
    engine.bind(*arrays(fake_cuda(), 4))
    one.close()
    one.close()
    assert engine.context is None and engine.bound == ({}, {}) and kept.engine is None
    kept = one.load(b"plan", "unet", fake_cuda())
    engine, gone = None, weakref.ref(TensorRTEngine(kept, SPEC, Scratch(fake_cuda())))
    assert gone() is None
    kept, plan = None, weakref.ref(kept)
    assert plan() is None


def test_a_plan_with_other_tensors_than_the_manifest():
    with pytest.raises(EngineError, match=r"the manifest has others.*hd-engines build"):
        TensorRTEngine(loaded(FakePlan(("x", "row", "next_x"))), SPEC, Scratch(fake_cuda()))


@pytest.mark.parametrize("trouble", [{"valid": False}, {"loads": False}])
def test_a_foreign_plan_is_one_sentence(trouble):
    with pytest.raises(
        EngineError, match=r"unet does not run here \(Fake GPU, compute capability 8\.9.*hd-engines build"
    ):
        backend(**trouble).load(b"plan", "unet", fake_cuda())


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
    cuda = fake_cuda(capability)
    assert backend(rtx).runs_on(target, cuda) == fits


def on(capability):
    return fake_cuda(capability)


@pytest.mark.parametrize(
    ("installed", "cuda", "chosen", "words"),
    [
        (("tensorrt-rtx", "tensorrt"), on("8.9"), "tensorrt-rtx", "Fake GPU"),
        (("tensorrt-rtx", "tensorrt"), on("7.5"), "tensorrt-rtx", "7.5"),
        (("tensorrt-rtx", "tensorrt"), on("9.0"), "tensorrt", "9.0"),
        (("tensorrt",), on("12.0"), "tensorrt", "12.0"),
        (("tensorrt-rtx",), on("10.0"), None, r"does not run on this GPU \(Fake GPU.*10\.0.*--backend tensorrt"),
        (("tensorrt-rtx", "tensorrt"), None, "tensorrt-rtx", "8.x or 12.x"),
        (("tensorrt",), None, None, "no usable GPU.*handiffuser\\[tensorrt-rtx\\]"),
        ((), on("8.9"), None, "cannot be imported"),
    ],
)
def test_the_backend_follows_from_the_gpu(monkeypatch, installed, cuda, chosen, words):
    def stand_in(name):
        if name not in installed:
            raise EngineError(f"{name} cannot be imported")
        return backend(rtx=name == "tensorrt-rtx")

    monkeypatch.setattr(build, "TensorRT", stand_in)
    if chosen is None:
        with pytest.raises(EngineError, match=words):
            build.choose_builder(cuda)
    else:
        name, sentence = build.choose_builder(cuda)
        assert name == chosen and words in sentence


def test_plans_without_named_gpus_are_for_the_gpu_that_is_there():
    rtx, plain = backend(rtx=True), Options(level=1)
    assert rtx.for_gpu(plain, None) == rtx.for_gpu(plain, on("8.6")) == plain
    assert rtx.for_gpu(plain, on("7.5")).compute_capabilities == ("7.5",)
    for_others = Options(compute_capabilities=("8.9",))
    assert rtx.for_gpu(for_others, on("7.5")) == rtx.for_gpu(for_others, on("9.0")) == for_others
    with pytest.raises(EngineError, match=r"does not run on this GPU.*--backend tensorrt.*--compute-capability 8\.9"):
        rtx.for_gpu(plain, on("9.0"))
    with pytest.raises(EngineError, match=r"7\.5 serves no other GPU: build twice"):
        rtx.for_gpu(Options(compute_capabilities=("7.5", "8.9")), None)
    assert backend().for_gpu(plain, on("9.0")) == plain


def test_plans_of_a_backend_that_never_runs_on_the_gpu_are_not_asked_for_again(toy_bundle, tmp_path):
    with pytest.raises(EngineError, match=r"does not run on this GPU.*--backend tensorrt,"):
        usable_plans(PlanStore(tmp_path), Manifest.load(toy_bundle), backend(rtx=True), on("9.0"))


def test_plans_are_picked_by_bundle_backend_version_and_gpu(toy_bundle, tmp_path):
    manifest, store, cuda, module = Manifest.load(toy_bundle), PlanStore(tmp_path), fake_cuda(), backend(rtx=True)
    everywhere = f"compute capability {EVERYWHERE}"

    def add(version, target, sizes, dynamic=False):
        for name, batch in wanted_plans(manifest, Wanted(tuple(sizes), dynamic)):
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
    assert set(found) == set(ALL_GRAPHS) and list(found["unet"]) == [4]
    for name, batch in wanted_plans(manifest, Wanted((1, 3), shared=True)):
        store.add(parts(manifest, name, batch, module.name, "11.0", everywhere, Options()), b"plan", {}, 1.0)
    found = usable_plans(store, manifest, module, cuda)
    assert sorted(found["unet"]) == [1, 3, 4] and found["unet"][1] is found["unet"][3]
    for plan in {
        plan.key: plan for sizes in found.values() for plan in sizes.values() if plan.batches == [1, 3]
    }.values():
        store.remove(plan)
    add("11.0", everywhere, [6], dynamic=True)
    found = usable_plans(store, manifest, module, cuda)
    assert sorted(found["unet"]) == [1, 2, 4, 6]
    damaged = found["unet"][6]
    damaged.path.write_bytes(b"pla")
    assert sorted(usable_plans(store, manifest, module, cuda)["unet"]) == [4]


@pytest.mark.parametrize(
    ("precision", "capability", "refusal"),
    [
        ("bf16", "8.0", ""),
        ("bf16", "12.1", ""),
        ("fp16", "7.5", ""),
        ("int8", "7.5", ""),
        ("fp8", "8.9", ""),
        ("fp8", "10.0", ""),
        ("bf16", "7.5", r"Fake GPU, compute capability 7\.5.*bfloat16.*--precision fp16"),
        ("fp8", "8.6", r"Fake GPU, compute capability 8\.6.*fp8.*--precision int8"),
    ],
)
def test_a_precision_needs_a_gpu_that_has_it(toy_bundle, precision, capability, refusal):
    manifest, cuda = replace(Manifest.load(toy_bundle), precision=precision), fake_cuda(capability)
    if not refusal:
        check_gpu(manifest, cuda)
    else:
        with pytest.raises(EngineError, match=refusal):
            check_gpu(manifest, cuda)


def test_plans_in_fp8_are_for_the_gpus_that_have_it(toy_bundle):
    fp8, rtx = replace(Manifest.load(toy_bundle), precision="fp8"), SimpleNamespace(rtx=True)
    assert options_for(fp8, rtx, Options(level=3)) == Options(level=3, compute_capabilities=("8.9", "12.0"))
    named = Options(compute_capabilities=("12.0",))
    assert options_for(fp8, rtx, named) == named
    assert options_for(replace(fp8, precision="int8"), rtx, None) == Options()
    assert options_for(fp8, SimpleNamespace(rtx=False), None) == Options()


@pytest.mark.parametrize(
    ("buckets", "slots", "kept"),
    [([1, 16], 8, [1, 16]), ([1, 2, 4, 8], 4, [1, 2, 4]), ([1, 2, 4, 8], 3, [1, 2, 4]), ([16], 1, [16])],
)
def test_the_buckets_kept_hold_all_slots(buckets, slots, kept):
    assert enough(buckets, slots) == kept


def test_powers_of_two():
    assert powers_of_two(1) == [1] and powers_of_two(5) == [1, 2, 4, 8] and powers_of_two(8) == [1, 2, 4, 8]
