"""The HTTP application: OpenAI's images API over the dispatcher, hands beside it, and the page.

    service = Service(Limits(), manifest folder, dispatcher, ...)
    app = make_app(service)

Nothing in here waits for a model: answers are awaited, and what takes more than a moment (encoding a picture, reading
hands, the fingers' kinematics) runs in threads.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import math
import os
import secrets
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI
from fastapi import Request as Http
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image
from starlette.exceptions import HTTPException

from ..errors import HanDiffuserError, RequestError
from ..hands import NO_HANDS, hands_file
from ..runtime.bundle import Bundle
from ..runtime.requests import MAX_SEED, Request
from ..schedules import SOLVERS
from ..skeleton import draw_skeleton
from . import hands as editing
from .dispatch import BusyError, Dispatcher, Event, Ticket
from .fields import Edit, Generation, HandsField, HandsRequest, as_json
from .guard import Guard, problem
from .hands import Arrays
from .keys import Keys
from .metrics import Metrics

T = TypeVar("T")
LATE = "The time that this request allowed is over, and the picture is not done."
PING = 15.0  # seconds of silence after which a stream says that it is alive
KEPT_HANDS = 1000  # files of hands that clients sent or were given
KEPT_BYTES, KEPT_SECONDS = 256 << 20, 3600.0  # of pictures that wait to be fetched by URL
MEDIA = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
PNG_LEVEL = 4  # of zlib: in less than half of the usual level's time, 4 % larger
CODES = {429: "queue_full", 504: "timeout"}
DRAWN_SEEDS = 2**31  # seeds that are drawn, so that every client can hold them


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    n: int = 8  # pictures
    steps: int = 100
    timeout: float = 300.0  # seconds, where a request names none, and at most
    body: int = 1 << 20  # bytes


class UnfinishedError(HanDiffuserError):
    """A picture that came to nothing; `status` says whose fault it is."""

    def __init__(self, sentence: str, status: int = 500) -> None:
        super().__init__(sentence)
        self.status = status


class Service:
    """What the paths share: the bundle as the front knows it, the dispatcher, hands and pictures that are kept."""

    def __init__(
        self,
        bundle: Bundle,
        dispatcher: Dispatcher,
        name: str,
        limits: Limits,
        keys: Keys,
        metrics: Metrics,
        folder: Path,
    ) -> None:
        """folder: where hands that clients send are kept, a private one."""
        self.bundle, self.dispatcher, self.name, self.limits = bundle, dispatcher, name, limits
        self.keys, self.metrics = keys, metrics
        self.folder = folder
        self.started = int(time.time())
        self.hands: OrderedDict[str, Path] = OrderedDict()
        self.pictures: OrderedDict[str, tuple[float, str, bytes]] = OrderedDict()
        self.bytes = 0
        self.lock = threading.Lock()  # requests are prepared, and pictures encoded, in threads

    @property
    def size(self) -> str:
        height, width = self.bundle.manifest.image_size
        return f"{width}x{height}"

    def keep_hands(self, hands: Arrays, prompt: str = "") -> str:
        """Writes hands into the private folder, under a name that says what they are. Raises RequestError, and
        UnfinishedError where they cannot be written."""
        content = hands_file({name: np.asarray(value, np.float32) for name, value in hands.items()}, prompt)
        id = f"hands_{hashlib.sha256(content).hexdigest()[:32]}"
        path, temporary = self.folder / f"{id}.npz", self.folder / f"{secrets.token_hex(8)}.tmp"
        if id not in self.hands:
            try:
                temporary.write_bytes(content)
                os.replace(temporary, path)
            except OSError as error:
                temporary.unlink(missing_ok=True)
                raise UnfinishedError(f"The server cannot keep hands: {error.strerror or error}.", 503) from None
        with self.lock:
            self.hands[id] = path
        return id

    def forget_hands(self) -> None:
        """Lets the oldest go, but none that somebody waits for."""
        if len(self.hands) <= KEPT_HANDS:
            return
        dispatcher = self.dispatcher
        waiting = [*dispatcher.queue, *(t for w in dispatcher.workers for t in w.has.values())]
        needed = {ticket.request.hands for ticket in waiting}
        with self.lock:
            for id, path in list(self.hands.items())[: len(self.hands) - KEPT_HANDS]:
                if str(path) not in needed:
                    del self.hands[id]
                    path.unlink(missing_ok=True)

    def hands_path(self, hands: HandsField | str | None) -> str | None:
        """What `Request.hands` takes; nothing but what this server wrote itself is ever opened."""
        if hands is None or hands == NO_HANDS:
            return hands
        if isinstance(hands, HandsField):
            hands = self.keep_hands(hands.arrays())
        with self.lock:
            if hands not in self.hands:
                raise RequestError(f"There are no hands {hands[:60]!r} here (any more). Send the arrays themselves.")
            self.hands.move_to_end(hands)
            return str(self.hands[hands])

    def prepare(self, request: Request, count: int = 1) -> list[Request]:
        """Fills in the bundle's defaults, seeds and ids. Raises RequestError for what this bundle cannot run."""
        gaps = {name: v for name, v in self.bundle.manifest.defaults.items() if getattr(request, name) is None}
        assert request.seed is not None
        filled = replace(request, **gaps)
        if (filled.steps or 1) > self.limits.steps:
            raise RequestError(
                f"{filled.steps} steps are more than this server makes. Ask for {self.limits.steps} or fewer."
            )
        try:
            with self.lock:  # the bundle keeps schedules that it has computed
                self.bundle.check(filled)
        except RequestError as error:
            raise RequestError(str(error).replace(f"The hands file {request.hands} has", "The hands have")) from None
        return [
            replace(filled, seed=(request.seed + i) % (MAX_SEED + 1), id=f"img-{secrets.token_hex(12)}")
            for i in range(count)
        ]

    def keep_picture(self, content: bytes, format: str) -> str:
        """A name for a picture that is fetched by URL, within the hour."""
        now = time.monotonic()
        name = f"{secrets.token_urlsafe(24)}.{format}"
        with self.lock:
            self.pictures[name] = (now, format, content)
            self.bytes += len(content)
            while self.pictures:
                first, (kept, _, old) = next(iter(self.pictures.items()))
                if self.bytes <= KEPT_BYTES and now - kept < KEPT_SECONDS:
                    break
                del self.pictures[first]
                self.bytes -= len(old)
        return name


