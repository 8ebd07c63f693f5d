"""Ids of the Hub, against a server that speaks its API: what is fetched, what is not, and what is said."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
from handiffuser import HanDiffuser, HubError, hub, shipped
from handiffuser.errors import CheckpointError
from handiffuser.models.foreign import check_stable_diffusion
from hub_server import GOOD_TOKEN, hub_in_place
from huggingface_hub import constants

WEIGHTS = {
    "text_encoder": "text_encoder/model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}
KINDS = {"text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}


@pytest.fixture
def server(tmp_path, monkeypatch):
    with hub_in_place(monkeypatch, tmp_path / "cache") as server:
        yield server


def stable_diffusion(server, id="org/sd", **options):
    """A repository with the names of Stable Diffusion's files, and all that lies beside them on the Hub."""
    repo = server.add(id, **options)
    index = {"_class_name": "StableDiffusionPipeline"}
    for part, kind in KINDS.items():
        index[part] = ["transformers" if part == "text_encoder" else "diffusers", kind]
        repo.files[f"{part}/config.json"] = json.dumps({"_class_name": kind, "in_channels": 4}).encode()
        repo.files[WEIGHTS[part]] = part.encode() * 5000
        repo.files[WEIGHTS[part].replace(".safetensors", ".fp16.safetensors")] = part.encode() * 2500
        repo.files[WEIGHTS[part].replace(".safetensors", ".bin")] = b"pickle"
    for name in ("tokenizer/vocab.json", "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"):
        repo.files[name] = b"{}"
    repo.files["tokenizer/merges.txt"] = b"#version: 0.2\n"
    for name in ("README.md", "v1-5-pruned.safetensors", "v1-5.ckpt", "safety_checker/model.safetensors", "x.py"):
        repo.files[name] = b"x" * 9000
    repo.files["model_index.json"] = json.dumps(index).encode()
    return repo


def again(*arguments, **options):
    """`fetch` as the next command would call it."""
    hub._fetch.cache_clear()
    return hub.fetch(*arguments, **options)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("org/name", ("org/name", None)),
        ("org/name@v1.0", ("org/name", "v1.0")),
        ("hf://org/name", ("org/name", None)),
        ("hf://org/name@refs/pr/3", ("org/name", "refs/pr/3")),
        ("here/name", None),  # a folder `here` exists: a misspelt path
        ("hf://here/name", ("here/name", None)),
        ("here/there", None),
        *(
            (name, None)
            for name in ("demo2", "./demo2", "../demo2", "/a/b", "a/b/c", "a/", "org/model.safetensors", "")
        ),
    ],
)
def test_what_is_an_id(name, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here/there").mkdir(parents=True)
    assert hub.parse(name) == wanted
    assert hub.parse(tmp_path / "org/name") is None


@pytest.mark.parametrize(
    "name", ["hf://name", "hf://a/b/c", "hf://org/../x", "hf://", "hf://org/name@", "hf://o/n@a b"]
)
def test_a_bad_id(name):
    with pytest.raises(HubError, match=r"must be hf://ORGANISATION/NAME"):
        hub.parse(name)


def test_a_bundle_paints_and_comes_once(server, capsys):
    server.add("org/demo", shipped.bundle_path())
    server.repos["org/demo"].files |= {"README.md": b"x", "plans/unet.plan": b"x", "model.pkl": b"x"}
    with HanDiffuser.load("org/demo", device="cpu", threads=1) as ours:
        picture = ours.generate("a fist", seed=3, steps=2)[0]
    with HanDiffuser.load("demo", device="cpu", threads=1) as theirs:
        assert (theirs.generate("a fist", seed=3, steps=2)[0].image == picture.image).all()
    manifest = json.loads((shipped.bundle_path() / "manifest.json").read_text())
    small = ["manifest.json", "tokenizer.json", "weights.json"]  # large ones come from the CDN
    assert sorted(server.fetched()) == small
    large = [path for method, path, _ in server.log if method == "GET" and path.startswith("/cdn/")]
    assert len(large) == len(manifest["files"]) - 2
    said = capsys.readouterr().err
    assert f"Fetching {len(manifest['files'])} files of org/demo (" in said and len(said.splitlines()) == 1
    server.log.clear()
    folder = again("org/demo", "bundle")
    assert not [line for line in server.log if line[0] == "GET" and "/api/" not in line[1]]
    # OpenVINO and onnx refuse weights behind a link, and files with two names.
    assert not [path for path in folder.iterdir() if path.is_symlink() or path.stat().st_nlink > 1]
    assert not list(folder.glob(".*")) and not list(folder.parent.parent.glob("blobs/*"))


@pytest.mark.slow
def test_revisions_of_a_bundle_share_no_file(server):
    repo = server.add("org/demo", shipped.bundle_path())
    first = repo.sha
    one = hub.fetch("org/demo", "bundle")
    repo.files["README.md"] = b"new"
    two = again("org/demo", "bundle")
    assert one.name == first and two.name == repo.sha and one != two
    for name in json.loads((two / "manifest.json").read_text())["files"]:
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_stable_diffusion_is_fetched_without_what_lies_beside(server):
    stable_diffusion(server)
    folder = hub.fetch("org/sd", "stable-diffusion", check=check_stable_diffusion)
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    small = {name for name in server.repos["org/sd"].files if name.endswith((".json", ".txt"))}
    assert there == small | set(WEIGHTS.values())


def test_variants(server):
    repo = stable_diffusion(server)
    half = {name.replace(".safetensors", ".fp16.safetensors") for name in WEIGHTS.values()}
    folder = hub.fetch("org/sd", "stable-diffusion", "fp16")
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")} == half
    for name in WEIGHTS.values():
        del repo.files[name]
    folder = again("org/sd", "stable-diffusion")
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")} == half
    with pytest.raises(HubError, match=r"text_encoder of org/sd must have bf16 weights for --variant, got "):
        again("org/sd", "stable-diffusion", "bf16")


def test_shards(server):
    repo = stable_diffusion(server)
    del repo.files[WEIGHTS["unet"]]
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    shards = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    repo.files[index] = json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}).encode()
    repo.files |= {f"unet/{name}": name.encode() * 99 for name in shards}
    folder = hub.fetch("org/sd", "stable-diffusion")
    assert all((folder / "unet" / name).is_file() for name in shards)
    del repo.files[f"unet/{shards[1]}"]
    with pytest.raises(HubError, match=r"must have unet/diffusion_pytorch_model-00002-of-00002.safetensors, which"):
        again("org/sd", "stable-diffusion")
    repo.files[index] = json.dumps({"weight_map": {"a": "../../x.safetensors"}}).encode()
    with pytest.raises(HubError, match=r"must have unet/../../x.safetensors, which"):
        again("org/sd", "stable-diffusion")


