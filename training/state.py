"""What a run keeps of a stage: the state that training goes on from, and the average that it has learned.

State is one safetensors file, written beside and renamed.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import TrainingError
from ..files import written
from .processes import full, local, put
from .recipe import Plan

if TYPE_CHECKING:
    from .loop import Stage

STATE = "state.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW


class Average:
    """The exponential moving average of some parameters, float32, sharded as they are."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.values = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, decay: float) -> None:
        mine = [local(value) for value in self.values.values()]
        torch._foreach_lerp_(mine, [local(p.detach()) for p in self.parameters.values()], 1 - decay)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        for name, parameter in self.parameters.items():
            local(parameter.detach()).copy_(local(self.values[name]))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block, the parameters hold the average."""
        kept = {name: local(p.detach()).clone() for name, p in self.parameters.items()}
        self.copy_to_parameters()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    local(parameter.detach()).copy_(kept[name])


# Settings that change only speed, memory and output.
FREE = ("log_every", "save_every", "validate_every", "workers", "resident", "compile", "shard", "accumulate",
        "gradient_checkpointing")  # fmt: skip


def changes(folder: Path, plan: Plan) -> str:
    """The settings of a stage's saved state that differ from the plan's, and the change of its learning rate; or "".

    "steps 1000 (now 2000); the learning rate would be 0 here and becomes 5e-05".
    """
    path = folder / STATE
    if not path.exists():
        return ""
    with safe_open(path, "pt") as file:
        known = file.metadata()
    before = json.loads(known["plan"])
    now = msgspec.to_builtins(plan)
    other = [f"{name} {before[name]} (now {now[name]})" for name in now
             if name in before and before[name] != now[name] and name not in FREE]  # fmt: skip
    if not other:
        return ""
    step = int(known["step"])
    names = before.keys() & {"steps", "learning_rate", "warmup", "schedule"}
    rates = (msgspec.structs.replace(plan, **{name: before[name] for name in names}).rate(step), plan.rate(step))
    if step < plan.steps and rates[0] != rates[1]:
        other[-1] += "; the learning rate would be {:.3g} here and becomes {:.3g}".format(*rates)
    return ", ".join(other)


def data_of(folder: Path) -> str:
    """The digest of the dataset that a stage's saved state was trained on; "" without a state."""
    path = folder / STATE
    if not path.exists():
        return ""
    with safe_open(path, "pt") as file:
        return str(file.metadata()["data"])


def identity(plan: Plan, stage: Stage) -> dict[str, str]:
    """The settings that a run must keep."""
    return {"batch": str(plan.batch), "seed": str(plan.seed), "data": stage.data}


def save_state(
    folder: Path,
    plan: Plan,
    stage: Stage,
    average: Average,
    optimizer: torch.optim.Optimizer,
    step: int,
    main: bool,
    seconds: float = 0.0,
) -> None:
    """Writes the state to go on from, after `step` steps and `seconds` of training. All processes must call it.

    Raises TrainingError when the disk is full; the last state stays.
    """
    tensors: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        whole = full(value.detach())
        if main:
            tensors[name] = whole.cpu().contiguous().clone()

    for name, parameter in average.parameters.items():
        keep(f"model.{name}", parameter)
        keep(f"ema.{name}", average.values[name])
        for moment in MOMENTS:
            if moment in optimizer.state[parameter]:
                keep(f"{moment}.{name}", torch.as_tensor(optimizer.state[parameter][moment]))
    kept = stage.module.state_dict()
    for name, buffer in stage.module.named_buffers():
        if name in kept:
            keep(f"buffer.{name}", buffer)
    if not main:
        return
    notes = {
        "step": str(step),
        "seconds": str(seconds),
        "plan": json.dumps(msgspec.to_builtins(plan)),
        **identity(plan, stage),
    }
    try:
        with written(folder / STATE) as temporary:
            save_file(tensors, temporary, metadata=notes)
    except Exception as error:  # for a full disk, safetensors raises its own kind
        free = shutil.disk_usage(folder).free
        raise TrainingError(
            f"The state of {stage.name} cannot be written to {folder} ({error}; {free / 1e9:.1f} GB free). Free some "
            "space and run the same command again: it goes on from the last saved step."
        ) from error


@torch.no_grad()
def load_state(
    folder: Path,
    plan: Plan,
    stage: Stage,
    average: Average,
    optimizer: torch.optim.Optimizer,
) -> int:
    """Restores the state that `save_state` wrote; returns its step, 0 for a new run. Raises TrainingError."""
    path = folder / STATE
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            known = file.metadata()
        tensors = load_file(path)
    except Exception as error:  # safetensors' own
        raise TrainingError(
            f"{path} is damaged ({error}). Remove it to begin {stage.name} again, or put back a copy of it."
        ) from error
    for name, wanted in identity(plan, stage).items():
        if known.get(name) != wanted:
            raise TrainingError(
                f"{name} must stay {known.get(name)} in {folder}, got {wanted}. Take the same as before, or name "
                "another --run."
            )
    for name, parameter in average.parameters.items():
        if f"model.{name}" not in tensors:
            raise TrainingError(f"{path} is of another network: it lacks {name}. Name another --run.")
        put(parameter.detach(), tensors[f"model.{name}"])
        put(average.values[name], tensors[f"ema.{name}"])
        for moment in MOMENTS:
            if f"{moment}.{name}" in tensors:
                value = tensors[f"{moment}.{name}"]
                if moment == "step":  # AdamW's fused kernel counts on its own device
                    fused = optimizer.defaults["fused"]
                    optimizer.state[parameter][moment] = value.to(parameter.device) if fused else value
                else:
                    optimizer.state[parameter][moment] = torch.zeros_like(parameter)
                    put(optimizer.state[parameter][moment], value)
    buffers = dict(stage.module.named_buffers())
    for name, value in tensors.items():
        if name.startswith("buffer.") and name[7:] in buffers:
            buffers[name[7:]].copy_(value)
    return int(known["step"])


def averages(folder: Path) -> dict[str, Tensor]:
    """A stage's averaged parameters and its buffers by name; empty without a state."""
    path = folder / STATE
    if not path.exists():
        return {}
    out = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
            kind, _, rest = name.partition(".")
            if kind in ("ema", "buffer"):
                out[rest] = file.get_tensor(name)
    return out


def spent(folder: Path) -> float:
    """Seconds of training behind a stage's saved state."""
    path = folder / STATE
    if not path.exists():
        return 0.0
    with safe_open(path, "pt") as file:
        return float(file.metadata().get("seconds", 0))


def finished(folder: Path, steps: int = 1, minutes: float = 0.0) -> bool:
    """Whether a stage's run has reached a step, or has trained for some minutes (above 0)."""
    path = folder / STATE
    if not path.exists():
        return False
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"]) >= steps or 0 < 60 * minutes <= spent(folder)
