"""The body of `POST /sdapi/v1/txt2img`: the fields of AUTOMATIC1111's web UI, as a `Generation`.

    body = Txt2Img(prompt="a fist", steps=8, sampler_name="Euler")
    solver, warnings = body.solver()
    generation = body.generation(service, solver)

The server refuses a field that it cannot honour and that asks for another picture (REFUSED). It names one that changes
the look alone (NAMED) in `warnings` of the answer's `info`, and unknown fields, too.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

from fastapi import Request as Http
from pydantic import ConfigDict, Field

from ..errors import RequestError
from ..settings import MAX_ADAPTERS, MAX_GUIDANCE, MAX_SEED, MAX_STEPS
from .fields import MAX_PROMPT, Generation, Nullable, Prompt
from .pictures import Painting, drawn_seed
from .service import Service

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
    "latent_mask": ("",),
    "refiner_checkpoint": ("", "None"),
}
PICTURES = ("init_images", "mask")
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
    "initial_noise_multiplier": (1,),
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
    "auth", "latent_sampler", "full_quality", "image_cfg_scale", "mask_round",
}  # fmt: skip
ADAPTER = re.compile(r"<(lora|lyco|hypernet):([^:<>]{1,200})([^<>]{0,100})>")
SCALE = re.compile(r":-?\d{0,3}\.?\d{1,6}(?=:|\Z)")  # another one behind it is the text encoder's in the web UI


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
                do = "Send pictures to /sdapi/v1/img2img." if name in PICTURES else "This server has none of it."
                raise RequestError(
                    f"{name} must be {json.dumps(off[0])}, got {json.dumps(given[name])[:60]}. {do}", name
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
        return said

    def adapters(self, service: Service) -> tuple[list[str], list[str]]:
        """The adapters of <lora:NAME:SCALE> in the prompt, and a sentence for each that is not here."""
        names, found, said = service.adapters.names(), [], []
        for kind, name, rest in ADAPTER.findall(self.prompt):
            scale = SCALE.match(rest)
            if kind != "hypernet" and name in names and (scale or not rest):
                found.append(f"{name}{scale[0] if scale else ''}")
            else:
                said.append(f"The prompt asks for the adapter {name}, which has no effect.")
        if len(found) > MAX_ADAPTERS:
            raise RequestError(
                f"prompt must name at most {MAX_ADAPTERS} adapters, got {len(found)}. Leave some out.", "prompt"
            )
        return found, said

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
            lora=self.adapters(service)[0] or None,
            n=self.batch_size * self.n_iter,
            size=f"{self.width or width}x{self.height or height}",
            response_format="b64_json",
        )

    async def painting(self, service: Service, solver: str | None, http: Http) -> Painting:
        """Raises RequestError."""
        return Painting(service, self.generation(service, solver), http)

    def parameters(self) -> dict[str, Any]:
        """What the answer repeats of the request."""
        return {name: value for name, value in self.model_dump().items() if name in type(self).model_fields}

    def notes(self) -> str:
        """What the picture's own text says beside the settings of every picture."""
        return ""


def spelled(name: str) -> str:
    return re.sub(r"[^a-z0-9+]", "", name.lower())


def idle(script: Any) -> bool:
    """Whether an entry of alwayson_scripts is switched off: no arguments, only false ones, or the first of them, which
    is the switch of the web UI's own scripts, or units that are not enabled."""
    args = script.get("args", []) if isinstance(script, dict) else script
    if isinstance(args, dict):
        args = list(args.values())
    if not args or not isinstance(args, list):
        return not args
    off = [one for one in args if not one or (isinstance(one, dict) and one.get("enabled") is False)]
    return args[0] is False or len(off) == len(args)


def changes(options: dict[str, Any]) -> list[str]:
    """The names of options that would change pictures, beside the model."""
    return [
        name[:60]
        for name, value in options.items()
        if name != "sd_model_checkpoint" and value is not None and value not in OPTIONS.get(name, ())
    ]
