"""hd-run --ray: any number of kills loses nothing and makes nothing twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import run_command
from handiffuser import HanDiffuser, Request
from PIL import Image

STEPS = 200  # of the toy: some 60 ms


def actors(tag: str) -> list[int]:
    """Processes of this run's actors: of all that Ray calls so, those that know the folder `tag` in their session."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if b"Painter" in (path / "cmdline").read_bytes() and tag in (path / "environ").read_text(errors="ignore"):
                found.append(int(path.name))
        except OSError:
            continue
    return found


def start(toy_bundle, prompts, out, tag):
    line = [sys.executable, "-m", "handiffuser.runtime.cli", str(toy_bundle), "--prompts", str(prompts), "--steps"]
    line += [str(STEPS), "--solver", "ddpm", "-o", str(out), "--ray-workers", "2", "--ray"]
    return subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env={**os.environ, "HD_TEST": tag})


def ledger(out):
    """What is complete. A file that is being written, or was when its writer was killed, begins with a dot."""
    done = (path for path in out.glob("*.json") if not path.name.startswith("."))
    return {path.stem: (path.stat().st_mtime_ns, path.stat().st_ino) for path in done}


def wait(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.poll() is None, process.stderr.read()
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_actors_and_the_driver_are_killed(toy_bundle, tmp_path):
    pytest.importorskip("ray")
    prompts, out, tag = tmp_path / "prompts.jsonl", tmp_path / "out", f"hd-{os.getpid()}-{time.time_ns()}"
    lines = [json.dumps({"prompt": f"prompt {n}", "id": f"p{n}", "seed": n}) for n in range(200)]
    lines.insert(50, '{"prompt": "", "id": "empty"}')
    prompts.write_text("\n".join(lines))
    process = start(toy_bundle, prompts, out, tag)
    killed = set()
    for done in (20, 50):
        wait(lambda done=done: len(ledger(out)) >= done, process)
        alive = [pid for pid in actors(tag) if pid not in killed]
        os.kill(alive[0], signal.SIGKILL)
        killed.add(alive[0])
    wait(lambda: len(ledger(out)) >= 90, process)
    second = run_command("runtime.cli", toy_bundle, "a fist", "-o", out, "--ray")
    assert second.returncode == 1 and "Another hd-run is writing into" in second.stderr
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 60
    while actors(tag) and time.monotonic() < end:
        time.sleep(0.1)
    assert not actors(tag)  # nothing of a dead driver goes on
    before = ledger(out)
    assert 90 <= len(before) < 200
    again = start(toy_bundle, prompts, out, tag)
    said = again.communicate(timeout=240)[1]
    assert again.returncode == 0, said
    after = ledger(out)
    assert sorted(after) == sorted(f"p{n}" for n in range(200))
    assert all(after[name] == mark for name, mark in before.items())  # made once
    assert f"{200 - len(before)} pictures" in said and f"{len(before)} skipped" in said and "1 refused" in said
    assert "line 51" in said and "Traceback" not in said
    pipeline = HanDiffuser.load(toy_bundle, device="cpu", threads=1)
    for n in range(0, 200, 7):
        (picture,) = pipeline.generate(Request(f"prompt {n}", seed=n, steps=STEPS, solver="ddpm"))
        image = np.asarray(Image.open(out / f"p{n}.png"))
        assert np.abs(image.astype(int) - picture.image).max() <= 1
    assert not list(out.glob(".hd-run.tmp.*"))


def test_there_is_no_ray_at_that_address(toy_bundle, tmp_path):
    pytest.importorskip("ray")
    result = run_command("runtime.cli", toy_bundle, "a fist", "-o", tmp_path / "out", "--ray", "nonsense://here")
    assert result.returncode == 1 and "Traceback" not in result.stderr and "nonsense" in result.stderr


def test_an_actor_makes_what_is_not_there(toy_bundle, tmp_path):
    """Without Ray: the actor's own work, with a row that fails."""
    from dataclasses import asdict

    from handiffuser.serving.ray import Painter
    from handiffuser.serving.worker import Options

    pipeline = HanDiffuser.load(toy_bundle, device="cpu", threads=1)
    requests, _ = pipeline.prepare([Request(f"p {n}", seed=n) for n in range(5)])
    rows = np.array([json.dumps(asdict(request)) for request in requests], object)
    actor = Painter(Options(str(toy_bundle), "cpu", 1, 4), str(tmp_path / "out"))
    assert actor({"request": rows[:2]})["state"] == ["made", "made"]
    assert actor({"request": rows[:3]})["state"] == ["there", "there", "made"]
    gone = {**asdict(requests[3]), "hands": str(tmp_path / "gone.npz")}
    other = actor({"request": np.array([json.dumps(gone), rows[4]], object)})
    assert other["state"] == ["failed", "made"] and "gone.npz" in other["sentence"][0]
