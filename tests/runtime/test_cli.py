"""`hd-run` as users meet it: in a process of its own, with good and bad input."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import listen
from handiffuser.contract import Manifest

RUN = [sys.executable, "-m", "handiffuser.runtime.cli"]


def hd_run(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [*RUN, *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, **(env or {})},
        timeout=300,
    )
    assert "Traceback" not in result.stderr, result.stderr
    assert result.stdout == "" or "--help" in arguments
    return result


def pictures(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.json") if not path.name.startswith("."))


def test_first_command(toy_bundle, tmp_path):
    out = tmp_path / "out"
    result = hd_run(toy_bundle, "a right hand making a fist", "two open hands", "--seed", 7, "--output", out)
    assert result.returncode == 0, result.stderr
    assert "2 pictures in" in result.stderr and str(out / "index.html") in result.stderr.replace("\n", "")
    ids = pictures(out)
    assert len(ids) == 2 and ids[0].startswith("a-right-hand-making-a-fist-7-")
    for name in ids:
        for suffix in (".png", ".hands.npz", ".hands.png"):
            assert (out / (name + suffix)).stat().st_size > 0
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    result = hd_run(toy_bundle, "a right hand making a fist", "two open hands", "--seed", 7, "--output", out)
    assert result.returncode == 0 and "2 skipped" in result.stderr
    assert before == {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}


def test_words_outside_the_model_s_world_are_named_once(toy_bundle, tmp_path):
    """Each on the terminal once, and in the record of every picture that has it; the pictures are made all the same."""
    bundle = shutil.copytree(toy_bundle, tmp_path / "bundle")
    manifest = Manifest.load(bundle)
    manifest.words = ["a", "fist", "holding", "open", "hand"]
    manifest.save(bundle)
    prompts = ("A fist holding an umbrella", "an open hand")
    result = hd_run(bundle, *prompts, "--images-per-prompt", 2, "--steps", 2, "-o", tmp_path / "out")
    assert result.returncode == 0 and "4 pictures in" in result.stderr
    assert result.stderr.count("'umbrella' is no word") == result.stderr.count("'an' is no word") == 1
    assert result.stderr.count("is no word") == 2
    told = [json.loads((tmp_path / f"out/{name}.json").read_text())["warnings"] for name in pictures(tmp_path / "out")]
    assert sorted(len(warnings) for warnings in told) == [1, 1, 2, 2]
    assert "is no word" not in hd_run(toy_bundle, *prompts, "--steps", 2, "-o", tmp_path / "none").stderr


def test_settings_reach_the_picture(toy_bundle, tmp_path):
    options = ["--steps", "3", "--solver", "euler", "--guidance", "1.5", "--negative-prompt", "blur"]
    options += ["--hand-steps", "2", "--hand-guidance", "2"]
    hd_run(toy_bundle, "a fist", *options, "--images-per-prompt", 2, "-o", tmp_path, "--quiet", "--threads", 1)
    records = [json.loads((tmp_path / f"{name}.json").read_text()) for name in pictures(tmp_path)]
    assert [r["seed"] for r in records] == [0, 1]
    wanted = {"steps": 3, "solver": "euler", "guidance": 1.5, "negative_prompt": "blur", "hand_steps": 2}
    for record in records:
        assert {name: record[name] for name in wanted} == wanted and record["hand_guidance"] == 2.0


def test_edited_hands_skip_stage_1(toy_bundle, tmp_path):
    hd_run(toy_bundle, "a fist", "-o", tmp_path / "a")
    (path,) = (tmp_path / "a").glob("*.npz")
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays["left_hand_pose"][:] = 0.25
    np.savez(tmp_path / "edited.npz", **arrays)
    result = hd_run(toy_bundle, "two hands", "--hand-params", tmp_path / "edited.npz", "-o", tmp_path / "b")
    assert result.returncode == 0, result.stderr
    (path,) = (tmp_path / "b").glob("*.npz")
    with np.load(path) as archive:
        np.testing.assert_allclose(archive["left_hand_pose"], 0.25, atol=1e-5)


@pytest.mark.parametrize("content", [b"no npz", "shape", "nan", None])
def test_bad_hands_file(toy_bundle, tmp_path, content):
    hd_run(toy_bundle, "a fist", "-o", tmp_path / "a")
    (good,) = (tmp_path / "a").glob("*.npz")
    path = tmp_path / "bad.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        with np.load(good) as archive:
            arrays = dict(archive)
        arrays["betas"] = np.zeros(16) if content == "shape" else np.full(10, np.nan)
        np.savez(path, **arrays)
    result = hd_run(toy_bundle, "a fist", "--hand-params", path, "-o", tmp_path / "b")
    assert result.returncode == 1 and "hands file" in result.stderr
    assert not pictures(tmp_path / "b")


def test_an_empty_prompt_is_refused_and_the_rest_done(toy_bundle, tmp_path):
    result = hd_run(toy_bundle, "", "a fist", "  ", "-o", tmp_path)
    assert result.returncode == 0 and "prompt 1: The prompt is empty" in result.stderr and "2 refused" in result.stderr
    assert len(pictures(tmp_path)) == 1
    assert hd_run(toy_bundle, "", "-o", tmp_path / "b").returncode == 1


def test_a_2000_word_prompt_is_cut(toy_bundle, tmp_path):
    result = hd_run(toy_bundle, "hand " * 2000, "-o", tmp_path)
    assert result.returncode == 0 and "warning" in result.stderr and "75 tokens" in result.stderr


def test_emoji_and_other_scripts(toy_bundle, tmp_path):
    prompts = ["✌️👍🏽", "一只拳头", "кулак", "يد مفتوحة", "'\"<b>$(x)`"]
    result = hd_run(toy_bundle, *prompts, "-o", tmp_path, env={"LC_ALL": "C", "PYTHONUTF8": "1"})
    assert result.returncode == 0 and len(pictures(tmp_path)) == 5
    assert "一只拳头" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_broken_lines_duplicate_ids_and_paths(toy_bundle, tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [
        '{"prompt": "a fist", "id": "one", "steps": 2}',
        '{"prompt": "broken',
        '{"prompt": "again", "id": "ONE"}',
        '{"prompt": "away", "id": "../../away"}',
        '{"prompt": "none", "steps": 0}',
        '{"prompt": "many", "steps": 10000}',
        '{"prompt": "plms on x0", "hand_solver": "plms"}',
        '{"prompt": "two hands", "id": "two", "seed": 5}',
    ]
    path.write_text("\n".join(lines))
    result = hd_run(toy_bundle, "--prompts", path, "-o", tmp_path / "out")
    assert result.returncode == 0 and "6 refused" in result.stderr
    assert pictures(tmp_path / "out") == ["one", "two"]
    for line in range(2, 8):
        assert f"line {line}:" in result.stderr.replace("\n", " ")
    assert not (tmp_path.parent / "away.png").exists()


def test_text_file_and_prompts_together(toy_bundle, tmp_path):
    (tmp_path / "p.txt").write_text("a fist\n\ntwo hands\n")
    result = hd_run(toy_bundle, "a fist", "--prompts", tmp_path / "p.txt", "-o", tmp_path / "out")
    assert result.returncode == 0 and len(pictures(tmp_path / "out")) == 3


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--steps", "0"], 2, "--steps"),
        (["--steps", "10000"], 2, "--steps"),
        (["--batch-size", "0"], 2, "--batch-size"),
        (["--images-per-prompt", "0"], 2, "--images-per-prompt"),
        (["--solver", "magic"], 2, "ddim"),
        (["--guidance", "nan"], 1, "guidance"),
        (["--seed", "-1"], 2, "--seed"),
        (["--prompts", "missing.txt"], 1, "missing.txt cannot be read"),
        (["--hand-params", "missing.npz"], 1, "no hands file"),
    ],
)
def test_bad_options(toy_bundle, tmp_path, options, code, words):
    result = hd_run(toy_bundle, "a fist", *options, "-o", tmp_path / "out")
    assert result.returncode == code and words in result.stderr
    assert not pictures(tmp_path / "out")


def test_nothing_to_do(toy_bundle, tmp_path):
    result = hd_run(toy_bundle, "-o", tmp_path)
    assert result.returncode == 1 and "nothing to do" in result.stderr


@pytest.mark.parametrize("damage", ["missing", "flipped", "newer", "nobundle", "nowhere"])
def test_bad_bundles(toy_copy, tmp_path, damage):
    graph, manifest = toy_copy / "unet.onnx", toy_copy / "manifest.json"
    words = {"missing": "is missing", "flipped": "is damaged", "newer": "format 99", "nobundle": "no bundle"}
    if damage == "missing":
        graph.unlink()
    elif damage == "flipped":
        content = bytearray(graph.read_bytes())
        content[100] ^= 4
        graph.write_bytes(content)
    elif damage == "newer":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    elif damage == "nobundle":
        manifest.unlink()
    else:
        shutil.rmtree(toy_copy)
    result = hd_run(toy_copy, "a fist", "-o", tmp_path / "out")
    assert result.returncode == 1 and words.get(damage, "does not exist") in result.stderr
    assert result.stderr.startswith("hd-run: ") and not pictures(tmp_path / "out")


def test_output_that_is_a_file(toy_bundle, tmp_path):
    (tmp_path / "out").write_text("")
    result = hd_run(toy_bundle, "a fist", "-o", tmp_path / "out")
    assert result.returncode == 1 and "is not a folder" in result.stderr


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody can write to")
def test_unwritable_output(toy_bundle):
    result = hd_run(toy_bundle, "a fist", "-o", "/proc/out")
    assert result.returncode == 1 and "cannot be written" in result.stderr


# Runs the command with a disk that is full after some bytes: no test may fill a real one.
FULL_DISK = """
import errno, sys
from pathlib import Path
room, real = int(sys.argv.pop(1)), Path.write_bytes
def write_bytes(path, data):
    global room
    room -= len(data)
    if room < 0:
        real(path, data[: len(data) // 2])
        raise OSError({errno}, "No space left on device")
    return real(path, data)
Path.write_bytes = write_bytes
from handiffuser.runtime.cli import main
main()
"""


def test_full_disk(toy_bundle, tmp_path):
    code = FULL_DISK.format(errno=errno.ENOSPC)
    prompts = [f"prompt {n}" for n in range(12)]
    command = [
        sys.executable,
        "-c",
        code,
        "150000",
        str(toy_bundle),
        *prompts,
        "-o",
        str(tmp_path),
        "--batch-size",
        "2",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "is full" in result.stderr
    done = pictures(tmp_path)
    assert 0 < len(done) < 12 and f"{len(done)} pictures" in result.stderr
    assert not list(tmp_path.glob(".hd-run.tmp*"))
    result = hd_run(toy_bundle, *prompts, "-o", tmp_path)
    assert result.returncode == 0 and f"{len(done)} skipped" in result.stderr and len(pictures(tmp_path)) == 12


def start_slow(bundle: Path, out: Path) -> subprocess.Popen[str]:
    """A run that goes on for minutes, returned once its first pictures are there."""
    prompts = out.parent / "many.txt"
    prompts.write_text("\n".join(f"prompt {n}" for n in range(5000)))
    command = [*RUN, str(bundle), "--prompts", str(prompts), "-o", str(out), "--steps", "50"]

    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(list(out.glob("*.json"))) < 3 and process.poll() is None:
        time.sleep(0.05)
    assert process.poll() is None, process.stderr and process.stderr.read()
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_what_was_finished(toy_bundle, tmp_path, number):
    out = tmp_path / "out"
    process = start_slow(toy_bundle, out)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in stderr and "Interrupted" in stderr
    done = pictures(out)
    assert len(done) >= 3 and not list(out.glob(".hd-run.tmp*"))
    counted = re.search(r"(\d+) pictures in", stderr)
    assert counted and int(counted[1]) == len(done)
    page = (out / "index.html").read_text(encoding="utf-8")
    assert f"{len(done)} pictures" in page
    for name in done:
        assert (out / f"{name}.png").is_file() and f"{name}.png" in page


def test_a_second_run_into_the_same_folder(toy_bundle, tmp_path):
    out = tmp_path / "out"
    process = start_slow(toy_bundle, out)
    try:
        result = hd_run(toy_bundle, "a fist", "-o", out)
        assert result.returncode == 1 and "Another hd-run is writing" in result.stderr
        assert str(process.pid) in result.stderr
    finally:
        process.kill()
        process.communicate()
    # The killed run left its lock and perhaps half a picture; neither is in the way.
    assert hd_run(toy_bundle, "a fist", "-o", out).returncode == 0
    assert not list(out.glob(".hd-run.tmp*"))


def test_an_id_that_names_another_picture(toy_bundle, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a fist", "id": "x"}')
    assert hd_run(toy_bundle, "--prompts", path, "-o", tmp_path / "out").returncode == 0
    before = (tmp_path / "out" / "x.png").read_bytes()
    path.write_text('{"prompt": "a palm", "id": "x"}')
    result = hd_run(toy_bundle, "--prompts", path, "-o", tmp_path / "out")
    assert result.returncode == 1 and "another picture with the id x" in result.stderr.replace("\n", " ")
    assert (tmp_path / "out" / "x.png").read_bytes() == before


def test_both_onnxruntimes(toy_bundle, tmp_path):
    for name in ("onnxruntime", "onnxruntime_gpu"):
        info = tmp_path / "site" / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    result = hd_run(toy_bundle, "a fist", "-o", tmp_path / "out", env={"PYTHONPATH": str(tmp_path / "site")})
    assert result.returncode == 0 and "warning: onnxruntime and onnxruntime-gpu are both" in result.stderr


def test_quiet_says_nothing(toy_bundle, tmp_path):
    result = hd_run(toy_bundle, "a fist", "-o", tmp_path, "--quiet")
    assert result.returncode == 0 and result.stderr == ""


def test_help():
    result = hd_run("--help")
    assert result.returncode == 0 and "ENGINES" in result.stdout
