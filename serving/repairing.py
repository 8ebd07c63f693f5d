"""`repair` of `/v1/images/edits`: each hand of a picture is cut out, painted again at the model's size, and put back.

The hands are those of the request, or those that the detector finds. Hands that do not touch run beside each other in
the loop's batches: a round. The others follow in further rounds. The picture keeps its own size, and its bytes outside
of the hands' masks. Where the detector chose the hands, it looks again at each painted one, as hd-repair does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import Request as Http
from fastapi.responses import JSONResponse, Response
from PIL import Image

from ..detection.draw import draw
from ..detection.hands import Seen
from ..errors import DetectionError, HanDiffuserError, RequestError
from ..repair.wish import SMALLEST, SURE
from ..runtime.requests import Request
from .dispatch import Ticket
from .fields import as_json
from .finding import Finder, seen_of
from .forms import Upload
from .images import base64_of, encoded, over, preview, preview_steps
from .messages import Answer, HandsMade, PictureMade, Preview
from .pictures import Painting, Stream, drawn_seed, event, trouble, wait_for
from .service import Service, UnfinishedError

if TYPE_CHECKING:
    from ..repair.patch import Patch
    from .edits import EditForm

PING_SECONDS = 15.0  # of silence, after which a stream says that it is alive
SHOWN = 1024  # pixels of a preview's longer side
ADVICE = "Send it as hands to repair it."
LACKING = 'This server repairs no hands: OpenCV is missing. Install it: pip install "handiffuser[detect]"'
Hand = tuple[Seen, np.ndarray | None]  # a new hand, and the points [21, 2] in pixels of the old one, if they are said


class ClientGoneError(Exception):
    """The client does not wait any more."""


@dataclass
class Round:
    """Hands that are painted beside each other. pictures: before it, uint8 [H, W, 3] each. each: the patches of each
    picture. later: hands of the next rounds. rounds: how many are left, with this one."""

    pictures: list[np.ndarray] = field(repr=False)
    each: list[list[Patch]]
    later: list[Hand]
    tickets: list[Ticket]
    rounds: int


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
        self.settings = self.painting.settings(self.seed)
        self.found: list[Seen] = []  # by the detector
        self.asked: list[Seen] = []
        self.repaired = [0] * body.n  # hands of each picture
        self.previews = max((body.partial_images if body.stream else 0) - 1, 0)  # that may follow
        self.steps = 0  # of the rounds that are done
        self.running: list[Ticket] = []
        self.task: asyncio.Task[list[np.ndarray]] | None = None
        self.looks: asyncio.Queue[Callable[[], dict[str, Any]] | None] = asyncio.Queue()  # previews to be drawn

    async def answer(self) -> Response:
        """Raises RequestError, BusyError and UnfinishedError."""
        hands = await self.hands()
        self.asked = [seen for seen, _ in hands]
        if not self.found:  # the client says what to repair; other hands keep their pixels
            with suppress(UnfinishedError):
                self.found = await self.finder(self.image.pixels)
        most = self.service.most // self.body.n
        if len(hands) > most:
            raise RequestError(f"hands must be at most {most} with n = {self.body.n}, got {len(hands)}.", "hands")
        try:
            first = await self.begin(hands, [self.image.original.image] * self.body.n)
            if self.body.stream:
                return Stream(self.events(first), self.stop)
            pictures = await self.all_of(first)
        except ClientGoneError:
            return Response(status_code=499)
        data = [await asyncio.to_thread(self.entry, i, picture) for i, picture in enumerate(pictures)]
        return JSONResponse({"created": int(time.time()), "data": data, **self.painting.about, **self.warned()})

    async def events(self, first: Round) -> AsyncIterator[str]:
        """Server-sent events: the found hands, previews of the whole picture, and the picture or an error."""
        task = self.task = asyncio.create_task(self.all_of(first))
        task.add_done_callback(lambda _: self.looks.put_nowait(None))
        if self.body.partial_images:
            self.looks.put_nowait(self.skeletons)
        index = 0
        while True:
            try:
                look = await asyncio.wait_for(self.looks.get(), PING_SECONDS)
            except asyncio.TimeoutError:
                yield ": still here\n\n"
                continue
            if look is None:
                break
            now = {"created_at": int(time.time()), **self.painting.about, "output_format": "png"}
            values = {"partial_image_index": index, **now, **await asyncio.to_thread(look)}
            yield event("image_edit.partial_image", values)
            index += 1
        try:
            entry = await asyncio.to_thread(self.entry, 0, task.result()[0])
        except HanDiffuserError as error:
            yield trouble(error)
            return
        now = {"created_at": int(time.time()), **self.painting.about}
        yield event("image_edit.completed", entry | now | self.warned())

    def stop(self) -> None:
        """The client has the answer, or has gone."""
        if self.task is not None:
            self.task.cancel()
        self.service.dispatcher.cancel(self.running)

    def warned(self) -> dict[str, Any]:
        warnings = list(dict.fromkeys(self.painting.warnings))
        return {"warnings": warnings} if warnings else {}

    async def hands(self) -> list[Hand]:
        """What shall be painted."""
        given, size = self.body.hands, self.image.size
        if isinstance(given, str):
            raise RequestError("hands must be objects with repair, got text. Send those of /v1/hands/detect.", "hands")
        if given is None:
            self.found = await self.finder(self.image.pixels)
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
        self.painting.warnings += [f"The server left {one} as it is. {ADVICE}" for one in left]
        return sure

    # ------------------------------------------------------------------ rounds

    async def all_of(self, first: Round) -> list[np.ndarray]:
        """The pictures after all rounds."""
        now = first
        while True:
            pictures = await self.end(now)
            if not now.later:
                return pictures
            now = await self.begin(now.later, pictures)

    async def begin(self, hands: list[Hand], pictures: list[np.ndarray]) -> Round:
        """Puts the hands that touch none before them into the queue."""
        from ..repair.repair import apart, rounds_of

        first = await asyncio.to_thread(self.plan, pictures[0], hands)
        chosen = apart(first)
        ids = {id(patch.seen) for patch in chosen}
        now = [hand for hand in hands if id(hand[0]) in ids]
        each = [chosen]  # the patches of each picture
        for picture in pictures[1:]:
            each.append(chosen if picture is pictures[0] else await asyncio.to_thread(self.plan, picture, now))
        await self.pose(each)
        requests = await asyncio.to_thread(self.requests, each)
        rounds = rounds_of(first)
        share = self.previews // rounds
        steps = preview_steps(requests[0].steps or 1, share) if share else []
        logged = self.http.scope["handiffuser"]
        logged.update(n=logged.get("n", 0) + len(requests), steps=requests[0].steps)
        self.running = self.service.dispatcher.submit(logged["owner"], requests, steps)
        return Round(pictures, each, [hand for hand in hands if id(hand[0]) not in ids], self.running, rounds)

    async def end(self, now: Round) -> list[np.ndarray]:
        """Waits for a round's hands. Returns the pictures with them."""
        answers = await self.wait(now.tickets, self.looking(now) if self.previews else lambda answer: None)
        made = [answer for answer in answers if isinstance(answer, PictureMade)]
        self.painting.warnings += [said for one in made for said in one.warnings]
        self.steps += now.tickets[0].cost
        count = len(now.each[0])
        work, pictures = asyncio.to_thread if self.body.hands is not None else self.finder.later, []
        for i, (picture, patches) in enumerate(zip(now.pictures, now.each, strict=True)):
            pictures.append(await work(self.lay, i, picture, patches, made[i * count : (i + 1) * count]))
        return pictures

    def lay(self, i: int, picture: np.ndarray, patches: list[Patch], made: list[PictureMade]) -> np.ndarray:
        """A picture uint8 [H, W, 3] with its painted hands. Runs in a thread: the finder's where the detector looks."""
        from ..repair.repair import lay, soft, stays

        detector = self.finder.detector if self.body.hands is None else None
        for patch, one in zip(patches, made, strict=True):
            laid, _ = lay(picture, patch, one.image, detector)
            if laid is picture:
                self.painting.warnings.append(f"Picture {i + 1}: " * (self.body.n > 1) + stays(patch, ADVICE))
                continue
            picture = laid
            self.repaired[i] += 1
            self.painting.warnings += soft(patch)
        return picture

    def plan(self, picture: np.ndarray, hands: list[Hand]) -> list[Patch]:
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
            patches.append(patch)
        return patches

    async def pose(self, each: list[list[Patch]]) -> None:
        """Lets the model's body show the hands: its mesh gives the masks."""
        dispatcher, owner = self.service.dispatcher, self.http.scope["handiffuser"]["owner"]
        requests = await asyncio.to_thread(self.of_hands, each[0])
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

    def of_hands(self, patches: list[Patch]) -> list[Request]:
        """A request for hands of each patch. Runs in a thread."""
        requests = [Request("hands", seed=0, steps=1, hands=patch.arrays) for patch in patches]
        return [one for request in requests for one in self.service.prepare(request)]

    def requests(self, each: list[list[Patch]]) -> list[Request]:
        """Those of all patches of the first picture, then of the next one, with seeds that follow each other. Runs in a
        thread."""
        prepared = []
        for i, patches in enumerate(each):
            settings = self.settings | {"seed": self.seed_of(i)}
            for patch in patches:
                prepared += self.service.prepare(patch.request(self.body.prompt, **settings))
        return prepared

    def seed_of(self, i: int) -> int:
        return (self.seed + i) % (1 << 63)

    async def wait(self, tickets: list[Ticket], hear: Callable[[Answer], None] = lambda answer: None) -> list[Any]:
        # A stream hears by itself that the client has gone.
        http = None if self.body.stream else self.http
        answers = await wait_for(http, self.service, tickets, self.deadline, hear)
        if answers is None:
            raise ClientGoneError
        return answers

    # ------------------------------------------------------------------ what the client sees

    def looking(self, now: Round) -> Callable[[Answer], None]:
        """Hears the answers of a round, and asks for a preview of the picture whenever all its hands are a step
        further."""
        last: dict[str, Preview | PictureMade] = {}
        done, steps = self.steps, now.tickets[0].cost

        def hear(answer: Answer) -> None:
            if isinstance(answer, (Preview, PictureMade)):
                last[answer.id] = answer
            if not isinstance(answer, Preview) or len(last) < len(now.tickets):
                return
            if all(isinstance(one, PictureMade) or one.step >= answer.step for one in last.values()):
                self.previews -= 1
                far = {"step": done + answer.step, "steps": done + now.rounds * steps}
                parts = [last[ticket.id] for ticket in now.tickets]
                self.looks.put_nowait(partial(self.preview, now.pictures[0], now.each[0], parts, far))

        return hear

    def preview(
        self, picture: np.ndarray, patches: list[Patch], parts: list[Preview | PictureMade], far: dict[str, int]
    ) -> dict[str, Any]:
        """The fields of a partial image: the whole picture, with its hands as they are now. Runs in a thread."""
        size = self.service.bundle.manifest.image_size
        for patch, one in zip(patches, parts, strict=True):
            picture = patch.paste(picture, one.image if isinstance(one, PictureMade) else preview(one.colours, size))
        return {"kind": "preview", **far, "b64_json": base64_of(encoded(small(picture)))}

    def skeletons(self) -> dict[str, Any]:
        """The fields of the first partial image: the hands that will be painted, over the picture. Runs in a thread."""
        image = draw(self.image.pixels, self.asked)
        values = {"kind": "hands", "step": 0, "hands": self.shown()}
        return values | {"b64_json": base64_of(encoded(small(image)))}

    def shown(self) -> list[dict[str, Any]]:
        """The hands that the request asked for, or that the detector found, as JSON."""
        return [as_json(self.finder.shown(seen, self.image.size)) for seen in self.asked]

    def entry(self, i: int, picture: np.ndarray) -> dict[str, Any]:
        """An entry of `data`. Runs in a thread."""
        body, service = self.body, self.service
        started = time.perf_counter()
        content = over(self.image.original, picture, body.output_format, body.output_compression)
        service.metrics.took("encoding", time.perf_counter() - started)
        entry: dict[str, Any] = {"seed": self.seed_of(i), "repaired": self.repaired[i]}
        if body.return_hands:
            entry["hands"] = self.shown()
        if self.painting.format == "url":
            name = service.keep_picture(content, body.output_format)
            return entry | {"url": f"{self.painting.base}/v1/files/{name}"}
        return entry | {"b64_json": base64_of(content)}


def small(image: np.ndarray) -> np.ndarray:
    """A picture uint8 [H, W, 3] whose longer side has at most SHOWN pixels."""
    share = SHOWN / max(image.shape[:2])
    if share >= 1:
        return image
    size = max(round(image.shape[1] * share), 1), max(round(image.shape[0] * share), 1)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0))
