"""Nodes of ComfyUI: load engines, make the hands of a prompt or of an image, edit hands, paint, repair.

Each node is a plain class in ComfyUI's form. The classes also run alone: they import ComfyUI, where it is there, for
its progress bar and its stop button.

    (engines,) = LoadEngines().load("demo", "auto", "auto", 8)
    image, mask, hands = Paint().paint(engines, "two open hands", seed=3)

`HANDIFFUSER` is a loaded `HanDiffuser`. `HANDIFFUSER_LORA` is a list of adapters, FILE:SCALE each, to load it with.
`HANDS` is a list with the hands of each picture, as in `Picture.hands`. `IMAGE` and `MASK` are ComfyUI's: see
`tensors.py`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from handiffuser import (
    SETTINGS,
    DetectionError,
    EngineError,
    Failure,
    HanDiffuser,
    Picture,
    Request,
    RequestError,
    find_hands,
    repair_hands,
    save_hands,
)
from handiffuser.editing import edit, gestures, mirrored, swapped
from PIL import Image

from .tensors import Hands, as_image, as_mask, as_masks, as_pictures, skeletons

CATEGORY = "HanDiffuser"
AS_FOUND = "as it is"  # a gesture that does not change
OWN = "the bundle's"  # a setting that the bundle's default decides
MAX_SEED = 2**53 - 1  # the page's numbers are exact up to here

PROMPT = ("STRING", {"multiline": True, "default": "a right hand making a fist, blue background"})
SEED = ("INT", {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True})
COUNT = ("INT", {"default": 1, "min": 1, "max": 256, "tooltip": "Pictures, with the seeds seed, seed + 1, ..."})
SIDE = ("INT", {"default": 0, "min": 0, "max": 4096, "step": 8, "tooltip": f"In pixels. 0: {OWN}."})
PLAIN = ("BOOLEAN", {"default": False, "tooltip": SETTINGS["plain_prompts"].help})


def number(name: str, least: float) -> tuple[str, dict[str, Any]]:
    """The widget of a setting; `least`, below its bounds, is the bundle's own value."""
    setting = SETTINGS[name]
    kind = "INT" if setting.kind is int else "FLOAT"
    about = {"default": least, "min": least, "max": setting.most, "step": 1 if setting.kind is int else 0.1}
    return kind, about | {"tooltip": f"{setting.help} {least:g}: {OWN}."}


def choice(name: str) -> tuple[list[str], dict[str, Any]]:
    return [OWN, *SETTINGS[name].choices], {"default": OWN, "tooltip": SETTINGS[name].help}


def asked(**settings: Any) -> dict[str, Any]:
    """The settings that the user gave: not those of OWN, nor numbers below the bounds of theirs."""
    return {
        name: value
        for name, value in settings.items()
        if value != OWN and not (isinstance(value, (int, float)) and value < SETTINGS[name].least)
    }


class Watch:
    """ComfyUI's progress bar, and whether its user has pressed stop. Without ComfyUI it does nothing."""

    def __init__(self, steps: int) -> None:
        self.done, self.bar, self.management = 0, None, None
        try:
            import comfy.model_management
            import comfy.utils
        except ImportError:
            return
        self.bar, self.management = comfy.utils.ProgressBar(steps), comfy.model_management

    def step(self, count: int) -> None:
        self.done += count
        if self.bar is not None:
            self.bar.update_absolute(self.done)

    @property
    def stopped(self) -> bool:
        return self.management is not None and self.management.processing_interrupted()

    def end(self) -> None:
        """Raises ComfyUI's exception if its user has pressed stop."""
        if self.management is not None:
            self.management.throw_exception_if_processing_interrupted()


def prepared(engines: HanDiffuser, request: Request, seed: int, count: int) -> list[Request]:
    """`count` requests with the seeds seed, seed + 1, ... Raises RequestError for what the bundle cannot run."""
    requests, refused = engines.prepare([request], seed, count)
    for _, sentence in refused:
        raise RequestError(sentence)
    return requests


def run(engines: HanDiffuser, requests: list[Request]) -> list[Picture]:
    """Pictures in the order of their requests. Raises EngineError where one fails, and ComfyUI's exception on stop."""
    watch = Watch(sum(request.steps or 0 for request in requests))

    def lazily() -> Iterator[Request]:
        for request in requests:
            if watch.stopped:
                return
            yield request

    def on_event(kind: str, count: int) -> None:
        if kind == "steps":
            watch.step(count)
        if watch.stopped:  # the requests under way leave at the next step, so that the engines can be used again
            for request in requests:
                engines.cancel(str(request.id))

    made: dict[str, Picture] = {}
    failed: list[Failure] = []
    for result in engines.run(lazily(), on_event):
        if isinstance(result, Failure):
            failed.append(result)
        else:
            made[result.id] = result
    watch.end()
    for failure in failed:
        raise EngineError(f"{failure.request.prompt!r}: {failure.sentence}")
    say(sentence for picture in made.values() for sentence in picture.warnings)
    return [made[str(request.id)] for request in requests]


