"""Commands where Linux's own things are missing: what Windows and macOS lack is taken away from a fresh Python first.

This finds what would end at once there. It cannot find how files, consoles and drivers of those systems differ.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request

import pytest

# Python's own modules and psutil are loaded before their ground is taken away: on Windows they are other ones.
WITHOUT = """
import asyncio, importlib.abc, multiprocessing, os, select, signal, socket, subprocess, sys, tempfile, threading
import concurrent.futures.process, http.client, multiprocessing.resource_tracker, urllib.request, uuid, zoneinfo
try:
    import psutil
except ImportError:
    pass
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *rest):
        if name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules.pop(name, None)
for name in ("fork", "register_at_fork", "sched_getaffinity", "sysconf", "getuid", "geteuid", "getloadavg", "wait4",
             "mkfifo", "statvfs", "killpg", "setsid", "O_NOFOLLOW", "O_DIRECTORY", "fchmod"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("pthread_sigmask", "pthread_kill", "SIGHUP", "SIGUSR1", "SIGALRM", "setitimer", "alarm", "siginterrupt"):
    delattr(signal, name)
waiting = select.select
def sockets_only(reading, writing, broken, *timeout):
    assert all(isinstance(one, socket.socket) for one in (*reading, *writing, *broken)), "Windows waits for sockets"
    return waiting(reading, writing, broken, *timeout)
select.select = sockets_only
def refuse(*_, **__):
    raise NotImplementedError
asyncio.SelectorEventLoop.add_signal_handler = refuse
_open = open
import builtins
def no_system_files(file, *rest, **said):
    asks = sys._getframe(1).f_globals["__name__"]
    if str(file).startswith(("/proc/", "/sys/")) and "psutil" not in asks:
        raise FileNotFoundError(2, "No such file or directory", str(file))
    return _open(file, *rest, **said)
builtins.open = no_system_files
import io
io.open = no_system_files
"""
# msvcrt is taken for fcntl there; a lock of ours that nothing else wants is enough.
WITHOUT += "sys.modules['msvcrt'] = type(sys)('msvcrt'); sys.modules['msvcrt'].LK_NBLCK = 2\n"
WITHOUT += "sys.modules['msvcrt'].locking = lambda *_: None\n"


def start(tmp_path, command: str, *arguments: object) -> subprocess.Popen[str]:
    said = f"from handiffuser import commands\nsys.argv = {[command, *map(str, arguments)]!r}\n"
    code = f"{WITHOUT}{said}commands.{command.replace('-', '_')}()"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True, stdout=-1, stderr=-1
    )


@pytest.mark.skipif(os.name == "nt", reason="the real thing")
@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("hd-run", ("demo", "two open hands", "--steps", "1", "--threads", "1")),
        ("hd-run", ("--check",)),
        ("hd-engines", ("list", "demo")),
        pytest.param(
            "hd-bench",
            ("demo", "--threads", "1", "--steps", "1", "--repeats", "1", "--batch-sizes", "1"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else value,
)
def test_a_command_without_what_linux_has(command, arguments, tmp_path):
    if command == "hd-bench":
        pytest.importorskip("psutil")
    with start(tmp_path, command, *arguments) as process:
        out, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in errors, errors
    if command == "hd-bench":
        document = json.loads(out.splitlines()[-1])
        assert document["first_picture"]["peak_mb"] > 50 and document["runs"][0]["memory"]["rss_mb"] > 50


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the real thing")
def test_a_server_without_what_linux_has(tmp_path):
    with start(tmp_path, "hd-serve", "demo", "--port", "0", "--threads", "1") as server:
        try:
            said: list[str] = []
            while server.poll() is None and not (said and "Ready: " in said[-1]):
                said.append(server.stderr.readline())
            assert server.poll() is None, said
            url = said[-1].split("Ready: ")[1].strip() + "/v1/images/generations"
            body = json.dumps({"prompt": "two open hands", "num_inference_steps": 1}).encode()
            asked = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(asked, timeout=60) as answer:
                assert json.load(answer)["data"][0]["b64_json"].startswith("iVBOR")  # a PNG's first bytes
        finally:
            server.send_signal(signal.SIGINT)
            _, errors = server.communicate(timeout=60)
    assert server.returncode == 0 and "Stopping" in errors and "Traceback" not in errors, errors
