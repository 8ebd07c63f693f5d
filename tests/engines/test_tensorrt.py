"""TensorRT-RTX builds engines without a GPU: every graph, its precision proven, and what it refuses."""

from __future__ import annotations

import shutil

import pytest
from commands import invoke
from handiffuser.contract import ALL_GRAPHS, Manifest
from handiffuser.engines.build import gpu, wanted_plans
from handiffuser.engines.plans import PlanStore, Wanted
from handiffuser.engines.tensorrt import Options, TensorRT
from handiffuser.engines.tensorrt_build import build_plan
from handiffuser.errors import EngineError

pytest.importorskip("tensorrt_rtx")


def sizes_of(folder):
    """One row, both branches, one chunk of a prompt."""
    return {"B": 1, "G": 2, **Manifest.load(folder).sides()}


@pytest.fixture(scope="module")
def backend():
    return TensorRT("tensorrt-rtx")


@pytest.fixture(scope="module")
def tiny_plans(tiny_checkpoint_folder, tiny_half, tmp_path_factory):
    """The tiny checkpoint in fp16 with plans for batches of 1 and 2, by the command as a user types it."""
    folder = shutil.copytree(tiny_half, tmp_path_factory.mktemp("engines") / "tiny")
    result = invoke("export.cli", tiny_checkpoint_folder, folder, "--backend", "tensorrt-rtx", "--batch-sizes", "1,2")
    assert result.returncode == 0, result.stderr
    assert "nothing was exported" in result.stderr and "Built 19 of 19 plans" in result.stderr
    return folder


def test_every_graph_is_built_in_the_precision_asked_for(tiny_plans):
    plans = list(PlanStore(tiny_plans))
    assert {plan.graph for plan in plans} == set(ALL_GRAPHS)
    for plan in plans:
        kind = "FLOAT" if plan.graph == "hand_features" else "HALF"
        assert plan.proof["types"].get(kind, 0) > 0 and sum(plan.proof["types"].values()) == plan.proof["types"][kind]
        if plan.graph in ("hand_prior", "unet"):  # the solver's state is float32 whatever the network is
            assert plan.proof["outputs"]["finite"] == plan.proof["outputs"]["next_history"] == "FLOAT"
    decoder = next(plan for plan in plans if plan.graph == "image_decoder")
    assert decoder.proof["outputs"] == {"image": "UINT8", "finite": "FLOAT"}


@pytest.mark.slow
def test_float32_and_dynamic_plans_build_too(backend, tiny_bundle):
    manifest = Manifest.load(tiny_bundle)
    for name in ALL_GRAPHS:
        sizes = {"S": (1, 20, 1000)} if name == "unet_time" else {"B": (1, 2, 4), "G": 2, **manifest.sides()}
        plan, proof = build_plan(backend, tiny_bundle / manifest.graphs[name].file, sizes, "fp32", Options(level=0))
        assert plan and set(proof["types"]) <= {"FLOAT"}


def test_float32_is_never_tf32(backend, tiny_bundle, monkeypatch):
    graph = tiny_bundle / "unet_context.onnx"
    sizes = {"B": 1, "G": 2, **Manifest.load(tiny_bundle).sides()}
    _, proof = build_plan(backend, graph, sizes, "fp32", Options(level=0))
    assert proof["tf32"] is False
    # What TensorRT does unless told otherwise is found out and refused.
    monkeypatch.setattr(backend.module.IBuilderConfig, "clear_flag", lambda config, flag: None)
    with pytest.raises(EngineError, match=r"float32 layers of unet_context in TF32"):
        build_plan(backend, graph, sizes, "fp32", Options(level=0))


def test_bfloat16_is_built_as_bfloat16(backend, tiny_bf16):
    manifest = Manifest.load(tiny_bf16)
    for name, sizes in wanted_plans(manifest, Wanted((2,))):
        plan, proof = build_plan(backend, tiny_bf16 / manifest.graphs[name].file, sizes, "bf16", Options(level=0))
        wanted = "FLOAT" if name == "hand_features" else "BF16"
        assert plan and set(proof["types"]) == {wanted}, name
        for spec in (*manifest.graphs[name].inputs, *manifest.graphs[name].outputs):
            if spec.dtype == "bfloat16":
                assert {**proof["inputs"], **proof["outputs"]}[spec.name] == "BF16", (name, spec.name)


def test_bfloat16_for_a_gpu_without_it(backend, tiny_bf16):
    graph = tiny_bf16 / "unet_context.onnx"
    with pytest.raises(EngineError, match=r"7\.5 do not compute in bfloat16.*--precision fp16"):
        build_plan(backend, graph, sizes_of(tiny_bf16), "bf16", Options(compute_capabilities=("7.5", "8.9")))
    plan, _ = build_plan(backend, graph, sizes_of(tiny_bf16), "bf16", Options(compute_capabilities=("8.0",)))
    assert plan


@pytest.mark.slow
def test_float32_instead_of_bfloat16_is_an_error(backend, tiny_bundle):
    with pytest.raises(EngineError, match=r"unet_context that compute must be in bf16.*in FLOAT.*--precision bf16"):
        build_plan(backend, tiny_bundle / "unet_context.onnx", sizes_of(tiny_bundle), "bf16", Options())


def test_another_precision_than_asked_is_an_error(backend, tiny_plans):
    with pytest.raises(EngineError, match=r"unet that compute must be in fp32.*in HALF.*--precision fp32"):
        sizes = {"B": 1, "G": 2, **Manifest.load(tiny_plans).sides()}
        build_plan(backend, tiny_plans / "unet.onnx", sizes, "fp32", Options())


