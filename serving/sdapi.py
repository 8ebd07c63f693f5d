"""The API of AUTOMATIC1111's web UI (`/sdapi/v1/...`), as far as its clients use it to make pictures of a prompt.

    POST /sdapi/v1/txt2img {"prompt": "two open hands", "steps": 8, "width": 128, "height": 128}

Open WebUI, SillyTavern, Krita plugins and chat bots speak it. A request becomes a `Generation`, so it has the same
queue, limits, keys and errors as one of `/v1/images/generations`. Names and meanings are those of the web UI's 1.10.

The server refuses a field that it cannot honour and that asks for another picture (REFUSED). It names one that changes
the look alone (NAMED) in `warnings` of the answer's `info`, and unknown fields, too.

img2img is not here: a loop that starts from a picture belongs beside `Txt2Img`, with `init_images` and `mask`.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Request as Http
from fastapi.responses import JSONResponse, Response
from pydantic import ConfigDict, Field

from ..errors import RequestError
from ..settings import MAX_GUIDANCE, MAX_SEED, MAX_STEPS, SOLVERS
from .dispatch import Ticket
from .fields import MAX_PROMPT, Generation, Nullable, Prompt
from .guard import own_page
from .images import base64_of, encoded, preview, preview_steps
from .messages import Answer, Failed, PictureMade, Preview
from .pictures import Painting, begin, drawn_seed, wait_for
from .problems import RESPONSES, ModelError
from .service import Service, UnfinishedError

PREFIX = "/sdapi/v1"
# Paths without a body. Browsers send such a POST for pages of any origin, so `own_page` looks where it comes from.
BARE = frozenset(f"{PREFIX}/{name}" for name in ("interrupt", "skip", "refresh-checkpoints", "refresh-loras"))
LOOKS = 20  # at a picture on its way, for /progress
INTERRUPTED = "The request was interrupted before its picture was done. Send it again."

# The web UI's name of each solver.
SAMPLERS = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "euler": "Euler",
    "dpm++2m": "DPM++ 2M",
    "dpm++2m-karras": "DPM++ 2M Karras",
    "plms": "PLMS",
    "lcm": "LCM",
    "ddim-early": "DDIM early",
}
# Samplers and schedules of the web UI without a solver here. Clients set them unasked: the bundle's solver takes over.
LACKING = (
    "Euler a", "LMS", "Heun", "DPM2", "DPM2 a", "DPM++ 2S a", "DPM++ SDE", "DPM++ 2M SDE", "DPM++ 2M SDE Heun",
    "DPM++ 3M SDE", "DPM fast", "DPM adaptive", "Restart", "UniPC", "DDIM CFG++",
)  # fmt: skip
SCHEDULES = ("automatic", "karras", "uniform")
LACKING_SCHEDULES = (
    "exponential", "polyexponential", "sgm_uniform", "kl_optimal", "align_your_steps", "simple", "normal", "ddim",
    "beta", "turbo", "align_your_steps_gits", "align_your_steps_11", "align_your_steps_32",
)  # fmt: skip

# Fields that ask for another picture, with the values that ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "enable_hr": (False,),
    "styles": ([], [""], ["None"]),
    "script_name": ("", "None"),
    "subseed_strength": (0,),
    "init_images": ([],),
    "mask": ("",),
    "refiner_checkpoint": ("", "None"),
}
# Fields that change the look of a picture in the web UI, with the values that change nothing here.
NAMED: dict[str, tuple[Any, ...]] = {
    "restore_faces": (False,),
    "tiling": (False,),
    "seed_resize_from_h": (-1, 0),
    "seed_resize_from_w": (-1, 0),
    "eta": (0, 1),
    "s_churn": (0,),
    "s_tmin": (0,),
    "s_tmax": (0,),
    "s_noise": (1,),
    "s_min_uncond": (0,),
    "clip_skip": (0, 1),
    "refiner": ("", "none", "None"),
    "enable_refiner": (False,),
}
# Options that a request or POST /options may set, with the values that change nothing.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "sd_vae": ("", "None", "Automatic"),
    "CLIP_stop_at_last_layers": (0, 1),
    "eta_noise_seed_delta": (0,),
    "face_restoration_model": ("", "None"),
    "img2img_color_correction": (True, False),
    "samples_format": ("png",),
}
# Fields that change no picture: where the web UI writes files, and values of what is switched off. SillyTavern's server
# repeats url and auth, which its page sent.
IGNORED = {
    "save_images", "do_not_save_samples", "do_not_save_grid", "override_settings_restore_afterwards", "subseed",
    "script_args", "denoising_strength", "firstphase_width", "firstphase_height", "force_task_id", "infotext",
    "comments", "disable_extra_networks", "refiner_switch_at", "refiner_start", "include_init_images", "url",
    "auth", "latent_sampler", "full_quality",
}  # fmt: skip
ADAPTER = re.compile(r"<(lora|lyco|hypernet):([^:<>]{1,200})[^<>]{0,100}>")


class Txt2Img(Nullable):
    """`POST /sdapi/v1/txt2img`. As in the web UI, a number may be text, and null counts as a missing field."""

    model_config = ConfigDict(extra="allow")

    prompt: Prompt
    negative_prompt: Annotated[str, Field(max_length=MAX_PROMPT)] = ""
    seed: Annotated[int, Field(ge=-1, le=MAX_SEED, description="-1: the server draws one.")] = -1
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS, description="Without it, the bundle's.")] | None = None
    cfg_scale: Annotated[float, Field(ge=0, le=MAX_GUIDANCE, description="Without it, the bundle's.")] | None = None
    width: Annotated[int, Field(ge=1, le=100_000, description="Without it, the bundle's.")] | None = None
    height: Annotated[int, Field(ge=1, le=100_000, description="Without it, the bundle's.")] | None = None
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 1
    n_iter: Annotated[int, Field(ge=1, le=1024, description="Multiplies batch_size.")] = 1
    sampler_name: Annotated[str, Field(max_length=100)] | None = None
    sampler_index: Annotated[str, Field(max_length=100, description="The older name of sampler_name.")] | None = None
    scheduler: Annotated[str, Field(max_length=100)] | None = None
    send_images: bool = True
    override_settings: Annotated[dict[str, Any], Field(default_factory=dict)]
    alwayson_scripts: Annotated[dict[str, Any], Field(default_factory=dict)]

    def solver(self) -> tuple[str | None, list[str]]:
        """The solver of sampler_name and scheduler, and sentences about what is not here."""
        said: list[str] = []
        name, schedule = self.sampler_name or self.sampler_index or "", (self.scheduler or "automatic").lower()
        if schedule not in SCHEDULES + LACKING_SCHEDULES:
            raise RequestError(f"scheduler must be one of {', '.join(SCHEDULES)}, got {self.scheduler!r}.", "scheduler")
        known = {spelled(one): solver for solver, label in SAMPLERS.items() for one in (solver, label)}
        plain = re.sub(r"(karras|exponential)\Z", "", spelled(name))
        if not name or name == "None":
            solver = None
        elif (solver := known.get(spelled(name))) is None and plain not in map(spelled, LACKING) and plain not in known:
            raise RequestError(
                f"sampler_name must be one of {', '.join(SAMPLERS.values())}, got {name!r}.", "sampler_name"
            )
        elif solver is None:
            said.append(f"The sampler {name} is not here. The bundle's own made the picture.")
        if solver == "dpm++2m" and schedule in ("automatic", "karras"):  # as in the web UI since 1.9
            solver = "dpm++2m-karras"
        elif schedule not in ("automatic", "uniform") and solver != "dpm++2m-karras":
            said.append(f"The scheduler {self.scheduler} has no effect with this sampler.")
        return solver, said

    def warnings(self) -> list[str]:
        """A sentence for each field that has no effect. Raises RequestError for one that asks for another picture."""
        given = {**(self.model_extra or {})}
        for name, off in REFUSED.items():
            if name in given and given[name] not in off:
                raise RequestError(
                    f"{name} must be {json.dumps(off[0])}, got {json.dumps(given[name])[:60]}. This server makes "
                    "pictures of a prompt alone.",
                    name,
                )
        for name, script in self.alwayson_scripts.items():
            if not idle(script):
                raise RequestError(
                    f"alwayson_scripts must have scripts that are switched off, got {name[:60]!r}. This server has no "
                    "scripts.",
                    "alwayson_scripts",
                )
        said = [f"The option {name} has no effect." for name in changes(self.override_settings)]
        for name, value in given.items():
            if name in NAMED and value not in NAMED[name]:
                said.append(f"The field {name} has no effect.")
            elif name not in {*NAMED, *REFUSED, *IGNORED} and not name.startswith("hr_"):
                said.append(f"The field {name[:60]} is unknown and has no effect.")
        if found := ADAPTER.search(self.prompt):
            said.append(f"The prompt asks for the adapter {found[2]}, which has no effect.")
        return said

    def generation(self, service: Service, solver: str | None) -> Generation:
        """The same request to /v1/images/generations."""
        height, width = service.bundle.manifest.image_size
        return Generation(
            prompt=ADAPTER.sub("", self.prompt).strip() or self.prompt,
            negative_prompt=self.negative_prompt or None,
            seed=drawn_seed(None if self.seed < 0 else self.seed),
            num_inference_steps=self.steps,
            guidance_scale=self.cfg_scale,
            solver=solver,
            n=self.batch_size * self.n_iter,
            size=f"{self.width or width}x{self.height or height}",
            response_format="b64_json",
        )


def spelled(name: str) -> str:
    return re.sub(r"[^a-z0-9+]", "", name.lower())


def idle(script: Any) -> bool:
    """Whether an entry of alwayson_scripts is switched off: no arguments, or only false ones."""
    args = script.get("args", []) if isinstance(script, dict) else script
    if isinstance(args, dict):
        args = list(args.values())
    return not args or (isinstance(args, list) and not any(args))


def changes(options: dict[str, Any]) -> list[str]:
    """The names of options that would change pictures, beside the model."""
    return [
        name[:60]
        for name, value in options.items()
        if name != "sd_model_checkpoint" and value is not None and value not in OPTIONS.get(name, ())
    ]


@dataclass(eq=False)
class Job:
    """A request on its way, for /progress and /interrupt."""

    owner: str
    count: int
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

    @router.post(f"{PREFIX}/txt2img", responses=RESPONSES | {409: RESPONSES[500] | {"description": INTERRUPTED}})
    async def txt2img(body: Txt2Img, http: Http) -> Response:
        """Makes pictures of a prompt."""
        checked_model(service, body.override_settings)
        solver, warnings = body.solver()
        warnings += body.warnings()
        most = service.most
        if body.batch_size * body.n_iter > most:
            raise RequestError(
                f"batch_size * n_iter must be at most {most}, got {body.batch_size * body.n_iter}. Send several "
                "requests.",
                "batch_size",
            )
        job = Job(http.scope["handiffuser"]["owner"], body.batch_size * body.n_iter)
        try:
            painting = Painting(service, body.generation(service, solver), http)
            painting.warnings += warnings
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
        for name in ("sd-vae", "loras", "upscalers", "latent-upscale-modes", "hypernetworks", "face-restorers",
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

    async def refresh(http: Http) -> Response:
        """Does nothing: a running server keeps its model."""
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
    entries = [await painting.finished(ticket, made, infotext(ticket, painting)) for ticket, made in done]
    images = [entry["b64_json"] for entry in entries] if body.send_images else []
    parameters = {name: value for name, value in body.model_dump().items() if name in Txt2Img.model_fields}
    info = info_of(service, [ticket for ticket, _ in done], painting)
    return JSONResponse({"images": images, "parameters": parameters, "info": json.dumps(info)})


def infotext(ticket: Ticket, painting: Painting) -> str:
    """The settings of a picture in the web UI's form, which it also reads from a PNG."""
    request, service = ticket.request, painting.service
    height, width = painting.given
    negative = f"\nNegative prompt: {request.negative_prompt}" * bool(request.negative_prompt)
    return (
        f"{request.prompt}{negative}\nSteps: {request.steps}, Sampler: {SAMPLERS[request.solver or SOLVERS[0]]}, "
        f"CFG scale: {request.guidance}, Seed: {request.seed}, Size: {width}x{height}, Model: {service.name}"
    )


