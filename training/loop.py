"""One training loop for every stage: AdamW, cosine decay, clipping, EMA, resumable, on one process or several.

A stage gives a module and a function `loss(module, generator)`. Everything random comes from that generator, which is
seeded by (seed, step, rank): a run that was stopped goes on as if it had not been. State is kept in safetensors.

    fit("vae", model, loss, Plan(steps=2000, learning_rate=1e-3), Path("runs/demo/vae"))
"""

from __future__ import annotations

import copy
import json
import math
import os
import socket
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Loss = Callable[[nn.Module, torch.Generator], Tensor]
console = Console(stderr=True, markup=False)


@dataclass(frozen=True)
class Plan:
    """How long and how fast a stage is trained. `warmup` steps rise linearly, then a half cosine falls to zero."""

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.995
    seed: int = 0
    bf16: bool = False  # on CPUs with AMX or AVX-512 bf16, and on GPUs
    log_every: int = 50
    save_every: int = 500

    def rate(self, step: int) -> float:
        """Learning rate of a step in [0, steps)."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def generator_for(*parts: int) -> torch.Generator:
    """A generator whose state depends on all parts alone."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(seed)


def fit(
    name: str,
    module: nn.Module,
    loss: Loss,
    plan: Plan,
    folder: Path,
    on_save: Callable[[nn.Module, int], Any] | None = None,
) -> nn.Module:
    """Trains `module` and returns its exponential moving average, in evaluation mode.

    folder: where `state.safetensors` and `log.jsonl` are kept; a finished run is loaded and returned at once.
    on_save: called on the main process with the average and the step each time the state is saved (sample grids).
    """
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16" if plan.bf16 else "no")
    module.train().requires_grad_(True)
    for part in getattr(module, "fixed", ()):
        part.eval().requires_grad_(False)
    average = copy.deepcopy(module).eval().requires_grad_(False).to(accelerator.device)
    optimizer = torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad], weight_decay=plan.weight_decay, betas=(0.9, 0.99)
    )
    model, optimizer = accelerator.prepare(module, optimizer)
    plain = accelerator.unwrap_model(model)
    start = load_state(folder, plain, average, optimizer)
    if accelerator.is_main_process and start:
        console.print(f"{name}: goes on at step {start} of {plan.steps}")

    began, seen = time.monotonic(), 0.0
    for step in range(start, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        value = loss(model, generator_for(plan.seed, step, accelerator.process_index))
        accelerator.backward(value)
        accelerator.clip_grad_norm_(model.parameters(), plan.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_average(average, plain, min(plan.ema, (1 + step) / (10 + step)))
        seen = value.item() if step == start else 0.95 * seen + 0.05 * value.item()
        if not math.isfinite(seen):
            raise FloatingPointError(f"{name}: the loss became {value.item()} at step {step}; lower the learning rate.")
        last = step + 1 == plan.steps
        if accelerator.is_main_process and ((step + 1) % plan.log_every == 0 or last):
            speed = (step + 1 - start) / (time.monotonic() - began)
            left = (plan.steps - step - 1) / speed / 60
            console.print(
                f"{name}: step {step + 1}/{plan.steps}  loss {seen:.4f}  {speed:.2f} steps/s  {left:.0f} min left"
            )
            with open(folder / "log.jsonl", "a") as log:
                log.write(json.dumps({"step": step + 1, "loss": seen, "steps_per_second": speed}) + "\n")
        if accelerator.is_main_process and ((step + 1) % plan.save_every == 0 or last):
            save_state(folder, plain, average, optimizer, step + 1)
            if on_save is not None:
                on_save(average, step + 1)
        accelerator.wait_for_everyone() if last else None
    return average.eval()


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)
    for mine, other in zip(average.buffers(), module.buffers(), strict=True):
        mine.copy_(other)


def save_state(folder: Path, module: nn.Module, average: nn.Module, optimizer: Any, step: int) -> None:
    """Everything that going on needs, in one file, written beside and renamed."""
    tensors: dict[str, Tensor] = {}
    for key, value in module.state_dict().items():
        tensors[f"model.{key}"] = value
    for key, value in average.state_dict().items():
        tensors[f"ema.{key}"] = value
    inner = getattr(optimizer, "optimizer", optimizer)
    for key, parameter in module.named_parameters():
        for moment, value in inner.state.get(parameter, {}).items():
            tensors[f"{moment}.{key}"] = torch.as_tensor(value)
    unique = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    temporary = folder / "state.tmp"
    save_file(unique, temporary, metadata={"step": str(step)})
    temporary.replace(folder / "state.safetensors")


def load_state(folder: Path, module: nn.Module, average: nn.Module, optimizer: Any) -> int:
    """Restores what `save_state` wrote; returns the step to go on at, 0 where there is nothing."""
    path = folder / "state.safetensors"
    if not path.exists():
        return 0
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
    tensors = load_file(path)
    for prefix, target in (("model.", module), ("ema.", average)):
        target.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
    inner = getattr(optimizer, "optimizer", optimizer)
    for key, parameter in module.named_parameters():
        for moment in ("step", "exp_avg", "exp_avg_sq"):
            if f"{moment}.{key}" in tensors:
                inner.state[parameter][moment] = tensors[f"{moment}.{key}"].to(
                    "cpu" if moment == "step" else parameter.device
                )
    return step


def finished(folder: Path, steps: int) -> bool:
    """Whether a stage's run has reached its last step."""
    from safetensors import safe_open

    path = folder / "state.safetensors"
    if not path.exists():
        return False
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"]) >= steps


def run_processes(function: Callable[..., None], processes: int, *args: Any) -> None:
    """Calls `function(*args)` in several one-thread processes that average their gradients (gloo).

    On a CPU, two processes of one thread are far faster than one process of two.
    """
    if processes <= 1:
        function(*args)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_process, (processes, port, function, args), nprocs=processes)


def _process(rank: int, processes: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Grad strides do not match")  # costs nothing at these sizes
    function(*args)
