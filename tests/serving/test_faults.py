"""Ten minutes of all faults at once: no picture is lost, doubled or wrong, and memory stays flat.

HD_SECONDS=60 makes it shorter.
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from handiffuser import HanDiffuser
from PIL import Image
from served import serving

SECONDS = float(os.environ.get("HD_SECONDS", "600"))
KILL_EVERY = 20.0
SEEDS = 40  # different pictures; a single loop makes them first


def memory(pid: int) -> float:
    """Resident megabytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def raw(url: str, body: bytes) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)), timeout=30)
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    return client


@pytest.mark.nightly
def test_everything_at_once(toy_bundle, tmp_path):
    pipeline = HanDiffuser.load(toy_bundle, device="cpu", threads=1)
    known = {p.request.seed: p.image for p in pipeline.generate("a", images_per_prompt=SEEDS, steps=30, solver="ddpm")}
    counts = {"asked": 0, "right": 0, "wrong": 0, "errors": 0, "refused": 0, "vanished": 0, "slow": 0, "half-open": 0}
    killed, lock, ids = [], threading.Lock(), set()
    body = {"prompt": "a", "num_inference_steps": 30, "solver": "ddpm"}

    def count(what):
        with lock:
            counts[what] += 1

    with serving(toy_bundle, tmp_path / "hands", workers=2, batch=4, places=200) as served:
        served.wait(lambda: all(worker.slots for worker in served.dispatcher.workers), 60)
        end = time.monotonic() + SECONDS
        held = []

        def client(number):
            chance = random.Random(number)
            with httpx.Client(base_url=served.url, timeout=120) as http:
                while time.monotonic() < end:
                    seed, kind = chance.randrange(SEEDS), chance.random()
                    asked = json.dumps({**body, "seed": seed}).encode()
                    if kind < 0.3:  # the client vanishes
                        with raw(served.url, asked):
                            time.sleep(chance.random() * 0.05)
                        count("vanished")
                    elif kind < 0.32:  # the client reads a byte at a time
                        with raw(served.url, asked) as slow:
                            for _ in range(20):
                                slow.recv(1)
                                time.sleep(0.01)
                        count("slow")
                    elif kind < 0.322 and len(held) < 20:  # the client neither reads nor leaves
                        held.append(raw(served.url, asked))
                        count("half-open")
                    else:
                        count("asked")
                        answer = http.post("/v1/images/generations", json={**body, "seed": seed})
                        if answer.status_code in (429, 503):
                            count("refused")
                            time.sleep(0.2)
                        elif answer.status_code != 200:
                            count("errors")
                        else:
                            (entry,) = answer.json()["data"]
                            image = np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["b64_json"]))))
                            good = np.abs(image.astype(int) - known[seed]).max() <= 1 and entry["seed"] == seed
                            with lock:
                                good = good and entry["id"] not in ids
                                ids.add(entry["id"])
                            count("right" if good else "wrong")

        def kill():
            while time.monotonic() < end - 5:
                time.sleep(min(KILL_EVERY, SECONDS / 4))
                worker = served.dispatcher.workers[len(killed) % 2]
                if worker.slots and worker.pid != os.getpid():
                    os.kill(worker.pid, signal.SIGKILL)
                    killed.append(worker.pid)

        killer = threading.Thread(target=kill)
        killer.start()
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(client, range(12)))
        killer.join()
        for one in held:
            one.close()
        served.wait(lambda: served.dispatcher.idle, 60)
    print(counts, f"{len(killed)} workers killed")
    assert killed and counts["wrong"] == counts["errors"] == 0
    assert counts["right"] + counts["refused"] == counts["asked"] and counts["right"] > 50


@pytest.mark.nightly
def test_memory_is_flat_over_ten_thousand_requests(toy_bundle):
    from served import command

    with command(toy_bundle, "--threads", 1, "--queue", 1000) as process:
        assert process.url, process.said
        with httpx.Client(base_url=process.url, timeout=60) as http, ThreadPoolExecutor(16) as pool:

            def ask(n):
                fields = {"stream": True, "partial_images": 3} if n % 5 == 0 else {"return_hands": n % 7 == 0}
                answer = http.post(
                    "/v1/images/generations",
                    json={"prompt": f"p {n}", "seed": n, "num_inference_steps": 2 + n % 3, **fields},
                )
                assert answer.status_code == 200

            list(pool.map(ask, range(2000)))
            after_2000 = memory(process.pid)
            list(pool.map(ask, range(2000, 10_000)))
            after_10000 = memory(process.pid)
        print(f"{after_2000:.0f} MB after 2,000 requests, {after_10000:.0f} after 10,000")
        assert after_10000 < after_2000 + 25
