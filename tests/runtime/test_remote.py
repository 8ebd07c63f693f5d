"""An output folder under a URL: what is there is skipped, a second run is refused, what breaks is a sentence."""

from __future__ import annotations

import json
import time

import pytest

fsspec = pytest.importorskip("fsspec")

from commands import run_command  # noqa: E402
from handiffuser import HanDiffuser, Request, RequestError  # noqa: E402
from handiffuser.runtime.outputs import OutputError  # noqa: E402
from handiffuser.runtime.remote import LOCK, STALE, open_folder  # noqa: E402


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


def test_a_second_run_is_refused_and_a_dead_one_s_place_is_taken(url):
    with open_folder(url), pytest.raises(OutputError, match="Another hd-run is writing"), open_folder(url):
        pass
    files = fsspec.filesystem("memory")
    files.pipe_file(f"/bucket/run/{LOCK}", json.dumps({"time": time.time() - 2 * STALE, "by": "dead"}).encode())
    with open_folder(url), open_folder(url, shared=True):
        pass


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
        result = run_command("runtime.cli", toy_bundle, "a fist", "-o", url)
        assert result.returncode == 0 and said in result.stderr, result.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


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
