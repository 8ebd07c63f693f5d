"""Options of other programs (diffusers, kohya's scripts, vLLM), and what to type here instead.

hint("--num-inference-steps", "hd-run", ["--steps", "--guidance"])     # "It is --steps here."
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import click

# Our option -> what other programs call it. The first of ours that the command has is named.
OTHERS = {
    "images-per-prompt": "n num-images-per-prompt num-images num-samples n-samples n-images images batch-count",
    "steps": "num-inference-steps inference-steps ddim-steps sampling-steps num-steps n-steps max-train-steps",
    "guidance": "guidance-scale cfg cfg-scale scale true-cfg-scale",
    "solver": "scheduler sampler sampling-method sampler-name sample-method",
    "output": "output-dir output-path outdir out-dir save-path output-folder",
    "scenes": "count num-scenes n-scenes num-samples",
    "prompts": "prompt prompt-file prompts-file from-file input",
    "hand-params": "hands hand hand-file",
    "init-image": "image init-img input-image source-image",
    "image": "init-image init-img input-image source-image",
    "mask": "mask-image inpaint-mask",
    "strength": "denoising-strength denoise image-strength",
    "learning-rate": "lr unet-lr",
    "batch": "train-batch-size per-device-train-batch-size bs",
    "batch-size": "bs max-batch-size",
    "batch-sizes": "max-batch-size batch-size",
    "accumulate": "gradient-accumulation-steps grad-accum",
    "precision": "mixed-precision fp16 bf16 fp8 int8 half dtype torch-dtype quantization",
    "image-size": "resolution height width size h w",
    "lora": "network-dim rank lora-rank lora-r network-weights lora-weights lora-path adapter loras",
    "lora-folder": "lora loras lora-dir adapter",
    "start": "pretrained-model-name-or-path model checkpoint init-from resume-from-checkpoint",
    "data": "train-data-dir dataset dataset-name dataset-config data-dir",
    "run": "logging-dir log-dir workdir output-dir",
    "devices": "gpus gpu gpu-ids num-gpus device-ids tensor-parallel-size data-parallel-size",
    "processes": "num-processes nproc workers num-workers jobs j",
    "workers": "num-workers dataloader-num-workers max-data-loader-n-workers",
    "api-keys": "api-key key",
    "name": "served-model-name model-name",
    "queue": "max-num-seqs max-queue queue-size",
    "threads": "num-threads cpu-threads intra-op-threads",
    "body": "smplh smpl smplh-path model-path",
}
# Options that we lack: what to do instead, by command.
_BUNDLE_FIRST = "The bundle comes first, without an option: hd-run BUNDLE PROMPT."
_SIZE = "Each request says its size, as size: WIDTHxHEIGHT in pixels, such as 512x768."
_LORA = "A bundle of its own holds an adapter: hd-engines merge BUNDLE OUT --lora FILE:SCALE."
_PRECISION = "A bundle has one precision. Export another: hd-export CHECKPOINT OUT --precision fp16."
_REQUEST = "Each request says it, as {}."
_NO_TRAINING = "hd-train trains, for example: hd-train pictures --help."
INSTEAD: dict[str, dict[str, str]] = {
    "image-size": {
        **dict.fromkeys(("hd-run", "request"), "Say the size of pictures as size: WIDTHxHEIGHT, such as 512x768."),
        **dict.fromkeys(("hd-serve", "hd-bench", "hd-engines"), _SIZE),
    },
    "lora": dict.fromkeys(("hd-bench", "hd-engines"), _LORA),
    "precision": dict.fromkeys(("hd-run", "hd-serve", "hd-bench", "hd-engines", "request"), _PRECISION),
    "devices": {
        "hd-run": "hd-run uses one GPU, which CUDA_VISIBLE_DEVICES chooses; --ray, after the prompts, uses all.",
        "hd-bench": "hd-bench uses one GPU, which CUDA_VISIBLE_DEVICES chooses.",
        "hd-export": "A plan is built on one GPU, which CUDA_VISIBLE_DEVICES chooses.",
        "hd-engines": "A plan is built on one GPU, which CUDA_VISIBLE_DEVICES chooses.",
        "hd-train": "torchrun trains on several GPUs: "
        "torchrun --nproc-per-node N -m handiffuser.training.cli -- pictures ...",
    },
    "start": {"hd-run": _BUNDLE_FIRST, "hd-serve": "The bundle comes first, without an option: hd-serve BUNDLE."},
    "images-per-prompt": {
        "hd-serve": "Each request says how many pictures it wants, as n; --max-n bounds it.",
        "hd-bench": "--batch-sizes says how many pictures are made at once.",
    },
    "steps": {
        "hd-serve": "Each request says its num_inference_steps; --max-steps bounds them.",
        "hd-export": "A run says its steps: hd-run --steps.",
    },
    "guidance": {
        "hd-serve": _REQUEST.format("guidance_scale"),
        "hd-export": "A run says its guidance: hd-run --guidance.",
    },
    "negative-prompt": {
        "hd-serve": "Each request says it, as negative_prompt; --default-negative-prompt is for those without one.",
    },
    "seed": {"hd-serve": _REQUEST.format("seed")},
    "solver": {"hd-serve": _REQUEST.format("solver"), "hd-export": "A run says its solver: hd-run --solver."},
    "learning-rate": {"hd-run": _NO_TRAINING, "hd-export": _NO_TRAINING},
    "batch": {"hd-run": "--batch-size says how many pictures are made at once."},
}


def hint(name: str, command: str, options: Iterable[str]) -> str:
    """A sentence that says what `name` is called here, or what to do instead; "" for an unknown name.

    name: as typed, with or without dashes. command: such as "hd-run"; "request" for settings in Python. options: what
    the command has, as typed.
    """
    wanted = _plain(name)
    has = {_plain(option): option for option in options}
    if wanted in has:
        return f"It is {has[wanted]} here."  # --negative_prompt
    meant = [ours for ours, others in OTHERS.items() if wanted == ours or wanted in others.split()]
    for ours in meant:
        if ours in has:
            return f"It is {has[ours]} here."
    for ours in (*meant, wanted):
        if command in INSTEAD.get(ours, {}):
            return INSTEAD[ours][command]
    return ""


def explained(error: click.ClickException) -> click.ClickException:
    """Adds the hint to an error about an unknown option. Returns any other error as it is."""
    import click

    if not isinstance(error, click.NoSuchOption) or error.ctx is None:
        return error
    program, _, _ = error.ctx.command_path.partition(" ")
    said = hint(error.option_name, program, _options(error.ctx.command)) or _of_a_command(error, program)
    if not said:
        return error
    return click.UsageError(f"No such option: {error.option_name}. {said}", error.ctx)


def _of_a_command(error: click.NoSuchOption, program: str) -> str:
    """A sentence where the user gave an option of `hd-train pictures` to `hd-train`."""
    import click

    context = error.ctx
    if context is None or not isinstance(context.command, click.Group):
        return ""
    for name in context.command.list_commands(context):
        command = context.command.get_command(context, name)
        if command is not None and (said := hint(error.option_name, program, _options(command))):
            where = f"It belongs after the command, such as {program} {name}."
            return f"{said} {where}" if said.startswith("It is") else said
    return ""


def _options(command: click.Command) -> list[str]:
    return [option for parameter in command.params for option in parameter.opts if option.startswith("-")]


def _plain(name: str) -> str:
    return name.lstrip("-").replace("_", "-").lower()
