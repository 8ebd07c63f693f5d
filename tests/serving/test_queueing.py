"""Full queues, late and absent clients, dead workers, shutdown: every request gets one answer, slots become free."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from handiffuser.serving.messages import Measured, PictureMade, Ready
from handiffuser.serving.service import Limits
from handiffuser.serving.worker import Options
from served import command, serving


@pytest.fixture
def busy(toy_bundle, tmp_path, slow):
    """A server of one slot and three places whose steps take 30 ms."""
    slow(0.03)
    with serving(toy_bundle, tmp_path / "hands", batch=1, places=3) as served:
        yield served


def ask(served, n, **fields):
    """n requests at once; futures of their answers, in order."""
    pool = ThreadPoolExecutor(n)
    futures = []
    for i in range(n):
        before = len(served.dispatcher.queue) + served.dispatcher.running
        futures.append(pool.submit(served.generate, f"prompt {i}", seed=i, **fields))
        there = lambda before=before: len(served.dispatcher.queue) + served.dispatcher.running > before  # noqa: E731
        served.wait(lambda there=there: there() or futures[-1].done())
    return futures


def idle(served):
    return served.dispatcher.idle


def test_a_full_queue_gives_retry_after(busy):
    futures = ask(busy, 6, num_inference_steps=10)  # one runs, the worker holds two more, three wait
    refused = busy.generate("one too many")
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert busy.client.post("/v1/hands", json={"prompt": "a"}).status_code == 200  # hands do not wait in the queue
    assert [future.result().status_code for future in futures] == [200] * 6
    assert busy.generate("now there is room", n=3, num_inference_steps=2).status_code == 200
    never = busy.generate("never so many", n=4)  # the queue has three places: a retry would not help
    assert never.status_code == 400 and "at most 3" in never.json()["error"]["message"]


def test_a_timeout_gives_504_and_frees_the_slot(busy):
    slow_one = ask(busy, 1, num_inference_steps=100, timeout=0.4)[0]
    started = time.monotonic()
    answer = busy.generate("quick", num_inference_steps=2, seed=3)
    assert answer.status_code == 200 and time.monotonic() - started < 2.5
    late = slow_one.result()
    assert late.status_code == 504 and late.json()["error"]["code"] == "timeout"
    busy.wait(lambda: idle(busy))


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_do_not_change_the_other_pictures(toy_bundle, tmp_path, slow, monkeypatch, capfd, stream):
    from handiffuser.runtime.steptimes import StepTimes

    # Batches of one: sizes of batches differ in rounding.
    monkeypatch.setattr(StepTimes, "choose", lambda times, active, unguided=(): 1)
    with serving(toy_bundle, tmp_path / "hands", batch=4, places=20) as served:
        alone = served.generate("stays", seed=1, num_inference_steps=12).json()["data"][0]["b64_json"]
        slow(0.02)
        stays = ask(served, 1, num_inference_steps=12)[0]
        stays = ThreadPoolExecutor(1).submit(served.generate, "stays", seed=1, num_inference_steps=12)
        goes = []
        for n in range(6):
            client = socket.create_connection(served.url.removeprefix("http://").split(":"))
            body = b'{"prompt": "goes %d", "num_inference_steps": 90, "stream": %s, "partial_images": 2}' % (
                n,
                b"true" if stream else b"false",
            )
            head = b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            goes.append(client)
        served.wait(lambda: served.dispatcher.running + len(served.dispatcher.queue) >= 8)
        for client in goes:
            client.close()
        served.wait(lambda: served.dispatcher.running + len(served.dispatcher.queue) <= 2, 5)
        assert stays.result().json()["data"][0]["b64_json"] == alone
        served.wait(lambda: idle(served))
        assert '"error"' not in capfd.readouterr().err  # a client that leaves is not an error of the server


@pytest.fixture
def gate(monkeypatch):
    """Steps wait until this event is set."""
    from handiffuser.runtime.sampler import StepSampler

    gate, step = threading.Event(), StepSampler.step

    def after_the_gate(sampler):
        assert gate.wait(60)
        return step(sampler)

    monkeypatch.setattr(StepSampler, "step", after_the_gate)
    return gate


def test_a_fair_share(toy_bundle, tmp_path, gate):
    keys, order = tmp_path / "keys", []
    keys.write_text("many: secret-of-many\nfew: secret-of-few\n")
    with serving(toy_bundle, tmp_path / "hands", keys=keys, batch=1, places=60) as served:

        def post(owner, n):
            headers = {"authorization": f"Bearer secret-of-{owner}"}
            body = {"prompt": f"{owner} {n}", "num_inference_steps": 4}
            answer = httpx.post(f"{served.url}/v1/images/generations", json=body, headers=headers, timeout=60)
            order.append(owner)
            return answer.status_code

        with ThreadPoolExecutor(32) as pool:
            futures = [pool.submit(post, "many", n) for n in range(30)]
            served.wait(lambda: served.dispatcher.running + len(served.dispatcher.queue) == 30)
            futures.append(pool.submit(post, "few", 0))
            served.wait(lambda: served.dispatcher.running + len(served.dispatcher.queue) == 31)
            gate.set()
        assert [future.result() for future in futures] == [200] * 31
    assert order.index("few") < 10  # three are under way and one comes first; threads end in any order


def test_a_full_queue_still_takes_other_clients(toy_bundle, tmp_path, gate):
    """When a second client comes, the first one's newest requests get 429, and the second one's are served."""
    keys = tmp_path / "keys"
    keys.write_text("many: secret-of-many\nfew: secret-of-few\n")
    with serving(toy_bundle, tmp_path / "hands", keys=keys, batch=1, places=4) as served, ThreadPoolExecutor(9) as pool:

        def post(owner, number, **fields):
            headers = {"authorization": f"Bearer secret-of-{owner}"}
            body = {"prompt": f"{owner} {number}", "num_inference_steps": 4, **fields}
            return httpx.post(f"{served.url}/v1/images/generations", json=body, headers=headers, timeout=60)

        many = []
        for n in range(7):  # one runs, the worker holds two more, four wait
            many.append(pool.submit(post, "many", n, stream=n == 6))
            served.wait(lambda n=n: served.dispatcher.running + len(served.dispatcher.queue) == n + 1)
        assert post("many", 7).status_code == 429
        few = pool.submit(post, "few", 0, n=2)
        try:
            served.wait(lambda: many[5].done() and many[6].done())
        finally:
            gate.set()
        refused = many[5].result()
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) >= 1 and "with fewer pictures" in refused.json()["error"]["message"]
        assert '"code": "queue_full"' in many[6].result().text.split("event: error")[1]
        assert few.result().status_code == 200 and [one.result().status_code for one in many[:5]] == [200] * 5
        assert idle(served)


def test_after_the_grace_period_requests_get_503(busy):
    futures = ask(busy, 5, num_inference_steps=100)
    stream = ThreadPoolExecutor(1).submit(busy.generate, "s", num_inference_steps=100, stream=True)
    busy.wait(lambda: len(busy.dispatcher.queue) + busy.dispatcher.running == 6)
    draining = asyncio.run_coroutine_threadsafe(busy.dispatcher.drain(0.3), busy.dispatcher.loop)
    busy.wait(lambda: busy.dispatcher.draining)
    assert busy.client.get("/readyz").json()["status"] == "stopping" and busy.client.get("/healthz").status_code == 200
    early = busy.generate("too late")
    assert early.status_code == 503 and int(early.headers["retry-after"]) > 0
    assert draining.result(20) == 6
    for future in futures:
        assert future.result().status_code == 503 and "Send it again" in future.result().json()["error"]["message"]
    assert "Send it again" in stream.result().text.split("event: error")[1]


@pytest.mark.slow
def test_changes_of_the_clock_have_no_effect(busy, monkeypatch):
    """Deadlines, queue times, the measured rate and the age of pictures use a monotonic clock."""
    clock, ahead = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: clock() + ahead[0])
    kept = busy.generate("kept", num_inference_steps=2, response_format="url").json()
    futures = ask(busy, 3, num_inference_steps=20, timeout=30)
    ahead[0] = 1e7
    late = busy.generate("late", num_inference_steps=100, timeout=0.3)
    assert late.status_code == 504 and [future.result().status_code for future in futures] == [200] * 3
    after = busy.generate("after", num_inference_steps=2).json()
    assert (
        abs(after["created"] - kept["created"] - 1e7) < 60
    )  # this field has the wall clock's time, as in OpenAI's API
    futures = ask(busy, 6, num_inference_steps=3)
    ahead[0] = -1e7
    refused = busy.generate("one too many")
    assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
    assert [future.result().status_code for future in futures] == [200] * 6
    assert httpx.get(kept["data"][0]["url"]).status_code == 200
    assert 0 < busy.metric("steps_per_second") < 1000 and 0 <= busy.metric("queue_time_seconds_sum") < 60
    assert 0 <= busy.metric("request_latency_seconds_sum") < 120


def test_a_client_that_does_not_read_is_cut_off_but_a_slow_one_is_not(toy_bundle, tmp_path, monkeypatch):
    from handiffuser.serving import guard

    monkeypatch.setattr(guard, "READER_SECONDS", 0.4)
    with serving(toy_bundle, tmp_path / "hands", places=40, buffer=4096) as served:
        body = b'{"prompt": "a", "n": 8, "return_hands": true, "num_inference_steps": 1}'  # an answer of some 50 kB
        head = b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"

        def connect():
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", int(served.url.rpartition(":")[2])))
            client.settimeout(20)
            client.sendall(head + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            return client

        def read(client, pause=0.0):
            content = b""
            with client, contextlib.suppress(ConnectionError):
                while more := client.recv(2048):
                    content += more
                    time.sleep(pause)
            return content

        whole = len(read(connect()))
        assert whole > 40_000
        never, slowly = connect(), connect()
        assert len(read(slowly, 0.05)) > 0.9 * whole  # a little at a time, over a second in all
        served.wait(lambda: len(served.server.server_state.connections) == 0)  # the other connection is gone too
        assert len(read(never)) < 0.9 * whole
        assert served.generate().status_code == 200


def test_loading_gives_503_and_broken_engines_end_the_server(toy_copy_broken, toy_bundle, tmp_path):
    with serving(toy_bundle, tmp_path / "hands", wait=False) as served:
        answer = served.client.get("/readyz")
        if answer.status_code == 503:
            assert answer.json()["status"] == "loading"
            early = served.generate()
            assert early.status_code in (200, 503) and (early.status_code == 200 or early.headers["retry-after"])
    with command(toy_copy_broken, ready=False) as process:
        assert process.wait(60) == 1
    assert any("damaged" in line for line in process.said) and not any("Traceback" in line for line in process.said)


@pytest.fixture
def toy_copy_broken(toy_bundle, tmp_path):
    import shutil

    folder = shutil.copytree(toy_bundle, tmp_path / "broken")
    (folder / "unet.onnx").write_bytes(b"no graph")
    return folder


def test_a_late_stream_ends_with_an_error(busy):
    body = {"prompt": "a", "num_inference_steps": 100, "timeout": 0.5, "stream": True, "partial_images": 2}
    with busy.client.stream("POST", "/v1/images/generations", json=body) as answer:
        said = answer.read().decode()
    assert answer.status_code == 200 and said.count("event: ") == 2
    assert "event: image_generation.partial_image" in said and said.rstrip().endswith("}")
    assert '"code": "timeout"' in said.split("event: error")[1]
    busy.wait(lambda: idle(busy))


@pytest.mark.slow
def test_one_worker_serves_if_the_other_cannot_load(toy_bundle, toy_copy_broken, tmp_path):
    """The server says what is wrong with the other."""
    broken = Options(str(toy_copy_broken), "cpu", 1, 4, "auto", False)
    with serving(toy_bundle, tmp_path / "hands", workers=2, places=30, second=broken) as served:
        served.wait(lambda: any("damaged" in sentence for sentence in served.service.said), 60)
        answers = [served.generate(f"p {n}", num_inference_steps=2) for n in range(5)]
        assert [answer.status_code for answer in answers] == [200] * 5
        assert served.client.get("/readyz").status_code == 200 and served.metric("workers_ready") == 1
        assert all("Traceback" not in sentence for sentence in served.service.said)


@pytest.mark.slow
def test_two_hundred_connections_at_once(toy_bundle, tmp_path):
    with serving(toy_bundle, tmp_path / "hands", places=250) as served:
        limits = httpx.Limits(max_connections=200)
        with httpx.Client(base_url=served.url, timeout=60, limits=limits) as client, ThreadPoolExecutor(200) as pool:
            answers = list(
                pool.map(
                    lambda i: client.post("/v1/images/generations", json={"prompt": f"p {i}", "seed": i}), range(200)
                )
            )
        assert [answer.status_code for answer in answers] == [200] * 200
        assert len({answer.json()["data"][0]["id"] for answer in answers}) == 200
        pictures = {answer.json()["data"][0]["seed"]: answer.json()["data"][0]["b64_json"] for answer in answers}
        assert sorted(pictures) == list(range(200))


def test_late_headers_and_bodies_are_cut_off(toy_bundle, tmp_path, monkeypatch):
    from handiffuser.serving import guard

    monkeypatch.setattr(guard, "HEADER_SECONDS", 0.3)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
    with serving(toy_bundle, tmp_path / "hands") as served:
        host, port = served.url.removeprefix("http://").split(":")
        silent, slow_headers = (socket.create_connection((host, port)) for _ in range(2))
        slow_headers.sendall(b"GET /healthz HTTP/1.1\r\nHost: ")
        for client in (silent, slow_headers):
            client.settimeout(5)
            assert client.recv(100) == b""
        body = socket.create_connection((host, port))
        head = b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        body.sendall(head + b"Content-Length: 100\r\n\r\n{")
        body.settimeout(5)
        assert b" 408 " in body.recv(1000)
        assert served.generate().status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 2])
def test_sigterm_lets_requests_finish_and_a_second_one_does_not(toy_bundle, signals):
    count = 6
    with command(toy_bundle, "--batch-size", 1, "--max-steps", 1000, "--grace", 30, "--no-warm-up") as process:
        with ThreadPoolExecutor(60) as pool:
            post = lambda i: httpx.post(  # noqa: E731
                f"{process.url}/v1/images/generations",
                json={"prompt": f"p {i}", "num_inference_steps": 1000, "solver": "ddpm"},
                timeout=60,
            )
            futures = [pool.submit(post, i) for i in range(count)]
            end = time.monotonic() + 30
            while "num_running_reqs 0" in httpx.get(f"{process.url}/metrics").text and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            if signals == 1:
                stopping = httpx.get(f"{process.url}/readyz")
                assert stopping.status_code == 503 and stopping.json()["status"] == "stopping"
                assert httpx.post(f"{process.url}/v1/hands", json={"prompt": "a"}).status_code == 503
                assert httpx.get(f"{process.url}/healthz").status_code == 200
            else:
                process.send_signal(signal.SIGTERM)
            codes = []
            for future in futures:
                try:
                    codes.append(future.result().status_code)
                except httpx.HTTPError:
                    codes.append(0)
        assert process.wait(30) == (0 if signals == 1 else 1), process.said
    if signals == 1:
        assert codes.count(200) + codes.count(503) == count and codes.count(200) > 0
    else:
        assert 503 in codes or 0 in codes
    assert not any("Traceback" in line for line in process.said), process.said


@pytest.mark.slow
def test_sighup_reads_the_keys_again(toy_bundle, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first-secret\n")
    with command(toy_bundle, "--api-keys", keys, "--no-warm-up") as process:
        models = lambda key: httpx.get(f"{process.url}/v1/models", headers={"authorization": f"Bearer {key}"})  # noqa: E731
        assert models("first-secret").status_code == 200
        keys.write_text("second-secret\n")
        process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 10
        while models("second-secret").status_code != 200 and time.monotonic() < end:
            time.sleep(0.05)
        assert models("first-secret").status_code == 401 and models("second-secret").status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def test_a_taken_port_is_a_sentence(toy_bundle):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        line = [sys.executable, "-m", "handiffuser.serving.cli", str(toy_bundle), "--port", str(taken.getsockname()[1])]
        result = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "cannot listen on" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="limits of files")
def test_more_connections_than_open_files(toy_bundle):
    """The connections wait, and the log says so once, without tracebacks."""
    import resource

    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))  # noqa: E731
    with command(toy_bundle, "--no-warm-up", preexec_fn=limit) as process:
        address = ("127.0.0.1", int(process.url.rpartition(":")[2]))
        silent = [socket.create_connection(address) for _ in range(100)]
        end = time.monotonic() + 20
        while not any("open files" in line for line in process.said) and time.monotonic() < end:
            time.sleep(0.02)
        for one in silent:
            one.close()
        assert httpx.get(f"{process.url}/healthz", timeout=20).status_code == 200
        body = {"prompt": "a", "num_inference_steps": 2}
        assert httpx.post(f"{process.url}/v1/images/generations", json=body, timeout=20).status_code == 200
    assert sum("open files" in line for line in process.said) == 1 and len(process.said) < 20, process.said[:20]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_the_server_works_with_its_log_on_a_full_disk(toy_bundle):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "handiffuser.serving.cli", str(toy_bundle), "--no-warm-up", "--port", str(port)]
    with open("/dev/full", "w") as full, subprocess.Popen(line, stderr=full) as process:
        try:
            answer, end = None, time.monotonic() + 60
            while answer is None and process.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                        body = {"prompt": "a", "num_inference_steps": 2}
                        answer = httpx.post(f"http://127.0.0.1:{port}/v1/images/generations", json=body, timeout=60)
            assert answer is not None and answer.status_code == 200
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_nan_fails_one_request_only(toy_bundle, tmp_path, monkeypatch):
    from handiffuser.runtime.host import _Timed

    call, decoded = _Timed.__call__, []

    def spoilt(engine, feeds):
        results = dict(call(engine, feeds))
        if engine.name == "image_decoder" and threading.current_thread().name == "hd-serve-loop":
            decoded.append(1)
            if len(decoded) % 3 == 0:
                results["finite"] = results["finite"] * 0
        return results

    monkeypatch.setattr(_Timed, "__call__", spoilt)
    with serving(toy_bundle, tmp_path / "hands", places=30, limits=Limits()) as served:
        codes = [served.generate("a", seed=seed) for seed in range(12)]
        assert {answer.status_code for answer in codes} == {200, 500}
        assert all("NaN" in answer.json()["error"]["message"] for answer in codes if answer.status_code == 500)
        assert idle(served)


def ask_while_signalled(served, number: int, most: int, apart: int, count: int):
    """Sends `count` requests, and the signal to at most `most` workers. Returns the answers and the workers' pids.

    The busiest worker gets the signal after 20 pictures, and again after each `apart` more.
    """
    stop, signalled, done = threading.Event(), [], []

    def ask_one(i):
        answer = served.generate(f"p {i}", seed=i, num_inference_steps=60, solver="ddpm")
        done.append(i)
        return answer

    def send():
        while not stop.wait(0.005) and len(signalled) < most:
            busiest = max(served.dispatcher.workers, key=lambda worker: len(worker.tickets))
            if len(done) >= 20 + apart * len(signalled) and busiest.slots and busiest.pid not in signalled:
                os.kill(busiest.pid, number)
                signalled.append(busiest.pid)

    sender = threading.Thread(target=send)
    sender.start()
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask_one, range(count)))
    stop.set()
    sender.join()
    return answers, signalled


@pytest.mark.slow
def test_killed_workers_lose_nothing(toy_bundle, tmp_path):
    """Two processes behind one port, killed again and again during 300 requests: each request gets one answer, with the
    picture that a single loop makes."""
    with serving(toy_bundle, tmp_path / "hands", workers=2, batch=2, places=400) as served:
        served.wait(lambda: all(worker.slots for worker in served.dispatcher.workers), 60)
        answers, killed = ask_while_signalled(served, signal.SIGKILL, most=4, apart=70, count=300)
        assert len(killed) >= 3 and len(set(killed)) == len(killed)
        assert [answer.status_code for answer in answers] == [200] * 300, answers[0].text[:200]
        data = [answer.json()["data"][0] for answer in answers]
        assert [entry["seed"] for entry in data] == list(range(300)) and len({entry["id"] for entry in data}) == 300
        assert served.metric("worker_restarts_total") >= len(killed)
    same_as_alone(toy_bundle, data, range(0, 300, 10))


def same_as_alone(folder, data, numbers):
    """Asserts that entries of `data` have the pictures that a single loop makes."""
    import base64
    import io

    from handiffuser import HanDiffuser, Request
    from PIL import Image

    pipeline = HanDiffuser.load(folder, device="cpu", threads=1)
    requests = [Request(f"p {i}", seed=i, steps=60, solver="ddpm") for i in numbers]
    for picture, i in zip(pipeline.generate(requests), numbers, strict=True):
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(data[i]["b64_json"]))))
        assert np.abs(image.astype(int) - picture.image).max() <= 1


@pytest.fixture
def watched(monkeypatch):
    """A dispatcher with two fake workers: the first is ready and has a request.

    look(seconds, times): the dispatcher looks at its workers so many times, so many seconds apart. Returns the number
    of workers that it has killed so far.
    """
    from types import SimpleNamespace

    from handiffuser import Request
    from handiffuser.serving import dispatch

    killed, said = [], []
    dispatcher = dispatch.Dispatcher([Options("nowhere")] * 2, True, say=said.append)
    dispatcher.loop, dispatcher.said = SimpleNamespace(call_later=lambda *_: None), said
    for worker in dispatcher.workers:
        worker.process = SimpleNamespace(kill=lambda number=worker.number: killed.append(number))
        worker.outbox = SimpleNamespace(put=lambda message: None)

    def look(seconds, times=1):
        for _ in range(times):
            dispatcher._look(time.monotonic() - seconds)
        return len(killed)

    worker = dispatcher.workers[0]
    dispatcher._take(worker, worker.round, READY)
    (ticket,) = dispatcher.submit("a", [Request("a fist", id="one", seed=0, steps=4)])
    return dispatcher, worker, look, ticket


READY = Ready(slots=4, pid=1, rate=10.0, slowest=0.5)


def test_a_silent_worker_hangs(watched):
    dispatcher, worker, look, ticket = watched
    assert worker.tickets and look(1, 59) == 0
    assert (
        look(1, 2) == 1 and not worker.tickets and worker.slots == 0 and len(dispatcher.queue) == 1 and not ticket.done
    )
    assert "has not reported a step for 6" in dispatcher.said[0] and "go to another" in dispatcher.said[1]
    # The dispatcher drops the last messages of the killed worker, and the news of its end.
    round = worker.round - 1
    dispatcher._take(worker, round, PictureMade("one", np.zeros((8, 8, 3), np.uint8), {}))
    dispatcher._take(worker, round, None)
    assert worker.deaths == 1 and not ticket.done and ticket.tries == 1
    assert look(1, 1000) == 1  # it has no tickets now


def test_tickets_of_a_hanging_worker_go_to_another(watched):
    from handiffuser import Request

    dispatcher, worker, look, ticket = watched
    hands = dispatcher.submit_hands("a", Request("a fist", id="hands", seed=0, steps=1))
    other = dispatcher.workers[1]
    dispatcher._take(other, other.round, READY)
    assert set(worker.tickets) == {"one", "hands"} and look(1, 61) == 1
    assert set(other.tickets) == {"one", "hands"} and not hands.done and not ticket.done
    assert look(1, 61) == 2 and hands.done and not ticket.done  # no worker is left, and requests for hands do not wait


def test_a_slow_worker_does_not_hang(watched):
    dispatcher, worker, look, _ = watched
    steps = Measured({1: 1}, {}, {})
    assert look(1, 20) == 0
    dispatcher._take(worker, worker.round, steps)
    assert look(1, 198) == 0  # ten times the slowest step
    dispatcher._take(worker, worker.round, steps)
    assert look(1, 1970) == 0 and look(1, 20) == 1


def test_time_without_a_look_does_not_count(watched):
    """The machine was suspended, or this process stood still: the worker's messages are not read yet."""
    _, _, look, _ = watched
    assert look(1, 50) == 0 and look(86400, 4) == 0 and look(1, 10) == 1


