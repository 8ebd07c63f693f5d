"""The API of AUTOMATIC1111's web UI (`/sdapi/v1/...`), as far as its clients use it to make pictures.

    POST /sdapi/v1/txt2img {"prompt": "two open hands", "steps": 8, "width": 128, "height": 128}
    POST /sdapi/v1/img2img {"prompt": "an open hand", "init_images": ["iVBORw0KGgo..."], "denoising_strength": 0.6}

Open WebUI, SillyTavern, Krita plugins and chat bots speak it. A request becomes a `Generation`, so it has the same
queue, limits, keys and errors as one of `/v1/images/generations`. Names and meanings are those of the web UI's 1.10.

`txt2img` and `img2img` have the bodies, and say which fields the server refuses and which have no effect.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from fastapi import Request as Http
from fastapi.responses import JSONResponse, Response

from ..errors import RequestError
from ..settings import SOLVERS
from .dispatch import Ticket
from .guard import JSON, own_page
from .images import base64_of, encoded, preview, preview_steps
from .img2img import Img2Img
from .messages import Answer, Failed, PictureMade, Preview
from .pictures import Painting, begin, wait_for
from .problems import RESPONSES, ModelError
from .service import Service, UnfinishedError
from .txt2img import OPTIONS, SAMPLERS, SCHEDULES, Txt2Img, changes

PREFIX = "/sdapi/v1"
UPLOADS = {f"{PREFIX}/img2img": JSON}
# Paths without a body. Browsers send such a POST for pages of any origin, so `own_page` looks where it comes from.
BARE = frozenset(f"{PREFIX}/{name}" for name in ("interrupt", "skip", "refresh-checkpoints", "refresh-loras"))
LOOKS = 20  # at a picture on its way, for /progress
INTERRUPTED = "The request was interrupted before its picture was done. Send it again."


@dataclass(eq=False)
class Job:
    """A request on its way, for /progress and /interrupt."""

    owner: str
    name: str
    count: int
    painted: tuple[int, int] = (0, 0)  # height, width
    tickets: list[Ticket] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    steps: dict[str, float] = field(default_factory=dict)  # picture -> share of its steps that is done
    made: dict[str, PictureMade] = field(default_factory=dict)
    last: Preview | None = None
    interrupted: bool = False

    def hear(self, message: Answer) -> None:
        if isinstance(message, Preview):
            self.steps[message.id], self.last = message.step / message.steps, message
        elif isinstance(message, PictureMade):
            self.steps[message.id], self.made[message.id] = 1.0, message

    @property
    def progress(self) -> float:
        return sum(self.steps.values()) / self.count

    def interrupt(self, service: Service) -> None:
        """Ends it: what is made is its answer."""
        self.interrupted = True
        for ticket in self.tickets:
            while not ticket.inbox.empty():
                self.hear(ticket.inbox.get_nowait())
            service.dispatcher.cancel([ticket])
            ticket.inbox.put_nowait(self.made.get(ticket.id) or Failed(ticket.id, INTERRUPTED, 409))


def checked_model(service: Service, options: dict[str, Any]) -> None:
    """Raises ModelError where options name another model."""
    name = options.get("sd_model_checkpoint")
    if name is not None and name not in service.names:
        raise ModelError(
            f"sd_model_checkpoint must be {' or '.join(service.names)}, got {str(name)[:60]!r}. This server has one "
            "model."
        )


def make_router(service: Service) -> APIRouter:
    """The routes of the web UI."""
    router = APIRouter()
    jobs: list[Job] = []

    responses = RESPONSES | {409: RESPONSES[500] | {"description": INTERRUPTED}}

    @router.post(f"{PREFIX}/txt2img", responses=responses)
    async def txt2img(body: Txt2Img, http: Http) -> Response:
        """Makes pictures of a prompt."""
        return await made(body, http, "txt2img")

    @router.post(f"{PREFIX}/img2img", responses=responses)
    async def img2img(body: Img2Img, http: Http) -> Response:
        """Paints a picture again, or the part of it that is white in the mask."""
        with service.bringing():
            return await made(body, http, "img2img")

    async def made(body: Txt2Img, http: Http, name: str) -> Response:
        checked_model(service, body.override_settings)
        solver, warnings = body.solver()
        warnings += body.warnings() + body.adapters(service)[1]
        count, most = body.batch_size * body.n_iter, service.most
        if count > most:
            raise RequestError(
                f"batch_size * n_iter must be at most {most}, got {count}. Send several requests.", "batch_size"
            )
        job = Job(http.scope["handiffuser"]["owner"], name, count)
        try:
            painting = await body.painting(service, solver, http)
            painting.warnings += warnings
            job.painted = painting.painted
            jobs.append(job)
            return await answer(service, body, painting, job, http)
        except RequestError as error:
            raise translated(error) from None
        finally:
            if job in jobs:
                jobs.remove(job)

    def own(http: Http) -> list[Job]:
        return [job for job in jobs if job.owner == http.scope["handiffuser"]["owner"]]

    @router.get(f"{PREFIX}/progress")
    async def progress(http: Http, skip_current_image: bool = False) -> Response:
        """Where the client's own pictures are."""
        return JSONResponse(await asyncio.to_thread(progress_of, own(http), service, not skip_current_image))

    @router.post(f"{PREFIX}/interrupt")
    async def interrupt(http: Http) -> Response:
        """Stops the client's own pictures: their requests end with what is made."""
        own_page(http, service.front.cors)
        for job in own(http):
            job.interrupt(service)
        return JSONResponse({})

    router.post(f"{PREFIX}/skip")(interrupt)

    @router.get(f"{PREFIX}/options")
    async def options() -> Response:
        """The model, and values that this server has no choice of."""
        return JSONResponse({"sd_model_checkpoint": service.name, **{name: off[-1] for name, off in OPTIONS.items()}})

    @router.post(f"{PREFIX}/options", responses=RESPONSES)
    async def set_options(body: dict[str, Any]) -> Response:
        """Takes what `GET /options` gives: this server has one model, and no other option."""
        checked_model(service, body)
        for name in changes(body):
            raise RequestError(
                f"{name} must be left out. This server takes the option sd_model_checkpoint alone.", name
            )
        return JSONResponse(None)

    @router.get("/queue/status")
    async def queue() -> Response:
        """How many pictures wait. Clients ask this path of the web UI's page whether a server is there."""
        return JSONResponse({"msg": "estimation", "queue_size": len(service.dispatcher.queue)})

    add_lists(router, service)
    return router


