"""On a real GPU: the device loop over each backend that is installed gives the pictures that the CPU gives."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
from handiffuser import HanDiffuser, Request
from handiffuser.engines.backends import GPU_PLANNED
from handiffuser.engines.build import build
from handiffuser.engines.cuda import Cuda
from handiffuser.engines.plans import PlanStore, Wanted
from handiffuser.errors import EngineError, ExportError, HanDiffuserError
from handiffuser.runtime.device_graphs import Staging
from handiffuser.runtime.device_noise import DeviceNoise
from handiffuser.runtime.noise import RequestNoise
from handiffuser.runtime.results import Failure

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt-rtx", "onnxruntime", "onnxruntime graphs", "inductor"])
def on_gpu(request, tiny_bundle, tiny_checkpoint, tmp_path_factory):
    """A function that loads the tiny bundle for one backend, or a skip where the backend does not run here."""
    import shutil

    from handiffuser.export.inductor import compile_bundle

    backend, _, graphs = request.param.partition(" ")
    folder = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp(backend) / "engines")
    try:
        if backend in GPU_PLANNED:
            list(build(backend, folder, Wanted((1, 2, 4))))
        elif backend == "inductor":
            compile_bundle(lambda: tiny_checkpoint, folder, None, "cuda", Wanted((1, 2, 4)))
    except (EngineError, ExportError) as error:
        pytest.skip(str(error))

    def load(**options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return HanDiffuser.load(
                folder, backend=backend, device="cuda", batch_size=4, onnxruntime_graphs=bool(graphs), **options
            )

    try:
        load()
    except HanDiffuserError as error:
        pytest.skip(str(error))
    load.folder, load.backend, load.graphs = folder, backend, bool(graphs)
    return load


def requests(pipeline, count=7, **settings):
    wanted = [Request(f"prompt {i}", seed=i, steps=4 + i % 3, **settings) for i in range(count)]
    return pipeline.prepare(wanted)[0]


def close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, picture in theirs.items():
        difference = np.abs(ours[key].image.astype(int) - picture.image.astype(int))
        assert difference.mean() < 1 and difference.max() <= 8  # TF32 and other orders of summation
        np.testing.assert_allclose(ours[key].hands["joints_2d"], picture.hands["joints_2d"], atol=2e-3)


@pytest.mark.parametrize("overlap", [True, False])
def test_equals_the_cpu(on_gpu, tiny_bundle, overlap):
    gpu, cpu = on_gpu(overlap=overlap), HanDiffuser.load(tiny_bundle, device="cpu")
    wanted = requests(gpu)
    close({p.id: p for p in gpu.run(wanted)}, {p.id: p for p in cpu.run(requests(cpu))})
    # A second run replays what the first captured; a single request switches to another bucket.
    again = {p.id: p for p in gpu.run(wanted)}
    close(again, {p.id: p for p in cpu.run(requests(cpu))})
    close({p.id: p for p in gpu.run(wanted[:1])}, {p.id: p for p in cpu.run(requests(cpu)[:1])})


def test_pictures_that_requests_bring(on_gpu, tiny_bundle):
    """The blend's kernel; rows with and without pictures share batches."""
    gpu, cpu = on_gpu(), HanDiffuser.load(tiny_bundle, device="cpu")
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    mask = np.tile(np.linspace(0, 255, 48).astype(np.uint8), (32, 1))
    kinds = [{}, {"image": image}, {"image": image, "mask": mask}, {"image": image, "mask": mask, "strength": 0.6}]
    asked = [
        Request(f"prompt {i}", seed=i, steps=5 + i % 3, solver=("ddim", "euler", "dpm++2m")[i % 3], **kinds[i % 4])
        for i in range(12)
    ]
    on_cpu = {picture.id: picture for picture in cpu.run(cpu.prepare(asked)[0])}
    close({picture.id: picture for picture in gpu.run(gpu.prepare(asked)[0])}, on_cpu)