def test_the_first_request_may_take_longer(watched):
    dispatcher, worker, look, _ = watched
    worker.proven, worker.slowest = False, 0.0  # as without warm-up: the first request prepares the engines
    dispatcher._take(worker, worker.round, Measured({1: 1}, {}, {}))
    assert look(1, 599) == 0 and look(1, 2) == 1
    worker.start = lambda: None
    assert look(1, 5000) == 1  # it has no tickets while it loads again


HANGING = """
import sys, time
from handiffuser.runtime.host import HostLoop
stage_1 = HostLoop._stage_1
def hang(loop, requests, sampler):
    if any(request.prompt == "hang" for request in requests):
        time.sleep(1000)
    return stage_1(loop, requests, sampler)
HostLoop._stage_1 = hang
from handiffuser.serving.cli import main
main()
"""


@pytest.mark.slow
def test_a_hanging_loop_in_the_servers_process_ends_the_server(toy_bundle):
    """A thread cannot be killed, so the server ends with a sentence, for its supervisor to start it again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    line = [sys.executable, "-c", HANGING, str(toy_bundle), "--port", url.rpartition(":")[2], "--stuck-after", "1"]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        try:
            end = time.monotonic() + 60
            while time.monotonic() < end:
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"{url}/readyz").status_code == 200:
                        break
                time.sleep(0.05)
            answer = httpx.post(f"{url}/v1/images/generations", json={"prompt": "hang"}, timeout=60)
            assert answer.status_code == 503 and "hangs" in answer.json()["error"]["message"]
            assert process.wait(30) == 1
        finally:
            process.kill()
        said = process.stderr.read()
    assert "has not reported a step" in said and "start the server again" in said and "Traceback" not in said


@pytest.mark.slow
def test_hanging_workers_lose_nothing(toy_bundle, tmp_path, monkeypatch):
    """SIGSTOP stops two workers one after the other; a stopped process does not end by itself."""
    from handiffuser.serving import dispatch

    monkeypatch.setattr(dispatch, "LOOK_SECONDS", 0.1)
    with serving(
        toy_bundle, tmp_path / "hands", workers=2, batch=2, places=400, warm_up=True, stuck_after=1.0
    ) as served:
        served.wait(lambda: all(worker.slots for worker in served.dispatcher.workers), 60)
        answers, stopped = ask_while_signalled(served, signal.SIGSTOP, most=2, apart=60, count=150)
        said = " ".join(served.service.said)
        assert len(stopped) == 2 and said.count("has not reported a step") >= 2
        assert [answer.status_code for answer in answers] == [200] * 150, answers[0].text[:200]
        data = [answer.json()["data"][0] for answer in answers]
        assert [entry["seed"] for entry in data] == list(range(150)) and len({entry["id"] for entry in data}) == 150
        assert served.metric("worker_restarts_total") >= 2 and served.metric("pictures_total") == 150
        served.wait(lambda: not any(os.path.exists(f"/proc/{pid}/cmdline") and alive(pid) for pid in stopped))
    same_as_alone(toy_bundle, data, range(0, 150, 15))


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
