"""The training benchmark on a tiny checkpoint: every way trains, and says how fast."""

from __future__ import annotations

import json

import pytest
from commands import run_study
from training_speed import WAYS


@pytest.mark.slow
def test_every_way_is_measured(tiny_checkpoint_folder, tmp_path):
    """In a process of its own: accelerate takes one precision a process, and what the benchmark saves is nothing."""
    out = tmp_path / "out.json"
    result = run_study("training_speed", tiny_checkpoint_folder, "--steps", 2, "--output", out)
    assert result.returncode == 0, result.stderr
    ways = json.loads(out.read_text())["ways"]
    assert len(ways) == len(WAYS) and all(way["samples_per_second"] > 0 for way in ways)
    whole, lora = (next(way for way in ways if way["rank"] == rank) for rank in (0, 16))
    assert lora["trained_parameters"] < whole["trained_parameters"]
