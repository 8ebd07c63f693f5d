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
from click.testing import CliRunner
from commands import invoke, listen, run_command
from handiffuser.contract import Manifest
from handiffuser.errors import HanDiffuserError
from handiffuser.runtime.cli import run

RUN = [sys.executable, "-m", "handiffuser.runtime.cli"]


def hd_run(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs `hd-run`; with `env` in a process of its own, because Python reads its variables at the start."""
    result = run_command("runtime.cli", *arguments, env=env) if env else invoke("runtime.cli", *arguments)
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
    """A line a prompt, and in the record of every picture of it; the pictures are made all the same."""
    bundle = shutil.copytree(toy_bundle, tmp_path / "bundle")
    manifest = Manifest.load(bundle)
    manifest.words = ["a", "fist", "holding", "open", "hand"]
    manifest.save(bundle)
    prompts = ("A fist holding an umbrella", "an open hand")
    result = hd_run(bundle, *prompts, "--images-per-prompt", 2, "--steps", 2, "-o", tmp_path / "out")
    assert result.returncode == 0 and "4 pictures in" in result.stderr
    assert result.stderr.count("not trained on 'an', 'umbrella'.") == result.stderr.count("not trained on 'an'.") == 1
    assert result.stderr.count("warning") == 2
    told = [json.loads((tmp_path / f"out/{name}.json").read_text())["warnings"] for name in pictures(tmp_path / "out")]
    assert [len(warnings) for warnings in told] == [1, 1, 1, 1]
    assert "not trained" not in hd_run(toy_bundle, *prompts, "--steps", 2, "-o", tmp_path / "none").stderr


def test_one_line_for_a_prompt_of_unknown_words_and_none_for_those_that_are_cut(toy_copy, tmp_path):
    manifest = Manifest.load(toy_copy)
    manifest.words = ["a", "fist"]
    manifest.save(toy_copy)
    prompt = "a fist " + " ".join(f"word{letter}" for letter in "abc") + " padding" * 80 + " lost"
    stderr = hd_run(toy_copy, prompt, "--steps", 2, "-o", tmp_path / "out").stderr
    assert stderr.count("warning") == 2 and stderr.count("not trained on 'worda'") == 1
    assert "This part was cut" in stderr and "'lost'" not in stderr
    (tmp_path / "many.txt").write_text("".join(f"a fist {'x' * n}\n" for n in range(2, 32)))
    stderr = hd_run(toy_copy, "--prompts", tmp_path / "many.txt", "--steps", 2, "-o", tmp_path / "many").stderr
    assert stderr.count("not trained on") == 20 and stderr.count("There are more warnings") == 1


def test_list_words(toy_copy):
    listed = CliRunner().invoke(run, ["demo", "--list-words"], standalone_mode=False)
    assert listed.exit_code == 0, listed.exception
    for words in ("Gestures", "making a fist", "Sides", "both hands", "Views", "in profile", "Skin", "Backgrounds",
                  "purple", "Sample sentences", "two open hands"):  # fmt: skip
        assert words in listed.output
    assert "any words go" in CliRunner().invoke(run, [str(toy_copy), "--list-words"], standalone_mode=False).output
    manifest = Manifest.load(toy_copy)
    manifest.words = ["fist", "umbrella"]
    manifest.save(toy_copy)
    assert "fist, umbrella" in CliRunner().invoke(run, [str(toy_copy), "--list-words"], standalone_mode=False).output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--ray", "a fist"], "--ray must be an address such as 10.0.0.1:6379, or stand last, got 'a fist'"),
        (["demo", "a fist", "--ray", "two hands"], "put it before --ray"),
        (["a fist", "demo"], 'Type: hd-run demo "a fist"'),
        (["a fist", "two hands"], "The first argument must be a bundle, got 'a fist'"),
        (["fist"], 'hd-run demo "fist"'),
        (["engines/", "a fist"], "engines does not exist"),
        (["demo"], "There is nothing to do"),
    ],
)
def test_arguments_in_each_other_s_place(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(run, arguments, standalone_mode=False)
    assert isinstance(result.exception, HanDiffuserError) and words in str(result.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (
            ["height=512", "a fist"],
            "got 'height=512'. Say the size of pictures as size: WIDTHxHEIGHT, such as 512x768.",
        ),
        (["a fist", "steps=8"], "A setting must be an option, got 'steps=8'. It is --steps here."),
        (["num_inference_steps=8"], "It is --num-inference-steps here."),
        (["cfg=3"], "It is --guidance here."),
    ],
)
def test_a_setting_among_the_prompts_is_not_painted(prompts, words, tmp_path):
    result = CliRunner().invoke(run, ["demo", *prompts, "-o", str(tmp_path / "out")], standalone_mode=False)
    assert isinstance(result.exception, HanDiffuserError) and words in str(result.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("prompts", "warned"),
    [
        (["a", "fist"], "2 prompts were given: 'a', 'fist'. If they are one prompt, put it in quotes: hd-run {} "),
        (["a right hand", "making", "a", "fist"], '"a right hand making a fist"'),
        (["fist", "two open hands"], ""),
        (["fist"], ""),
        (["E=mc2 written in chalk"], ""),
    ],
)
def test_forgotten_quotes(toy_bundle, tmp_path, prompts, warned):
    result = hd_run(toy_bundle, *prompts, "--steps", 1, "--hand-steps", 1, "-o", tmp_path, "--quiet")
    assert result.returncode == 0 and len(pictures(tmp_path)) == len(prompts)
    assert warned.format(toy_bundle) in result.stderr and ("quotes" in result.stderr) == bool(warned)


def test_settings_without_effect_are_named(toy_bundle, tmp_path):
    asked = ["a fist", "two hands", "--steps", 2, "--negative-prompt", "blur", "--guidance-interval", 0, 0.5]
    stderr = hd_run(toy_bundle, *asked, "--guidance", 1, "-o", tmp_path / "1").stderr
    assert stderr.count("The negative prompt has no effect: the guidance is 1, which is off.") == 1
    assert stderr.count("The guidance interval has no effect") == 1
    assert "no effect" not in hd_run(toy_bundle, *asked, "--guidance", 2, "-o", tmp_path / "2").stderr
    assert "no effect" not in hd_run(toy_bundle, "a fist", "--steps", 2, "--guidance", 1, "-o", tmp_path / "3").stderr


def test_a_refused_run_leaves_no_folder(toy_bundle, tmp_path):
    """Where it made the folder, and the folders around it. Folders that were there stay."""
    asked = [toy_bundle, "a fist", "--backend", "tensorrt", "--device", "cpu", "-o"]
    assert hd_run(*asked, tmp_path / "new" / "out").returncode == 1 and not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    assert hd_run(*asked, tmp_path / "mine").returncode == 1 and (tmp_path / "mine").is_dir()


@pytest.mark.parametrize("file", ["unet.onnx", "manifest.json"])
def test_a_file_of_a_bundle_is_not_the_bundle(toy_bundle, tmp_path, file):
    result = CliRunner().invoke(run, [str(toy_bundle / file), "a fist", "-o", str(tmp_path)], standalone_mode=False)
    assert f"Give the folder it is in: {toy_bundle}." in str(result.exception)
    result = CliRunner().invoke(run, [__file__, "a fist", "-o", str(tmp_path)], standalone_mode=False)
    assert "A bundle must be a folder" in str(result.exception)


def test_strict(toy_bundle, tmp_path):
    """The rest is made all the same, and a second run that skips it fails, too."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a fist"}\nbroken\n')
    common = (toy_bundle, "--prompts", tmp_path / "p.jsonl", "--steps", 2)
    assert hd_run(*common, "-o", tmp_path / "a").returncode == 0
    for _ in range(2):
        assert hd_run(*common, "-o", tmp_path / "b", "--strict").returncode == 1
    assert len(pictures(tmp_path / "b")) == 1
    assert hd_run(toy_bundle, "a fist", "--steps", 2, "-o", tmp_path / "c", "--strict").returncode == 0


def test_a_full_temporary_folder_costs_no_picture(toy_bundle, tmp_path):
    """ONNX Runtime cannot write its optimised graph there: the bundle is not to blame."""
    code = (
        "import handiffuser.engines.onnxruntime as o\n"
        "class Full(o.TemporaryDirectory):\n"
        "    def __enter__(self): return super().__enter__() + '/missing'\n"
        "o.TemporaryDirectory = Full\n"
        "from handiffuser.runtime.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code, str(toy_bundle), "a fist", "-o", str(tmp_path / "out")]
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert result.returncode == 0 and len(pictures(tmp_path / "out")) == 1, result.stderr
    assert result.stderr.count("The temporary folder") == 1 and "Export the bundle" not in result.stderr


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
        (["--hand-params", "missing.npz"], 1, "missing.npz does not exist"),
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
    words = {
        "missing": "is missing",
        "flipped": "is damaged",
        "newer": "must be at most 3, got 99",
        "nobundle": "is not a bundle",
    }
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
    assert result.returncode == 1 and "--output must be a folder" in result.stderr


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a read-only folder")
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
