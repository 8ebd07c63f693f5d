"""An output folder under a URL: what is there is skipped, a second run is refused, what breaks is a sentence."""

from __future__ import annotations

import json
import sys
import time

import pytest

fsspec = pytest.importorskip("fsspec")

from commands import invoke, run_command  # noqa: E402
from handiffuser import HanDiffuser, Request, RequestError  # noqa: E402
from handiffuser.errors import OutputError  # noqa: E402
from handiffuser.runtime import remote  # noqa: E402
from handiffuser.runtime.remote import LOCK, open_folder  # noqa: E402


@pytest.fixture
def pictures(toy_bundle):
    pipeline = HanDiffuser.load(toy_bundle, device="cpu", threads=1)
    requests, _ = pipeline.prepare([Request(f"prompt {n}", seed=n) for n in range(3)])
    return pipeline, requests, list(pipeline.run(requests))


@pytest.fixture
def url():
    fsspec.filesystem("memory").store.clear()
    return "memory://bucket/run"


def test_a_ledger_in_a_store(pictures, url):
    pipeline, requests, made = pictures
    with open_folder(url) as folder:
        assert not any(folder.done(request, pipeline.digest) for request in requests)
        for picture in made[:2]:
            folder.save(picture)
        folder.flush()
        assert folder.write_index() == f"{url}/index.html"
    files = fsspec.filesystem("memory")
    names = {path.rpartition("/")[2] for path in files.find("/bucket/run")}
    assert len(names) == 2 * 4 + 1 and LOCK not in names
    with open_folder(url) as folder:
        there = {made[0].id, made[1].id}
        assert {str(r.id) for r in requests if folder.done(r, pipeline.digest)} == there
        with pytest.raises(RequestError, match="another picture with the id"):
            folder.done(requests[[str(r.id) for r in requests].index(made[0].id)], "another bundle")
    files.rm_file(f"/bucket/run/{made[0].id}.hands.npz")  # half a picture is none
    with open_folder(url) as folder:
        assert sum(folder.done(request, pipeline.digest) for request in requests) == 1


@pytest.fixture
def quick(monkeypatch):
    """Signs of life come every 50 ms. quick(seconds): without one for so long a writer is dead."""
    monkeypatch.setattr(remote, "RENEWED", 0.05)
    monkeypatch.setattr(remote, "STALE", 20.0)
    return lambda seconds: monkeypatch.setattr(remote, "STALE", seconds)


JUMPS = [0.0, 86400.0 * 365, -86400.0 * 365]


@pytest.mark.parametrize("jump", JUMPS)
def test_a_living_writer_is_found_by_any_clock(url, quick, monkeypatch, jump):
    clock, said = time.time, []
    with open_folder(url):
        monkeypatch.setattr(time, "time", lambda: clock() + jump)
        with pytest.raises(OutputError, match="Another hd-run is writing"), open_folder(url, say=said.append):
            pass
        with open_folder(url, shared=True):  # an actor of its own
            pass
    assert len(said) == 1 and "Waiting up to" in said[0]
    with open_folder(url, say=said.append):  # who ended leaves nothing to wait for
        assert len(said) == 1


@pytest.mark.parametrize("jump", JUMPS)
def test_a_dead_writer_s_place_is_taken_by_any_clock(url, quick, monkeypatch, jump):
    quick(0.6)
    files = fsspec.filesystem("memory")
    files.pipe_file(f"/bucket/run/{LOCK}", json.dumps({"by": "dead", "beat": 7, "time": time.time() + jump}).encode())
    started = time.monotonic()
    with open_folder(url):
        assert 0.6 <= time.monotonic() - started < 5
        assert b"dead" not in files.cat_file(f"/bucket/run/{LOCK}")
    assert not files.exists(f"/bucket/run/{LOCK}")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"null"])
def test_a_lock_that_says_nothing_is_a_dead_one_s_too(url, quick, content):
    quick(0.2)
    fsspec.filesystem("memory").pipe_file(f"/bucket/run/{LOCK}", content)
    with open_folder(url):
        pass