class Stream(StreamingResponse):
    """Server-sent events; `at_end` is called whatever happens, also when the client goes before the first one."""

    def __init__(self, events: AsyncIterator[str], at_end: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.at_end = at_end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.at_end()


def encoded(image: np.ndarray, format: str = "png", quality: int | None = None) -> bytes:
    """uint8 [H, W, 3] as a file's content."""
    buffer = io.BytesIO()
    if format == "png":
        Image.fromarray(image).save(buffer, "PNG", compress_level=PNG_LEVEL)
    else:
        Image.fromarray(image).save(buffer, format.upper(), quality=90 if quality is None else quality)
    return buffer.getvalue()


def skeleton(hands: Arrays, size: tuple[int, int]) -> np.ndarray:
    """The bones of a request's hands on grey, as large as the picture or 256. size: height, width."""
    ground = np.full((*size, 3), 40, np.uint8)
    return draw_skeleton(ground, hands["joints_2d"], hands["visibility"])


def preview(colours: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A small picture, uint8 [h, w, 3], in the picture's size."""
    return np.asarray(Image.fromarray(colours).resize(size[::-1], Image.Resampling.BICUBIC))


def preview_steps(steps: int, previews: int) -> list[int]:
    """After which of a request's steps previews are taken: `previews` of them, evenly, neither first nor last."""
    wanted = {round(steps * i / (previews + 1)) for i in range(1, previews + 1)}
    return sorted({max(step, min(2, steps - 1)) for step in wanted if 0 < step < steps})  # two tell what is noise


def base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def make_app(service: Service, cors: Sequence[str] = ()) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.dispatcher.start()
        yield
        service.dispatcher.stop()

    errors: dict[int | str, dict[str, Any]] = {
        status: {
            "description": words,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        for status, words in {
            400: "Something about the request is wrong; the message says what.",
            401: "No key, or a wrong one.",
            404: "No such model.",
            408: "The body took too long.",
            413: "The body is too large.",
            415: "The body is no JSON.",
            429: "The queue is full; see Retry-After.",
            500: "The picture came to nothing.",
            503: "Loading or stopping; see Retry-After.",
            504: "The time that the request allowed is over.",
        }.items()
    }
    app = FastAPI(
        title="hd-serve", version="1", docs_url=None, redoc_url=None, lifespan=lifespan, description=__doc__ or ""
    )
    limits, dispatcher, manifest = service.limits, service.dispatcher, service.bundle.manifest
    most = min(limits.n, dispatcher.queue.places)  # more would be turned away every time

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)  # what is wrong with a request is a 400 here
            parts = schema["components"]["schemas"]
            for name in ("HTTPValidationError", "ValidationError"):
                parts.pop(name, None)
            for part, field, bounds in (
                ("Generation", "model", {"enum": [service.name]}),
                ("HandsRequest", "model", {"enum": [service.name]}),
                ("Generation", "size", {"enum": [service.size, "auto"]}),
                ("Generation", "n", {"maximum": most}),
                ("Generation", "num_inference_steps", {"maximum": limits.steps}),
            ):
                schemas = parts[part]["properties"][field]
                schemas.get("anyOf", [schemas])[0].update(bounds)
            nullable = {"anyOf": [{"type": "string"}, {"type": "null"}]}
            parts["Error"] = {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type", "param", "code"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "param": nullable,
                            "code": nullable,
                        },
                    }
                },
            }  # fmt: skip
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Http, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            why = first.get("ctx", {}).get("error", first["msg"])
            return problem(400, f"The body is no JSON: {why}, at character {first['loc'][-1]}.", code="invalid_json")
        where = ".".join(str(part) for part in first["loc"] if part not in ("body", "HandsField"))
        if first["type"] == "missing" and not where:
            return problem(400, "The body is empty. It must be JSON.", code="invalid_json")
        if first["type"] == "extra_forbidden":
            return problem(400, f"The field {where[:60]} is unknown here.", code="unknown_field", param=where[:60])
        said = first["msg"].rstrip(".")
        return problem(400, f"{where[:60] or 'The body'}: {said}.", code="invalid_value", param=where[:60] or None)

    @app.exception_handler(HTTPException)
    async def refused(http: Http, error: HTTPException) -> JSONResponse:
        sentence = {
            "Not Found": f"There is no {http.url.path[:60]} here. GET /openapi.json says what there is.",
            "Method Not Allowed": f"{http.method} is not for {http.url.path[:60]}. GET /openapi.json says what is.",
        }.get(str(error.detail), str(error.detail))
        response = problem(error.status_code, sentence)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(HanDiffuserError)
    async def failed(http: Http, error: HanDiffuserError) -> JSONResponse:
        if isinstance(error, BusyError):
            wait = str(min(3600, math.ceil(error.seconds)))
            status, code = (503, "unavailable") if error.loading else (429, "queue_full")
            return problem(status, str(error), code=code, retry_after=wait)
        if isinstance(error, UnfinishedError):
            response = problem(error.status, str(error), code=CODES.get(error.status))
            if error.status == 429:
                response.headers["retry-after"] = str(min(3600, math.ceil(dispatcher.wait_for_room())))
            return response
        return problem(400, str(error), code="invalid_value")

    def check_model(model: str | None) -> None:
        if model not in (None, service.name):
            raise HTTPException(404, f"There is no model {model!r} here; there is {service.name}.")

    @app.post("/v1/images/generations", responses=errors)
    async def generations(body: Generation, http: Http) -> Response:
        """Makes pictures of a prompt, as OpenAI's images API does; `stream` sends them as they come to be."""
        check_model(body.model)
        warnings = body.warnings()
        if body.n > most:
            return problem(400, f"n is {body.n}; this server makes at most {most} pictures a request.", param="n")
        if body.stream and body.n > 1:
            return problem(400, "With stream, n must be 1: send a request for each picture.", param="n")
        if body.stream and body.response_format == "url":
            return problem(400, "With stream, response_format must be b64_json.", param="response_format")
        if body.size not in (None, "auto", service.size):
            sentence = f"The size is {body.size!r}; this bundle paints {service.size} and nothing else."
            return problem(400, sentence, param="size")
        if body.background == "transparent":
            return problem(400, "A transparent background cannot be painted.", param="background")
        if (body.timeout or 0) > limits.timeout:
            warnings.append(f"The timeout was shortened to {limits.timeout:g} seconds.")
        deadline = asyncio.get_running_loop().time() + min(body.timeout or limits.timeout, limits.timeout)
        seed = secrets.randbelow(DRAWN_SEEDS) if body.seed is None else body.seed

        def prepare() -> list[Request]:
            return service.prepare(
                Request(
                    body.prompt,
                    seed=seed,
                    steps=body.num_inference_steps,
                    solver=body.solver,
                    guidance=body.guidance_scale,
                    negative_prompt=body.negative_prompt,
                    noise_offset=body.noise_offset,
                    hands=service.hands_path(body.hands),
                    guidance_interval=tuple(body.guidance_interval or (0.0, 1.0)),  # type: ignore[arg-type]
                ),
                body.n,
            )

        requests = await asyncio.to_thread(prepare)
        service.forget_hands()
        entry = http.scope["handiffuser"]
        entry.update(n=body.n, steps=requests[0].steps, ids=[request.id for request in requests])
        if body.user is not None:
            entry["user"] = body.user
        if requests[0].guidance == 1:
            warnings += body.unguided()
        follow = preview_steps(requests[0].steps or 1, body.partial_images - 1) if body.partial_images > 1 else []
        tickets = dispatcher.submit(entry["owner"], requests, follow, whole=body.stream and body.partial_images > 0)

        async def finished(ticket: Ticket, event: Event) -> dict[str, Any]:
            """An entry of `data`."""
            image, hands, said = event.value
            warnings.extend(sentence for sentence in said if sentence not in warnings)

            def make() -> dict[str, Any]:
                started = time.perf_counter()
                content = encoded(image, body.output_format, body.output_compression)
                service.metrics.observe("encoding_time", time.perf_counter() - started)
                entry: dict[str, Any] = {"id": ticket.id, "seed": ticket.request.seed}
                if body.return_hands:
                    entry |= {"hands": as_json(hands), "hands_id": service.keep_hands(hands, body.prompt)}
                if body.response_format == "url":
                    name = service.keep_picture(content, body.output_format)
                    return entry | {"url": f"{str(http.base_url).rstrip('/')}/v1/files/{name}"}
                return entry | {"b64_json": base64_of(content)}

            return await asyncio.to_thread(make)

        about = {
            "size": service.size,
            "background": "opaque",
            "quality": "auto",
            "output_format": body.output_format,
        }
        if body.stream:
            stream = _stream(service, tickets[0], finished, about, deadline, warnings)
            return Stream(stream, lambda: dispatcher.cancel(tickets))
        events = await _wait(http, service, tickets, deadline)
        if events is None:
            return Response(status_code=499)
        data = [await finished(ticket, event) for ticket, event in zip(tickets, events, strict=True)]
        entry["queue_seconds"] = round(max(ticket.began - ticket.came for ticket in tickets), 4)
        answer: dict[str, Any] = {"created": int(time.time()), "data": data, **about}
        return JSONResponse(answer | ({"warnings": warnings} if warnings else {}))

    @app.post("/v1/hands", responses=errors)
    async def make_hands(body: HandsRequest, http: Http) -> Response:
        """The hands that a prompt and seed give, without a picture; or where the joints of given hands are."""
        check_model(body.model)
        seed = secrets.randbelow(DRAWN_SEEDS) if body.seed is None else body.seed
        path = await asyncio.to_thread(service.hands_path, body.hands)
        (request,) = await asyncio.to_thread(service.prepare, Request(body.prompt, seed=seed, steps=1, hands=path))
        service.forget_hands()
        entry = http.scope["handiffuser"]
        if body.user is not None:
            entry["user"] = body.user
        ticket = dispatcher.submit_hands(entry["owner"], request)
        deadline = asyncio.get_running_loop().time() + limits.timeout
        events = await _wait(http, service, [ticket], deadline)
        if events is None:
            return Response(status_code=499)
        (hands,) = events[0].value
        id = await asyncio.to_thread(service.keep_hands, hands, body.prompt)
        made = {"id": id, "seed": seed, "hands": as_json(hands), "hands_id": id}
        answer = {"created": int(time.time()), "data": [made]}
        return JSONResponse(answer | ({"warnings": body.warnings()} if body.warnings() else {}))

    @app.post("/v1/hands/edit", responses=errors)
    async def edit_hands(body: Edit) -> Response:
        """Drags joints, takes gestures, mirrors or swaps; no model runs."""

        def make() -> Arrays:
            hands = body.hands.arrays()
            gesture = (body.gesture.hand, body.gesture.name) if body.gesture is not None else None
            hands = editing.edit(hands, body.moves(), gesture)
            if body.mirror:
                hands = editing.mirrored(hands)
            if body.swap:
                hands = editing.swapped(hands)
            if not all(np.isfinite(value).all() for value in hands.values()):
                raise RequestError("These hands cannot be computed with. Start again from hands of /v1/hands.")
            return hands

        hands = await asyncio.to_thread(make)
        return JSONResponse({"hands": as_json(hands)})

    @app.get("/v1/gestures")
    async def gestures() -> Response:
        """Names that /v1/hands/edit takes."""
        return JSONResponse({"data": list(editing.gestures())})

    def model() -> dict[str, Any]:
        return {
            "id": service.name,
            "object": "model",
            "created": service.started,
            "owned_by": "handiffuser",
            "size": service.size,
            "defaults": manifest.defaults,
            "solvers": list(SOLVERS),
            "limits": {"n": most, "steps": limits.steps, "timeout": limits.timeout},
        }

    @app.get("/v1/models", responses={401: errors[401]})
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model()]})

    @app.get("/v1/models/{name}", responses={401: errors[401], 404: errors[404]})
    async def one_model(name: str) -> Response:
        check_model(name)
        return JSONResponse(model())

    @app.get("/v1/files/{name}", responses={404: errors[404]})
    async def file(name: str) -> Response:
        """A picture of the last hour that was asked for as a URL."""
        kept, format, content = service.pictures.get(name, (-math.inf, "", b""))
        if time.monotonic() - kept > KEPT_SECONDS:
            return problem(404, "There is no such picture (any more).")
        return Response(content, media_type=MEDIA[format], headers={"Cache-Control": "private, max-age=3600"})

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz")
    async def healthz() -> Response:
        """200 while the process answers."""
        return JSONResponse({"status": "ok"})

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", responses={503: errors[503]})
    async def readyz() -> Response:
        """200 while requests are taken: not while loading, and not while stopping."""
        if dispatcher.ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "stopping" if dispatcher.draining else "loading"}, 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(dispatcher), media_type="text/plain; version=0.0.4")

    files = resources.files(__name__.rpartition(".")[0]).joinpath("page")
    for path, name, kind in (
        ("/", "index.html", "text/html; charset=utf-8"),
        ("/page.css", "page.css", "text/css; charset=utf-8"),
        ("/page.js", "page.js", "text/javascript; charset=utf-8"),
        ("/server.js", "server.js", "text/javascript; charset=utf-8"),
        ("/stage.js", "stage.js", "text/javascript; charset=utf-8"),
    ):
        content = files.joinpath(name).read_bytes()

        def give(content: bytes = content, kind: str = kind) -> Callable[[], Any]:
            async def page() -> Response:
                return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

            return page

        app.add_api_route(path, give(), include_in_schema=False, methods=["GET", "HEAD"])

    app.add_middleware(Guard, keys=service.keys, metrics=service.metrics, max_body=limits.body)
    if cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["x-request-id", "Retry-After"],
        )
    return app


