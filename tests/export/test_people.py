"""A checkpoint of two people becomes a bundle whose graphs, and pictures, are PyTorch's."""

from __future__ import annotations

import numpy as np
import pytest
from commands import invoke
from handiffuser import HanDiffuser, Request
from handiffuser.contract import Manifest
from handiffuser.evaluation.eager import Torch
from handiffuser.hands import save_hands
from handiffuser.models.checkpoint import Checkpoint
from handiffuser.training.grow import with_people


@pytest.mark.slow
def test_two_people_from_checkpoint_to_pictures(tiny_checkpoint_folder, tmp_path):
    checkpoint = with_people(Checkpoint.load(tiny_checkpoint_folder), 2)
    for part in (checkpoint.hand_prior, checkpoint.text_hand_encoder):
        part.person *= 20  # so that people differ
    checkpoint.save(tmp_path / "checkpoint")
    result = invoke("export.cli", tmp_path / "checkpoint", tmp_path / "bundle")  # each graph beside PyTorch
    assert result.returncode == 0, result.stderr
    manifest = Manifest.load(tmp_path / "bundle")
    shapes = {t.name: t.shape for name in ("hand_features", "hand_prior") for t in manifest.graphs[name].outputs}
    assert manifest.num_people == 2 and shapes["x"] == ("B", 660) and shapes["joints"] == ("B", 4, 21, 2)
    context = manifest.graphs["text_hand_encoder"].outputs[0]
    assert context.shape[2] == 77 + 2 * 44
    result = invoke("runtime.cli", tmp_path / "bundle", "two people", "-o", tmp_path / "out", "--device", "cpu",
                    "--backend", "onnxruntime")  # fmt: skip
    assert result.returncode == 0 and len(list((tmp_path / "out").glob("*.hands.npz"))) == 1, result.stderr
    engines = HanDiffuser.load(tmp_path / "bundle", "cpu", threads=1, backend="onnxruntime")
    eager = Torch(tmp_path / "checkpoint", {"body": None, "threads": 1, "device": "cpu"})
    (made,) = engines.generate("a fist", seed=3)
    save_hands(tmp_path / "two.hands.npz", made.hands)
    asked = [Request("a fist", seed=3), Request("others", seed=4, hands=str(tmp_path / "two.hands.npz"))]
    theirs = {picture.request.prompt: picture for picture in eager.run(eager.prepare(asked)[0])}
    for ours in engines.generate(asked):
        other = theirs[ours.request.prompt]
        assert np.abs(ours.image.astype(int) - other.image).max() <= 2
        assert ours.hands["joints_2d"].shape == other.hands["joints_2d"].shape == (2, 2, 21, 2)
        for name in ("placement", "joints_2d", "visibility", "camera"):
            np.testing.assert_allclose(ours.hands[name], other.hands[name], rtol=1e-2, atol=2e-3, err_msg=name)
    assert np.abs(made.hands["params"][0] - made.hands["params"][1]).max() > 0.1
