"""`POST /v1/images/generations`: a request becomes tickets, and their answers become one answer or a stream."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import numpy as np
from fastapi import Request as Http
from fastapi.responses import JSONResponse, Response, StreamingResponse

from ..contract import shown_size
from ..errors import HanDiffuserError, RequestError
from ..repair.files import Original
from ..runtime.requests import Request
from .dispatch import BusyError, Ticket
from .fields import Generation, as_json
from .images import base64_of, encoded, fitted, over, preview, preview_steps, skeleton
from .messages import Answer, Failed, HandsMade, PictureMade, Preview
from .problems import CODES, LATE
from .proxy import base_url
from .service import MAX_SIDE_PIXELS, MIN_SIDE_PIXELS, Service, UnfinishedError

PING_SECONDS = 15.0  # of silence, after which a stream says that it is alive
DRAWN_SEEDS = 2**31  # the server draws smaller seeds, which fit any client's integers


class Stream(StreamingResponse):
    """Server-sent events. Calls `at_end` in every case, even if the client leaves before the first event."""

    def __init__(self, events: AsyncIterator[str], at_end: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.at_end = at_end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.at_end()


class Painting:
    """A request for pictures that has been checked.

    painted: (height, width) that the engine paints. size: that the pictures are scaled to, or None. warnings: sentences
    of the answer. brought: what each of its pictures begins with: image, mask and so on of a `Request`, for `edits`.
    """

    kind = "image_generation"  # of a stream's events
    original: Original | None = None  # what the pictures were painted over
    bars = True  # whether a picture of another shape than the painted one gets bars

    def __init__(self, service: Service, body: Generation, http: Http) -> None:
        """Raises RequestError."""
        self.service, self.body = service, body
        self.format = body.response_format or ("b64_json" if body.stream else service.front.response_format)
        self.base = service.front.public_url or base_url(http)
        self.warnings = body.warnings()
        self.brought: list[dict[str, Any]] = [{}]
        self.painted = service.bundle.manifest.image_size
        self.size = self._check()
        self.about = {
            "size": shown_size(self.given),
            "background": "opaque",
            "quality": "auto",
            "output_format": body.output_format,
        }

    def _check(self) -> tuple[int, int] | None:
        body, limits = self.body, self.service.limits
        if body.n > self.service.most:
            raise RequestError(f"n must be at most {self.service.most}, got {body.n}. Send several requests.", "n")
        if body.stream and body.n > 1:
            raise RequestError(f"n must be 1 with stream, got {body.n}. Send a request for each picture.", "n")
        if body.stream and body.response_format == "url":
            raise RequestError("response_format must be b64_json with stream, got 'url'.", "response_format")
        if body.background == "transparent":
            raise RequestError("background must be opaque or auto, got 'transparent'.", "background")
        if (body.timeout or 0) > limits.timeout:
            self.warnings.append(f"The timeout was shortened to {limits.timeout:g} seconds.")
        return self._size()

    @property
    def given(self) -> tuple[int, int]:
        """Height and width of the pictures that the client gets."""
        return self.size or self.painted

    def _size(self) -> tuple[int, int] | None:
        """Sets the size that is painted. Returns the size that pictures are scaled to; None if they keep theirs."""
        asked, own, bundle = self.body.size, self.service.size, self.service.bundle
        if asked in (None, "auto", own):
            return None
        if bundle.manifest.size_multiple:
            try:
                size = bundle.size(Request("a picture", size=asked))
                bundle.room.check(size)
                if size[0] * size[1] > self.service.most_pixels:
                    most = f"{self.service.most_area} times the pixels of {own}"
                    raise RequestError(f"size must have at most {most}, got {asked}.", "size")
                self.painted = size
                return None
            except RequestError:
                if not self.service.front.any_size:
                    raise
        elif not self.service.front.any_size:
            raise RequestError(
                f"size must be {own} or auto, got {asked!r}. hd-serve --any-size scales pictures.", "size"
            )
        found = re.fullmatch(r"(\d{1,4})x(\d{1,4})", asked)
        width, height = (int(side) for side in found.groups()) if found else (0, 0)
        if not all(MIN_SIDE_PIXELS <= side <= MAX_SIDE_PIXELS for side in (width, height)):
            raise RequestError(
                f"size must be auto, or WIDTHxHEIGHT with sides from {MIN_SIDE_PIXELS} to {MAX_SIDE_PIXELS} pixels, "
                f"got {asked!r}.",
                "size",
            )
        painted = self.service.bundle.manifest.image_size
        self.warnings.append(f"The engine paints {own}. The picture was scaled to {asked}.")
        if self.bars and painted[0] * width != painted[1] * height:
            self.warnings[-1] += " It has bars, because its shape is different."
            if self.body.return_hands:
                self.warnings.append("The joints' places are those in the picture without bars.")
        return height, width

    def requests(self, seed: int) -> list[Request]:
        """One for each picture. Raises RequestError for what the bundle cannot run."""
        body, settings = self.body, self.settings(seed)
        settings["hands"] = self.service.hands_path(body.hands)
        settings["size"] = shown_size(self.painted) if self.painted != self.service.bundle.manifest.image_size else None
        requests = [Request(body.prompt, **settings, **brought) for brought in self.brought]
        return [one for request in requests for one in self.service.prepare(request, body.n)]

    def settings(self, seed: int) -> dict[str, Any]:
        """What the client and the server say of each picture, by the names of `Request`. Raises RequestError."""
        settings = {**self.body.settings(), "seed": seed, "lora": self.service.adapters.paths(self.body.lora)}
        if settings.get("guidance", self.service.bundle.manifest.defaults["guidance"]) != 1:
            settings.setdefault("negative_prompt", self.service.front.negative_prompt)
        return settings

    def shown(self, image: np.ndarray) -> np.ndarray:
        """A painted picture as the client gets it."""
        return fitted(image, self.size)

    async def finished(self, ticket: Ticket, made: PictureMade, parameters: str = "") -> dict[str, Any]:
        """An entry of `data`. parameters: see `images.encoded`."""
        self.warnings.extend(sentence for sentence in made.warnings if sentence not in self.warnings)
        return await asyncio.to_thread(self._entry, ticket, made, parameters)

    def _entry(self, ticket: Ticket, made: PictureMade, parameters: str) -> dict[str, Any]:
        body, service = self.body, self.service
        service.bundle.room.ran(self.painted)
        started = time.perf_counter()
        image = self.shown(made.image)
        save = encoded if self.original is None else partial(over, self.original)
        content = save(image, body.output_format, body.output_compression, parameters)
        service.metrics.took("encoding", time.perf_counter() - started)
        entry: dict[str, Any] = {"id": ticket.id, "seed": ticket.request.seed}
        if body.return_hands:
            entry |= {"hands": as_json(made.hands), "hands_id": service.keep_hands(made.hands, body.prompt)}
        if self.format == "url":
            name = service.keep_picture(content, body.output_format)
            return entry | {"url": f"{self.base}/v1/files/{name}"}
        return entry | {"b64_json": base64_of(content)}


async def begin(
    painting: Painting, http: Http, previews: Callable[[int], list[int]] = lambda steps: [], hands_first: bool = False
) -> tuple[list[Ticket], float]:
    """Puts the pictures of a request into the queue. Returns their tickets, and when the request's time is over.

    previews: steps of a picture -> those after which a preview comes. Raises RequestError and BusyError.
    """
    service, body = painting.service, painting.body
    limits = service.limits
    deadline = asyncio.get_running_loop().time() + min(body.timeout or limits.timeout, limits.timeout)
    requests = await asyncio.to_thread(painting.requests, drawn_seed(body.seed))
    service.forget_hands()
    logged = http.scope["handiffuser"]
    logged.update(n=len(requests), steps=requests[0].steps, ids=[request.id for request in requests])
    if (user := body.safety_identifier or body.user) is not None:
        logged["user"] = user
    steps = previews(requests[0].steps or 1)
    return service.dispatcher.submit(logged["owner"], requests, steps, hands_first), deadline


async def paint(painting: Painting, http: Http) -> Response:
    """Answers a request for pictures. Raises RequestError, BusyError and UnfinishedError."""
    service, body = painting.service, painting.body
    logged = http.scope["handiffuser"]
    partial_images = body.partial_images if body.stream else 0
    tickets, deadline = await begin(
        painting,
        http,
        lambda steps: preview_steps(steps, partial_images - 1) if partial_images > 1 else [],
        hands_first=partial_images > 0,
    )
    if body.stream:
        return Stream(_stream(painting, tickets[0], deadline), lambda: service.dispatcher.cancel(tickets))
    answers = await wait_for(http, service, tickets, deadline)
    if answers is None:
        return Response(status_code=499)
    data = [
        await painting.finished(ticket, made)
        for ticket, made in zip(tickets, answers, strict=True)
        if isinstance(made, PictureMade)
    ]
    logged["queue_seconds"] = round(max(ticket.began - ticket.came for ticket in tickets), 4)
    answer: dict[str, Any] = {"created": int(time.time()), "data": data, **painting.about}
    return JSONResponse(answer | ({"warnings": painting.warnings} if painting.warnings else {}))


def drawn_seed(seed: int | None) -> int:
    """The seed of the request, or a random one."""
    return secrets.randbelow(DRAWN_SEEDS) if seed is None else seed


def checked(answer: Answer, service: Service) -> HandsMade | Preview | PictureMade:
    """Raises UnfinishedError for a failure."""
    if isinstance(answer, Failed):
        raise UnfinishedError(service.unnamed(answer.sentence), answer.status)
    return answer


async def wait_for(
    http: Http | None,
    service: Service,
    tickets: list[Ticket],
    deadline: float,
    hear: Callable[[Answer], None] = lambda answer: None,
) -> list[Answer] | None:
    """The last answer of each ticket; None when the client has gone. Raises UnfinishedError. http: None for a stream,
    which hears by itself that its client has gone. hear: see `Ticket.result`.

    In every case the loop then drops the tickets that are not done.
    """

    async def gone() -> None:
        if http is None:
            await asyncio.Event().wait()
            return
        while (await http.receive())["type"] != "http.disconnect":
            pass

    async def one(ticket: Ticket) -> Answer:
        return checked(await ticket.result(hear), service)

    async def all_of() -> list[Answer]:
        return await asyncio.gather(*map(one, tickets))

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


def event(kind: str, values: dict[str, Any]) -> str:
    """An event of a stream, as text."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **values})}\n\n"


