"""The training benchmark on a tiny checkpoint: every way trains, and says how fast."""

from __future__ import annotations

import json

from click.testing import CliRunner
from handiffuser.benchmarks import training
from handiffuser.training import loop


def test_every_way_is_measured(tiny_checkpoint_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "save_state", loop.save_state)  # the benchmark puts nothing in its place: put it back
    result = CliRunner().invoke(
        training.main, [str(tiny_checkpoint_folder), "--steps", "2", "--output", str(tmp_path / "out.json")]
    )
    assert result.exit_code == 0, result.output
    ways = json.loads((tmp_path / "out.json").read_text())["ways"]
    assert len(ways) == len(training.WAYS) and all(way["samples_per_second"] > 0 for way in ways)
    whole, lora = (next(way for way in ways if way["rank"] == rank) for rank in (0, 16))
    assert lora["trained_parameters"] < whole["trained_parameters"]
