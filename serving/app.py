"""The HTTP application: OpenAI's images API over the dispatcher, paths for hands, and the page.

    service = Service(bundle, dispatcher, "demo", Limits(), keys, metrics, folder)
    app = make_app(service)

The event loop never waits for a model. Slow work, such as encoding a picture or moving fingers, runs in threads.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import resources
from importlib.util import find_spec
from typing import Any

import numpy as np
from fastapi import FastAPI
from fastapi import Request as Http
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response

from .. import editing
from ..editing import Arrays
from ..errors import RequestError
from ..runtime.requests import Request
from ..schedules import SOLVERS
from ..settings import MAX_SIDE
from . import edits, sdapi
from . import service as keeping
from .fields import Edit, Generation, HandsRequest, arrays_of, as_json
from .guard import Guard
from .images import MEDIA
from .messages import HandsMade
from .pictures import Painting, drawn_seed, paint, wait_for
from .problems import RESPONSES, ModelError, add_handlers, check_model, problem
from .proxy import Forwarded
from .schema import describe
from .service import Service

SWAGGER = ("swagger-ui.css", "swagger-ui-bundle.js")
KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}  # files of the page


def make_app(service: Service) -> FastAPI:
    """The ASGI application of a service. Serve it with uvicorn's own proxy_headers off: `Forwarded` reads them."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.dispatcher.start()
        yield
        service.dispatcher.stop()

    app = FastAPI(
        title="hd-serve",
        version="1",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        description=__doc__ or "",
        redirect_slashes=False,  # a proxy's client may not reach the redirect; `Forwarded` drops the slash
    )

    def openapi() -> dict[str, Any]:
        app.openapi_schema = app.openapi_schema or describe(app, service)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    add_handlers(app, service)
    add_pictures(app, service)
    add_models(app, service)
    add_health(app, service)
    add_page(app)
    app.include_router(sdapi.make_router(service))
    app.include_router(edits.make_router(service))
    posts = frozenset(getattr(route, "path", "") for route in app.routes if "POST" in getattr(route, "methods", ()))
    app.add_middleware(
        Guard,
        keys=service.keys,
        metrics=service.metrics,
        max_body=service.limits.body,
        posts=posts - sdapi.BARE,
        uploads={**edits.UPLOADS, **sdapi.UPLOADS},
        max_upload=service.limits.upload,
    )
    if service.front.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.front.cors),
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],  # OpenAI's client adds a dozen
            expose_headers=["x-request-id", "Retry-After"],
        )
    app.add_middleware(Forwarded, public_url=service.front.public_url)
    return app


def add_pictures(app: FastAPI, service: Service) -> None:
    """Paths that run a model or edit hands."""

    @app.post("/v1/images/generations", responses=RESPONSES)
    async def generations(body: Generation, http: Http) -> Response:
        """Makes pictures of a prompt, as OpenAI's images API does. `stream` sends previews on the way."""
        check_model(service, body.model)
        return await paint(Painting(service, body, http), http)

    @app.post("/v1/hands", responses=RESPONSES)
    async def make_hands(body: HandsRequest, http: Http) -> Response:
        """Returns the hands of a prompt and seed without a picture, or the joints of given hands."""
        check_model(service, body.model)
        seed = drawn_seed(body.seed)
        path = await asyncio.to_thread(service.hands_path, body.hands)
        (request,) = await asyncio.to_thread(service.prepare, Request(body.prompt, seed=seed, steps=1, hands=path))
        service.forget_hands()
        logged = http.scope["handiffuser"]
        if body.user is not None:
            logged["user"] = body.user
        ticket = service.dispatcher.submit_hands(logged["owner"], request)
        deadline = asyncio.get_running_loop().time() + service.limits.timeout
        answers = await wait_for(http, service, [ticket], deadline)
        if answers is None:
            return Response(status_code=499)
        (made,) = answers
        assert isinstance(made, HandsMade)
        id = await asyncio.to_thread(service.keep_hands, made.hands, body.prompt)
        entry = {"id": id, "seed": seed, "hands": as_json(made.hands), "hands_id": id}
        answer = {"created": int(time.time()), "data": [entry]}
        return JSONResponse(answer | ({"warnings": body.warnings()} if body.warnings() else {}))

    @app.post("/v1/hands/edit", responses=RESPONSES)
    async def edit_hands(body: Edit) -> Response:
        """Drags joints, applies a gesture, mirrors, swaps, turns or scales hands, without a model."""

        def make() -> Arrays:
            hands = arrays_of(body.hands)
            gesture = (body.gesture.hand, body.gesture.name) if body.gesture is not None else None
            hands = editing.edit(hands, body.moves(), gesture, body.person)
            if body.mirror:
                hands = editing.mirrored(hands)
            if body.swap:
                hands = editing.swapped(hands, body.person)
            if body.flip or body.over or body.turn or body.scale != 1:
                hands = editing.moved(hands, body.scale, body.turn, body.over, body.flip, body.person)
            if not all(np.isfinite(value).all() for value in hands.values()):
                raise RequestError(
                    "hands must give finite joints, got NaN or infinity. Start again from hands of /v1/hands.", "hands"
                )
            return hands

        hands = await asyncio.to_thread(make)
        return JSONResponse({"hands": as_json(hands)})


