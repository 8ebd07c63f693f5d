"""A small server that speaks the Hub's API over HTTP, for huggingface_hub as it is: listing, files, redirects, ranges,
tokens, commits. Its repositories are dictionaries of bytes."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LFS = (".safetensors", ".onnx", ".data", ".bin", ".npz")
GOOD_TOKEN = "hf_good"


@dataclass
class Repo:
    files: dict[str, bytes]
    gated: bool = False
    cut: dict[str, int] = field(default_factory=dict)  # file -> bytes after which each connection is closed
    listed: dict[str, str] = field(default_factory=dict)  # file -> a SHA-256 that is stated in place of its own
    private: bool = False

    @property
    def sha(self) -> str:
        parts = (f"{name} {hashlib.sha256(content).hexdigest()}" for name, content in sorted(self.files.items()))
        return hashlib.sha1("\n".join(parts).encode()).hexdigest()

    def digest(self, name: str) -> str:
        return self.listed.get(name) or hashlib.sha256(self.files[name]).hexdigest()


class Hub:
    """repos: by id. log: (method, path, Range) of each request."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.log: list[tuple[str, str, str | None]] = []
        self.uploads: dict[str, bytes] = {}
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.cdn = f"http://localhost:{self.port}/cdn"  # another host, as the Hub's
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def add(self, id: str, folder: Path | None = None, **options) -> Repo:
        files = {}
        if folder is not None:
            files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        self.repos[id] = Repo(files, **options)
        return self.repos[id]

    def fetched(self) -> list[str]:
        """The files whose content was asked for, in order."""
        return [
            path.split("/resolve/")[-1].partition("/")[2]
            for method, path, _ in self.log
            if method == "GET" and "/resolve/" in path
        ]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server_hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None, cut: int = -1) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if 0 <= cut < len(content):
            self.wfile.write(content[:cut])
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(2)
            return
        self.wfile.write(content)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, b'{"error": "refused"}', {"X-Error-Code": code, "X-Error-Message": code})

    def json(self, value) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    @property
    def token(self) -> str | None:
        return (self.headers.get("authorization") or "").removeprefix("Bearer ") or None

    def find(self, id: str, revision: str) -> Repo | None:
        repo = self.server_hub.repos.get(id)
        if repo is None or (repo.private and self.token != GOOD_TOKEN):
            self.refuse(401 if self.token is None else 404, "RepoNotFound")
        elif repo.gated and self.token != GOOD_TOKEN:
            self.refuse(401 if self.token is None else 403, "GatedRepo")
        elif revision not in ("main", repo.sha):
            self.refuse(404, "RevisionNotFound")
        else:
            return repo
        return None

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server_hub.log.append((self.command, path, self.headers.get("Range")))
        if found := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            return self.content(self.server_hub.repos[found[1]], found[2])
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo = self.find(found[1], found[2])
            return None if repo is None else self.file(found[1], repo, found[3])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            repo = self.find(found[1], found[2])
            return None if repo is None else self.json([self.entry(repo, name) for name in repo.files])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            repo = self.find(found[1], found[2] or "main")
            return None if repo is None else self.json(self.listing(found[1], repo))
        return self.refuse(404, "EntryNotFound")

    def entry(self, repo: Repo, name: str) -> dict:
        size = len(repo.files[name])
        lfs = {"lfs": {"oid": repo.digest(name), "size": size, "pointerSize": 130}} if name.endswith(LFS) else {}
        return {"type": "file", "path": name, "size": size, "oid": hashlib.sha1(repo.files[name]).hexdigest(), **lfs}

    def listing(self, id: str, repo: Repo) -> dict:
        siblings = []
        for name, content in repo.files.items():
            lfs = {"sha256": repo.digest(name), "size": len(content), "pointerSize": 130}
            blob = hashlib.sha1(content).hexdigest()
            siblings.append(
                {"rfilename": name, "size": len(content), "blobId": blob} | ({"lfs": lfs} if name.endswith(LFS) else {})
            )
        return {
            "_id": "0",
            "id": id,
            "modelId": id,
            "sha": repo.sha,
            "siblings": siblings,
            "tags": [],
            "private": False,
        }

    def file(self, id: str, repo: Repo, name: str) -> None:
        if name not in repo.files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.sha})
        if name.endswith(LFS):
            headers = {
                "X-Repo-Commit": repo.sha,
                "X-Linked-Size": str(len(repo.files[name])),
                "X-Linked-Etag": f'"{repo.digest(name)}"',
                "Location": f"{self.server_hub.cdn}/{id}/{name}",
            }
            return self.answer(302, b"", headers)
        return self.content(repo, name)

    def content(self, repo: Repo, name: str) -> None:
        content = repo.files[name]
        headers = {
            "X-Repo-Commit": repo.sha,
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        begin = 0
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            begin = int(found[1])
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        self.answer(206 if begin else 200, content[begin:], headers, repo.cut.get(name, -1))

    def do_PUT(self) -> None:
        self.server_hub.log.append(("PUT", self.path, None))
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server_hub.uploads[self.path.rpartition("/")[2]] = content
        self.answer(200)

    def do_POST(self) -> None:
        path, hub = unquote(urlsplit(self.path).path), self.server_hub
        hub.log.append(("POST", path, None))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.token != GOOD_TOKEN:
            return self.refuse(401, "")
        if path == "/api/repos/create":
            asked = json.loads(body)
            id = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if id in hub.repos:
                return self.answer(409, json.dumps({"error": "It exists.", "url": f"{hub.url}/{id}"}).encode())
            hub.repos[id] = Repo({}, private=bool(asked.get("private")) or asked.get("visibility") == "private")
            return self.json({"url": f"{hub.url}/{id}", "name": id})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(LFS) else "regular",
                    "shouldIgnore": False,
                }
                for f in files
            ]
            return self.json({"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = {o["oid"]: {"upload": {"href": f"{hub.url}/upload/{o['oid']}"}} for o in objects}
            return self.json({"transfer": "basic", "objects": [{**o, "actions": upload[o["oid"]]} for o in objects]})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            repo = hub.repos[found[1]]
            for line in body.decode().splitlines():
                entry = json.loads(line)
                key, value = entry["key"], entry["value"]
                if key == "file":
                    repo.files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    repo.files[value["path"]] = hub.uploads[value["oid"]]
                elif key == "deletedFile":
                    repo.files.pop(value["path"], None)
            return self.json({"commitUrl": f"{hub.url}/{found[1]}/commit/{repo.sha}", "commitOid": repo.sha})
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        return self.refuse(404, "EntryNotFound")


@contextlib.contextmanager
def hub_in_place(patch, cache: Path):
    """A Hub for huggingface_hub in this process, with a cache of its own. patch: pytest's MonkeyPatch."""
    from handiffuser import hub as ours
    from huggingface_hub import constants

    hub = Hub()
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    patch.setattr(constants, "HF_URL_HOSTS", frozenset({"127.0.0.1"}), raising=False)
    patch.delenv("HF_TOKEN", raising=False)
    ours._fetch.cache_clear()
    try:
        yield hub
    finally:
        ours._fetch.cache_clear()
        hub.close()
