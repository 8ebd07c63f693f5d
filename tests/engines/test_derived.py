"""The graphs that ONNX Runtime gets on CUDA compute what the bundle's do: their operators run as their definitions."""

from __future__ import annotations

import shutil
import warnings
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("onnx_ir")
import onnx
import onnx_ir as ir
import onnxruntime
from handiffuser.contract import Manifest
from handiffuser.engines import derived, fusions, onnxruntime_cuda
from handiffuser.engines.cuda import Cuda
from handiffuser.engines.standins import CONTRIBUTED, DEFINITIONS, expanded
from handiffuser.shipped import bundle_path

RANDOM = np.random.default_rng(0)
# (rows, branches of guidance)
SIZES = [(1, 2), (2, 1), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((1, 1), (4, 1), (4, 2)))]


def session(model, folder=None):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def feeds(spec, B, G=2):
    shapes = {t.name: [{"B": B, "G": G}.get(n, n) for n in t.shape] for t in spec.inputs}
    return {
        t.name: RANDOM.integers(0, 256, shapes[t.name], np.uint8)
        if t.dtype == "uint8"
        else RANDOM.standard_normal(shapes[t.name]).astype(t.dtype)
        for t in spec.inputs
    }


def errors(expected, got):
    """Largest difference of each output relative to its largest value; of pixels in levels."""
    found = []
    for ours, theirs in zip(got, expected, strict=True):
        difference = np.abs(ours.astype(np.float64) - theirs).max()
        found.append(difference if ours.dtype == np.uint8 else difference / np.abs(theirs).max())
    return found


def kinds(model):
    """Operators of a model that run at each call."""
    fixed, found = {tensor.name for tensor in model.graph.initializer} | {""}, Counter()
    for node in model.graph.node:
        if all(name in fixed for name in node.input):
            fixed.update(node.output)
        else:
            found[node.op_type] += 1
    return found


@pytest.fixture(scope="module")
def models():
    """Graph of the demo -> what is derived from it."""
    sides = Manifest.load(bundle_path(), verify=False).sides()
    return {name: derived.derive(bundle_path() / f"{name}.onnx", sides) for name in derived.PICTURES}


@pytest.fixture(scope="module")
def demo(models):
    """Graph of the demo -> (its session, the derived graph's)."""
    return {
        name: (session(str(bundle_path() / f"{name}.onnx")), session(expanded(model).SerializeToString()))
        for name, model in models.items()
    }


@pytest.mark.parametrize(("B", "G"), SIZES)
def test_the_demo_s_graphs_are_the_same(demo, B, G):
    manifest = Manifest.load(bundle_path(), verify=False).fixed()
    for name, (plain, new) in demo.items():
        given = feeds(manifest.graphs[name], B, G)
        expected, got = plain.run(None, given), new.run(None, given)
        assert [value.name for value in plain.get_outputs()] == [value.name for value in new.get_outputs()]
        assert max(errors(expected, got)) <= (1 if name == "image_decoder" else 5e-6), name


def test_what_is_left_of_the_demo_s_step(models):
    """Norms, their activations and residuals are joined; only where pictures come and go is a transposition."""
    model = models["unet"]
    found = kinds(model)
    assert found["NhwcConv"] == 56 and found["GroupNorm"] + found["SkipGroupNorm"] == 33
    assert found["Transpose"] == 2 and not found["Conv"] and not found["GroupNormalization"] and not found["ReduceMean"]
    assert not found["Sigmoid"] and not found["Attention"] and found["MultiHeadAttention"] == 20
    assert found["SkipLayerNormalization"] == 20 and found["LayerNormalization"] == 10
    inputs = {value.name: value for value in model.graph.input}
    assert inputs["latents"].type.tensor_type.shape.dim[0].dim_param == "B", "free axes stay free"


