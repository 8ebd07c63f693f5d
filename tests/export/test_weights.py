"""A bundle says where its weights are: with adapters merged at run time it is what hd-export --lora makes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from commands import invoke
from handiffuser import HanDiffuser
from handiffuser.contract import Manifest
from handiffuser.engines.adapted import adapted_bundle, chosen
from handiffuser.engines.initializers import OnnxWeights
from handiffuser.models import lora
from handiffuser.weights import WeightMap, written_as
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def files(tiny_checkpoint, tmp_path_factory):
    """An adapter of ours, with whole tensors, for all layers; and one of kohya's in bfloat16."""
    folder, generator = tmp_path_factory.mktemp("adapters"), torch.Generator().manual_seed(1)

    def normal(*shape):
        return 0.2 * torch.randn(*shape, generator=generator)

    ours, theirs = {}, {}
    for name, shape in lora.shapes(tiny_checkpoint).items():
        layer = name.removesuffix(".weight")
        if name.startswith(("position_kernel.", *(f"text_hand_encoder.{whole}" for whole in lora.WHOLE))):
            ours[name] = normal(*shape)
        elif name.endswith(".weight") and len(shape) > 1 and "embedding." not in name:
            ours[f"{layer}.lora_A.weight"] = normal(3, *shape[1:])
            ours[f"{layer}.lora_B.weight"] = normal(shape[0], 3, *(1,) * (len(shape) - 2))
        if layer.endswith(("to_q", "to_k")):
            word = f"lora_{layer.replace('.', '_')}"
            theirs |= {f"{word}.lora_down.weight": normal(2, shape[1]), f"{word}.lora_up.weight": normal(shape[0], 2),
                       f"{word}.alpha": torch.tensor(1.0)}  # fmt: skip
    save_file(ours, folder / "ours.safetensors")
    save_file({name: value.bfloat16() for name, value in theirs.items()}, folder / "theirs.safetensors")
    return [f"{folder / 'ours.safetensors'}:0.8", f"{folder / 'theirs.safetensors'}:-0.5"]


def test_every_place_holds_the_merged_parameter(tiny_bundle, tiny_checkpoint, files):
    made = adapted_bundle(tiny_bundle, chosen(files))
    merged, weights, manifest = copy.deepcopy(tiny_checkpoint), WeightMap.load(made), Manifest.load(made)
    for one in chosen(files):
        lora.merge(merged, one.path, one.scale)
    parameters = {name: value.detach().numpy() for name, value in lora.parts(merged).named_parameters()}
    lost = [name for name in parameters if name not in weights.places and "norm" not in name and "bias" not in name]
    assert not lost and len(weights.places) > 150
    graphs = {name: OnnxWeights(made / spec.file) for name, spec in manifest.graphs.items()}
    for name, places in weights.places.items():
        value = parameters[name]
        for place in places:
            held = graphs[place.graph].read(place.initializer)
            if place.form == "columns":
                held = held.reshape(-1, held.shape[-1])[:, place.column :][:, : value.size // len(value)] / place.factor
                np.testing.assert_allclose(held.reshape(value.shape), value, atol=1e-6)
            else:
                np.testing.assert_array_equal(held, written_as(value, place.form).reshape(held.shape))


@pytest.mark.slow
def test_pictures_are_those_of_an_export_with_the_adapters(tiny_bundle, tiny_checkpoint_folder, files, tmp_path):
    options = [word for file in files for word in ("--lora", file)]
    exported = invoke("export.cli", tiny_checkpoint_folder, tmp_path / "merged", *options)
    assert exported.returncode == 0, exported.stderr
    with HanDiffuser.load(tiny_bundle, "cpu", 1, backend="onnxruntime") as base:
        made = [base.generate("two open hands", seed=4, lora=said)[0].image.astype(int) for said in (None, files)]
    with HanDiffuser.load(tmp_path / "merged", "cpu", 1, backend="onnxruntime") as merged:
        (theirs,) = merged.generate("two open hands", seed=4)
    np.testing.assert_allclose(made[1], theirs.image, rtol=0, atol=1)
    assert np.abs(made[1] - made[0]).mean() > 1
