"""What every request passes before it reaches the application, and what every answer passes on its way out.

Bearer keys, limits on the body's size and on how long its sender may take, on how long a reader may take, an id, one
line in the log, and the metrics. `Protocol` is the limit that only the server itself can keep: on the headers' time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from .keys import Keys
from .metrics import Metrics
from .problems import problem

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

PATIENCE = 16  # times the largest body that are read before a connection is cut
HEADER_SECONDS, BODY_SECONDS, READER_SECONDS = 10.0, 30.0, 60.0
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
    """ASGI middleware. Paths below /v1/ need a key where there are any; `posts` are those that take a body of JSON."""

    def __init__(
        self,
        app: Any,
        keys: Keys,
        metrics: Metrics,
        max_body: int,
        posts: frozenset[str] = frozenset(),
        log: Any = sys.stderr,
    ) -> None:
        self.app, self.keys, self.metrics, self.max_body, self.log = app, keys, metrics, max_body, log
        self.posts = posts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        started = time.monotonic()
        entry: dict[str, Any] = {"id": f"req_{secrets.token_hex(12)}", "status": 0}
        scope["handiffuser"] = entry
        headers = dict(scope["headers"])
        client = (scope.get("client") or ("", 0))[0]
        entry["owner"] = owner = client
        got, late = 0, started + BODY_SECONDS
        ended = False

        async def receive_some() -> MutableMapping[str, Any]:
            nonlocal got, ended
            if ended:  # from here on it is only said that the client has gone
                return await receive()
            while True:
                try:
                    message = await asyncio.wait_for(receive(), max(0.0, late - time.monotonic()))
                except asyncio.TimeoutError:
                    raise HTTPException(408, "The body took too long to come.", {"connection": "close"}) from None
                got += len(message.get("body", b""))
                ended = not message.get("more_body", False)
                if got <= self.max_body:
                    return message
                # Who is still sending does not read the answer: a little more is taken, and thrown away.
                if ended or got > PATIENCE * self.max_body:
                    raise HTTPException(413, too_large, {"connection": "close"})

        async def send_some(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                entry["status"] = message["status"]
                # Pages of other origins may show a picture whose URL they were given. Its name is a secret.
                whose = b"cross-origin" if scope["path"].startswith("/v1/files/") else b"same-origin"
                own = [(b"x-request-id", entry["id"].encode()), (b"cross-origin-resource-policy", whose)]
                message["headers"] = [*message["headers"], *own, *SECURITY]
            await asyncio.wait_for(send(message), READER_SECONDS)

        too_large = f"The body is larger than {self.max_body >> 10} kB, which no request needs to be."
        try:
            if scope["path"].startswith("/v1/") and self.keys.path is not None and scope["method"] != "OPTIONS":
                kind, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
                name = self.keys.who(key.strip()) if kind.lower() == "bearer" else None
                if name is None and not scope["path"].startswith("/v1/files/"):  # whose names are secrets
                    sentence = "The API key is missing or wrong. Send it as the header Authorization: Bearer KEY."
                    await problem(401, sentence, code="invalid_api_key", www_authenticate="Bearer")(
                        scope, receive, send_some
                    )
                    return
                entry["owner"] = owner = name or client
            if scope["method"] == "POST":
                length = headers.get(b"content-length", b"0")
                if length.isdigit() and int(length[:20]) > PATIENCE * self.max_body:
                    await problem(413, too_large, code="too_large", connection="close")(scope, receive, send_some)
                    return
                if scope["path"] in self.posts and (wrong := _foreign(headers)):
                    await problem(415, wrong, code="unsupported_media_type")(scope, receive, send_some)
                    return
            await self.app(scope, receive_some, send_some)
        except asyncio.TimeoutError:  # uvicorn closes a connection whose answer is not complete
            entry["note"] = "the reader was too slow"
        except Exception as error:
            entry["error"] = "".join(traceback.format_exception(error))[-4000:]
            if not entry["status"]:
                await problem(500, "The server made an error. Its log says which.")(scope, receive, send_some)
        finally:
            seconds = time.monotonic() - started
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, str(entry["status"])).inc()
            if path.startswith("/v1/"):
                self.metrics.latency.labels(path).observe(seconds)
            if path not in ("/healthz", "/readyz", "/metrics") or entry["status"] >= 500:
                said = scope["path"][:200] if path == "other" else path
                self._say({"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **entry, "owner": owner,
                           "method": scope["method"], "path": said, "seconds": round(seconds, 4)})  # fmt: skip

    def _say(self, entry: dict[str, Any]) -> None:
        with contextlib.suppress(OSError, ValueError):  # a log that is full or gone is no reason not to answer
            print(json.dumps(entry, ensure_ascii=True), file=self.log, flush=True)


def _foreign(headers: dict[bytes, bytes]) -> str | None:
    """What is wrong with the form of a body; it also stops other sites' forms, which browsers send without asking."""
    if headers.get(b"content-type", b"").lower().partition(b";")[0].strip() != b"application/json":
        return "The body must be JSON, with the header Content-Type: application/json."
    coding = headers.get(b"content-encoding", b"identity").lower().strip()
    if coding != b"identity":
        return f"The body must not be compressed, got Content-Encoding: {coding.decode('latin-1')[:20]}."
    return None


class Protocol(H11Protocol):
    """uvicorn's own, and whoever does not finish headers in time, or reads nothing of an answer, is cut off.

    A connection that is closed while its client does not read stays, with all that is still to be sent, until it does.
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
        """From now on, looks whether what is still to be sent becomes less."""
        if self._reading is not None:
            self._reading.cancel()
        left = self.transport.get_write_buffer_size()
        self._reading = self.loop.call_later(READER_SECONDS, self._look, left) if left else None

    def _look(self, before: int) -> None:
        if 0 < before <= self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self._follow()
