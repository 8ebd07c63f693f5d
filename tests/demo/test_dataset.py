"""The demo world as a dataset: every scene is a sample whose picture, hands and words agree; made once, resumable."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import listen
from handiffuser.commands import undisturbed
from handiffuser.data.hands import params_of
from handiffuser.data.samples import picture, read, shards
from handiffuser.demo import dataset
from handiffuser.demo.dataset import LABELS, WORDINGS, class_numbers, labels_of, make, scene_of
from handiffuser.demo.prompts import VIEWS, Spec, is_held_out, write_prompt
from handiffuser.demo.render import demo_body, render_scenes
from handiffuser.errors import DatasetError
from handiffuser.models.hand_features import pack, placement_of

SEED = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo")
    make(path, 24, size=48, seed=SEED, processes=1)
    return path


def test_a_sample_is_its_scene(folder):
    body = demo_body()
    samples = list(read(folder))
    scenes, prompts = zip(*(scene_of(SEED, i) for i in range(24)), strict=True)
    assert [sample.prompts for sample in samples] == list(prompts)
    images = render_scenes(scenes[:8], body, 48).numpy()
    for sample, scene, image in zip(samples[:8], scenes, images, strict=False):
        drawn = picture(sample).astype(int)
        assert np.abs(drawn - image).max() <= 2  # which scenes share a batch may round one level
        rotations, betas = (torch.from_numpy(a)[None] for a in (scene.rotations, scene.betas))
        camera, present = (torch.from_numpy(a)[None] for a in (scene.camera, scene.present))
        wanted = pack(rotations, betas, placement_of(body(rotations, betas)[1], camera, present))
        assert torch.allclose(params_of([sample.hands], body), wanted, atol=1e-5)
        only_camera = {name: value for name, value in sample.hands.items() if name != "placement"}
        assert torch.allclose(params_of([only_camera], body), wanted, atol=1e-4)
        spec = scene.spec
        assert sample.meta["labels"] == {
            "side": spec.side, "gesture": spec.gesture, "view": spec.view, "skin": spec.skin,
            "background": spec.background,
        }  # fmt: skip
        assert all(value in LABELS[name] for name, value in sample.meta["labels"].items())
    assert set(LABELS) - set(sample.meta["labels"]) <= {"other", "view"}


def test_labels_say_what_each_hand_does():
    alike = Spec("both", "fist", "palm", "tan", "blue")
    assert labels_of(alike) == {**asdict(alike), "other": "fist"}
    one = labels_of(Spec("right", "fist", "side", "tan", "blue"))
    assert "other" not in one and one["view"] == "side" and class_numbers(one)[-1] == -1
    # Thumbs up is held with the back to the viewer, thumbs down with the palm: no view is said of the two.
    apart = Spec("both", "thumbs_up", "back", "tan", "blue", "thumbs_down")
    assert labels_of(apart) == {k: v for k, v in asdict(apart).items() if k != "view"}
    assert (apart.view_of(0), apart.view_of(1)) == ("back", "palm")
    assert not any(word in write_prompt(apart, np.random.default_rng(i), 0).lower() for i in range(50)
                   for words in VIEWS.values() for word in (*words, "back of the hands"))  # fmt: skip


def test_held_out_prompts_are_not_in_it():
    for number in range(120):
        scene, prompts = scene_of(SEED, number)
        assert prompts[0] == scene.prompt and len(prompts) == WORDINGS
        assert not any(map(is_held_out, prompts))


def test_it_is_made_once_and_grows(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SHARD", 4)
    made = []
    shard = dataset._shard

    def noted(job):
        made.append(job[2][0])
        return shard(job)

    monkeypatch.setattr(dataset, "_shard", noted)
    make = partial(dataset.make, processes=1)
    make(tmp_path, 6, size=16, seed=SEED)
    assert [path.name for path in shards(tmp_path)] == ["00000.tar", "00001.tar"] and made == [0, 4]
    before = [sample.prompts for sample in read(tmp_path)]
    made.clear()
    make(tmp_path, 6, size=16, seed=SEED)
    assert made == []
    make(tmp_path, 9, size=16, seed=SEED)  # the second shard was short
    assert made == [4, 8]
    after = [sample.prompts for sample in read(tmp_path)]
    assert len(after) == 9 and after[:6] == before
    path = tmp_path / "00000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:3000])
    made.clear()
    shown = []
    make(tmp_path, 9, size=16, seed=SEED, on_progress=lambda *done: shown.append(done))
    assert made == [0] and path.read_bytes() == whole and shown == [(5, 9), (9, 9)]


@pytest.mark.parametrize("other", [{"seed": 5, "size": 48}, {"seed": SEED, "size": 32}])
def test_another_dataset_is_not_mixed_in(folder, other):
    with pytest.raises(DatasetError, match="or hold this dataset, got"):
        make(folder, 24, processes=1, **other)


def test_ctrl_c_waits_until_processes_have_been_started(request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    started = False
    with pytest.raises(KeyboardInterrupt):
        with undisturbed():
            signal.raise_signal(signal.SIGINT)
            started = True
        pytest.fail("it was lost")
    assert started


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_waits_whichever_thread_the_signal_comes_to(number):
    code = f"""