def test_pickles_never_travel(server):
    repo = stable_diffusion(server)
    for name in [name for name in repo.files if name.endswith(".safetensors")]:
        del repo.files[name]
    with pytest.raises(HubError, match=r"must have safetensors weights, got pickles .*can run code when opened"):
        hub.fetch("org/sd", "stable-diffusion")
    assert not [path for _, path, _ in server.log if path.endswith(".bin")]


def test_the_wrong_kind_is_refused_before_weights_travel(server):
    repo = stable_diffusion(server, "org/xl")
    index = json.loads(repo.files["model_index.json"]) | {"text_encoder_2": ["transformers", "CLIPTextModel"]}
    repo.files["model_index.json"] = json.dumps(index).encode()
    with pytest.raises(CheckpointError, match=r"^hf://org/xl holds a StableDiffusionPipeline \(SDXL\)"):
        hub.fetch("org/xl", "stable-diffusion", check=check_stable_diffusion)
    assert not [path for _, path, _ in server.log if path.endswith(".safetensors")]
    server.add("org/demo", shipped.bundle_path())
    server.add("org/single").files["model.safetensors"] = b"x"
    stable_diffusion(server)
    for id, kind, said in (
        ("org/demo", "checkpoint", "got an exported bundle. Paint with it: hd-run hf://org/demo"),
        ("org/sd", "bundle", "hd-train init hf://org/sd start"),
        ("org/sd", "checkpoint", "got a StableDiffusionPipeline"),
        ("org/single", "stable-diffusion", "got single files. Fetch one and give its path: hf download org/single"),
        ("org/single", "bundle", "must have a manifest.json"),
    ):
        with pytest.raises(HubError, match=said):
            again(id, kind)


@pytest.mark.slow
def test_a_checkpoint_with_its_body(server):
    server.add("org/checkpoint", shipped.checkpoint_path())
    folder = hub.fetch("hf://org/checkpoint", "checkpoint")
    for path in shipped.checkpoint_path().rglob("*"):
        if path.is_file():
            assert (folder / path.relative_to(shipped.checkpoint_path())).read_bytes() == path.read_bytes()
    with pytest.raises(
        HubError, match=r"is a HanDiffuser checkpoint already. Export it: hd-export hf://org/checkpoint"
    ):
        hub.fetch("org/checkpoint", "stable-diffusion")


