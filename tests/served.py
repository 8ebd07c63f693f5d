"""A server in this process over the toy bundle, on a port of its own; and hd-serve as a process."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import uvicorn
from handiffuser.contract import Manifest
from handiffuser.runtime.bundle import Bundle
from handiffuser.serving.app import make_app
from handiffuser.serving.cli import Server, config_socket
from handiffuser.serving.dispatch import Dispatcher
from handiffuser.serving.guard import Protocol
from handiffuser.serving.keys import Keys
from handiffuser.serving.metrics import Metrics
from handiffuser.serving.service import Front, Limits, Service
from handiffuser.serving.worker import Options


class Served:
    """The service, its dispatcher, and an HTTP client of it."""

    def __init__(self, service, server, url):
        self.service, self.server, self.dispatcher, self.url = service, server, service.dispatcher, url
        self.client = httpx.Client(base_url=url, timeout=60)

    def generate(self, prompt="a fist", **fields):
        return self.client.post("/v1/images/generations", json={"prompt": prompt, **fields})

    def metric(self, name):
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split()[0] == f"handiffuser_{name}")

    def wait(self, condition, seconds=20.0):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "the condition did not become true"
            time.sleep(0.005)


@contextlib.contextmanager
def serving(
    folder, tmp, workers=1, places=8, batch=4, limits=None, keys=None, front=None, wait=True, warm_up=False,
    buffer=None, second=None, stuck_after=60.0,
):  # fmt: skip
    """A server in a thread of its own event loop. buffer: bytes that the system buffers for a client. second: other
    options for the last worker."""
    bundle = Bundle.load(folder, Manifest.load(folder, verify=False))
    metrics = Metrics()
    options = [Options(str(folder), "cpu", 1, batch, "onnxruntime", warm_up)] * workers
    options[-1] = second or options[-1]
    said = []
    dispatcher = Dispatcher(options, workers > 1, places, metrics, said.append, stuck_after)
    tmp.mkdir(exist_ok=True)
    service = Service(bundle, dispatcher, "toy", limits or Limits(), Keys(keys), metrics, tmp, front or Front())
    service.said = said
    app = make_app(service)
    listening = config_socket("127.0.0.1", 0)
    if buffer:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    config = uvicorn.Config(
        app, http=Protocol, ws="none", log_config=None, access_log=False, timeout_graceful_shutdown=1,
        proxy_headers=False,
    )  # fmt: skip
    server = Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True)
    thread.start()
    served = Served(service, server, f"http://127.0.0.1:{listening.getsockname()[1]}")
    try:
        served.wait(lambda: server.started)
        if wait:
            served.wait(lambda: dispatcher.ready or dispatcher.fatal, 60)
        yield served
    finally:
        served.client.close()
        server.should_exit = True
        thread.join(20)


@contextlib.contextmanager
def command(*arguments, ready=True, preexec_fn=None):
    """hd-serve in a process of its own. `said` has its lines on stderr so far, `url` its address."""
    line = [sys.executable, "-m", "handiffuser.serving.cli", "--backend", "onnxruntime", *map(str, arguments)]
    line += ["--port", "0"]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, preexec_fn=preexec_fn)
    process.said, process.url = [], None

    def read():
        for text in process.stderr:
            process.said.append(text.rstrip("\n"))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        end = time.monotonic() + 60
        while ready and process.url is None and process.poll() is None and time.monotonic() < end:
            found = [text for text in process.said if "Ready: " in text]
            process.url = found[0].split("Ready: ")[1] if found else None
            time.sleep(0.02)
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)
        reader.join(5)