def test_the_operators_are_those_of_onnx_runtime(models):
    """Names, inputs, outputs and attributes fit the installed release's schemas."""
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    schemas = {one.name: one for one in get_all_operator_schema() if one.domain == CONTRIBUTED}
    nodes = [node for model in models.values() for node in model.graph.node if node.domain == CONTRIBUTED]
    assert {"NhwcConv", "GroupNorm", "SkipGroupNorm", "MultiHeadAttention"} <= {node.op_type for node in nodes}
    for node in nodes:
        schema = schemas[node.op_type]
        assert {one.name for one in node.attribute} <= set(schema.attributes), node.op_type
        required = {name for name, one in schema.attributes.items() if one.required}
        assert required <= {one.name for one in node.attribute}, node.op_type
        assert len(node.input) <= len(schema.inputs) and len(node.output) <= len(schema.outputs)
    known = {text.split("<")[0].split("(")[0].strip() for text in DEFINITIONS}
    assert {node.op_type for node in nodes} <= known


def graph(text: str, *weights: tuple[str, np.ndarray], domain: str = "") -> ir.Model:
    """A model of ONNX's text form, with weights."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> {text}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights)
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    return ir.from_proto(model)


def numbers(*shape: int, kind=np.float32) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(kind)


@pytest.mark.parametrize(
    ("channels", "groups", "moves"), [(32, 8, True), (24, 8, False), (8, 8, False)], ids=["even", "odd", "one"]
)
def test_a_norm_that_the_kernel_cannot_compute_stays(channels, groups, moves):
    """It takes two channels at once."""
    text = f"""g (float[B,{channels},4,6] x) => (float[B,{channels},4,6] y) {{
        c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w)
        y = GroupNormalization <num_groups = {groups}> (c, s, b) }}"""
    weights = [("w", numbers(channels, channels, 3, 3)), ("s", numbers(channels)), ("b", numbers(channels))]
    model = graph(text, *weights)
    for value in model.graph.all_nodes():  # onnx infers no shape for this operator
        value.outputs[0].shape = value.outputs[0].shape or ir.Shape([ir.SymbolicDim("B"), channels, 4, 6])
    plain, new = ir.to_proto(model), derived.rewrite(model)
    assert (kinds(new)["GroupNorm"] == 1) == moves == (kinds(new)["GroupNormalization"] == 0)
    x = numbers(2, channels, 4, 6)
    expected, got = (session(m.SerializeToString()).run(None, {"x": x}) for m in (plain, expanded(new)))
    assert max(errors(expected, got)) < 1e-5


@pytest.mark.parametrize("how", ["group = 2", 'auto_pad = "SAME_UPPER"'])
def test_a_convolution_of_another_kind_stays(how):
    text = f"g (float[B,4,6,6] x) => (float[B,4,6,6] y) {{ y = Conv <kernel_shape = [1, 1], {how}> (x, w) }}"
    model = graph(text, ("w", numbers(4, 2 if "group" in how else 4, 1, 1)))
    assert derived.rewrite(model) is None


def test_a_graph_without_convolutions_has_no_derived_form():
    assert derived.rewrite(graph("g (float[B,4] x) => (float[B,4] y) { y = Relu (x) }")) is None


@pytest.mark.parametrize("between", ["Resize", "Pad", "DepthToSpace", "Concat", "Mul"])
def test_what_lies_between_convolutions_moves_along(between):
    step = {
        "Resize": 'm = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">'
        " (a, , scales)",
        "Pad": "m = Pad (a, pads)",
        "DepthToSpace": "m = DepthToSpace <blocksize = 2> (a)",
        "Concat": "m = Concat <axis = 1> (a, x)",
        "Mul": "m = Mul (a, factor)",
    }[between]
    inner = {"DepthToSpace": 2, "Concat": 12}.get(between, 8)
    text = f"""g (float[B,4,6,10] x) => (float[B,3,H,W] y) {{
        a = Conv <kernel_shape = [1, 1]> (x, v)
        {step}
        y = Conv <kernel_shape = [1, 1]> (m, w) }}"""
    model = graph(
        text, ("v", numbers(8, 4, 1, 1)), ("w", numbers(3, inner, 1, 1)),
        ("scales", np.array([1, 1, 2, 2], np.float32)), ("pads", np.array([0, 0, 0, 1, 0, 0, 1, 2])),
        ("factor", numbers(8, 1, 1)),
    )  # fmt: skip
    plain, new = ir.to_proto(model), derived.rewrite(model)
    assert kinds(new)["NhwcConv"] == 2
    assert kinds(new)["Transpose"] == 2 + (between == "DepthToSpace")
    x = numbers(2, 4, 6, 10)
    expected, got = (session(m.SerializeToString()).run(None, {"x": x}) for m in (plain, expanded(new)))
    assert max(errors(expected, got)) < 1e-5


GEGLU = """g (float[B,5,320] x, float[B,5,320] r) => (float[B,5,320] y) {{
    p = MatMul (x, v)
    q = Add (p, c)
    left, right = Split <axis = 2, num_outputs = 2> (q)
    g = Gelu <approximate = "{how}"> (right)
    h = Mul (left, g)
    i = MatMul (h, w)
    j = Add (i, d)
    y = Add (j, r) }}"""


@pytest.mark.parametrize("how", ["none", "tanh"])
def test_a_linear_layer_with_its_bias_and_activation(how):
    weights = ("v", numbers(320, 2560)), ("c", numbers(2560)), ("w", numbers(1280, 320)), ("d", numbers(320))
    model = graph(GEGLU.format(how=how), *weights)
    plain = ir.to_proto(model)
    made = fusions.fuse(model)
    assert made["BiasSplitGelu"] == (how == "none") and made["BiasAdd"] == 1
    given = {"x": numbers(2, 5, 320), "r": numbers(2, 5, 320)}
    models = plain, expanded(ir.to_proto(model))
    expected, got = (session(m.SerializeToString()).run(None, given) for m in models)
    assert max(errors(expected, got)) < 1e-5


def test_weights_are_turned_and_padded_once_when_the_graph_is_loaded(tmp_path):
    """Also in half precision and in a file of their own: nothing of it runs at each step."""
    kind, heads, depth, width, N = np.float16, 2, 8, 16, 6
    text = f"""g (float16[B,4,2,3] x, float16[B,{heads},5,{width}] k, float16[B,{heads},5,{width}] v)
               => (float16[B,{N},16] y) {{
        c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w)
        t = Transpose <perm = [0, 2, 3, 1]> (c)
        tokens = Reshape (t, rows)
        q = MatMul (tokens, wq)
        s = Reshape (q, split)
        h = Transpose <perm = [0, 2, 1, 3]> (s)
        m = Mul (h, factor)
        b = Shape <start = 0, end = 1> (x)
        four = Concat <axis = 0> (b, one, one, one)
        e = Expand (codes, four)
        whole = Concat <axis = -1> (m, e)
        a = Attention <scale = 1.0> (whole, k, v)
        part = Slice (a, zero, depth, last)
        turned = Transpose <perm = [0, 2, 1, 3]> (part)
        merged = Reshape (turned, merge)
        y = MatMul (merged, wo) }}"""
    weights = {
        "w": numbers(16, 4, 3, 3, kind=kind), "wq": numbers(16, 16, kind=kind), "wo": numbers(16, 16, kind=kind),
        "codes": numbers(heads, N, width - depth, kind=kind), "factor": np.array(0.35, kind),
        "rows": np.array([0, N, 16]), "split": np.array([0, N, heads, depth]), "merge": np.array([0, N, 16]),
        "one": np.array([1]), "zero": np.array([0]), "depth": np.array([depth]), "last": np.array([3]),
    }  # fmt: skip
    model = graph(text, *weights.items())
    ir.save(model, tmp_path / "g.onnx", external_data="g.onnx.data", size_threshold_bytes=64)
    new = derived.derive(tmp_path / "g.onnx")
    assert kinds(new) == Counter(
        {"Transpose": 1, "NhwcConv": 1, "Reshape": 1, "MatMul": 2, "Add": 1, "MultiHeadAttention": 1}
    )
    assert len(new.SerializeToString()) < 8000
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimised.onnx"), 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(tmp_path))
    plain, whole = onnx.load(tmp_path / "g.onnx"), expanded(new).SerializeToString()
    loaded = onnxruntime.InferenceSession(whole, options, providers=["CPUExecutionProvider"])
    left = kinds(onnx.load(tmp_path / "optimised.onnx"))
    assert not left["Pad"] and left["Transpose"] <= 4, left  # of the definitions
    given = {
        "x": numbers(3, 4, 2, 3, kind=kind), "k": numbers(3, heads, 5, width, kind=kind),
        "v": numbers(3, heads, 5, width, kind=kind),
    }  # fmt: skip
    expected = session(plain.SerializeToString()).run(None, given)
    assert max(errors(expected, loaded.run(None, given))) < 5e-3


def test_a_derived_graph_is_kept_and_made_again_where_it_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "bundle"
    shutil.copytree(bundle_path(), folder, ignore=shutil.ignore_patterns("plans"))
    manifest = Manifest.load(folder, verify=False)
    first = derived.derived_graph(folder, manifest, "image_decoder")
    assert first is not None and derived.derived_graph(folder, manifest, "hand_prior") is None
    calls = []
    made = derived.derive
    monkeypatch.setattr(derived, "derive", lambda path, sides: calls.append(path) or made(path, sides))
    assert derived.derived_graph(folder, manifest, "image_decoder") == first and not calls
    (kept,) = (tmp_path / "cache").rglob("*.plan")
    kept.write_bytes(kept.read_bytes()[:-1] + b"\0")
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert derived.derived_graph(folder, manifest, "image_decoder") == first and len(calls) == 1
    manifest.files["image_decoder.onnx"] = "0" * 64
    assert derived.derived_graph(folder, manifest, "image_decoder") is not None and len(calls) == 2
    manifest.precision = "fp8"
    assert derived.derived_graph(folder, manifest, "image_decoder") is None


@pytest.fixture
def fake(monkeypatch):
    """ONNX Runtime with a CUDA provider, on a GPU that is not there."""
    pytest.importorskip("cuda.bindings.runtime")
    from fake_onnxruntime import FakeOnnxRuntime
    from fake_runtime import FakeRuntime

    gpu = FakeRuntime(seed=0).install(monkeypatch)
    monkeypatch.setattr(onnxruntime_cuda, "_SAID", [])
    yield FakeOnnxRuntime(gpu).install(monkeypatch)
    assert not gpu.problems


def test_a_session_on_a_gpu_is_of_the_derived_graph(fake):
    manifest = Manifest.load(bundle_path(), verify=False)
    stream = Cuda().stream()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = onnxruntime_cuda.open_cuda(bundle_path(), manifest, "image_decoder", stream=int(stream.handle))
    assert [name for name, _ in fake.sessions] == ["derived"] == fake.trials
    assert fake.sessions[0][1]["enable_skip_layer_norm_strict_mode"] == "1"
    given = feeds(manifest.fixed().graphs["image_decoder"], 1)
    expected = session(str(bundle_path() / "image_decoder.onnx")).run(None, given)
    assert max(errors(expected, list(engine(given).values()))) <= 1


def test_where_the_derived_graph_fails_the_bundle_s_runs_with_one_warning(fake):
    fake.refuse = ("derived.onnx",)
    manifest = Manifest.load(bundle_path(), verify=False)
    stream = Cuda().stream()
    with pytest.warns(RuntimeWarning, match="runs the bundle's own graphs.*no kernel for GroupNorm") as said:
        for _ in range(2):
            onnxruntime_cuda.open_cuda(bundle_path(), manifest, "image_decoder", stream=int(stream.handle))
    assert len(said) == 1 and [name for name, _ in fake.sessions] == 2 * ["image_decoder"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Folders with a step and a decoder in the shape of Stable Diffusion's, by precision: 32 groups, 8 heads, widths
    that all kernels take, codes of positions that matter."""
    torch = pytest.importorskip("torch")
    from handiffuser.export.bundle import export_graph
    from handiffuser.export.graphs import PRECISIONS, graphs
    from handiffuser.models.checkpoint import random_checkpoint
    from handiffuser.models.configs import Config
    from handiffuser.models.smplh import SMPLH
    from handiffuser.shipped import body_path

    config = Config(
        image_size=(64, 96), unet_channels=(64, 320), unet_attention=(True, True), unet_layers=2, unet_heads=8,
        unet_groups=32, vae_channels=(64, 256, 256, 256), vae_layers=2, vae_groups=32, schedule="sd",
        text_width=64, text_layers=1, prior_layers=1,
    )  # fmt: skip
    checkpoint, body = random_checkpoint(config, seed=2, body=body_path()), SMPLH.load(body_path())
    generator = torch.Generator().manual_seed(0)
    for parameter in checkpoint.position_kernel.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    found = {}
    for precision in ("fp32", "fp16"):
        folder = tmp_path_factory.mktemp(precision)
        specs = {}
        for one in graphs(checkpoint, body, PRECISIONS[precision], 2):
            if one.name in ("unet", "image_decoder"):
                specs[one.name] = export_graph(one, folder, 23)
        found[precision] = folder, specs
    return found