def say(sentences: Iterable[str]) -> None:
    """Each once, in ComfyUI's log."""
    for sentence in dict.fromkeys(sentences):
        logging.warning("HanDiffuser: %s", sentence)


def adapter_files() -> dict[str, str]:
    """Name -> file of each adapter in ComfyUI's folders of LoRAs; none without ComfyUI. It never reads pickles."""
    try:
        import folder_paths
    except ImportError:
        return {}
    names = [name for name in folder_paths.get_filename_list("loras") if name.endswith(".safetensors")]
    found = {name: folder_paths.get_full_path("loras", name) for name in names}
    return {name: path for name, path in found.items() if path}  # a link that leads nowhere has none


class LoadLora:
    """Chooses an adapter for `LoadEngines`, which merges it when it loads: so it costs no time in a step."""

    CATEGORY, FUNCTION = CATEGORY, "choose"
    RETURN_TYPES, RETURN_NAMES = ("HANDIFFUSER_LORA",), ("lora",)
    DESCRIPTION = (
        "Chooses an adapter (LoRA, .safetensors) of ComfyUI's folder models/loras. Connect it to Load HanDiffuser, or "
        "to another LoRA node to take both. It changes the picture; the hands stay those of the prompt."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        strength = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01, "tooltip": "0 changes nothing."}
        return {
            "required": {"lora_name": (list(adapter_files()), {}), "strength": ("FLOAT", strength)},
            "optional": {"lora": ("HANDIFFUSER_LORA", {"tooltip": "Further adapters."})},
        }

    def choose(self, lora_name: str, strength: float, lora: list[str] | None = None) -> tuple[list[str]]:
        files = adapter_files()
        if lora_name not in files:
            raise RequestError(
                f"lora_name must be a .safetensors file of models/loras, got {lora_name!r}. Put the file there.", "lora"
            )
        return ([*(lora or ()), f"{files[lora_name]}:{strength}"],)


class LoadEngines:
    """Loads a bundle or an engines folder. ComfyUI keeps it until an input changes."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = ("HANDIFFUSER",), ("engines",)
    DESCRIPTION = "Loads a folder that hd-export made, or the word demo for the model that ships with the package."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {
                "engines": ("STRING", {"default": "demo"}),
                "backend": (list(HanDiffuser.BACKENDS), {"default": "auto"}),
                "device": (list(HanDiffuser.DEVICES), {"default": "auto"}),
                "batch_size": ("INT", {"default": 8, "min": 1, "max": 256, "tooltip": "Pictures made at once."}),
            },
            "optional": {"lora": ("HANDIFFUSER_LORA",)},
        }

    def load(
        self, engines: str, backend: str, device: str, batch_size: int, lora: list[str] | None = None
    ) -> tuple[HanDiffuser]:
        name = engines.strip() or "demo"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = HanDiffuser.load(name, device, batch_size=batch_size, backend=backend, lora=lora)
        say(str(one.message) for one in caught if one.category is RuntimeWarning)
        return (loaded,)


class HandsOfPrompt:
    """The hands of a prompt, without a picture."""

    CATEGORY, FUNCTION = CATEGORY, "make"
    RETURN_TYPES, RETURN_NAMES = ("HANDS", "IMAGE"), ("hands", "skeleton")
    DESCRIPTION = "Makes the hands that a prompt describes, without a picture: SMPL-H parameters and their skeleton."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {"engines": ("HANDIFFUSER",), "prompt": PROMPT, "seed": SEED, "count": COUNT},
            "optional": {
                "hand_steps": number("hand_steps", 0),
                "hand_guidance": number("hand_guidance", -1),
                "hand_solver": choice("hand_solver"),
                "plain_prompts": PLAIN,
            },
        }

    def make(
        self, engines: HanDiffuser, prompt: str, seed: int = 0, count: int = 1, **settings: Any
    ) -> tuple[list[Hands], Any]:
        requests = prepared(engines, Request(prompt, **asked(**settings)), seed, count)
        watch, hands = Watch(count), []
        for first in range(0, count, engines.batch_size):
            watch.end()
            for made in engines.hands(requests[first : first + engines.batch_size]):
                if isinstance(made, Failure):
                    raise EngineError(f"{prompt!r}: {made.sentence}")
                hands.append(made)
                watch.step(1)
        return hands, skeletons(hands)


class HandsOfImage:
    """The hands of an image: found, and fitted to the bundle's body."""

    CATEGORY, FUNCTION = CATEGORY, "find"
    RETURN_TYPES, RETURN_NAMES = ("HANDS", "IMAGE"), ("hands", "found")
    DESCRIPTION = (
        "Finds the hands of each image with MediaPipe, a left and a right one. 'for a new picture' shows small hands "
        "nearer, for Paint; 'in this image' keeps their places, for Repair. 'found' shows how sure each is."
    )
    PLACES = ("for a new picture", "in this image")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        places = (list(cls.PLACES), {"default": cls.PLACES[0]})
        return {"required": {"engines": ("HANDIFFUSER",), "image": ("IMAGE",), "places": places}}

    def find(self, engines: HanDiffuser, image: Any, places: str) -> tuple[list[Hands], Any]:
        pictures = as_pictures(image)
        watch, told = Watch(len(pictures)), []
        for one in find_hands(engines, pictures, whole=places == self.PLACES[1]):
            if not one.arrays:
                raise DetectionError(one.said[0])
            told.append(one)
            watch.step(1)
            watch.end()
        say(sentence for one in told for sentence in one.said)
        return [one.arrays for one in told], as_image([one.drawing for one in told])