def test_progress_is_true_and_can_stop(backend, tiny_plans):
    seen, sizes = [], {"B": 1, **Manifest.load(tiny_plans).sides()}
    build_plan(
        backend,
        tiny_plans / "image_decoder.onnx",
        sizes,
        "fp16",
        Options(),
        lambda _, done: seen.append(done) or True,
    )
    assert len(seen) > 10 and seen == sorted(seen) and 0 <= seen[0] < 0.5 < seen[-1] <= 1
    with pytest.raises(KeyboardInterrupt):
        build_plan(backend, tiny_plans / "image_decoder.onnx", sizes, "fp16", Options(), lambda *_: False)


def test_chosen_gpus(backend, tiny_plans):
    graph = tiny_plans / "unet_context.onnx"
    everywhere, _ = build_plan(backend, graph, sizes_of(tiny_plans), "fp16", Options())
    one, _ = build_plan(backend, graph, sizes_of(tiny_plans), "fp16", Options(compute_capabilities=("8.9",)))
    assert one and everywhere
    with pytest.raises(EngineError, match=r"compute capability 9\.0.*7\.5, 8\.0"):
        build_plan(backend, graph, sizes_of(tiny_plans), "fp16", Options(compute_capabilities=("9.0",)))


def test_what_is_no_graph(backend, tmp_path):
    (tmp_path / "junk.onnx").write_bytes(b"hello")
    with pytest.raises(EngineError, match=r"cannot read junk\.onnx"):
        build_plan(backend, tmp_path / "junk.onnx", {"B": 1}, "fp16", Options())


def test_the_same_command_again_does_nothing(tiny_plans, tiny_checkpoint_folder):
    command = (
        "export.cli",
        tiny_checkpoint_folder,
        tiny_plans,
        "--backend",
        "tensorrt-rtx",
        "--batch-sizes",
        "1,2",
    )
    before = {path.name: path.stat().st_mtime_ns for path in (tiny_plans / "plans").iterdir()}
    result = invoke(*command)
    assert result.returncode == 0
    assert "nothing was exported" in result.stderr and "nothing was built" in result.stderr
    assert before == {path.name: path.stat().st_mtime_ns for path in (tiny_plans / "plans").iterdir()}


def test_engines_command(tiny_plans):
    listed = invoke("engines.cli", "list", tiny_plans)
    assert listed.returncode == 0 and listed.stdout.count("current") == 19 and "fp16" in listed.stdout
    sound = invoke("engines.cli", "verify", tiny_plans)
    assert sound.returncode == 0 and "19 plans are sound" in sound.stderr
    more = invoke("engines.cli", "build", tiny_plans, "--batch-sizes", "1,2,3")
    assert more.returncode == 0 and "Built 9 of 28 plans" in more.stderr and "never built for B=3" in more.stderr

    plan = next(plan for plan in PlanStore(tiny_plans) if plan.graph == "unet" and plan.batch == (3, 3))
    content = plan.path.read_bytes()
    plan.path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    damaged = invoke("engines.cli", "verify", tiny_plans)
    assert damaged.returncode == 1 and "unet B=3,G=2,h=16,w=24,L=121: its plan is damaged" in damaged.stderr
    (tiny_plans / "plans" / "unet.B9.0123.plan.77.tmp").write_bytes(b"left over")
    dry = invoke("engines.cli", "prune", tiny_plans, "--dry-run")
    assert dry.returncode == 0 and plan.path.exists() and "would remove" in dry.stderr
    rebuilt = invoke("engines.cli", "build", tiny_plans, "--batch-sizes", "1,2,3")  # as `verify` advises
    assert "Built 1 of 28 plans" in rebuilt.stderr and "SHA-256 differs" in rebuilt.stderr
    assert invoke("engines.cli", "verify", tiny_plans).returncode == 0
    plan.path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    pruned = invoke("engines.cli", "prune", tiny_plans)
    assert pruned.returncode == 0 and not plan.path.exists() and len(list(PlanStore(tiny_plans))) == 27
    assert not PlanStore(tiny_plans).strays()
    rebuilt = invoke("engines.cli", "build", tiny_plans, "--batch-sizes", "1,2,3")
    assert "Built 1 of 28 plans" in rebuilt.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("build", "nowhere"), 1, "does not exist"),
        (("list", "nowhere"), 1, "does not exist"),
        (("build", "{}", "--backend", "tensorrt"), 1, "cannot be imported"),
        (("build", "{}", "--batch-sizes", "1,x"), 2, "must be a list such as 1,2,4,8"),
        (("build", "{}", "--batch-sizes", "0"), 2, "must be a list such as 1,2,4,8"),
        (("build", "{}", "--build-level", "9"), 2, "0<=x<=5"),
        (("build", "{}", "--compute-capability", "9.0"), 1, "9.0"),
    ],
)
def test_bad_arguments_are_one_sentence(tiny_bundle, arguments, code, words, tmp_path):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    result = invoke("engines.cli", *(bundle if argument == "{}" else argument for argument in arguments))
    assert result.returncode == code and words in result.stderr and "Traceback" not in result.stderr


def test_without_a_gpu_plans_are_passed_over_with_a_word(tiny_plans, tmp_path):
    if gpu() is not None:
        pytest.skip("there is a GPU")
    result = invoke("runtime.cli", tiny_plans, "a fist", "--steps", "2", "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "are not used" in result.stderr and "nvidia-smi" in result.stderr
    assert len(list((tmp_path / "out").glob("*.hands.npz"))) == 1
    for backend in ("tensorrt-rtx", "tensorrt"):
        forced = invoke("runtime.cli", tiny_plans, "a fist", "--backend", backend, "--output", tmp_path / "other")
        assert forced.returncode == 1 and "nvidia-smi" in forced.stderr and "Traceback" not in forced.stderr
