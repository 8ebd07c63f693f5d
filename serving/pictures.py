"""`POST /v1/images/generations`: a request becomes tickets, and what comes of them an answer or a stream."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request as Http
from fastapi.responses import JSONResponse, Response, StreamingResponse

from ..errors import RequestError
from ..runtime.requests import Request
from .dispatch import Event, Ticket
from .fields import Generation, as_json
from .images import base64_of, encoded, fitted, preview, preview_steps, skeleton
from .problems import CODES, LATE
from .proxy import base_url
from .service import SIDES, Service, UnfinishedError

PING = 15.0  # seconds of silence after which a stream says that it is alive
DRAWN_SEEDS = 2**31  # seeds that are drawn, so that every client can hold them


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


class Painting:
    """A request that has been checked, and what becomes of its pictures.

    size: (height, width) that they are scaled to, or None; warnings: sentences that the answer brings.
    """

    def __init__(self, service: Service, body: Generation, http: Http) -> None:
        """Raises RequestError."""
        self.service, self.body = service, body
        self.format = body.response_format or ("b64_json" if body.stream else service.front.response_format)
        self.base = service.front.public_url or base_url(http)
        self.warnings = body.warnings()
        self.size = self._check()
        height, width = self.size or service.bundle.manifest.image_size
        self.about = {
            "size": f"{width}x{height}",
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

    def _size(self) -> tuple[int, int] | None:
        """What pictures are scaled to; None where they stay as they are painted."""
        asked, own = self.body.size, self.service.size
        if asked in (None, "auto", own):
            return None
        if not self.service.front.any_size:
            raise RequestError(
                f"size must be {own} or auto, got {asked!r}. hd-serve --any-size scales pictures.", "size"
            )
        found = re.fullmatch(r"(\d{1,4})x(\d{1,4})", asked)
        width, height = (int(side) for side in found.groups()) if found else (0, 0)
        least, most = SIDES
        if not (least <= width <= most and least <= height <= most):
            raise RequestError(
                f"size must be WIDTHxHEIGHT, each from {least} to {most}, or auto, got {asked!r}.", "size"
            )
        painted = self.service.bundle.manifest.image_size
        self.warnings.append(f"The engine paints {own}. The picture was scaled to {asked}.")
        if painted[0] * width != painted[1] * height:
            self.warnings[-1] += " It has bars, because its shape is another one."
            if self.body.return_hands:
                self.warnings.append("The places of the hands are those in the picture without its bars.")
        return height, width

    def requests(self, seed: int) -> list[Request]:
        """Of each picture one. Raises RequestError for what the bundle cannot run."""
        body = self.body
        interval: Any = tuple(body.guidance_interval or (0.0, 1.0))
        request = Request(
            body.prompt,
            seed=seed,
            steps=body.num_inference_steps,
            solver=body.solver,
            guidance=body.guidance_scale,
            negative_prompt=body.negative_prompt,
            noise_offset=body.noise_offset,
            hand_redraws=body.hand_redraws,
            hands=self.service.hands_path(body.hands),
            guidance_interval=interval,
        )
        return self.service.prepare(request, body.n)

    async def finished(self, ticket: Ticket, event: Event) -> dict[str, Any]:
        """An entry of `data`."""
        image, hands, said = event.value
        self.warnings.extend(sentence for sentence in said if sentence not in self.warnings)
        return await asyncio.to_thread(self._entry, ticket, image, hands)

    def _entry(self, ticket: Ticket, image: Any, hands: Any) -> dict[str, Any]:
        body, service = self.body, self.service
        started = time.perf_counter()
        content = encoded(fitted(image, self.size), body.output_format, body.output_compression)
        service.metrics.observe("encoding_time", time.perf_counter() - started)
        entry: dict[str, Any] = {"id": ticket.id, "seed": ticket.request.seed}
        if body.return_hands:
            entry |= {"hands": as_json(hands), "hands_id": service.keep_hands(hands, body.prompt)}
        if self.format == "url":
            name = service.keep_picture(content, body.output_format)
            return entry | {"url": f"{self.base}/v1/files/{name}"}
        return entry | {"b64_json": base64_of(content)}


async def paint(service: Service, body: Generation, http: Http) -> Response:
    """Answers a request for pictures. Raises RequestError, BusyError and UnfinishedError."""
    painting = Painting(service, body, http)
    limits, dispatcher = service.limits, service.dispatcher
    deadline = asyncio.get_running_loop().time() + min(body.timeout or limits.timeout, limits.timeout)
    seed = drawn_seed(body.seed)
    requests = await asyncio.to_thread(painting.requests, seed)
    service.forget_hands()
    entry = http.scope["handiffuser"]
    entry.update(n=body.n, steps=requests[0].steps, ids=[request.id for request in requests])
    if (user := body.safety_identifier or body.user) is not None:
        entry["user"] = user
    if requests[0].guidance == 1:
        painting.warnings += body.unguided()
    follow = preview_steps(requests[0].steps or 1, body.partial_images - 1) if body.partial_images > 1 else []
    tickets = dispatcher.submit(entry["owner"], requests, follow, whole=body.stream and body.partial_images > 0)
    if body.stream:
        return Stream(_stream(painting, tickets[0], deadline), lambda: dispatcher.cancel(tickets))
    events = await wait_for(http, service, tickets, deadline)
    if events is None:
        return Response(status_code=499)
    data = [await painting.finished(ticket, event) for ticket, event in zip(tickets, events, strict=True)]
    entry["queue_seconds"] = round(max(ticket.began - ticket.came for ticket in tickets), 4)
    answer: dict[str, Any] = {"created": int(time.time()), "data": data, **painting.about}
    return JSONResponse(answer | ({"warnings": painting.warnings} if painting.warnings else {}))


def drawn_seed(seed: int | None) -> int:
    """The seed that was asked for, or one that is drawn."""
    return secrets.randbelow(DRAWN_SEEDS) if seed is None else seed


def value_of(event: Event) -> Event:
    """The event, if it is what was asked for. Raises UnfinishedError."""
    if event.kind == "failure":
        raise UnfinishedError(*event.value)
    return event


async def wait_for(http: Http, service: Service, tickets: list[Ticket], deadline: float) -> list[Event] | None:
    """The last event of each ticket; None when the client has gone. Raises UnfinishedError.

    In every case the loop drops what the client no longer waits for.
    """

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


async def _stream(painting: Painting, ticket: Ticket, deadline: float) -> AsyncIterator[str]:
    """Server-sent events: the skeleton, previews, and the picture or an error."""
    index, size = 0, painting.service.bundle.manifest.image_size
    loop = asyncio.get_running_loop()

    def sent(kind: str, values: dict[str, Any]) -> str:
        return f"event: {kind}\ndata: {json.dumps({'type': kind, **values})}\n\n"

    def seen(event: Event) -> dict[str, Any]:
        """What a partial image shows and says; in a thread."""
        if event.kind == "hands":
            (hands,) = event.value
            image = skeleton(hands, size)
            values = {"kind": "hands", "step": 0, "steps": ticket.cost, "hands": as_json(hands)}
        else:
            step, steps, colours = event.value
            image = preview(colours, size)
            values = {"kind": "preview", "step": step, "steps": steps}
        return values | {"b64_json": base64_of(encoded(fitted(image, painting.size)))}

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
            now = {"created_at": int(time.time()), **painting.about}
            if event.kind == "picture":
                values = await painting.finished(ticket, event) | now
                warnings = {"warnings": painting.warnings} if painting.warnings else {}
                yield sent("image_generation.completed", values | warnings)
                return
            values = {"partial_image_index": index, **now, "output_format": "png"}
            yield sent("image_generation.partial_image", values | await asyncio.to_thread(seen, event))
            index += 1
    except UnfinishedError as error:
        kind = {"message": str(error), "type": "server_error", "param": None}
        yield sent("error", {"error": {**kind, "code": CODES.get(error.status)}})