class RepairHands:
    """Paints the hands of an image again, and leaves all other pixels as they are."""

    CATEGORY, FUNCTION = CATEGORY, "repair"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "MASK"), ("image", "painted")
    DESCRIPTION = (
        "Paints the hands of each image again, at the model's size, and leaves all other pixels as they are. Without "
        "hands it takes those that it finds; connect hands ('in this image') to paint those instead."
    )
    SIDES = ("both", "left", "right")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        on = {"default": False, "tooltip": "Also hands whose pose is not sure."}
        return {
            "required": {
                "engines": ("HANDIFFUSER",),
                "image": ("IMAGE",),
                "seed": SEED,
                "gesture": ([AS_FOUND, *gestures()], {"default": AS_FOUND, "tooltip": "What every hand shall do."}),
                "side": (list(cls.SIDES), {"default": "both"}),
                "every_hand": ("BOOLEAN", on),
            },
            "optional": {
                "caption": (
                    "STRING",
                    {"default": "", "tooltip": "Empty: made of the image's colours."},
                ),
                "steps": number("steps", 0),
                "guidance": number("guidance", -1),
                "denoise": number("strength", -1),
                "hands": ("HANDS",),
            },
        }

    def repair(
        self,
        engines: HanDiffuser,
        image: Any,
        seed: int = 0,
        gesture: str = AS_FOUND,
        side: str = "both",
        every_hand: bool = False,
        caption: str = "",
        denoise: float = -1,
        hands: list[Hands] | None = None,
        **settings: Any,
    ) -> tuple[Any, Any]:
        pictures = as_pictures(image)
        if hands is not None and len(hands) not in (1, len(pictures)):
            raise RequestError(f"hands must be 1 or {len(pictures)}, the number of images, got {len(hands)}.", "hands")
        made, said = [], []
        for i, picture in enumerate(pictures):
            outcome = repair_hands(
                engines,
                picture,
                None if hands is None else hands[i % len(hands)],
                gesture=None if gesture == AS_FOUND else gesture,
                side=None if side == "both" else side,
                every=every_hand,
                caption=caption.strip() or None,
                run=partial(run, engines),
                seed=seed + i,
                **asked(strength=denoise, **settings),
            )
            made.append(outcome.image)
            said += outcome.said
        say(said)
        changed = [(new != old).any(-1).astype(np.float32) for new, old in zip(made, pictures, strict=True)]
        return as_image(made), as_masks(changed)


class EditHands:
    """Edits hands as the page of hd-serve does."""

    CATEGORY, FUNCTION = CATEGORY, "edit"
    RETURN_TYPES, RETURN_NAMES = ("HANDS", "IMAGE"), ("hands", "skeleton")
    DESCRIPTION = "Gives a hand a gesture, mirrors the picture's hands, or swaps their poses. No model runs."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        gesture = ([AS_FOUND, *gestures()], {"default": AS_FOUND})
        return {
            "required": {
                "hands": ("HANDS",),
                "left_hand": gesture,
                "right_hand": gesture,
                "mirror": ("BOOLEAN", {"default": False, "tooltip": "The mirror image: a left hand becomes a right."}),
                "swap": ("BOOLEAN", {"default": False, "tooltip": "Both hands stay, and exchange their poses."}),
            },
            "optional": {
                "person": ("INT", {"default": 1, "min": 1, "max": 8, "tooltip": "Whose hands, from the left."}),
            },
        }

    def edit(
        self, hands: list[Hands], left_hand: str, right_hand: str, mirror: bool, swap: bool, person: int = 1
    ) -> tuple[list[Hands], Any]:
        steps: list[Callable[[Hands], Hands]] = []
        for side, gesture in (("left", left_hand), ("right", right_hand)):
            if gesture in gestures():
                steps.append(partial(edit, gesture=(side, gesture), person=person - 1))
        steps += [mirrored] * mirror + [partial(swapped, person=person - 1)] * swap
        edited = list(hands)
        for step in steps:
            edited = [step(one) for one in edited]
        return edited, skeletons(edited)


