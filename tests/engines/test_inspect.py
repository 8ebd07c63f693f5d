"""What a plan was compiled to: read off the builder's report, kept beside the plan, printed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import invoke
from handiffuser import shipped
from handiffuser.contract import Manifest
from handiffuser.engines import inspect
from handiffuser.engines.plans import LAYERS, PlanStore, parts
from handiffuser.engines.tensorrt import Options, TensorRT
from handiffuser.engines.tensorrt_build import build_plan
from handiffuser.errors import EngineError

REPORT = """Layers:
Name: __myl_Move_myl0_3, LayerType: kgen, Inputs: [], Constants: [], Outputs: [ { Name: a{b}, [c], Dimensions: [64], \
Strides: [1], StrideOrder: [0], Datatype: Int32, Format: (Linear) Row major linear format }], TacticName: \
__myl_Move_0xeb87, StreamId: 0, Metadata: [ONNX Layer: node_group_norm_22]
Name: {ForeignNode[x...y]}, LayerType: Convolution, Inputs: [ { Name: x, Location: Device, Dimensions: [1,4,-1,8], \
Format/Datatype: Row major linear FP16 format }], Outputs: [ { Name: y, Location: Device, Dimensions: [], \
Format/Datatype: Half }], TacticName: sm80_xmma_fprop, StreamId: 0, Metadata: [ONNX Layer: conv][ONNX Layer: add]

Bindings:
 Name: x, IOMode: Input
"""


def test_report_of_the_builder():
    found = inspect.read_log(
        ["Layer of another kind", REPORT, "Total Weights Memory: 12 bytes", "Total Activation Memory: 34 bytes"]
    )
    move, convolution = found["layers"]
    assert found["memory"] == {"weights": 12, "scratch": 34}
    assert (move["kind"], move["kernel"], move["inputs"], move["nodes"]) == (
        "kgen", "__myl_Move", [], ["node_group_norm_22"]
    )  # fmt: skip
    assert move["outputs"] == [{"name": "a{b}, [c]", "shape": [64], "type": "Int32"}]
    assert convolution["inputs"] == [{"name": "x", "shape": [1, 4, -1, 8], "type": "Row major linear FP16 format"}]
    assert convolution["outputs"] == [{"name": "y", "shape": [], "type": "Half"}]
    assert convolution["kernel"] == convolution["tactic"] == "sm80_xmma_fprop"
    assert convolution["nodes"] == ["conv", "add"]


def test_which_kernels_compute_in_eight_bits(tmp_path):
    """A layer that multiplies them, and one that was built in half precision because no such kernel was chosen."""
    layers = inspect.read_report(
        json.dumps({"Layers": [
            {"Name": "conv", "LayerType": "CaskConvolution", "TacticName": "sm89_xmma_e4m3", "Metadata": "",
             "Inputs": [{"Name": "x", "Dimensions": [1, 4], "Format/Datatype": "Channel major FP8 format"}],
             "Weights": {"Type": "FP8", "Count": 9}, "Outputs": []},
            {"Name": "late", "LayerType": "CaskConvolution", "Metadata": "[ONNX Layer: late]",
             "Inputs": [{"Name": "y", "Dimensions": [1, 4], "Format/Datatype": "Half"}],
             "Weights": {"Type": "Half", "Count": 9}, "Outputs": []},
            "a name alone",
        ]})
    )  # fmt: skip
    wanted = {"name": "unet", "graph": "0" * 16, "sizes": "B=1", "precision": "fp8", "backend": "tensorrt",
              "version": "11.0", "target": "", "options": "{}"}  # fmt: skip
    proof = {"layers": layers, "eight_bits": {"asked": 2, "compiled": 1}, "in_half": ["late"]}
    counts = inspect.summary(PlanStore(tmp_path).add(wanted, b"plan", proof, 1.0))
    assert counts["eight_bits"] == {
        "asked": 2, "compiled": 1, "kernels": {"sm89_xmma_e4m3": 1}, "in_half": ["late"]
    }  # fmt: skip
    said = inspect.text(counts)
    assert "in fp8: 1 of 2 quantised layers, in 1 kernels\n        1 sm89_xmma_e4m3" in said
    assert "in half, without such a kernel: late" in said


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The demo's manifest, and a plan of one of its graphs."""
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path_factory.mktemp("inspect")
    bundle = shipped.resolve("demo", "bundle")
    shutil.copy(bundle / "manifest.json", out)
    manifest, backend, options = Manifest.load(out, verify=False), TensorRT("tensorrt-rtx"), Options()
    spec = manifest.graphs["unet_context"]
    sizes = {"B": 2, "G": 2, "L": manifest.sides()["L"]}
    plan, proof = build_plan(backend, bundle / spec.file, sizes, "fp32", options)
    target = backend.target(options, None)
    wanted = parts(manifest, "unet_context", sizes, backend.name, backend.version, target, options)
    PlanStore(out).add(wanted, plan, proof, 1.0)
    return out


def test_command_prints_what_a_plan_consists_of(folder):
    result = invoke("engines.cli", "inspect", folder, "--graph", "unet_context")
    assert result.returncode == 0, result.stderr
    assert (
        "unet_context B=2,G=2,L=121, fp32: " in result.stdout
        and "Float" in result.stdout
        and "scratch" in result.stdout
    )
    (plan,) = PlanStore(folder)
    result = invoke("engines.cli", "inspect", plan.path, "--json")
    counts = json.loads(result.stdout)
    assert counts["count"] == len(counts["layers"]) == sum(counts["kinds"].values()) > 0
    weights = Manifest.load(folder, verify=False).graphs["unet_context"]
    assert counts["bytes"]["weights"] > 0 and counts["bytes"]["scratch"] >= 0
    # Every input and output of the graph is some layer's.
    ends = {tensor["name"] for layer in counts["layers"] for tensor in (*layer["inputs"], *layer["outputs"])}
    assert {tensor.name for tensor in (*weights.inputs, *weights.outputs)} <= ends


def test_what_is_not_there(folder, tmp_path):
    with pytest.raises(EngineError, match=r"no plans of unet.*hd-engines build"):
        inspect.find_plans(folder, "unet")
    with pytest.raises(EngineError, match=r"graph must be one of .*unet.*, got 'unets'"):
        inspect.find_plans(folder, "unets")
    with pytest.raises(EngineError, match="must be a finished plan"):
        inspect.find_plans(tmp_path / "plans" / "unet.plan")
    copy = shutil.copytree(folder, tmp_path / "copy")
    (plan,) = PlanStore(copy)
    plan.path.with_suffix(LAYERS).unlink()
    with pytest.raises(EngineError, match=r"layers cannot be read.*hd-engines prune"):
        inspect.layers_of(plan)


def test_removing_a_plan_removes_its_layers(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    store = PlanStore(copy)
    store.remove(next(iter(store)))
    assert not list(store.folder.iterdir())