def info_of(service: Service, tickets: list[Ticket], painting: Painting) -> dict[str, Any]:
    """The object that the web UI gives as text in `info`. `warnings` is ours."""
    request, seeds = tickets[0].request, [ticket.request.seed for ticket in tickets]
    height, width = painting.given
    count = len(tickets)
    return {
        "prompt": request.prompt,
        "all_prompts": [request.prompt] * count,
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
        "infotexts": [infotext(ticket, painting) for ticket in tickets],
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "clip_skip": 1,
        "warnings": painting.warnings,
    }


def progress_of(jobs: list[Job], service: Service, shown: bool) -> dict[str, Any]:
    """What the web UI says of the pictures on their way. shown: with a preview, as base64 of a PNG."""
    done = sum(job.progress for job in jobs) / len(jobs) if jobs else 0.0
    passed = time.monotonic() - min(job.began for job in jobs) if jobs else 0.0
    last = next((job.last for job in reversed(jobs) if job.last is not None), None)
    image = None
    if shown and last is not None:
        factor = service.bundle.manifest.image_size[0] // service.bundle.manifest.latent_size[0]
        h, w = last.colours.shape[:2]
        image = base64_of(encoded(preview(last.colours, (factor * h, factor * w))))
    state = {
        "skipped": False,
        "interrupted": any(job.interrupted for job in jobs),
        "stopping_generation": False,
        "job": "txt2img" if jobs else "",
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
    for ours, theirs in (("num_inference_steps", "steps"), ("guidance_scale", "cfg_scale"), ("solver", "sampler_name")):
        sentence = re.sub(rf"\b{ours}\b", theirs, sentence)
        param = theirs if param == ours else param
    sentence = re.sub(r"\Asize must (be|have|fit)", r"width and height must \1", sentence).replace(
        " or auto, got", ", got"
    )
    return RequestError(sentence, "width" if param == "size" else param, error.code)