class Paint:
    """Paints pictures of a prompt, with its own hands or with given ones, over an image or from nothing."""

    CATEGORY, FUNCTION = CATEGORY, "paint"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "MASK", "HANDS"), ("image", "hand_mask", "hands")
    DESCRIPTION = (
        "Paints a prompt. Connect hands to paint these instead of the prompt's own. Connect an image to paint it "
        "again, and a mask to paint the part of it where the mask is white."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {"engines": ("HANDIFFUSER",), "prompt": PROMPT, "seed": SEED, "count": COUNT},
            "optional": {
                "negative_prompt": ("STRING", {"multiline": True, "default": ""}),
                "steps": number("steps", 0),
                "guidance": number("guidance", -1),
                "solver": choice("solver"),
                "hands": ("HANDS",),
                "image": ("IMAGE",),
                "mask": ("MASK",),
                "denoise": number("strength", -1),
                "plain_prompts": PLAIN,
                "width": SIDE,
                "height": SIDE,
            },
        }

    def paint(
        self,
        engines: HanDiffuser,
        prompt: str,
        seed: int = 0,
        count: int = 1,
        hands: list[Hands] | None = None,
        image: Any = None,
        mask: Any = None,
        denoise: float = -1,
        width: int = 0,
        height: int = 0,
        **settings: Any,
    ) -> tuple[Any, Any, list[Hands]]:
        if mask is not None and image is None:
            raise RequestError("mask must come with an image. Connect one, or leave mask out.", "mask")
        given = self._pictures(image, mask)
        count = self._count(count, hands=hands, image=given)
        if given is not None:
            settings["strength"] = denoise
        if width or height:
            own = engines.manifest.image_size
            settings["size"] = f"{width or own[1]}x{height or own[0]}"
        request = Request(prompt, **({"image": given[0][0]} if given else {}), **asked(**settings))
        with TemporaryDirectory(prefix="handiffuser-") as folder:  # a request names its hands by a file
            requests = []
            for i in range(count):
                own: dict[str, Any] = {}
                if hands is not None:
                    own["hands"] = str(Path(folder, f"{i}.hands.npz"))
                    save_hands(Path(own["hands"]), hands[i % len(hands)], prompt)
                if given is not None:
                    own["image"], own["mask"] = given[i % len(given)]
                requests += prepared(engines, replace(request, **own), seed + i, 1)
            pictures = run(engines, requests)
        found = [picture.hands for picture in pictures]
        shape = pictures[0].image.shape[:2]
        return as_image([picture.image for picture in pictures]), as_mask(found, *shape), found

    @staticmethod
    def _pictures(image: Any, mask: Any) -> list[tuple[np.ndarray, np.ndarray | None]] | None:
        """Each image and its mask, as large."""
        if image is None:
            return None
        pictures = as_pictures(image)
        if mask is None:
            return [(picture, None) for picture in pictures]
        masks = as_pictures(mask.reshape(-1, *mask.shape[-2:]))
        if len(masks) not in (1, len(pictures)):
            raise RequestError(f"mask must be 1 or {len(pictures)}, the number of images, got {len(masks)}.", "mask")
        each = [Image.fromarray(masks[i % len(masks)]) for i in range(len(pictures))]
        return [
            (picture, np.asarray(one.resize(picture.shape[1::-1], Image.Resampling.BILINEAR)))
            for picture, one in zip(pictures, each, strict=True)
        ]

    @staticmethod
    def _count(count: int, **given: list[Any] | None) -> int:
        """How many pictures there will be: one for each of several hands, or images."""
        for name, each in given.items():
            if each is None or len(each) == 1:
                continue
            if count not in (1, len(each)):
                raise RequestError(f"count must be 1 or {len(each)}, the number of {name}, got {count}.", "count")
            count = len(each)
        return count


NODES = {
    "HanDiffuserLoad": (LoadEngines, "Load HanDiffuser"),
    "HanDiffuserLora": (LoadLora, "LoRA for HanDiffuser"),
    "HanDiffuserHands": (HandsOfPrompt, "Hands of a prompt"),
    "HanDiffuserHandsOfImage": (HandsOfImage, "Hands of an image"),
    "HanDiffuserEdit": (EditHands, "Edit hands"),
    "HanDiffuserPaint": (Paint, "Paint with hands"),
    "HanDiffuserRepair": (RepairHands, "Repair hands"),
}
