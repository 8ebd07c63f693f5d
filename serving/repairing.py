"""`repair` of `/v1/images/edits`: each hand of a picture is cut out, painted again at the model's size, and put back.

The hands are those of the request, or those that the detector finds. All of them run beside each other in the loop's
batches. The picture keeps its own size, and its bytes outside of the hands' masks.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import Request as Http
from fastapi.responses import JSONResponse, Response

from ..detection.hands import Seen
from ..errors import RequestError
from ..runtime.requests import Request
from .dispatch import Ticket
from .fields import as_json
from .finding import Finder, seen_of
from .forms import Upload
from .images import base64_of, encoded
from .messages import HandsMade, PictureMade
from .pictures import Painting, drawn_seed, wait_for
from .service import Service, UnfinishedError

if TYPE_CHECKING:
    from ..repair.patch import Patch
    from .edits import EditForm

UNSURE = 0.5  # of a found hand's sureness: below it a person should look first


class Repair:
    """A request that has been checked."""

    def __init__(
        self,
        service: Service,
        finder: Finder,
        body: EditForm,
        http: Http,
        images: list[Upload],
        mask: np.ndarray | None,
    ) -> None:
        """mask: uint8 [H, W], more of the picture that is to go. Raises RequestError."""
        if len(images) != 1:
            raise RequestError(f"image must be one file with repair, got {len(images)}.", "image")
        if body.stream:
            raise RequestError("stream must be false with repair. Leave it out.", "stream")
        (self.image,) = images
        height, width = self.image.size
        if body.size not in (None, "auto", f"{width}x{height}"):
            raise RequestError(
                f"size must be auto with repair, got {body.size!r}. The picture keeps its own size.", "size"
            )
        self.service, self.finder, self.http, self.mask = service, finder, http, mask
        self.body = body.model_copy(update={"size": None})
        self.painting = Painting(service, self.body, http)
        self.painting.about["size"] = f"{width}x{height}"

    async def answer(self) -> Response:
        """Raises RequestError, BusyError and UnfinishedError."""
        service, body = self.service, self.body
        deadline = asyncio.get_running_loop().time() + min(
            body.timeout or service.limits.timeout, service.limits.timeout
        )
        placed = await self.hands()
        most = service.most // body.n
        if len(placed) > most:
            raise RequestError(f"hands must be at most {most}, with n = {body.n}, got {len(placed)}.", "hands")
        patches = await asyncio.to_thread(self.plan, placed)
        if not await self.pose(patches, deadline):
            return Response(status_code=499)
        seed = drawn_seed(body.seed)
        requests = await asyncio.to_thread(self.requests, patches, seed)  # of each patch, those of the n pictures
        logged = self.http.scope["handiffuser"]
        logged.update(n=len(requests) * body.n, steps=requests[0][0].steps)
        tickets = service.dispatcher.submit(logged["owner"], [one for each in requests for one in each])
        answers = await wait_for(self.http, service, tickets, deadline)
        if answers is None:
            return Response(status_code=499)
        made = [answer for answer in answers if isinstance(answer, PictureMade)]
        for one in made:
            self.painting.warnings += [said for said in one.warnings if said not in self.painting.warnings]
        data = [
            await asyncio.to_thread(self.entry, patches, made[i :: body.n], requests[0][i].seed or 0)
            for i in range(body.n)
        ]
        told = {"created": int(time.time()), "data": data, **self.painting.about}
        return JSONResponse(told | ({"warnings": self.painting.warnings} if self.painting.warnings else {}))

    async def hands(self) -> list[tuple[Seen, np.ndarray | None]]:
        """Each new hand, and the points [21, 2] in pixels of the old one where it is elsewhere."""
        given, size = self.body.hands, self.image.size
        if given is None:
            seen = await self.finder(self.image.pixels)
            sure = [one for one in seen if (one.sureness or 0.0) >= UNSURE]
            if not seen:
                raise RequestError(
                    "image must show a hand that the detector finds, got none. Place the hand and send it as hands.",
                    "image",
                )
            if not sure:
                raise RequestError(
                    f"hands must be given: the detector found {seen[0]}, which is not sure enough. Look at them with "
                    "/v1/hands/detect first.",
                    "hands",
                )
            self.painting.warnings += [f"The server left {one} as it is: not sure enough." for one in seen[len(sure) :]]
            return [(one, None) for one in sure]
        if isinstance(given, str):
            raise RequestError("hands must be objects with repair, got text. Send those of /v1/hands/detect.", "hands")
        placed = []
        for one in given if isinstance(given, list) else [given]:
            old = None if one.old is None else np.array(one.old, np.float64) * (size[1], size[0])
            placed.append((seen_of(one.arrays(), size, one.gesture or ""), old))
        return placed

    def plan(self, placed: list[tuple[Seen, np.ndarray | None]]) -> list[Patch]:
        try:
            from ..repair.patch import cut, plan
        except ImportError:
            raise UnfinishedError(
                'This server repairs no hands: OpenCV is missing. Install it: pip install "handiffuser[detect]"', 501
            ) from None
        size = self.service.bundle.manifest.image_size
        patches = []
        for seen, old in placed:
            patch = plan(self.image.pixels, seen, self.finder.rest, size, old)
            if self.mask is not None:
                patch.old = patch.old | (cut(self.mask, patch.window, size) > 127)
            if patch.magnified > 4:
                self.painting.warnings.append(
                    f"A hand is {patch.magnified:.1f} times as large as the engine paints, so it looks soft."
                )
            patches.append(patch)
        return patches

    async def pose(self, patches: list[Patch], deadline: float) -> bool:
        """Lets the model's body show the hands. Returns False when the client has gone."""
        service = self.service
        requests = await asyncio.to_thread(self.of_hands, patches)
        owner = self.http.scope["handiffuser"]["owner"]
        tickets: list[Ticket] = []
        try:
            for request in requests:
                tickets.append(service.dispatcher.submit_hands(owner, request, mesh=True))
        except BaseException:
            service.dispatcher.cancel(tickets)
            raise
        answers = await wait_for(self.http, service, tickets, deadline)
        if answers is None:
            return False
        for patch, made in zip(patches, answers, strict=True):
            assert isinstance(made, HandsMade)
            await asyncio.to_thread(patch.pose, made.hands)
        return True

    def of_hands(self, patches: list[Patch]) -> list[Request]:
        """A request for each patch, whose hands the server keeps meanwhile."""
        paths = [str(self.service.hands[self.service.keep_hands(patch.arrays)]) for patch in patches]
        return [self.service.prepare(Request("hands", seed=0, steps=1, hands=path))[0] for path in paths]

    def requests(self, patches: list[Patch], seed: int) -> list[list[Request]]:
        settings: dict[str, Any] = {**self.body.settings(), "seed": seed}
        prepared = []
        for patch in patches:
            with tempfile.TemporaryDirectory(dir=self.service.folder) as folder:
                request = patch.request(Path(folder), self.body.prompt, **settings)
                kept = self.service.keep_hands(patch.arrays)
                prepared.append(
                    self.service.prepare(replace(request, hands=str(self.service.hands[kept])), self.body.n)
                )
        self.service.forget_hands()
        return prepared

    def entry(self, patches: list[Patch], made: list[PictureMade], seed: int) -> dict[str, Any]:
        """An entry of `data`: the picture with all hands of one variation. Runs in a thread."""
        body, service = self.body, self.service
        picture = self.image.pixels
        for patch, one in zip(patches, made, strict=True):
            picture = patch.paste(picture, one.image)
        started = time.perf_counter()
        content = encoded(picture, body.output_format, body.output_compression, profile=self.image.profile)
        service.metrics.took("encoding", time.perf_counter() - started)
        entry: dict[str, Any] = {"id": made[0].id, "seed": seed}
        if body.return_hands:
            shown = [self.finder.shown(patch.seen, self.image.size) for patch in patches]
            entry["hands"] = [as_json(one) for one in shown]
        if self.painting.format == "url":
            name = service.keep_picture(content, body.output_format)
            return entry | {"url": f"{self.painting.base}/v1/files/{name}"}
        return entry | {"b64_json": base64_of(content)}
