"""The server behind a proxy that adds a path, ends TLS or changes the host: which URLs its clients see.

The server believes the headers of trusted peers only: 127.0.0.1, or the addresses in FORWARDED_ALLOW_IPS. Without
--public-url, X-Forwarded-Proto, -Host and -Prefix begin the URLs in answers. They decide nothing else: a client that
gets its own headers through a proxy changes its own answer only.
"""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import RedirectResponse
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from ..errors import HanDiffuserError

HOST = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?")
PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)+")


class Forwarded(ProxyHeadersMiddleware):
    """ASGI middleware: uvicorn's for X-Forwarded-For and -Proto, extended by -Host and -Prefix.

    A proxy may keep its path in front of the server's or remove it. This middleware removes it if it is there.
    """

    def __init__(self, app: Any, public_url: str | None = None) -> None:
        super().__init__(app, os.environ.get("FORWARDED_ALLOW_IPS", "127.0.0.1"))
        self.public_path = urlsplit(public_url or "").path

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        peer = (scope.get("client") or ("",))[0]
        trusted = dict(scope["headers"]) if peer in self.trusted_hosts else {}
        host, prefix = _first(trusted, b"x-forwarded-host"), _first(trusted, b"x-forwarded-prefix").rstrip("/")
        if HOST.fullmatch(host):
            kept = [(name, value) for name, value in scope["headers"] if name != b"host"]
            scope["headers"] = [*kept, (b"host", host.encode())]
        scope["prefix"] = prefix = prefix if PREFIX.fullmatch(prefix) else ""
        path = scope["path"]
        for front in {self.public_path, prefix} - {""}:
            if path == front:  # the page's links are relative to a path that ends with a slash
                await RedirectResponse(f"{front.rpartition('/')[2]}/")(scope, receive, send)
                return
            if path.startswith(f"{front}/"):
                path = path[len(front) :]
                break
        scope["path"] = path.rstrip("/") or "/"
        await super().__call__(scope, receive, send)


def _first(headers: dict[bytes, bytes], name: bytes) -> str:
    """The first entry of a header, from the proxy next to the client."""
    return headers.get(name, b"").decode("latin-1").partition(",")[0].strip()


def base_url(http: Request) -> str:
    """The URL of / for the client, from its request and a trusted proxy, without a slash at the end."""
    return str(http.base_url).rstrip("/") + str(http.scope.get("prefix", ""))


def checked_url(url: str) -> str:
    """A --public-url without the slash at its end. Raises HanDiffuserError."""
    try:
        parts = urlsplit(url)
        path = parts.path.rstrip("/")
        good = (
            parts.scheme in ("http", "https") and HOST.fullmatch(parts.netloc) and not (parts.query or parts.fragment)
        )
    except ValueError:
        good, path = None, ""
    if not good or (path and not PREFIX.fullmatch(path)):
        raise HanDiffuserError(f"--public-url must be a URL such as https://example.org/sd, got {url!r}.")
    return f"{parts.scheme}://{parts.netloc}{path}"


def checked_origin(origin: str) -> str:
    """A --cors as browsers send it: in lower case, without the scheme's usual port. Raises HanDiffuserError."""
    plain = origin.lower().rstrip("/")
    if plain != "*":
        try:
            parts = urlsplit(plain)
        except ValueError:
            parts = urlsplit("")
        if not HOST.fullmatch(parts.netloc) or plain != f"{parts.scheme}://{parts.netloc}":
            raise HanDiffuserError(f"--cors must be an origin such as https://example.org, or *, got {origin!r}.")
    own = {"http": ":80", "https": ":443"}.get(plain.partition(":")[0], "/")
    return plain.removesuffix(own)
