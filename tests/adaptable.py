"""A toy bundle that adapters change, and adapters for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
from handiffuser.contract import WEIGHTS, Manifest, file_digest
from handiffuser.weights import Place, WeightMap
from onnx import helper, numpy_helper
from safetensors.numpy import save_file

PLACES = {"unet.conv_in.weight": ("unet", "shift"), "unet.mid_block.attn2.to_k.weight": ("unet_context", "gain")}


def adaptable(bundle: Path, folder: Path) -> Path:
    """A copy of a toy bundle whose graphs have the numbers of PLACES."""
    shutil.copytree(bundle, folder)
    for graph, name, op, value, at in (("unet", "shift", "Add", 0.0, "tv_"), ("unet_context", "gain", "Mul", 1.0, "")):
        model = onnx.load(folder / f"{graph}.onnx")
        model.graph.initializer.append(numpy_helper.from_array(np.float32([value]), name))
        if at:
            maker = next(node for node in model.graph.node if at in node.output)
            maker.output[0], source, target = f"{at}before", f"{at}before", at
        else:
            source, target = model.graph.input[0].name, "gained"
            for node in model.graph.node:
                node.input[0] = target
        place = next((i for i, node in enumerate(model.graph.node) if target in node.input), 0)
        model.graph.node.insert(place, helper.make_node(op, [source, name], [target]))
        onnx.save(model, folder / f"{graph}.onnx")
    WeightMap(dict.fromkeys(PLACES, (1, 1)), {n: [Place(*at, "plain")] for n, at in PLACES.items()}).save(folder)
    manifest = Manifest.load(folder, verify=False)
    manifest.files = {name: file_digest(folder / name) for name in [*manifest.files, WEIGHTS]}
    manifest.save(folder)
    return folder


def write(path: Path, word: str, size: float = 1.0) -> str:
    """An adapter of rank 1 that adds `size` to the number whose name has a word."""
    name = next(name for name in PLACES if word in name).removesuffix(".weight")
    one = np.full((1, 1), size, np.float32)
    save_file({f"{name}.lora_A.weight": one, f"{name}.lora_B.weight": np.ones_like(one)}, path)
    return str(path)