def add_models(app: FastAPI, service: Service) -> None:
    """Lists of names, and kept pictures."""

    @app.get("/v1/gestures")
    async def gestures() -> Response:
        """The gestures of /v1/hands/edit."""
        return JSONResponse({"data": list(editing.gestures())})

    def model(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": service.started,
            "owned_by": "handiffuser",
            "size": service.size,
            "size_multiple": service.bundle.manifest.size_multiple,  # of other sizes' sides; 0: there is the one size
            "sizes": service.sizes,  # that engines were built for; null: any
            "defaults": service.bundle.manifest.defaults,
            "solvers": list(SOLVERS),
            "limits": {
                "n": service.most,
                "steps": service.limits.steps,
                "timeout": service.limits.timeout,
                "side": MAX_SIDE,
                "pixels": service.most_pixels,
            },
        }

    @app.get("/v1/models", responses={401: RESPONSES[401]})
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model(name) for name in service.names]})

    @app.get("/v1/models/{name:path}", responses={401: RESPONSES[401], 404: RESPONSES[404]})
    async def one_model(name: str) -> Response:
        if name not in service.names:
            raise ModelError(
                f"model must be {' or '.join(service.names)}, got {name[:60]!r}. GET /v1/models lists them."
            )
        return JSONResponse(model(name))

    @app.get("/v1/files/{name}", responses={404: RESPONSES[404]})
    async def file(name: str) -> Response:
        """A picture of the last hour, for requests with response_format url."""
        kept, format, content = service.pictures.get(name, (-math.inf, "", b""))
        if time.monotonic() - kept > keeping.KEPT_SECONDS:
            return problem(404, "This picture is unknown or older than an hour. Make it again from its seed.")
        return Response(content, media_type=MEDIA[format], headers={"Cache-Control": "private, max-age=3600"})


def add_health(app: FastAPI, service: Service) -> None:
    """Paths for the person and the programs that run the server."""
    dispatcher = service.dispatcher

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz")
    async def healthz() -> Response:
        """200 while the process answers."""
        return JSONResponse({"status": "ok"})

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", responses={503: RESPONSES[503]})
    async def readyz() -> Response:
        """200 while the server takes requests; 503 while it loads or stops."""
        if dispatcher.ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "stopping" if dispatcher.draining else "loading"}, 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(dispatcher), media_type="text/plain; version=0.0.4")


def add_page(app: FastAPI) -> None:
    """The page in the browser, and Swagger UI, whose files come with a package of their own."""
    page = resources.files(__name__.rpartition(".")[0]).joinpath("page")
    files = list(page.iterdir())
    if find_spec("fastapi_swagger") is None:  # an older environment: the server goes on without /docs
        files = [file for file in files if not file.name.startswith("docs.")]
    else:
        files += map(resources.files("fastapi_swagger").joinpath("resources").joinpath, SWAGGER)
    for file in files:
        if not (kind := KINDS.get(file.name.rpartition(".")[2])):
            continue
        path = {"index.html": "/", "docs.html": "/docs"}.get(file.name, f"/{file.name}")
        content = file.read_bytes()

        def give(content: bytes = content, kind: str = kind) -> Callable[[], Any]:
            async def page() -> Response:
                return Response(content, media_type=f"{kind}; charset=utf-8", headers={"Cache-Control": "no-cache"})

            return page

        app.add_api_route(path, give(), include_in_schema=False, methods=["GET", "HEAD"])