def value_of(event: Event) -> Event:
    """The event, if it is what was asked for. Raises UnfinishedError."""
    if event.kind == "failure":
        raise UnfinishedError(*event.value)
    return event


async def _wait(http: Http, service: Service, tickets: list[Ticket], deadline: float) -> list[Event] | None:
    """The last event of each ticket; None when the client has gone. Raises UnfinishedError. Whatever happens, nothing
    that nobody waits for stays in the loop."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    async def all_of() -> list[Event]:
        return [value_of(await ticket.result()) for ticket in tickets]

    answer, left = asyncio.create_task(all_of()), asyncio.create_task(gone())
    try:
        seconds = max(0.0, deadline - asyncio.get_running_loop().time())
        await asyncio.wait({answer, left}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        if left.done():
            return None
        raise UnfinishedError(LATE, 504)
    finally:
        answer.cancel()
        left.cancel()
        service.dispatcher.cancel(tickets)


async def _stream(
    service: Service,
    ticket: Ticket,
    finished: Callable[[Ticket, Event], Any],
    about: dict[str, Any],
    deadline: float,
    warnings: list[str],
) -> AsyncIterator[str]:
    """Server-sent events: the skeleton, previews, and the picture or an error."""
    index, size = 0, service.bundle.manifest.image_size
    loop = asyncio.get_running_loop()

    def sent(kind: str, values: dict[str, Any]) -> str:
        return f"event: {kind}\ndata: {json.dumps({'type': kind, **values})}\n\n"

    try:
        while True:
            left = deadline - loop.time()
            try:
                event = value_of(await asyncio.wait_for(ticket.inbox.get(), min(PING, max(0.0, left))))
            except asyncio.TimeoutError:
                if left <= PING:
                    raise UnfinishedError(LATE, 504) from None
                yield ": still here\n\n"
                continue
            if event.kind == "picture":
                made = await finished(ticket, event)
                values = {**made, "created_at": int(time.time()), **about}
                yield sent("image_generation.completed", values | ({"warnings": warnings} if warnings else {}))
                return
            values = {"partial_image_index": index, "created_at": int(time.time()), **about, "output_format": "png"}
            if event.kind == "hands":
                (hands,) = event.value
                image = await asyncio.to_thread(skeleton, hands, size)
                values |= {"kind": "hands", "step": 0, "steps": ticket.cost, "hands": as_json(hands)}
            else:
                step, steps, colours = event.value
                image = await asyncio.to_thread(preview, colours, size)
                values |= {"kind": "preview", "step": step, "steps": steps}
            values["b64_json"] = base64_of(await asyncio.to_thread(encoded, image))
            index += 1
            yield sent("image_generation.partial_image", values)
    except UnfinishedError as error:
        kind = {"message": str(error), "type": "server_error", "param": None}
        yield sent("error", {"error": {**kind, "code": CODES.get(error.status)}})


def private_folder() -> tempfile.TemporaryDirectory[str]:
    """Where hands that clients send are kept while the server runs."""
    return tempfile.TemporaryDirectory(prefix="hd-serve-")
