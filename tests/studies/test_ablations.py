"""The ablations: which variants there are, what they begin with, and one round of two of them."""

from __future__ import annotations

import json

import pytest
from ablations import SETS, VARIANTS, command, start_of
from click.testing import CliRunner
from handiffuser.models.checkpoint import Checkpoint


def test_there_are_eight_sets_of_cues_and_each_way_with_and_without_kernel():
    assert len(set(SETS)) == 8 and len(VARIANTS) == len(set(VARIANTS.values())) == 15
    ways = {(v.joint, v.words, bool(v.cues), v.kernel) for v in VARIANTS.values()}
    assert ways == {
        (joint, words, cues, kernel)
        for joint, words, cues in ((True, True, True), (False, True, True), (True, True, False), (True, False, True))
        for kernel in (True, False)
    }


@pytest.mark.parametrize("name", ["no-cue", "vertices", "camera-rotations", "behind-the-encoder-without-kernel"])
def test_a_variant_begins_with_a_whole_checkpoint(name, tmp_path):
    variant = VARIANTS[name]
    checkpoint = Checkpoint.load(start_of(variant, tmp_path / "start", 64))
    config = checkpoint.text_hand_encoder.config
    assert tuple(config.cues) == variant.cues and config.joint == variant.joint
    assert config.rotation_frame == variant.frame and checkpoint.image_size == (64, 64)
    assert (checkpoint.position_kernel is not None) == variant.kernel
    assert checkpoint.hand_prior.mean.any(), "stage 1 is the demo's"


@pytest.mark.slow
def test_two_variants_are_trained_and_judged(tmp_path):
    from handiffuser.demo.dataset import make

    make(tmp_path / "world", 12, size=64, processes=1)
    words = [tmp_path / "out", "--data", tmp_path / "world", "--steps", 1, "--batch", 2, "--count", 6, "--no-detector",
             "--size", 64, "--only", "rotations", "--only", "hands-only"]  # fmt: skip
    result = CliRunner().invoke(command, [*map(str, words)], catch_exceptions=False)
    document = json.loads(result.stdout.splitlines()[-1])
    assert set(document["rows"]) == {"rotations", "hands-only"}
    assert document["rows"]["rotations"]["fid_h"]["value"] > 0
    assert "hands-only" in (tmp_path / "out" / "ablations.html").read_text()
    again = CliRunner().invoke(command, [*map(str, words)], catch_exceptions=False)
    assert json.loads(again.stdout.splitlines()[-1])["rows"] == document["rows"]
