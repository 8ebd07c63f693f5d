"""The outermost layer: every request and every answer passes through it.

`Guard` checks the key, and limits the size of a body and the time of sending and reading it. It gives each request an
id, a line in the log and a place in the metrics. `Protocol` limits the time of the headers, which only the server can.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import secrets
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request as Http
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import RequestError
from .keys import Keys
from .metrics import Metrics
from .problems import problem

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

DISCARDED_BODIES = 16  # times the largest body: the guard reads so much of a body that is too large
HEADER_SECONDS, BODY_SECONDS = 10.0, 30.0  # for a client to send the headers and the body
UPLOAD_SECONDS = 120.0  # for a body with pictures: a telephone sends slowly
API = ("/v1/", "/sdapi/")
JSON, FORM = "application/json", "multipart/form-data"
READER_SECONDS = 60.0  # for a client to read a part of the answer
SECURITY = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
]


class Guard:
    """ASGI middleware. Paths of API need a key if the server has keys. posts: paths that take a body of JSON. uploads:
    path -> the media type of its body, which may be as large as max_upload, because it brings pictures."""

    def __init__(
        self,
        app: Any,
        keys: Keys,
        metrics: Metrics,
        max_body: int,
        posts: frozenset[str] = frozenset(),
        log: Any = sys.stderr,
        uploads: Mapping[str, str] | None = None,
        max_upload: int = 0,
    ) -> None:
        self.app, self.keys, self.metrics, self.max_body, self.log = app, keys, metrics, max_body, log
        self.posts, self.uploads, self.max_upload = posts, uploads or {}, max_upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        started = time.monotonic()
        entry: dict[str, Any] = {"id": f"req_{secrets.token_hex(12)}", "status": 0}
        scope["handiffuser"] = entry
        headers = dict(scope["headers"])
        entry["owner"] = (scope.get("client") or ("", 0))[0]
        upload = scope["path"] in self.uploads
        most, time_left = (self.max_upload, UPLOAD_SECONDS) if upload else (self.max_body, BODY_SECONDS)
        got, late = 0, started + time_left
        ended = False

        async def receive_some() -> MutableMapping[str, Any]:
            nonlocal got, ended
            if ended:  # the only message left says that the client has gone
                return await receive()
            while True:
                try:
                    message = await asyncio.wait_for(receive(), max(0.0, late - time.monotonic()))
                except asyncio.TimeoutError:
                    raise HTTPException(
                        408,
                        f"The body must arrive within {time_left:g} seconds. Send it again.",
                        {"connection": "close"},
                    ) from None
                got += len(message.get("body", b""))
                ended = not message.get("more_body", False)
                if got <= most:
                    return message
                # A client that is still sending does not read the answer: the guard reads on and discards.
                if ended or got > DISCARDED_BODIES * most:
                    raise HTTPException(413, too_large, {"connection": "close"})

        async def send_some(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                entry["status"] = message["status"]
                # The name of a picture is secret, so pages of other origins that know it may show it.
                policy = b"cross-origin" if scope["path"].startswith("/v1/files/") else b"same-origin"
                own = [(b"x-request-id", entry["id"].encode()), (b"cross-origin-resource-policy", policy)]
                message["headers"] = [*message["headers"], *own, *SECURITY]
            await asyncio.wait_for(send(message), READER_SECONDS)

        too_large = f"The body must have at most {most >> 10} kB."
        try:
            refusal = self._check_key(scope, headers, entry)
            if refusal is None and scope["method"] == "POST":
                length = headers.get(b"content-length", b"0")
                if length.isdigit() and int(length[:20]) > DISCARDED_BODIES * most:
                    refusal = problem(413, too_large, code="too_large", connection="close")
                elif scope["path"] in {*self.posts, *self.uploads} and (
                    wrong := _wrong_form(headers, self.uploads.get(scope["path"], JSON))
                ):
                    refusal = problem(415, wrong, code="unsupported_media_type")
            if refusal is not None:
                await refusal(scope, receive, send_some)
            else:
                await self.app(scope, receive_some, send_some)
        except asyncio.TimeoutError:  # uvicorn closes a connection whose answer is not complete
            entry["note"] = "the reader was too slow"
        except Exception as error:
            entry["error"] = "".join(traceback.format_exception(error))[-4000:]
            if not entry["status"]:
                await problem(500, "The server made an error. Its log has the details.")(scope, receive, send_some)
        finally:
            seconds = time.monotonic() - started
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, str(entry["status"])).inc()
            if path.startswith(API):
                self.metrics.latency.labels(path).observe(seconds)
            if path not in ("/healthz", "/readyz", "/metrics") or entry["status"] >= 500:
                said = scope["path"][:200] if path == "other" else path
                self._say({"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **entry,
                           "method": scope["method"], "path": said, "seconds": round(seconds, 4)})  # fmt: skip

    def _check_key(self, scope: Scope, headers: dict[bytes, bytes], entry: dict[str, Any]) -> JSONResponse | None:
        """A refusal, or None; notes the key's owner in the entry."""
        path = scope["path"]
        if not path.startswith(API) or self.keys.path is None or scope["method"] == "OPTIONS":
            return None
        owner = self.keys.owner(_key(headers.get(b"authorization", b"").decode("latin-1")))
        if owner is None and not path.startswith("/v1/files/"):  # the names of files are secret
            sentence = "The API key is missing or wrong. Send it as the header Authorization: Bearer KEY."
            return problem(401, sentence, code="invalid_api_key", www_authenticate="Bearer")
        entry["owner"] = owner or entry["owner"]
        return None

    def _say(self, entry: dict[str, Any]) -> None:
        with contextlib.suppress(OSError, ValueError):  # the server answers even when the disk of its log is full
            print(json.dumps(entry, ensure_ascii=True), file=self.log, flush=True)


