"""hd-run --ray: kills lose no picture and repeat none."""

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
from adaptable import write
from commands import run_command
from handiffuser import HanDiffuser, Request
from handiffuser.runtime import cli
from handiffuser.runtime.bundle import Bundle
from handiffuser.serving import ray
from PIL import Image

STEPS = 200  # of the toy: some 60 ms


def actors(tag: str) -> list[int]:
    """Processes of this run's actors: those with `tag` in their environment."""
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
    """The complete pictures. Names of unfinished files begin with a dot."""
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
    assert not actors(tag)  # actors end with their driver
    before = ledger(out)
    assert 90 <= len(before) < 200
    again = start(toy_bundle, prompts, out, tag)
    said = again.communicate(timeout=240)[1]
    assert again.returncode == 0, said
    after = ledger(out)
    assert sorted(after) == sorted(f"p{n}" for n in range(200))
    assert all(after[name] == mark for name, mark in before.items())  # not made again
    assert f"{200 - len(before)} pictures" in said and f"{len(before)} skipped" in said and "1 refused" in said
    assert "line 51" in said and "Traceback" not in said
    pipeline = HanDiffuser.load(toy_bundle, device="cpu", threads=1)
    for n in range(0, 200, 7):
        (picture,) = pipeline.generate(Request(f"prompt {n}", seed=n, steps=STEPS, solver="ddpm"))
        image = np.asarray(Image.open(out / f"p{n}.png"))
        assert np.abs(image.astype(int) - picture.image).max() <= 1
    assert not list(out.glob(".hd-run.tmp.*"))


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_the_next_run_continues(toy_bundle, tmp_path, small_disk):
    pytest.importorskip("ray")
    out, count = small_disk / "out", 40
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": "a", "id": f"p{n}", "seed": n}) for n in range(count)))
    line = (toy_bundle, "--prompts", prompts, "--steps", 4, "-o", out, "--ray-workers", 2, "--ray")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(1700 << 10))
    first = run_command("runtime.cli", *line)
    assert first.returncode == 1 and first.stderr.count("is full") == 1, first.stderr
    assert "same command again" in first.stderr and "Traceback" not in first.stderr and "failed" not in first.stderr
    before = ledger(out)
    assert 0 < len(before) < count
    again = run_command("runtime.cli", *line[:-3])  # without Ray, on the same full disk
    assert again.returncode == 1 and again.stderr.count("is full") == 1 and ledger(out).items() >= before.items()
    before = ledger(out)
    filler.unlink()
    last = run_command("runtime.cli", *line)
    assert last.returncode == 0 and f"{len(before)} skipped" in last.stderr, last.stderr
    after = ledger(out)
    assert sorted(after) == sorted(f"p{n}" for n in range(count))  # no picture is lost
    assert all(after[name] == mark for name, mark in before.items())  # no picture is made twice
    pipeline = HanDiffuser.load(toy_bundle, device="cpu", threads=1)
    for picture in pipeline.generate([Request("a", seed=n, steps=4) for n in range(0, count, 3)]):
        image = np.asarray(Image.open(out / f"p{picture.request.seed}.png"))
        assert np.abs(image.astype(int) - picture.image).max() <= 1  # no picture is wrong
    assert not list(out.glob(".hd-run.tmp.*"))


@pytest.mark.nightly
def test_a_machine_dies(toy_bundle, tmp_path, monkeypatch):
    """A cluster of two nodes on this machine: the node that is left makes the pictures of the other."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    out, count = tmp_path / "out", 60
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": "a", "id": f"p{n}", "seed": n}) for n in range(count)))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1)
        line = [sys.executable, "-m", "handiffuser.runtime.cli", str(toy_bundle), "--prompts", str(prompts)]
        line += ["--steps", str(STEPS), "--solver", "ddpm", "-o", str(out), "--ray", cluster.address]
        process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
        wait(lambda: len(ledger(out)) >= 10, process)
        cluster.remove_node(node, allow_graceful=False)
        before = ledger(out)
        said = process.communicate(timeout=600)[1]
    finally:
        cluster.shutdown()
    assert process.returncode == 0 and "failed" not in said and "Traceback" not in said, said
    after = ledger(out)
    assert sorted(after) == sorted(f"p{n}" for n in range(count))
    assert all(after[name] == mark for name, mark in before.items())  # no picture is made twice


POISON = """
import os, signal
from handiffuser.runtime import cli
from handiffuser.serving import ray

class Poisoned(ray.Painter):
    def _paint(self, requests, row, hopeless):
        if not hopeless and any("poison" in request.prompt for request in requests):
            os.kill(os.getpid(), signal.SIGKILL)
        super()._paint(requests, row, hopeless)