def add_lists(router: APIRouter, service: Service) -> None:
    """Names that a client offers for choice, and empty lists of what this server has none of."""
    models = [
        {"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}
        for name in service.names
    ]
    samplers = [
        {"name": label, "aliases": [solver], "options": {"scheduler": "karras"} if label == "DPM++ 2M" else {}}
        for solver, label in SAMPLERS.items()
    ]
    schedules = [
        {"name": name, "label": name.title(), "aliases": None, "default_rho": -1.0, "need_inner_model": False}
        for name in SCHEDULES
    ]
    nothing: dict[str, Any] = {
        name: []
        for name in ("sd-vae", "upscalers", "latent-upscale-modes", "hypernetworks", "face-restorers",
                     "realesrgan-models", "prompt-styles", "script-info")
    }  # fmt: skip
    lists = nothing | {
        "sd-models": models,
        "samplers": samplers,
        "schedulers": schedules,
        "embeddings": {"loaded": {}, "skipped": {}},
        "scripts": {"txt2img": [], "img2img": []},
        "cmd-flags": {},
    }

    def give(content: Any) -> Any:
        async def listed() -> Response:
            return JSONResponse(content)

        return listed

    for name, content in lists.items():
        router.add_api_route(f"{PREFIX}/{name}", give(content), methods=["GET"], name=name)

    @router.get(f"{PREFIX}/loras")
    async def loras() -> Response:
        """The adapters that a prompt may name, as <lora:NAME:SCALE>."""
        return JSONResponse(await asyncio.to_thread(service.adapters.listed))

    async def refresh(http: Http) -> Response:
        """Does nothing: a running server keeps its model, and always sees its folder of adapters."""
        own_page(http, service.front.cors)
        return JSONResponse(None)

    for name in ("refresh-checkpoints", "refresh-loras"):
        router.add_api_route(f"{PREFIX}/{name}", refresh, methods=["POST"], name=name)


async def answer(service: Service, body: Txt2Img, painting: Painting, job: Job, http: Http) -> Response:
    """Paints, and answers as the web UI does. An interrupted request is answered with the pictures that are done."""
    job.tickets, deadline = await begin(painting, http, lambda steps: preview_steps(steps, LOOKS))
    try:
        if await wait_for(http, service, job.tickets, deadline, job.hear) is None:
            return Response(status_code=499)
    except UnfinishedError:
        if not job.interrupted or not job.made:
            raise
    done = [(ticket, job.made[ticket.id]) for ticket in job.tickets if ticket.id in job.made]
    notes = [infotext(ticket, painting) + body.notes() for ticket, _ in done]
    entries = [await painting.finished(*one, note) for one, note in zip(done, notes, strict=True)]
    images = [entry["b64_json"] for entry in entries] if body.send_images else []
    info = info_of(service, [ticket for ticket, _ in done], painting) | {"infotexts": notes}
    return JSONResponse({"images": images, "parameters": body.parameters(), "info": json.dumps(info)})


def infotext(ticket: Ticket, painting: Painting) -> str:
    """The settings of a picture in the web UI's form, which it also reads from a PNG."""
    request, service = ticket.request, painting.service
    height, width = painting.given
    negative = f"\nNegative prompt: {request.negative_prompt}" * bool(request.negative_prompt)
    sampler = SAMPLERS[request.solver or SOLVERS[0]]
    return (
        f"{said_prompt(ticket, painting)}{negative}\nSteps: {request.steps}, Sampler: {sampler}, "
        f"CFG scale: {request.guidance}, Seed: {request.seed}, Size: {width}x{height}, Model: {service.name}"
    )


def said_prompt(ticket: Ticket, painting: Painting) -> str:
    """The prompt with its adapters, as the client wrote them and may send them again."""
    tags = (one if ":" in one else f"{one}:1" for one in painting.body.lora or ())
    return " ".join([ticket.request.prompt, *(f"<lora:{one}>" for one in tags)])


def info_of(service: Service, tickets: list[Ticket], painting: Painting) -> dict[str, Any]:
    """The object that the web UI gives as text in `info`. `warnings` is ours."""
    request, seeds = tickets[0].request, [ticket.request.seed for ticket in tickets]
    height, width = painting.given
    count, prompt = len(tickets), said_prompt(tickets[0], painting)
    return {
        "prompt": prompt,
        "all_prompts": [prompt] * count,
        "negative_prompt": request.negative_prompt,
        "all_negative_prompts": [request.negative_prompt] * count,
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": seeds[0],
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": width,
        "height": height,
        "sampler_name": SAMPLERS[request.solver or SOLVERS[0]],
        "cfg_scale": request.guidance,
        "steps": request.steps,
        "batch_size": count,
        "restore_faces": False,
        "sd_model_name": service.name,
        "sd_model_hash": None,
        "index_of_first_image": 0,
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "clip_skip": 1,
        "warnings": painting.warnings,
    }


def progress_of(jobs: list[Job], service: Service, shown: bool) -> dict[str, Any]:
    """What the web UI says of the pictures on their way. shown: with a preview, as base64 of a PNG."""
    done = sum(job.progress for job in jobs) / len(jobs) if jobs else 0.0
    passed = time.monotonic() - min(job.began for job in jobs) if jobs else 0.0
    seen = next((job for job in reversed(jobs) if job.last is not None), None)
    last = seen.last if seen is not None else None
    image = None
    if shown and seen is not None and last is not None:
        image = base64_of(encoded(preview(last.colours, seen.painted)))
    state = {
        "skipped": False,
        "interrupted": any(job.interrupted for job in jobs),
        "stopping_generation": False,
        "job": jobs[0].name if jobs else "",
        "job_count": sum(job.count for job in jobs),
        "job_timestamp": "0",
        "job_no": sum(len(job.made) for job in jobs),
        "sampling_step": last.step if last is not None else 0,
        "sampling_steps": last.steps if last is not None else 0,
    }
    left = passed / done - passed if done else 0.0
    return {"progress": done, "eta_relative": left, "state": state, "current_image": image, "textinfo": None}


def translated(error: RequestError) -> RequestError:
    """The error with the web UI's name of the field."""
    sentence, param = str(error), error.param
    for ours, theirs in (
        ("num_inference_steps", "steps"),
        ("guidance_scale", "cfg_scale"),
        ("solver", "sampler_name"),
        ("strength", "denoising_strength"),
    ):
        sentence = re.sub(rf"\b{ours}\b", theirs, sentence)
        param = theirs if param == ours else param
    sentence = re.sub(r"\Asize must (be|have|fit)", r"width and height must \1", sentence).replace(
        " or auto, got", ", got"
    )
    return RequestError(sentence, "width" if param == "size" else param, error.code)