def test_who_slept_too_long_sees_that_another_has_its_place(pictures, url, quick):
    """As after a laptop's lid: this one's signs of life stopped, another one began."""
    files, other = fsspec.filesystem("memory"), b'{"by": "another", "beat": 1}'
    with pytest.raises(OutputError, match=r"\(another\) has taken over"), open_folder(url) as folder:
        folder.save(pictures[2][0])
        folder.flush()
        files.pipe_file(f"/bucket/run/{LOCK}", other)
        end = time.monotonic() + 10
        while time.monotonic() < end:
            folder.flush()
            time.sleep(0.01)
    assert files.cat_file(f"/bucket/run/{LOCK}") == other  # whose it is now
    assert files.exists(f"/bucket/run/{pictures[2][0].id}.json")


def test_of_two_that_begin_at_once_one_goes_on(url, quick):
    """Both found no lock; the later one's stays."""
    first, second = open_folder(url), open_folder(url)
    with first:
        second._look_for_life = lambda: None
        with second:
            end = time.monotonic() + 10
            while not first._lost and time.monotonic() < end:
                time.sleep(0.01)
            assert first._lost and not second._lost
            second.flush()


def test_a_store_that_cannot_say_is_asked_again_not_painted_over(pictures, url, monkeypatch):
    pipeline, requests, made = pictures
    with open_folder(url) as folder:
        folder.save(made[0])
        folder.flush()
    with open_folder(url) as folder:

        def broken(*_, **__):
            raise RuntimeError("the store is away")  # stores' own errors are of any kind

        monkeypatch.setattr(type(folder.files), "cat_file", broken)
        request = next(request for request in requests if request.id == made[0].id)
        with pytest.raises(OutputError, match=r"^memory://bucket/run cannot be used: the store is away"):
            folder.done(request, pipeline.digest)
        monkeypatch.undo()


def test_what_cannot_be_written_is_a_sentence(pictures, url, monkeypatch):
    _, _, made = pictures
    files = fsspec.filesystem("memory")

    def full(*_, **__):
        raise OSError("no space")

    with pytest.raises(OutputError, match="no space"), open_folder(url) as folder:
        monkeypatch.setattr(type(files), "pipe_file", full)
        folder.save(made[0])
        folder.flush()
    with pytest.raises(OutputError, match=r"cannot be written|not installed"):
        open_folder("nonsense://bucket/run")


def test_hd_run_writes_to_a_url(toy_bundle, tmp_path):
    url = f"file://{tmp_path}/out"
    for said in ("1 picture in", "1 skipped"):
        result = invoke("runtime.cli", toy_bundle, "a fist", "-o", url)
        assert result.returncode == 0 and said in result.stderr, result.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_a_store_that_is_not_reached_is_a_sentence(toy_bundle, tmp_path, monkeypatch):
    """No server listens at that port; and the usual mistake: no key."""
    pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    empty = tmp_path / "none"
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(empty))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    result = run_command("runtime.cli", toy_bundle, "a fist", "-o", "s3://bucket/run")
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "s3://bucket/run cannot be used: Unable to locate credentials" in result.stderr
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    result = run_command("runtime.cli", toy_bundle, "a fist", "-o", "s3://bucket/run")
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "s3://bucket/run cannot be used: " in result.stderr


@pytest.mark.slow
def test_s3_alone_and_with_ray(toy_bundle, tmp_path, monkeypatch):
    """Against a stand-in on this machine: what hd-run has made, hd-run --ray skips."""
    pytest.importorskip("s3fs")
    pytest.importorskip("ray")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        }.items():
            monkeypatch.setenv(name, value)
        import s3fs

        files = s3fs.S3FileSystem(endpoint_url=f"http://127.0.0.1:{port}")
        files.mkdir("bucket")
        result = run_command("runtime.cli", toy_bundle, "a fist", "-o", "s3://bucket/run")
        assert result.returncode == 0 and "1 picture in" in result.stderr, result.stderr
        result = run_command("runtime.cli", toy_bundle, "a fist", "b", "c", "-o", "s3://bucket/run", "--ray")
        assert result.returncode == 0, result.stderr
        assert "2 pictures in" in result.stderr and "1 skipped" in result.stderr
        files.invalidate_cache()
        names = [path.rpartition("/")[2] for path in files.find("bucket/run")]
        assert sum(name.endswith(".json") for name in names) == 3 and len(names) == 3 * 4 + 1
        assert files.cat_file("bucket/run/index.html").count(b"<figure>") == 3
        assert host
    finally:
        server.stop()


def test_a_missing_s3fs_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(OutputError, match=r"^s3:// needs s3fs \(handiffuser\[s3\]\), which is not installed"):
        open_folder("s3://bucket/run")
