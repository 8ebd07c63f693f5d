"""Sends requests over HTTP at random times, and measures how long clients of hd-serve and other servers wait.

    rows = compare("demo", requests, shares=(0.5, 0.7, 0.9), rounds=2, ...)

Each server is its own process with the same engines and as many threads. The load is open-loop: the client sends each
request at its time, whether earlier ones are answered or not. Arrival rates are shares of the bare loop's capacity: all
requests at once, in a process without HTTP, with each picture as base64 PNG, which a server has to send. The servers
take turns in every round, and every round's figures are kept. CPU seconds are those of the server with all its threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EngineError
from ..runtime.requests import Request
from .load import arrival_times, row

OURS = {"hd-serve": ("-m", "handiffuser.serving.cli")}  # name -> what Python runs
READY_SECONDS = 120.0  # until a server must be ready
BARE = """
import json, sys, time
from handiffuser import HanDiffuser, Request
from handiffuser.runtime.loading import SERVER_PICTURES
from handiffuser.serving.images import base64_of, encoded
engines, device, threads, batch, backend = json.loads(sys.argv[1])
requests = [Request(**values) for values in json.load(sys.stdin)]
pipeline = HanDiffuser.load(engines, device, threads, batch, backend, pictures=SERVER_PICTURES)
pipeline.generate("warm up", steps=2)
start, cpu = time.perf_counter(), time.process_time()
assert len([base64_of(encoded(picture.image)) for picture in pipeline.run(requests)]) == len(requests)
print(len(requests) / (time.perf_counter() - start), (time.process_time() - cpu) / len(requests))
"""


def body_of(request: Request, way: str) -> dict[str, Any]:
    body = {
        "prompt": request.prompt,
        "seed": request.seed,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
    }
    return body if way in OURS else body | {"id": str(request.id)}


@contextlib.contextmanager
def server(way: str, line: Sequence[str], engines: str, how: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Starts a server and yields its address and process id when it is ready. EngineError after READY_SECONDS."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = ["--port", str(port), "--batch-size", str(how["batch_size"]), "--device", how["device"]]
    said += ["--backend", how["backend"]]
    if how["threads"]:
        said += ["--threads", str(how["threads"])]
    if way in OURS:
        said += ["--queue", "100000", "--timeout", "3600"]
    process = subprocess.Popen([sys.executable, *line, engines, *said], stderr=subprocess.DEVNULL)
    try:
        import httpx

        end = time.monotonic() + READY_SECONDS
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > end:
                raise EngineError(f"The server {way} did not become ready. Start it by hand to see why.")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def _send(url: str, way: str, requests: Sequence[Request], arrivals: Sequence[float]) -> dict[str, float]:
    """Id -> seconds from the first arrival to its answer. Raises EngineError for an error."""
    import httpx

    done: dict[str, float] = {}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=3600, limits=limits) as client:
        start = time.perf_counter()

        async def one(request: Request, at: float) -> None:
            await asyncio.sleep(max(0.0, at - (time.perf_counter() - start)))
            answer = await client.post("/v1/images/generations", json=body_of(request, way))
            if answer.status_code != 200:
                raise EngineError(f"{way} answered {answer.status_code}: {answer.text[:200]}")
            done[str(request.id)] = time.perf_counter() - start

        await asyncio.gather(*(one(request, at) for request, at in zip(requests, arrivals, strict=True)))
    return done


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process so far; 0 where the system does not tell. They are fair on a busy machine, too."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return 0.0


def bare(engines: str, requests: Sequence[Request], how: dict[str, Any]) -> tuple[float, float]:
    """Pictures a second, as PNG, of the loop alone in a process of its own, and CPU seconds a picture."""
    import json
    from dataclasses import asdict

    arguments = json.dumps([engines, how["device"], how["threads"], how["batch_size"], how["backend"]])
    values = json.dumps([asdict(request) for request in requests])
    found = subprocess.run([sys.executable, "-c", BARE, arguments], input=values, capture_output=True, text=True)
    if found.returncode:
        raise EngineError(f"The bare loop failed: {found.stderr.strip().splitlines()[-1]}")
    rate, cpu = map(float, found.stdout.split()[-2:])
    return rate, cpu


def compare(
    engines: str,
    requests: Sequence[Request],
    shares: Sequence[float],
    rounds: int,
    how: dict[str, Any],
    on_way: Callable[[str], None] = lambda _: None,
    servers: Mapping[str, Sequence[str]] = OURS,
) -> Iterator[dict[str, Any]]:
    """Yields rows as they are done. First, of each round, {"name": "bare loop" or a way, "round",
    "pictures_per_second", "cpu_seconds_per_picture"} with all requests at once; then {"name", "share", "latency",
    "pictures_per_second"} for each share of the capacity.
    """
    capacities = []
    at_once = [0.0] * len(requests)
    for round in range(rounds):
        on_way("the bare loop")
        rate, cpu = bare(engines, requests, how)
        capacities.append(rate)
        yield {"name": "bare loop", "round": round, "pictures_per_second": rate, "cpu_seconds_per_picture": cpu}
        for way, line in servers.items():
            on_way(f"{way}, all at once")
            with server(way, line, engines, how) as (url, pid):
                before = cpu_seconds(pid)
                done = asyncio.run(_send(url, way, requests, at_once))
                cpu = (cpu_seconds(pid) - before) / len(done)
            rate = len(done) / max(done.values())
            yield {"name": way, "round": round, "pictures_per_second": rate, "cpu_seconds_per_picture": cpu}
    for share in shares:
        arrivals = arrival_times(len(requests), share * float(np.median(capacities)))
        for way, line in servers.items():
            on_way(f"{way} at {share:.0%} of capacity")
            with server(way, line, engines, how) as (url, _):
                done = asyncio.run(_send(url, way, requests, arrivals))
            yield row(way, requests, arrivals, done) | {"share": share}