import os, time
from handiffuser import commands

commands.hear_interrupts("Stopped.")  # with a thread of its own, which blocks nothing
try:
    with commands.undisturbed():
        os.kill(os.getpid(), {int(number)})
        time.sleep(0.2)
        print("started")
except KeyboardInterrupt:
    print("then heard")
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=listen, timeout=60)
    assert said.stdout == "started\nthen heard\n", said


def test_processes_begin_with_ctrl_c_blocked():
    """The first of them, too, with which multiprocessing starts another of its own. A terminal sends it to all."""
    code = """
import multiprocessing
from handiffuser.commands import undisturbed

if __name__ == "__main__":
    ask = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []), flush=True)"
    with undisturbed():
        some = [multiprocessing.get_context("spawn").Process(target=exec, args=(ask,)) for _ in range(2)]
        for process in some:
            process.start()
    for process in some:
        process.join()
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert said.stdout.count("True") == 2 and "False" not in said.stdout, said


@pytest.mark.slow
def test_ctrl_c_is_a_sentence_and_leaves_whole_shards(tmp_path):
    command = [sys.executable, "-m", "handiffuser.data.cli", "demo", str(tmp_path / "out"), "--scenes", "100000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen) as process:
        assert process.stderr.readline() == "scenes: 0 of 100000\n"  # type: ignore[union-attr]
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "again to go on" in said and "Traceback" not in said, said
    assert all(not path.name.endswith(".tar") for path in (tmp_path / "out").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo", "check"])
def test_no_process_outlives_a_command_that_is_killed(name, tmp_path):
    """By -9, which nothing can catch: the others notice that the first one is gone."""
    folder = tmp_path / "out"
    if name == "check":
        make(folder, 60, size=48, seed=SEED, processes=1)
        for number in range(1, 200):
            shutil.copy(folder / "00000.tar", folder / f"{number:05d}.tar")
    arguments = {
        "demo": ["demo", str(folder), "--scenes", "100000", "--processes", "2"],
        "check": ["check", str(folder), "--processes", "2"],
    }[name]
    process = subprocess.Popen(
        [sys.executable, "-m", "handiffuser.data.cli", *arguments], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )

    def workers() -> list[int]:
        of = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return [int(pid) for pid in of if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def until(true: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not true():
            assert time.monotonic() < end and process.poll() in (None, -signal.SIGKILL)
            time.sleep(0.1)

    until(lambda: len(workers()) == 2)
    left = workers()
    until(lambda: all(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) > 30_000 for pid in left))  # they began
    process.kill()
    process.wait()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in left))