def test_a_connection_that_breaks_is_taken_up_where_it_broke(server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what came of a chunk of 10 MB is asked for again
    repo = stable_diffusion(server)
    repo.cut[WEIGHTS["unet"]] = 7000  # each connection brings 7000 of 20000 bytes
    folder = hub.fetch("org/sd", "stable-diffusion")
    assert (folder / WEIGHTS["unet"]).read_bytes() == repo.files[WEIGHTS["unet"]]
    ranges = [asked for method, path, asked in server.log if method == "GET" and path.endswith(WEIGHTS["unet"])]
    assert ranges == [None, "bytes=7000-", "bytes=14000-"]


def test_a_run_that_breaks_keeps_whole_files(server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    repo = stable_diffusion(server)
    repo.cut[WEIGHTS["vae"]] = 0
    with pytest.raises(HubError, match=r"vae/diffusion_pytorch_model.safetensors of org/sd did not arrive .*to go on"):
        hub.fetch("org/sd", "stable-diffusion")
    repo.cut.clear()
    server.log.clear()
    folder = again("org/sd", "stable-diffusion")
    assert (folder / WEIGHTS["vae"]).read_bytes() == repo.files[WEIGHTS["vae"]]
    fetched = [path for method, path, _ in server.log if method == "GET" and "/cdn/" in path]
    assert fetched == [f"/cdn/org/sd/{WEIGHTS['vae']}"]


def test_damaged_on_the_way(server):
    repo = stable_diffusion(server)
    repo.listed[WEIGHTS["unet"]] = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(HubError, match=r"unet/.* of org/sd arrived damaged: its SHA-256 differs .* removed"):
        hub.fetch("org/sd", "stable-diffusion")
    repo.listed.clear()
    folder = again("org/sd", "stable-diffusion")
    assert (folder / WEIGHTS["unet"]).read_bytes() == repo.files[WEIGHTS["unet"]]


def test_gated_missing_and_private(server, monkeypatch):
    stable_diffusion(server, gated=True)
    stable_diffusion(server, "org/private", private=True)
    for id, said in (
        (
            "org/sd",
            rf"org/sd is gated.*Accept them at {server.url}/org/sd, log in with `hf auth login` or set HF_TOKEN",
        ),
        ("org/none", f"org/none is neither a folder here nor a repository at {server.url}"),
        ("org/private", "If it is private, log in"),
    ):
        with pytest.raises(HubError, match=said):
            hub.fetch(id, "stable-diffusion")
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    assert hub.fetch("org/sd", "stable-diffusion").is_dir() and hub.fetch("org/private", "stable-diffusion").is_dir()
    with pytest.raises(HubError, match=r"The revision must be a branch, tag or commit of .*/org/sd, got v9"):
        hub.fetch("org/sd@v9", "stable-diffusion")


def test_without_a_connection(server, monkeypatch, capsys):
    repo = stable_diffusion(server)
    folder = hub.fetch("org/sd", "stable-diffusion")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.log.clear()
    assert again("org/sd", "stable-diffusion") == folder and not server.log
    assert again(f"org/sd@{repo.sha}", "stable-diffusion") == folder
    with pytest.raises(
        HubError, match=r"org/other is neither a folder here nor in the cache, and HF_HUB_OFFLINE is set"
    ):
        hub.fetch("org/other", "stable-diffusion")
    (folder / WEIGHTS["unet"]).unlink()
    with pytest.raises(HubError, match=r"The cache holds only a part of org/sd: it lacks the weights of unet"):
        again("org/sd", "stable-diffusion")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert again("org/sd", "stable-diffusion") == folder
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    capsys.readouterr()
    assert again("org/sd", "stable-diffusion") == folder
    assert "http://127.0.0.1:9 does not answer" in capsys.readouterr().err
    with pytest.raises(HubError, match=r"org/other is neither a folder here nor in the cache, and .* does not answer"):
        hub.fetch("org/other", "stable-diffusion")


def test_a_small_disk(server, small_disk, monkeypatch):
    repo = stable_diffusion(server)
    repo.files[WEIGHTS["unet"]] = b"x" * 3_000_000
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(small_disk / "hub"))
    with pytest.raises(HubError, match=r"must have 3.1 MB free for org/sd, got 2\.\d MB. .*set HF_HOME"):
        hub.fetch("org/sd", "stable-diffusion")
    room = shutil.disk_usage(small_disk)._replace(free=1 << 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    with pytest.raises(HubError, match=r"disk of .* is full, and unet/.*safetensors of org/sd has no room"):
        hub.fetch("org/sd", "stable-diffusion")
    assert not list(small_disk.rglob("*.incomplete"))


def test_a_token_stays_with_the_hub(server, monkeypatch):
    """Large files come from another host, which must not learn the token."""
    stable_diffusion(server, gated=True)
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    seen = []
    handler = server.server.RequestHandlerClass
    plain = handler.content
    monkeypatch.setattr(handler, "content", lambda self, *a: (seen.append((self.path, self.token)), plain(self, *a))[1])
    hub.fetch("org/sd", "stable-diffusion")
    assert {token for path, token in seen if path.startswith("/cdn/")} == {None}
    assert {token for path, token in seen if not path.startswith("/cdn/")} == {GOOD_TOKEN}


def test_links_become_files_and_other_revisions_keep_theirs(tmp_path):
    for name in ("blobs", "snapshots/a", "snapshots/b"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("one", "two"):
        (tmp_path / "blobs" / name).write_text(name)
    links = {"a/x": "one", "b/x": "one", "b/same-as-x": "one", "b/y": "two"}
    for path, blob in links.items():
        (tmp_path / "snapshots" / path).symlink_to(f"../../blobs/{blob}")
    hub._without_links(tmp_path / "snapshots/b", ["x", "same-as-x", "y"])
    for path, blob in links.items():
        path = tmp_path / "snapshots" / path
        assert path.read_text() == blob and path.is_symlink() == (path.parent.name == "a")
    assert [path.name for path in (tmp_path / "blobs").iterdir()] == ["one"]
