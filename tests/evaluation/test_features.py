"""Extractors: random filters, the user's own networks, and refused files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from handiffuser.errors import EvaluationError
from handiffuser.evaluation.features import RandomFilters, load_extractor

RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (40, 56, 3), np.uint8), RNG.integers(0, 256, (128, 128, 3), np.uint8)]


class Network(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().mean((2, 3))


class Asked(torch.nn.Module):
    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return x.float().amax((2, 3)) if return_features else x.float()


def test_random_filters_are_the_same_everywhere():
    extractor = load_extractor(None)
    found = extractor(IMAGES)
    assert found.shape == (2, extractor.settings["features"]) and "not comparable" in extractor.warning
    assert np.allclose(found[:1], RandomFilters()(IMAGES[:1]), rtol=1e-5)
    # The figures must not change when a library draws other numbers.
    assert extractor.weights[0][0, 0, 0].numpy() == pytest.approx([-0.1835, -0.0986, 0.3166], abs=1e-4)
    assert [float(w.abs().sum()) for w in extractor.weights] == pytest.approx([202.36, 1328.42, 3764.43], abs=0.02)


@pytest.mark.parametrize(("network", "wanted"), [(Network(), "mean"), (Asked(), "max")])
def test_a_torchscript_file_is_run(tmp_path, network, wanted):
    path = tmp_path / "network.pt"
    torch.jit.script(network).save(str(path))
    extractor = load_extractor(path)
    found = extractor(IMAGES)
    assert found.shape == (2, 3)
    assert (found > 200).all() if wanted == "max" else (found < 160).all()


def test_a_pickle_is_refused(tmp_path):
    weights = tmp_path / "inception.pth"
    torch.save({"fc.weight": torch.zeros(2)}, weights)
    with pytest.raises(EvaluationError, match="must not be a pickle"):
        load_extractor(weights)
    weights.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(EvaluationError, match="safetensors or TorchScript"):
        load_extractor(weights)
    with pytest.raises(EvaluationError, match="must be a file"):
        load_extractor(tmp_path / "nowhere.pt")


def test_inception_takes_the_users_weights_and_no_others(tmp_path):
    from handiffuser.evaluation.inception import Network, resized_as_tensorflow
    from safetensors.torch import save_file

    weights = Network().state_dict()
    assert weights["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    save_file(weights, tmp_path / "inception.safetensors")
    found = load_extractor(tmp_path / "inception.safetensors")(IMAGES[:1])
    assert found.shape == (1, 2048) and np.isfinite(found).all() and found.std() > 0
    save_file({"fc.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(EvaluationError, match="must be the Inception V3 of pytorch-fid"):
        load_extractor(tmp_path / "other.safetensors")
    # TensorFlow 1 samples at pixel corners: at twice the size each second column is the mean of two.
    row = torch.tensor([0.0, 10, 30]).expand(1, 1, 3, 3)
    assert resized_as_tensorflow(row, 6)[0, 0, 0].tolist() == [0, 5, 10, 20, 30, 30]


def test_a_network_of_other_things_is_a_sentence(tmp_path):
    class Scalar(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float().mean()

    torch.jit.script(Scalar()).save(str(tmp_path / "n.pt"))
    with pytest.raises(EvaluationError, match="a row of features"):
        load_extractor(tmp_path / "n.pt")(IMAGES)