def own_page(http: Http, cors: Collection[str]) -> None:
    """Raises RequestError for a POST that a browser sends for a page of another origin without asking first."""
    cross = http.headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
    if cross and not {"*", http.headers.get("origin")} & set(cors):
        raise RequestError("The page of this request must be this server's, or named by hd-serve --cors.", None)


def _key(header: str) -> str:
    """The key in `Authorization: Bearer KEY`, or the password of `Basic`, which clients of /sdapi/ send."""
    kind, _, value = header.partition(" ")
    if kind.lower() == "basic":
        with contextlib.suppress(ValueError):
            return base64.b64decode(value, validate=True).decode().rpartition(":")[2].strip()
    return value.strip() if kind.lower() == "bearer" else ""


def _wrong_form(headers: dict[bytes, bytes], kind: str) -> str | None:
    """A sentence if the body is not of its media type. For JSON, this also stops forms of other sites, which browsers
    send without asking; `own_page` stops them where a form is taken."""
    if headers.get(b"content-type", b"").lower().partition(b";")[0].strip() != kind.encode():
        name = "JSON" if kind == JSON else "a form"
        return f"The body must be {name}, with the header Content-Type: {kind}."
    coding = headers.get(b"content-encoding", b"identity").lower().strip()
    if coding != b"identity":
        return f"The body must not be compressed, got Content-Encoding: {coding.decode('latin-1')[:20]}."
    return None


class Protocol(H11Protocol):
    """uvicorn's protocol, which also cuts off clients that do not finish their headers or do not read their answer.

    Without this, a closed connection keeps the rest of its answer in memory until its client reads.
    """

    _timer: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._timer, self._reading):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._follow()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._follow()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect()
        self._follow()

    def _expect(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(HEADER_SECONDS, self._late)

    def _late(self) -> None:
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.transport.close()

    def _follow(self) -> None:
        """From now on, checks that the client reads: the bytes to be sent become fewer."""
        if self._reading is not None:
            self._reading.cancel()
        left = self.transport.get_write_buffer_size()
        self._reading = self.loop.call_later(READER_SECONDS, self._look, left) if left else None

    def _look(self, before: int) -> None:
        if 0 < before <= self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self._follow()
