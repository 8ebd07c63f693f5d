"""Ctrl-C and `kill`: one signal ends any command in a few seconds, with 130 and a sentence; a second ends it at once.

(What a build of TensorRT plans does is in engines/test_interrupts.py, single moments of an export in
export/test_check.py.)
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import listen
from handiffuser.contract import Manifest

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux who listens to what")
BIN = Path(sys.executable).parent


def start(*command: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=listen
    )  # fmt: skip


def wait_until_it_listens(process: subprocess.Popen[str]) -> None:
    """Until the command's own code has begun. Before, the signal is the interpreter's: some 30 ms."""
    while process.poll() is None:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
        if int(status["SigCgt"], 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.001)
    raise AssertionError(process.communicate())


BUSY = """
import click
import numpy as np
from handiffuser import commands

commands.PATIENCE_SECONDS = 0.5

@click.command()
def spin():
    matrix = np.random.default_rng(0).random((6000, 6000))
    print("ready", flush=True)
    np.linalg.svd(matrix)  # minutes, and Python sees nothing of it

commands.run("hd-test", spin, "Stopped.")
"""


SWALLOWED = """
import click, time
from handiffuser import commands

commands.PATIENCE_SECONDS = 0.5

@click.command()
def spin():
    while True:
        try:
            print("ready", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:  # as a library may
            pass

commands.run("hd-test", spin, "Stopped.")
"""
LOCKED = """
import click, threading, time
from handiffuser import commands

commands.PATIENCE_SECONDS = 0.5

@click.command()
def spin():
    lock = threading.Lock()
    try:
        lock.acquire()
        print("ready", flush=True)
        time.sleep(60)
        lock.release()  # never comes
    finally:
        lock.acquire()

commands.run("hd-test", spin, "Stopped.")
"""


@pytest.mark.parametrize("code", [BUSY, SWALLOWED, LOCKED], ids=["native code", "swallowed", "deadlock on the way out"])
def test_ctrl_c_that_does_not_come_through(code):
    process = start(sys.executable, "-c", code)
    assert process.stdout.readline() == "ready\n"
    time.sleep(1)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and errors.strip() == "hd-test: Stopped."
    assert time.monotonic() - began < 20  # the machine may be busy


CLEANING = """
import click, time
from handiffuser import commands

@click.command()
def spin():
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        commands.ending()
        print("cleaning", flush=True)
        time.sleep(60)

commands.run("hd-test", spin, "Stopped.")
"""


@pytest.mark.parametrize(("code", "says"), [(SWALLOWED, 1), (BUSY, 1), (CLEANING, 0)], ids=["lost", "busy", "cleaning"])
def test_the_second_ctrl_c_ends_the_process_at_once(code, says):
    process = start(sys.executable, "-c", code.replace("PATIENCE_SECONDS = 0.5", "PATIENCE_SECONDS = 60"))
    assert process.stdout.readline() == "ready\n"
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(1)
    _, errors = process.communicate(timeout=30)
    # A busy machine may not have reached NumPy's code yet; then click ends the line that a terminal shows as ^C.
    assert process.returncode == 130 and errors.lstrip("\n") == "hd-test: Stopped.\n" * says


IN_A_CALLBACK = """
import click, time, weakref
from handiffuser import commands

commands.PATIENCE_SECONDS = 60

class Thing:
    pass

@click.command()
def spin():
    thing = Thing()
    watched = weakref.ref(thing, lambda _: (print("ready", flush=True), time.sleep(60)))
    del thing  # calls the line above, and what that raises goes nowhere
    time.sleep(60)

commands.run("hd-test", spin, "Stopped.")
"""


def test_ctrl_c_in_the_callback_of_a_weak_reference():
    process = start(sys.executable, "-c", IN_A_CALLBACK)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and errors.strip() == "hd-test: Stopped."


IN_AN_IMPORT = """
import click
from handiffuser import commands
from handiffuser.engines.openvino import _import
from handiffuser.errors import EngineError

commands.PATIENCE_SECONDS = 60

@click.command()
def spin():
    try:
        _import()
    except EngineError as error:  # as hd-run, which takes ONNX Runtime then
        print(error)

commands.run("hd-test", spin, "Stopped.")
"""
AS_NATIVE_CODE = """
import os, time

try:
    os.write(1, b"ready\\n")  # not print: a signal during its flush leaves the word in the buffer
    for _ in range(600):  # a signal right before a system call does not end that call
        time.sleep(0.1)
except KeyboardInterrupt:
    raise ImportError("initialization failed") from None
"""


def test_ctrl_c_while_native_code_is_imported(tmp_path):
    (tmp_path / "openvino.py").write_text(AS_NATIVE_CODE)
    process = start("env", f"PYTHONPATH={tmp_path}", sys.executable, "-c", IN_AN_IMPORT)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and not output and errors.strip() == "hd-test: Stopped."


AT_ONCE = """
import os, signal
from handiffuser import commands

listen = signal.signal

def heard(number, handler):
    listen(number, handler)
    if number == signal.SIGTERM:
        os.kill(os.getpid(), number)

signal.signal = heard
commands.start("hd-test", ".errors")
"""


def test_a_signal_as_soon_as_anybody_listens():
    process = start(sys.executable, "-c", AT_ONCE)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and errors == "hd-test: Interrupted.\n"


WHILE_THE_WATCHER_STARTS = """
import os, signal, threading
import click
from handiffuser import commands

begin = threading.Thread.start

def interrupted(thread):
    begin(thread)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread.start = interrupted
commands.run("hd-test", click.Command("hd-test"), "Stopped.")
"""


def test_ctrl_c_while_the_command_begins_to_listen():
    """Its handler is there, and the block that turns Ctrl-C into a sentence has to be as well."""
    process = start(sys.executable, "-c", WHILE_THE_WATCHER_STARTS)
    assert process.communicate(timeout=30) == ("", "hd-test: Stopped.\n")
    assert process.returncode == 130


ON_THE_WAY_OUT = """
import atexit, click, threading, time
from handiffuser import commands

def wait():
    print("ready", flush=True)
    time.sleep(60)

@click.command()
def spin():
    print("done")
    WAIT

commands.run("hd-test", spin, "Stopped.")
"""
WAITS = {
    "for a thread": "threading.Thread(target=wait).start()",
    "for what is registered": "atexit.register(wait)",
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_a_signal_when_all_is_done(wait):
    """It ends what the exit waits for, and takes nothing back."""
    process = start(sys.executable, "-c", ON_THE_WAY_OUT.replace("WAIT", wait))
    assert {process.stdout.readline(), process.stdout.readline()} == {"done\n", "ready\n"}
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and not errors


IN_THE_INTERPRETERS_END = """
import click, os, sys
from handiffuser import commands

class Last:
    def __del__(self, kill=os.kill, number=os.getpid()):
        kill(number, 2)  # SIGINT, when modules are taken down

@click.command()
def spin():
    sys.last = Last()

commands.run("hd-test", spin, "Stopped.")
"""


def test_a_signal_when_the_interpreter_ends():
    process = start(sys.executable, "-c", IN_THE_INTERPRETERS_END)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and not errors


SIGNALS = {
    "kill": [signal.SIGTERM],
    "Ctrl-C twice": [signal.SIGINT, signal.SIGINT],
    "kill twice": [signal.SIGTERM, signal.SIGTERM],
    "kill after Ctrl-C": [signal.SIGINT, signal.SIGTERM],
}


@pytest.mark.slow
@pytest.mark.parametrize("numbers", SIGNALS.values(), ids=SIGNALS)
def test_signals_while_a_command_begins(numbers, tmp_path):
    """In its first second, at moments drawn at random, and the second signal right after the first."""
    draw = random.Random(8)
    for moment in (0.0, 0.02, 0.1, 0.3, 0.6, 1.0):
        process = start(BIN / "hd-run", "demo", "a fist", "--images-per-prompt", 99, "-o", tmp_path / "out")
        wait_until_it_listens(process)
        time.sleep(moment * draw.uniform(0.5, 1.5))
        for number in numbers:
            process.send_signal(number)
            time.sleep(draw.choice([0, 0.002, 0.02, 0.1]))
        _, errors = process.communicate(timeout=30)
        said = [line for line in errors.splitlines() if line.startswith("hd-run: ")]
        assert process.returncode == 130 and "Traceback" not in errors, (moment, errors)
        assert len(said) == 1 and said[0].startswith("hd-run: Interrupted."), (moment, errors)


COMMANDS = {
    "hd-export": (["hd-export", "CHECKPOINT", "OUT"], 15, "Stopped. What is finished stays"),
    "hd-bench": (
        ["hd-bench", "demo", "--batch-sizes", "1", "--threads", "1", "--repeats", "3"],
        8,
        "Interrupted. The results so far follow.",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_one_signal_at_any_moment(command, tiny_checkpoint_folder, tmp_path):
    """At moments drawn at random, four times over; then the same command is left alone and does what it should."""
    arguments, seconds, sentence = COMMANDS[command]
    names = {"CHECKPOINT": str(tiny_checkpoint_folder), "OUT": str(tmp_path / "out")}
    line = [str(BIN / arguments[0]), *(names.get(argument, argument) for argument in arguments[1:])]
    draw = random.Random(9)
    stopped = 0
    for _ in range(4):
        process = start(*line)
        wait_until_it_listens(process)
        deadline = time.monotonic() + draw.random() * seconds
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        if process.poll() is not None:  # it was done before
            process.communicate()
            continue
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - began < 8, "the machine may be busy, and this is still too long"
        if process.returncode == 0:  # it came when all was done
            continue
        said = [line for line in errors.splitlines() if line.startswith(f"{command}: ")]
        assert process.returncode == 130 and "Traceback" not in errors, errors
        assert len(said) == 1 and (sentence in said[0] or said[0] == f"{command}: Interrupted."), errors
        stopped += 1
    assert stopped >= 2
    if command == "hd-export":
        assert subprocess.run(line, capture_output=True, timeout=300).returncode == 0
        Manifest.load(tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
