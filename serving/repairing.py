"""`repair` of `/v1/images/edits`: each hand of a picture is cut out, painted again at the model's size, and put back.

The hands are those of the request, or those that the detector finds. Hands that do not touch run beside each other in
the loop's batches; the others follow. The picture keeps its own size, and its bytes outside of the hands' masks.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import Request as Http
from fastapi.responses import JSONResponse, Response

from ..detection.hands import Seen
from ..errors import DetectionError, RequestError
from ..repair.wish import SMALLEST, SURE
from ..runtime.requests import Request
from .dispatch import Ticket
from .fields import as_json
from .finding import Finder, seen_of
from .forms import Upload
from .images import base64_of, over
from .messages import HandsMade, PictureMade
from .pictures import Painting, drawn_seed, wait_for
from .service import Service, UnfinishedError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..repair.patch import Patch
    from .edits import EditForm

SOFT = 4.0  # pixels of the picture that a painted one covers before the hand looks soft
LACKING = 'This server repairs no hands: OpenCV is missing. Install it: pip install "handiffuser[detect]"'


class ClientGoneError(Exception):
    """The client does not wait any more."""


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
        """mask: uint8 [H, W], what is to go beside the old hands. Raises RequestError, and UnfinishedError where the
        server lacks a package."""
        if find_spec("cv2") is None:
            raise UnfinishedError(LACKING, 501)
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
        seconds = min(body.timeout or service.limits.timeout, service.limits.timeout)
        self.deadline = asyncio.get_running_loop().time() + seconds
        self.seed = drawn_seed(body.seed)
        self.found: list[Seen] = []  # by the detector
        self.asked: list[Seen] = []

    async def answer(self) -> Response:
        """Raises RequestError, BusyError and UnfinishedError."""
        hands = await self.hands()
        self.asked = [seen for seen, _ in hands]
        if not self.found:  # the client says what to repair; other hands keep their pixels
            with suppress(UnfinishedError):
                self.found = await self.finder(self.image.original.image)
        most = self.service.most // self.body.n
        if len(hands) > most:
            raise RequestError(f"hands must be at most {most} with n = {self.body.n}, got {len(hands)}.", "hands")
        pictures = [self.image.original.image] * self.body.n
        try:
            with self.folder() as folder:
                left = hands
                while left:
                    left, pictures = await self.round(left, pictures, folder)
        except ClientGoneError:
            return Response(status_code=499)
        shown = [as_json(self.finder.shown(seen, self.image.size)) for seen, _ in hands]
        data = [await asyncio.to_thread(self.entry, i, picture, shown) for i, picture in enumerate(pictures)]
        warnings = list(dict.fromkeys(self.painting.warnings))
        told = {"created": int(time.time()), "data": data, **self.painting.about}
        return JSONResponse(told | ({"warnings": warnings} if warnings else {}))

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A private one, for the hands of this request."""
        try:
            with tempfile.TemporaryDirectory(prefix="repair-", dir=self.service.folder) as folder:
                yield Path(folder)
        except OSError as error:
            raise UnfinishedError(f"The server cannot keep hands: {error.strerror or error}.", 503) from None

    async def hands(self) -> list[tuple[Seen, np.ndarray | None]]:
        """Each new hand, and the points [21, 2] in pixels of the old one where the request says where it is."""
        given, size = self.body.hands, self.image.size
        if isinstance(given, str):
            raise RequestError("hands must be objects with repair, got text. Send those of /v1/hands/detect.", "hands")
        if given is None:
            self.found = await self.finder(self.image.original.image)
            return [(one, None) for one in self.sure(self.found)]
        return [
            (
                seen_of(one.arrays(), size, one.gesture or ""),
                None if one.old is None else np.array(one.old, np.float64) * (size[1], size[0]),
            )
            for one in (given if isinstance(given, list) else [given])
        ]

    def sure(self, seen: list[Seen]) -> list[Seen]:
        """The found hands whose pose is sure enough; warns about the others. Raises RequestError where none is."""
        if not seen:
            raise RequestError(
                "image must show a hand that the detector finds, got none. Place a hand and send it as hands.", "image"
            )
        sure = [one for one in seen if (one.sureness or 0.0) >= SURE and np.ptp(one.hand.joints_2d, 0).max() > SMALLEST]
        left = [str(one) for one in seen if not any(one is other for other in sure)]
        if not sure:
            raise RequestError(
                f"hands must be given, because the server found only {' and '.join(left)}. Look with /v1/hands/detect, "
                "and choose a gesture.",
                "hands",
            )
        self.painting.warnings += [f"The server left {one} as it is. Send it as hands to repair it." for one in left]
        return sure

    async def round(
        self, hands: list[tuple[Seen, np.ndarray | None]], pictures: list[np.ndarray], folder: Path
    ) -> tuple[list[tuple[Seen, np.ndarray | None]], list[np.ndarray]]:
        """Paints the hands that touch none before them. Returns the others, and the pictures."""
        from ..repair.repair import apart

        first = await asyncio.to_thread(self.plan, pictures[0], hands)
        chosen = apart(first)
        ids = {id(patch.seen) for patch in chosen}
        now = [hand for hand in hands if id(hand[0]) in ids]
        later = [hand for hand in hands if id(hand[0]) not in ids]
        each = [chosen]  # the patches of each picture
        for picture in pictures[1:]:
            each.append(chosen if picture is pictures[0] else await asyncio.to_thread(self.plan, picture, now))
        await self.pose(each, folder)
        requests = await asyncio.to_thread(self.requests, each, folder)
        logged = self.http.scope["handiffuser"]
        logged.update(n=logged.get("n", 0) + len(requests), steps=requests[0].steps)
        answers = await self.wait(self.service.dispatcher.submit(logged["owner"], requests))
        made = [answer for answer in answers if isinstance(answer, PictureMade)]
        self.painting.warnings += [said for one in made for said in one.warnings]
        count = len(now)
        parts = [made[i : i + count] for i in range(0, len(made), count)]
        return later, [
            await asyncio.to_thread(pasted, picture, patches, part)
            for picture, patches, part in zip(pictures, each, parts, strict=True)
        ]

    def plan(self, picture: np.ndarray, hands: list[tuple[Seen, np.ndarray | None]]) -> list[Patch]:
        """The crops of hands in a picture. Runs in a thread."""
        from ..repair.patch import plan

        size = self.service.bundle.manifest.image_size
        patches = []
        for seen, old in hands:
            try:
                patch = plan(picture, seen, self.finder.rest, size, old, [*self.found, *self.asked])
            except DetectionError as error:
                raise RequestError(str(error), "hands") from None
            if self.mask is not None:
                patch.old = patch.old | (patch.window.cut(self.mask, size) > 127)
            if patch.magnified > SOFT:
                self.painting.warnings.append(
                    f"The {seen.side} hand is {patch.magnified:.0f} times as large as the engine paints, so it looks "
                    "soft."
                )
            patches.append(patch)
        return patches

    async def pose(self, each: list[list[Patch]], folder: Path) -> None:
        """Lets the model's body show the hands: its mesh gives the masks."""
        dispatcher, owner = self.service.dispatcher, self.http.scope["handiffuser"]["owner"]
        requests = await asyncio.to_thread(self.of_hands, each[0], folder)
        tickets: list[Ticket] = []
        try:
            for request in requests:
                tickets.append(dispatcher.submit_hands(owner, request, mesh=True))
        except BaseException:
            dispatcher.cancel(tickets)
            raise
        answers = await self.wait(tickets)
        for patches in {id(patches): patches for patches in each}.values():
            for patch, made in zip(patches, answers, strict=True):
                assert isinstance(made, HandsMade)
                await asyncio.to_thread(patch.pose, made.hands)

    def of_hands(self, patches: list[Patch], folder: Path) -> list[Request]:
        """A request for hands of each patch. Runs in a thread."""
        requests = []
        for k, patch in enumerate(patches):
            patch.save(folder / f"{k}.npz")
            request = Request("hands", seed=0, steps=1, hands=str(folder / f"{k}.npz"))
            requests += self.service.prepare(request)
        return requests

    def requests(self, each: list[list[Patch]], folder: Path) -> list[Request]:
        """Those of all patches of the first picture, then of the next one, with seeds that follow each other. Runs in a
        thread."""
        prepared = []
        for i, patches in enumerate(each):
            settings: dict[str, Any] = {**self.body.settings(), "seed": self.seed_of(i)}
            for k, patch in enumerate(patches):
                request = patch.request(folder / f"{k}.npz", self.body.prompt, **settings)
                prepared += self.service.prepare(request)
        return prepared

    def seed_of(self, i: int) -> int:
        return (self.seed + i) % (1 << 63)

    async def wait(self, tickets: list[Ticket]) -> list[Any]:
        answers = await wait_for(self.http, self.service, tickets, self.deadline)
        if answers is None:
            raise ClientGoneError
        return answers

    def entry(self, i: int, picture: np.ndarray, shown: list[dict[str, Any]]) -> dict[str, Any]:
        """An entry of `data`. Runs in a thread."""
        body, service = self.body, self.service
        started = time.perf_counter()
        content = over(self.image.original, picture, body.output_format, body.output_compression)
        service.metrics.took("encoding", time.perf_counter() - started)
        entry: dict[str, Any] = {"seed": self.seed_of(i), **({"hands": shown} if body.return_hands else {})}
        if self.painting.format == "url":
            name = service.keep_picture(content, body.output_format)
            return entry | {"url": f"{self.painting.base}/v1/files/{name}"}
        return entry | {"b64_json": base64_of(content)}


def pasted(picture: np.ndarray, patches: list[Patch], made: list[PictureMade]) -> np.ndarray:
    """A picture uint8 [H, W, 3] with its painted hands."""
    for patch, one in zip(patches, made, strict=True):
        picture = patch.paste(picture, one.image)
    return picture
