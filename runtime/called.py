"""`pipeline(prompt, ...)` as users of diffusers call it: their names, their order of pictures, `.images`.

    pipeline = HanDiffuser.from_pretrained("org/bundle")
    output = pipeline("a right hand making a fist", num_inference_steps=20, generator=torch.Generator().manual_seed(7))
    output.images[0].save("fist.png")

What works otherwise here is refused by name, with what is meant. `HanDiffuser.generate` gives pictures with their
metadata.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import EngineError, RequestError
from ..settings import MAX_SEED
from .noise import LATENTS
from .requests import KEYS, Request, check_names
from .results import Failure, Picture

if TYPE_CHECKING:
    from .pipeline import HanDiffuser

OUTPUT_TYPES = ("pil", "np")
_EMBEDS = "Give the text itself; it may have weights, as in (word:1.3)."
_LORA = 'Give an adapter in the call: lora="style.safetensors:0.8", or to from_pretrained for all pictures.'
# Arguments of diffusers' call that have another meaning here, or none -> what to do instead.
ARGUMENTS = {
    **dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), _EMBEDS),
    **dict.fromkeys(("ip_adapter_image", "ip_adapter_image_embeds"), "Bundles have no image prompts."),
    **dict.fromkeys(("timesteps", "sigmas"), "The solver chooses them: solver='dpm++2m-karras', for example."),
    **dict.fromkeys(("callback", "callback_steps"), "Give callback_on_step_end."),
    "latents": "The noise follows from the seed: give seed or generator.",
    "eta": "For a solver that draws noise, give solver='ddpm'.",
    "guidance_rescale": "Give a lower guidance_scale.",
    "clip_skip": "A bundle reads the layer that it was trained with.",
    "cross_attention_kwargs": _LORA,
}
# What diffusers' pipelines have beside the call -> what to do instead.
ATTRIBUTES = {
    **dict.fromkeys(("to", "cuda", "cpu", "device"), 'Choose when you load: from_pretrained(..., device="cuda").'),
    **dict.fromkeys(
        (
            *("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_attention_slicing"),
            *("enable_vae_slicing", "enable_vae_tiling", "enable_xformers_memory_efficient_attention"),
        ),
        "Engines plan their own memory. A smaller batch_size in from_pretrained takes less.",
    ),
    **dict.fromkeys(("scheduler", "text_encoder", "unet", "vae", "tokenizer"), "A bundle holds compiled graphs."),
    **dict.fromkeys(("load_lora_weights", "fuse_lora", "set_adapters"), _LORA),
    "load_textual_inversion": "Add placeholders to the checkpoint: hd-train init --embedding FILE.",
    "set_progress_bar_config": "It shows no bar: count steps in callback_on_step_end.",
    "safety_checker": "It has none.",
    "save_pretrained": "A bundle is a folder already: copy it, or upload it with hd-export --push.",
}
ATTRIBUTES["scheduler"] = "Choose a solver in the call: solver='dpm++2m'."
# Arguments of diffusers' `from_pretrained` -> what to do instead.
LOADING = {
    **dict.fromkeys(("torch_dtype", "dtype", "variant"), "A bundle has its precision: hd-export --precision fp16."),
    **dict.fromkeys(("safety_checker", "feature_extractor", "requires_safety_checker"), "Leave it out: it has none."),
    "use_safetensors": "Leave it out: a bundle holds ONNX graphs.",
    "scheduler": ATTRIBUTES["scheduler"],
    "device_map": 'Give device="cuda".',
    "cache_dir": "Set HF_HOME before Python starts.",
    "local_files_only": "Set HF_HUB_OFFLINE=1 before Python starts.",
    "token": "Log in with `hf auth login`, or set HF_TOKEN.",
}


@dataclass
class Output:
    """What a call makes, a place for each picture: prompts in their order, and each one's pictures together.

    images: images of Pillow's, or for output_type="np" float32 [N, H, W, 3] from 0 to 1. hands: as in `Picture.hands`.
    """

    images: Any
    hands: list[dict[str, np.ndarray]] = field(repr=False)
    seeds: list[int]
    pictures: list[Picture] = field(repr=False)


def refuse(names: Mapping[str, Any], table: Mapping[str, str], what: str) -> None:
    """Raises RequestError for the first name that the table has: that argument must be left out."""
    for name in names:
        if name in table:
            raise RequestError(f"{what} must be called without {name}. {table[name]}", name)


def call(
    pipeline: HanDiffuser,
    prompt: str | Sequence[str],
    *,
    negative_prompt: str | Sequence[str] | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    num_images_per_prompt: int = 1,
    generator: Any = None,
    seed: int | None = None,
    output_type: str = "pil",
    return_dict: bool = True,
    callback_on_step_end: Callable[..., Any] | None = None,
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    **settings: Any,
) -> Output:
    """See `HanDiffuser.__call__`."""
    refuse({name: value for name, value in settings.items() if value is not None}, ARGUMENTS, "The pipeline")
    settings = {name: value for name, value in settings.items() if value is not None and name not in ARGUMENTS}
    check_names(settings, "argument", [*KEYS[1:], "num_inference_steps", "guidance_scale"])
    if output_type not in OUTPUT_TYPES:
        raise RequestError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.", "output_type")
    if not return_dict:
        raise RequestError("return_dict must be True, got False. Take .images and .hands of the result.", "return_dict")
    if list(callback_on_step_end_tensor_inputs or ()) not in ([], ["latents"]):
        raise RequestError(
            f"callback_on_step_end_tensor_inputs must be ['latents'], got {callback_on_step_end_tensor_inputs!r}.",
            "callback_on_step_end_tensor_inputs",
        )
    if height is not None or width is not None:
        if settings.get("size") is not None:
            raise RequestError("size must be left out with height and width. Give one of them.", "size")
        own = pipeline.manifest.image_size
        settings["size"] = f"{width or own[1]}x{height or own[0]}"
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    negatives = [negative_prompt or ""] * len(prompts) if isinstance(negative_prompt, str | None) else negative_prompt
    if len(negatives) != len(prompts):
        raise RequestError(
            f"negative_prompt must be one text, or one for each of {len(prompts)} prompts, got {len(negatives)}.",
            "negative_prompt",
        )
    for name, value in (("steps", num_inference_steps), ("guidance", guidance_scale)):
        if value is not None:
            if name in settings:
                alias = "num_inference_steps" if name == "steps" else "guidance_scale"
                raise RequestError(f"{alias} must be given under one name, got {name} too.", name)
            settings[name] = value
    images = [(text, n) for text, n in zip(prompts, negatives, strict=True) for _ in range(num_images_per_prompt)]
    if num_images_per_prompt < 1:
        raise RequestError(
            f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}.", "num_images_per_prompt"
        )
    seeds = seeds_of(generator, seed, len(images))
    asked = [
        Request(text, negative_prompt=negative, seed=one, **settings)
        for (text, negative), one in zip(images, seeds, strict=True)
    ]
    pictures = _run(pipeline, asked, callback_on_step_end)
    found: Any = [picture.pil for picture in pictures]
    if output_type == "np":
        found = np.stack([picture.image for picture in pictures]).astype(np.float32) / 255
    return Output(found, [picture.hands for picture in pictures], seeds, pictures)


def seeds_of(generator: Any, seed: int | None, count: int) -> list[int]:
    """A seed for each of so many pictures. A generator stands for the seed that it was made with.

    generator: with `initial_seed()`, such as torch.Generator, or a list of them, one for each picture. One seed counts
    up: seed, seed + 1, ... Without either, pictures are new each time, as in diffusers.
    """
    if generator is not None and seed is not None:
        raise RequestError("seed and generator must not both be given. Give one of them.", "seed")
    if isinstance(generator, (list, tuple)):
        if len(generator) != count:
            raise RequestError(
                f"generator must be one, or one for each of {count} pictures, got {len(generator)}.", "generator"
            )
        return [_seed_of(one) for one in generator]
    first = _seed_of(generator) if generator is not None else secrets.randbelow(1 << 32) if seed is None else seed
    if not isinstance(first, int) or isinstance(first, bool):
        raise RequestError(f"seed must be a whole number from 0 to {MAX_SEED}, got {seed!r}.", "seed")
    return [first + n for n in range(count)]


def _seed_of(generator: Any) -> int:
    if not hasattr(generator, "initial_seed"):
        raise RequestError(
            f"generator must be a torch.Generator, got {type(generator).__name__}. Without PyTorch, give seed=7.",
            "generator",
        )
    return int(generator.initial_seed()) & MAX_SEED


def _run(pipeline: HanDiffuser, asked: list[Request], callback: Callable[..., Any] | None) -> list[Picture]:
    requests, refused = pipeline.prepare(asked)
    for line, sentence in refused:
        raise RequestError(f"Prompt {line}: {sentence}")
    watch = Watch(pipeline, requests, callback) if callback is not None else None
    made: dict[str, Picture] = {}
    for result in pipeline.run(requests, watch):
        if isinstance(result, Failure):
            raise EngineError(f"{result.request.prompt!r}: {result.sentence}")
        if watch is not None:
            watch.finish(result.id)
        made[result.id] = result
    return [made[str(request.id)] for request in requests]


class Watch:
    """Calls callback_on_step_end(pipeline, step, timestep, {"latents": ...}) for each step of each picture."""

    def __init__(self, pipeline: HanDiffuser, requests: Sequence[Request], callback: Callable[..., Any]) -> None:
        self.pipeline, self.callback = pipeline, callback
        self.times = {str(one.id): pipeline.bundle.table(LATENTS, one).timesteps for one in requests}
        self.done = dict.fromkeys(self.times, 0)

    def __call__(self, kind: str, count: int) -> None:
        if kind == "steps":
            for id in [id for id, done in self.done.items() if done < len(self.times[id])]:
                peek = self.pipeline.peek(id)
                if peek is not None and peek.step > self.done[id]:
                    self._call(id, peek.step, peek.latents)

    def finish(self, id: str) -> None:
        """Tells of the last steps of a picture that is done."""
        self._call(id, len(self.times[id]), None)

    def _call(self, id: str, until: int, latents: np.ndarray | None) -> None:
        for step in range(self.done[id], until):
            self.done[id] = step + 1
            given = {"latents": None if latents is None else latents[None].copy()}
            sent = dict(given)
            back = self.callback(self.pipeline, step, float(self.times[id][step]), sent)
            changed = isinstance(back, Mapping) and any(back.get(name) is not value for name, value in given.items())
            if changed or self.pipeline.__dict__.pop("_interrupt", False):
                raise RequestError(
                    "callback_on_step_end must not change latents or set _interrupt. To stop, raise an exception in it."
                )