def test_steps_are_captured(on_gpu):
    gpu = on_gpu()
    list(gpu.run(requests(gpu)))
    if on_gpu.graphs:  # ONNX Runtime's own, of the steps alone
        refused = {name for name, graph in gpu.loop.graphs.items() if graph.refused}
        assert not refused & {"hand_prior", "unet"} and "text_encoder" in refused
    elif on_gpu.backend not in GPU_PLANNED:
        assert gpu.loop.warnings()
    else:
        assert not gpu.loop.warnings()


def test_engines_of_a_stream_share_scratch(on_gpu):
    if on_gpu.backend not in GPU_PLANNED:
        pytest.skip("ONNX Runtime and PyTorch keep their own")
    gpu = on_gpu()
    list(gpu.run(requests(gpu)))
    before = gpu.loop.cuda.free_memory()
    for _ in range(3):
        list(gpu.run(requests(gpu)))
    assert abs(before - gpu.loop.cuda.free_memory()) < 64 << 20


def test_nan_is_reported_not_saved(on_gpu):
    gpu = on_gpu()
    wanted = requests(gpu)
    spoilt = wanted[2].id
    make = gpu.loop._job

    def job(request, *arguments):
        made = make(request, *arguments)
        if request.id == spoilt:
            made.noise = replace(made.noise, init_sigma=float("nan"))
        return made

    gpu.loop._job = job
    results = {r.id: r for r in gpu.run(wanted)}
    assert isinstance(results[spoilt], Failure) and "step 0 gave NaN" in results[spoilt].sentence
    assert sum(isinstance(r, Failure) for r in results.values()) == 1


def test_plans_that_are_damaged_or_foreign(on_gpu):
    if on_gpu.backend not in GPU_PLANNED:
        pytest.skip("it has no plans for a batch size")
    store = PlanStore(on_gpu.folder)
    plan = next(p for p in store if p.graph == "unet" and p.batch == (4, 4))
    content = plan.path.read_bytes()
    plan.path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        gpu = on_gpu()
        with pytest.raises(EngineError, match="SHA-256 differs"):
            list(gpu.run(requests(gpu)))
    finally:
        plan.path.write_bytes(content)


def test_noise_is_the_hosts():
    cuda = Cuda()
    stream, noise = cuda.stream(), RequestNoise(7, "latents", 14.6, True)
    drawing = DeviceNoise(cuda, Staging(cuda))
    assert not drawing.refused
    for i, shape in enumerate([(330,), (4, 64, 64), (3, 5)]):
        array, back = cuda.zeros(shape, "float32"), cuda.pinned(shape, "float32")
        drawing.start(stream, array, noise)
        stream.copy(back, array)
        stream.synchronize()
        np.testing.assert_array_max_ulp(back, noise.start(shape), 1)
        drawing.step(stream, array, noise, i)
        stream.copy(back, array)
        stream.synchronize()
        np.testing.assert_array_max_ulp(back, noise.step(i, shape), 1)


def test_cuda_layer():
    cuda = Cuda()
    stream = cuda.stream()
    a, b = cuda.zeros((4, 3), "float32"), cuda.zeros((4, 3), "float32")
    host, back = cuda.pinned((4, 3), "float32"), cuda.pinned((4, 3), "float32")
    host[...] = np.arange(12).reshape(4, 3)
    stream.copy(a, host)
    graph = stream.capture(lambda: stream.copy(b, a))
    stream.copy(back, b)
    stream.synchronize()
    assert not back.any()  # a capture runs nothing
    graph.launch(stream)
    stream.copy(back, b)
    stream.record().synchronize()
    np.testing.assert_array_equal(back, host)
    stream.copy(b[1], a[3])
    stream.zero(b[0])
    stream.copy(back, b)
    stream.synchronize()
    np.testing.assert_array_equal(back[:2], [[0, 0, 0], [9, 10, 11]])
    with pytest.raises(EngineError, match="must be of equal size"):
        stream.copy(a, b[1:])