ray.Painter = Poisoned
cli.main()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
def test_a_request_that_kills_its_actors_fails(toy_bundle, tmp_path):
    pytest.importorskip("ray")
    (tmp_path / "poisoned.py").write_text(POISON)
    line = [sys.executable, str(tmp_path / "poisoned.py"), str(toy_bundle), *"abc", "poison", *"defghijklmnop"]
    line += ["--steps", "4", "-o", str(tmp_path / "out"), "--ray-workers", "2", "--ray"]
    result = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert "actors ended while they made this picture" in result.stderr
    made, failed = len(ledger(tmp_path / "out")), int(result.stderr.split(" failed")[0].split()[-1])
    assert made + failed == 17 and 1 <= failed <= 4  # the request and others of its batch
    assert f"{made} pictures in" in result.stderr


def test_no_cluster_at_that_address(toy_bundle, tmp_path):
    pytest.importorskip("ray")
    result = run_command("runtime.cli", toy_bundle, "a fist", "-o", tmp_path / "out", "--ray", "nonsense://here")
    assert result.returncode == 1 and "Traceback" not in result.stderr and "nonsense" in result.stderr


def test_an_actor_makes_missing_pictures(toy_bundle, tmp_path):
    """The actor without Ray, with a row that fails."""
    from dataclasses import asdict

    from handiffuser.serving.ray import Painter
    from handiffuser.serving.worker import Options

    pipeline = HanDiffuser.load(toy_bundle, device="cpu", threads=1)
    Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(tmp_path / "a.png")
    images = [None, str(tmp_path / "a.png")]  # every second one starts from a picture
    requests, _ = pipeline.prepare([Request(f"p {n}", seed=n, image=images[n % 2]) for n in range(5)])
    rows = np.array([json.dumps(asdict(request)) for request in requests], object)
    actor = Painter(Options(str(toy_bundle), "cpu", 1, 4, "onnxruntime"), str(tmp_path / "out"))
    assert actor({"request": rows[:2]})["state"] == ["made", "made"]
    assert actor({"request": rows[:3]})["state"] == ["there", "there", "made"]
    gone = {**asdict(requests[3]), "hands": str(tmp_path / "gone.npz")}
    other = actor({"request": np.array([json.dumps(gone), rows[4]], object)})
    assert other["state"] == ["failed", "made"] and "gone.npz" in other["sentence"][0]


def test_an_actor_reports_a_full_disk_or_missing_engines_for_every_row(toy_bundle, tmp_path, monkeypatch):
    """The driver stops at the first such row."""
    import errno
    from dataclasses import asdict

    from handiffuser.serving.ray import Painter
    from handiffuser.serving.worker import Options

    pipeline = HanDiffuser.load(toy_bundle, device="cpu", threads=1)
    requests, _ = pipeline.prepare([Request(f"p {n}", seed=n) for n in range(6)])
    rows = np.array([json.dumps(asdict(request)) for request in requests], object)
    options, real, files = Options(str(toy_bundle), "cpu", 1, 1, "onnxruntime"), Path.write_bytes, []

    def full(path, data):
        files.append(path)
        if len(files) > 6:  # a picture has four files
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, data)

    actor = Painter(options, str(tmp_path / "out"))
    monkeypatch.setattr(Path, "write_bytes", full)
    first = actor({"request": rows[:3]})
    assert sorted(first["state"]) in (["made", "stopped", "stopped"], ["stopped"] * 3)  # two threads write
    said = zip(first["state"], first["sentence"], strict=True)
    assert all("is full" in sentence for state, sentence in said if state == "stopped")
    assert actor({"request": rows[3:]})["state"] == ["stopped"] * 3
    monkeypatch.undo()
    kept = ["there" if state == "made" else "made" for state in first["state"]]
    assert Painter(options, str(tmp_path / "out"))({"request": rows[:3]})["state"] == kept
    lost = Painter(Options(str(tmp_path / "nowhere"), "cpu", 1, 1), str(tmp_path / "out"))({"request": rows})
    assert lost["state"] == ["stopped"] * 6 and all("nowhere" in said for said in lost["sentence"])
    monkeypatch.setattr(HanDiffuser, "load", lambda *_, **__: 1 / 0)  # an error of a library
    lost = Painter(options, str(tmp_path / "out"))({"request": rows[:1]})
    assert lost["state"] == ["stopped"] and "ZeroDivisionError" in lost["sentence"][0]


def test_actors_load_the_adapters_of_all_pictures(monkeypatch, tmp_path):
    """A GPU has no others. And --lora-memory reaches them."""
    given = []
    monkeypatch.setattr(ray, "connect", lambda address: 1)
    monkeypatch.setattr(ray, "paint", lambda todo, how, *_: given.append((todo, how)) or [])
    monkeypatch.chdir(tmp_path)
    name = write(tmp_path / "a.safetensors", "conv_in")
    monkeypatch.setattr(Bundle, "check", lambda *_: None)
    cli.run.main(
        ["demo", "a fist", "--lora", "a.safetensors:0.5", "--lora-memory", "2", "--ray"], standalone_mode=False
    )
    ((todo, how),) = given
    assert how.lora == todo[0].lora == (f"{name}:0.5",) and how.lora_memory == 2
