"""Killed (kill -9) at five random moments, a dataset and its latents end as undisturbed ones do."""

from __future__ import annotations

import random
import subprocess
import sys
import time

import pytest
import torch
from handiffuser.data.dataset import INDEX
from safetensors.torch import load_file

WORK = """
import sys
from handiffuser.data.latents import make_latents
from handiffuser.demo import dataset
from handiffuser.models.checkpoint import Checkpoint
if __name__ == "__main__":
    dataset.SHARD = 16  # many shards, soon made
    dataset.make(sys.argv[2], 160, size=32, processes=2)
    make_latents(Checkpoint.load(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.slow
def test_five_kills_change_nothing(tmp_path, tiny_checkpoint_folder):
    script = tmp_path / "work.py"
    script.write_text(WORK)

    def work(name: str) -> list:
        return [sys.executable, script, tiny_checkpoint_folder, tmp_path / name]

    began = time.monotonic()
    subprocess.run(work("whole"), check=True, timeout=300)
    length = time.monotonic() - began
    rng = random.Random(0)
    for part in range(5):  # of the time, which differ, so that both the pictures and the latents are hit
        process = subprocess.Popen(work("killed"))
        time.sleep((0.2 + 0.7 * (part + rng.random()) / 5) * length)
        process.kill()
        process.wait()
    subprocess.run(work("killed"), check=True, timeout=300)
    whole, killed = (
        {path.relative_to(tmp_path / name): path for path in (tmp_path / name).rglob("*") if path.is_file()}
        for name in ("whole", "killed")
    )
    assert {name for name in killed if not name.name.startswith(".")} == set(whole)
    assert sum(name.suffix == ".tar" for name in whole) == 10
    for name, path in whole.items():
        if name.suffix == ".tar":
            assert killed[name].read_bytes() == path.read_bytes(), name
        elif name.suffix == ".safetensors":
            a, b = load_file(path), load_file(killed[name])
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
        else:
            assert name.name in ("key.json", INDEX)