SIDES = {"h": 8, "w": 12, "H": 64, "W": 96, "L": 121}


def at_64_by_96(specs):
    """Graphs of `small` for pictures of its own size."""
    return {name: spec.at(SIDES) for name, spec in specs.items()}


@pytest.mark.slow
def test_a_model_of_stable_diffusion_s_shape(small):
    folder, specs = small["fp32"]
    for name, spec in at_64_by_96(specs).items():
        model = derived.derive(folder / spec.file, SIDES)
        found = kinds(model)
        if name == "unet":
            assert found["BiasSplitGelu"] and found["BiasAdd"] and found["Split"] and found["SkipGroupNorm"]
            assert not found["Attention"] and not found["GroupNormalization"] and not found["Conv"]
        plain = session(str(folder / spec.file))
        new = session(expanded(model).SerializeToString(), folder)
        for B, G in ((1, 1), (1, 2), (4, 1), (4, 2)):
            given = feeds(spec, B, G)
            worst = max(errors(plain.run(None, given), new.run(None, given)))
            assert worst <= (1 if name == "image_decoder" else 2e-5), (name, B, G, worst)


def typed(model):
    """The expanded model with the type of each tensor."""
    model = expanded(model)
    for node in model.graph.node:
        if node.op_type == "GroupNormalization":  # onnx infers nothing about it
            kind = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None)
            model.graph.value_info.append(onnx.helper.make_value_info(node.output[0], kind))
    return onnx.shape_inference.infer_shapes(model)


@pytest.mark.slow
def test_in_half_it_is_as_near_to_float32_as_the_bundle_s_graph(small):
    """With a rounding behind each node, as on a GPU."""
    from handiffuser.calibration.emulate import emulate

    for name, spec in at_64_by_96(small["fp16"][1]).items():
        plain = onnx.load(small["fp16"][0] / spec.file)
        new = derived.derive(small["fp16"][0] / spec.file, SIDES)
        onnx.load_external_data_for_model(new, str(small["fp16"][0]))
        given = {key: value.astype(np.float32) for key, value in feeds(spec, 2, 2).items()}
        exact = session(str(small["fp32"][0] / spec.file)).run(None, given)
        ours, theirs = (
            max(errors(exact, session(emulate(m).SerializeToString()).run(None, given))) for m in (typed(new), plain)
        )
        assert ours <= max(1.5 * theirs, 2 if name == "image_decoder" else 2e-3), (name, ours, theirs)
        print(f"{name}: derived {ours:.1e}, the bundle's {theirs:.1e}")