def trouble(error: HanDiffuserError) -> str:
    """The last event of a stream that cannot go on."""
    status = getattr(error, "status", 429 if isinstance(error, BusyError) else None)
    kind = "invalid_request_error" if isinstance(error, RequestError) or status == 400 else "server_error"
    said = {"message": str(error), "type": kind, "param": getattr(error, "param", None)}
    return event("error", {"error": {**said, "code": CODES.get(status) if status else getattr(error, "code", None)}})


async def _stream(painting: Painting, ticket: Ticket, deadline: float) -> AsyncIterator[str]:
    """Server-sent events: the skeleton, previews, and the picture or an error."""
    index, size = 0, painting.painted
    loop = asyncio.get_running_loop()

    def partial(answer: HandsMade | Preview) -> dict[str, Any]:
        """The fields of a partial image. Runs in a thread."""
        if isinstance(answer, HandsMade):
            image = skeleton(answer.hands, size)
            values = {"kind": "hands", "step": 0, "steps": ticket.cost, "hands": as_json(answer.hands)}
        else:
            image = preview(answer.colours, size)
            values = {"kind": "preview", "step": answer.step, "steps": answer.steps}
        return values | {"b64_json": base64_of(encoded(fitted(image, painting.size)))}

    try:
        while True:
            left = deadline - loop.time()
            try:
                said = await asyncio.wait_for(ticket.inbox.get(), min(PING_SECONDS, max(0.0, left)))
                answer = checked(said, painting.service)
            except asyncio.TimeoutError:
                if left <= PING_SECONDS:
                    raise UnfinishedError(LATE, 504) from None
                yield ": still here\n\n"
                continue
            now = {"created_at": int(time.time()), **painting.about}
            if isinstance(answer, PictureMade):
                values = await painting.finished(ticket, answer) | now
                warnings = {"warnings": painting.warnings} if painting.warnings else {}
                yield event(f"{painting.kind}.completed", values | warnings)
                return
            values = {"partial_image_index": index, **now, "output_format": "png"}
            yield event(f"{painting.kind}.partial_image", values | await asyncio.to_thread(partial, answer))
            index += 1
    except UnfinishedError as error:
        yield trouble(error)
