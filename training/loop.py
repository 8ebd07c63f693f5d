"""One training loop for every stage: AdamW, warm-up and decay, clipping, EMA, validation; resumable to the sample.

    fit(Stage("vae", module, source, inputs), plan, Path("runs/demo/vae"))

It runs on one process, or data parallel on all those of `accelerate launch`, `torchrun` or (on a CPU) `run_processes`;
`plan.shard` spreads weights, optimizer and average over them (FSDP2). All randomness follows from (seed, step, row),
see `draws.py`: a run that is killed and goes on ends with the same weights, bit for bit on one CPU process.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..cpu import has_bf16
from ..errors import TrainingError
from .attention import plain_attention
from .draws import Draws, rows_of
from .processes import full, spread
from .recipe import Plan
from .state import STATE, Average, changes, load_state, save_state, spent

Rows = dict[str, Tensor]
MAX_BAD_STEPS = 3  # steps in a row without a finite loss or gradient, after which the run ends
VALIDATION_SAMPLES = 64  # held-out samples of the validation loss, at most
SLOW = 0.1
MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # our names of precisions -> accelerate's
console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)


@dataclass
class Stage:
    """A module and its data. `module(*inputs(rows, draws))` is the loss, a mean over the rows."""

    name: str
    module: nn.Module  # its parameters that require gradients are trained
    read: Callable[[Sequence[int]], Rows]  # sample numbers -> tensors [n, ...]
    inputs: Callable[[Rows, Draws], Sequence[Any]]  # adds all randomness; both may run in workers, on the CPU
    train: Any  # sample numbers, a sequence or an array
    held: Any = ()  # sample numbers to validate on
    data: str = ""  # digest of the data, which a run must keep
    on_save: Callable[[int], Any] | None = None  # called with the step, while the module holds its average
    fixed: list[nn.Module] = field(default_factory=list)  # frozen parts of the module
    slow: list[nn.Module] = field(default_factory=list)  # parts that learn at SLOW times the rate


def usable(precision: str) -> str:
    """A recipe's precision on this machine: "fp32" for bfloat16 on a CPU without instructions for it.

    There PyTorch's convolutions in bfloat16 take fifty times as long.
    """
    return "fp32" if precision == "bf16" and not torch.cuda.is_available() and not has_bf16() else precision


class _Steps(torch.utils.data.Dataset):
    """step -> the module's inputs for each part of this process's batch, noise included, made by workers ahead of time.

    With `device`, all rows stay there from the start: sixteen workers are too slow for a GPU with a model as small as
    the demo's.
    """

    def __init__(self, stage: Stage, plan: Plan, rank: int, world: int, device: torch.device | None = None) -> None:
        self.stage, self.plan, self.rank, self.world = stage, plan, rank, world
        self.device, self.rows = device or torch.device("cpu"), None
        if device is not None:
            try:
                self.rows = _to(stage.read([int(number) for number in stage.train]), device)
            except torch.OutOfMemoryError:
                raise TrainingError(
                    f"{device} must hold the {len(stage.train)} rows of {stage.name} beside the model, but lacks the "
                    "memory. Set resident = false in the recipe, and workers."
                ) from None

    def __getitem__(self, step: int) -> list[Sequence[Any]]:
        plan = self.plan
        places = list(range(self.rank, plan.batch, self.world))
        numbers = rows_of(step, len(self.stage.train), plan.batch, plan.seed)
        if self.rows is None:
            rows = self.stage.read([int(self.stage.train[numbers[place]]) for place in places])
        else:
            at = torch.tensor([numbers[place] for place in places]).to(self.device)
            rows = {name: value[at] for name, value in self.rows.items()}
        parts = []
        for number in range(plan.accumulate):  # every process takes its share of every part
            mine = slice(number * len(places) // plan.accumulate, (number + 1) * len(places) // plan.accumulate)
            draws = Draws(plan.seed, step, plan.batch, places[mine], self.device)
            parts.append(self.stage.inputs({name: value[mine] for name, value in rows.items()}, draws))
        return parts


class Trainer:
    """A stage in training on this process: its module, optimizer and average, gone on from the folder's state.

    start: the step to begin with. Raises TrainingError, see `fit`.
    """

    def __init__(self, stage: Stage, plan: Plan, folder: Path) -> None:
        self.stage, self.plan, self.folder, self.module = stage, plan, folder, stage.module
        precision = MIXED[usable(plan.precision)]
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precision)
        self.world, self.main = self.accelerator.num_processes, self.accelerator.is_main_process
        self.device = self.accelerator.device
        # Inductor cannot trace a function mode, and checkpointing runs parts of the forward pass again without it.
        plain = self.device.type == "cpu" and not plan.compile and not plan.gradient_checkpointing
        self.attention = plain_attention() if plain else contextlib.nullcontext()
        if plan.batch % (self.world * plan.accumulate):
            raise TrainingError(
                f"batch must be a multiple of {self.world * plan.accumulate}, {self.world} processes with "
                f"{plan.accumulate} parts each, got {plan.batch}. Give another --batch."
            )
        if not len(stage.train):
            raise TrainingError(f"{stage.name} must have one sample to train on, got 0. Add data: see hd-data.")
        folder.mkdir(parents=True, exist_ok=True)
        for part in stage.fixed:
            part.requires_grad_(False)
        self.resume_training()
        if plan.gradient_checkpointing:
            for part in self.module.modules():
                if getattr(part, "_supports_gradient_checkpointing", False):
                    part.enable_gradient_checkpointing()  # type: ignore[operator]
        if plan.compile:
            self.module.compile()
        self.model = spread(self.module, self.world) if plan.shard else self.accelerator.prepare(self.module)
        self.parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        slow = {id(p) for part in stage.slow for p in part.parameters()}
        groups = [
            {"params": [p for p in self.parameters.values() if (id(p) in slow) == late], "times": times}
            for late, times in ((False, 1.0), (True, SLOW))
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            weight_decay=plan.weight_decay,
            betas=(0.9, 0.99),
            fused=not plan.shard,
        )
        self.average = Average(self.parameters)
        self.start = load_state(folder, plan, stage, self.average, self.optimizer)
        self.seconds, self.began = spent(folder), time.monotonic()  # of earlier runs; when this one began
        self.share = self.spent()
        self.scaler = getattr(self.accelerator, "scaler", None)
        # Steps left out because loss or gradient is not finite: in a row, and in all.
        self.in_a_row, self.left_out = (torch.zeros((), device=self.device) for _ in range(2))
        self.log: Log | None = None

    def resume_training(self) -> None:
        """Puts the module into training mode, but for its frozen parts."""
        self.module.train()
        for part in self.stage.fixed:
            part.eval()

    def batches(self) -> Iterator[list[Sequence[Any]]]:
        """The module's inputs of every step from `start` on, see `_Steps`."""
        plan, on_gpu = self.plan, self.device.type == "cuda"
        resident = self.device if plan.resident and on_gpu else None
        steps = _Steps(self.stage, plan, self.accelerator.process_index, self.world, resident)
        torch.backends.cudnn.benchmark = on_gpu  # shapes stay the same: cuDNN measures its algorithms once
        order: Any = range(self.start, plan.steps)
        if steps.rows is not None:
            return map(steps.__getitem__, order)
        # Workers fork: a stage holds functions, which a new interpreter (the default in `run_processes`) cannot get.
        how = "fork" if plan.workers and "fork" in torch.multiprocessing.get_all_start_methods() else None
        loader: Any = DataLoader(
            steps, batch_size=None, sampler=order, num_workers=plan.workers if how else 0, multiprocessing_context=how,
            pin_memory=on_gpu,
        )  # fmt: skip
        return iter(loader)

    def spent(self) -> float:
        """The share of the plan's minutes that training has taken, the same in all processes; 0 without a clock."""
        if not self.plan.minutes:
            return 0.0
        share = (self.seconds + time.monotonic() - self.began) / (60 * self.plan.minutes)
        if self.world == 1:  # without a tensor, for which the CPU would wait for the GPU at every step
            return share
        return float(self.accelerator.reduce(torch.tensor(share, device=self.device), "mean"))

    def step(self, step: int, parts: list[Sequence[Any]]) -> tuple[Tensor, Tensor]:
        """One step of optimizer and average on `parts`. Returns this process's loss and the gradient's norm.

        A step whose loss or gradient is not finite leaves the weights as they are.
        """
        plan, value = self.plan, torch.zeros((), device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.rate(step, self.share) * group["times"]
        for number, part in enumerate(parts, 1):
            together = number == plan.accumulate or plan.shard
            alone = contextlib.nullcontext() if together else self.accelerator.no_sync(self.model)
            inputs = _to(part, self.device)
            with alone, self.accelerator.autocast(), self.attention:
                loss = self.model(*inputs) / plan.accumulate
            self.accelerator.backward(loss)
            value += loss.detach()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), plan.clip)
        bad = ~full(norm).isfinite()
        if self.scaler is not None:  # its first steps overflow by design: only the loss shows a bad one
            bad = ~self.accelerator.reduce(value, "mean").isfinite()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif plan.shard:
            if not bad:
                self.optimizer.step()
        else:  # as a scaler does: the fused kernel reads the flag, and the CPU need not wait for the GPU
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        self.in_a_row, self.left_out = (self.in_a_row + 1) * bad, self.left_out + bad
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(min(plan.ema, (1 + step) / (10 + step)))
        return value, norm

    def report(self, step: int, value: Tensor, norm: Tensor) -> None:
        """Logs a step's loss and norm. Raises TrainingError where the run has diverged."""
        mean, in_a_row = float(self.accelerator.reduce(value, "mean")), int(self.in_a_row)
        if in_a_row >= MAX_BAD_STEPS or not (in_a_row or math.isfinite(mean)):
            what = "gradient became infinite or NaN" if math.isfinite(mean) else f"loss became {mean}"
            before = f" and {in_a_row - 1} before" if in_a_row > 1 else ""
            raise TrainingError(
                f"{self.stage.name}: the {what} at step {step}{before}. Lower the --learning-rate. "
                + (
                    "Training goes on from the last saved state."
                    if (self.folder / STATE).exists()
                    else "No state was saved."
                )
            )
        whole = float(full(norm))
        if self.log is not None:
            self.log.step(step + 1, mean, whole, self.plan.rate(step, self.share), int(self.left_out))

    @torch.no_grad()
    def validate(self, done: int) -> None:
        """Logs the average's mean loss over held-out samples, each time the same ones with the same noise."""
        held = [int(row) for row in self.stage.held[:VALIDATION_SAMPLES]]
        total = torch.zeros(2, device=self.device)
        part = max(1, min(self.plan.batch // (self.world * self.plan.accumulate), len(held)))
        groups = [range(first, min(first + part, len(held))) for first in range(0, len(held), part)]
        with self.average.in_place():
            self.module.eval()
            # Sharded modules run together: a process without a group of its own repeats the last.
            for turn in range(-(-len(groups) // self.world)):
                number = turn * self.world + self.accelerator.process_index
                places = groups[min(number, len(groups) - 1)]
                draws = Draws(self.plan.seed + 1, 0, len(held), places)
                rows = self.stage.read([held[place] for place in places])
                inputs = _to(self.stage.inputs(rows, draws), self.device)
                with self.accelerator.autocast():
                    value = self.module(*inputs)
                if number < len(groups):
                    count = torch.tensor(float(len(places))).to(value.device)
                    total += torch.stack([value.float() * len(places), count])
            total = self.accelerator.reduce(total, "sum")
            self.resume_training()
        if self.log is not None:
            self.log.validation(done, float(total[0] / total[1]))

    def checkpoint(self, done: int) -> None:
        """Saves the state after `done` steps, and calls the stage's `on_save` with the average in place."""
        seconds = self.seconds + time.monotonic() - self.began
        save_state(self.folder, self.plan, self.stage, self.average, self.optimizer, done, self.main, seconds)
        if self.stage.on_save is not None:
            with self.average.in_place():
                self.module.eval()
                if self.main or self.plan.shard:
                    self.stage.on_save(done)
                self.resume_training()
        self.accelerator.wait_for_everyone()


def fit(stage: Stage, plan: Plan, folder: Path) -> nn.Module:
    """Trains `stage.module` in place and returns it with its exponential moving average, in evaluation mode.

    folder: keeps `state.safetensors`, `log.jsonl` and TensorBoard's files; a finished run is only loaded. A step whose
    loss or gradient is not finite is left out. Raises TrainingError when the folder holds another run (batch, seed,
    data), when the processes cannot share the batch, and after MAX_BAD_STEPS such steps in a row.
    """
    trainer = Trainer(stage, plan, folder)
    if trainer.start < plan.steps and trainer.share < 1:
        if trainer.main:
            announce(stage.name, plan, folder, trainer.start)
            if usable(plan.precision) != plan.precision:
                console.print(f"{stage.name}: trains in float32, because this processor computes bfloat16 slowly")
            trainer.log = Log(stage.name, folder, plan, trainer.start)
        for step, parts in zip(range(trainer.start, plan.steps), trainer.batches(), strict=True):
            value, norm = trainer.step(step, parts)
            trainer.share, done = trainer.spent(), step + 1
            last = done == plan.steps or trainer.share >= 1
            if done % plan.log_every == 0 or last or step == trainer.start:
                trainer.report(step, value, norm)
            if len(stage.held) and (done % plan.validate_every == 0 or last):
                trainer.validate(done)
            if done % plan.save_every == 0 or last:
                trainer.checkpoint(done)
            if last:
                break
    trainer.average.copy_to_parameters()
    return trainer.module.eval()


def announce(name: str, plan: Plan, folder: Path, start: int) -> None:
    """Says that a stage goes on, and with which other settings."""
    if not start:
        return
    console.print(f"{name}: goes on at step {start} of {plan.steps}")
    if said := changes(folder, plan):
        console.print(
            f"{name}: goes on with other settings than before: {said}. To go on as before, give those; to keep both "
            "trainings apart, name another --run.",
            style="yellow",
        )


def _to(value: Any, device: torch.device) -> Any:
    """Moves the tensors in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: _to(part, device) for name, part in value.items()}
    return [_to(part, device) for part in value] if isinstance(value, (list, tuple)) else value


class Log:
    """Prints lines with the time left, and writes `log.jsonl` and, if installed, TensorBoard's files."""

    def __init__(self, name: str, folder: Path, plan: Plan, start: int) -> None:
        self.name, self.folder, self.plan, self.start = name, folder, plan, start
        self.opened = self.began = time.monotonic()
        self.seconds = spent(folder)
        self.seen: float | None = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=start)
        except ImportError:
            self.board = None

    def step(self, done: int, loss: float, norm: float, rate: float, left_out: int = 0) -> None:
        """left_out: steps so far without a finite loss or gradient; the mean skips such a loss."""
        if math.isfinite(loss):
            self.seen = loss if self.seen is None else 0.7 * self.seen + 0.3 * loss
        if done - self.start < 2:  # the first step is slower than the others
            self.began = time.monotonic()
            return
        speed = (done - self.start - 1) / max(time.monotonic() - self.began, 1e-9)
        left = (self.plan.steps - done) / speed
        if self.plan.minutes:
            left = min(left, 60 * self.plan.minutes - self.seconds - (time.monotonic() - self.opened))
        seen = "unknown" if self.seen is None else f"{self.seen:.4f}"
        gaps = f" ({left_out} step{'s' * (left_out > 1)} left out: not finite)" if left_out else ""
        console.print(
            f"{self.name}: step {done}/{self.plan.steps}  loss {seen}{gaps}  {speed * self.plan.batch:.1f} samples/s"
            f"  {duration(left)} left"
        )
        self.write(done, {"loss": loss, "gradient_norm": norm, "learning_rate": rate, "samples_per_second":
                          speed * self.plan.batch})  # fmt: skip

    def validation(self, done: int, loss: float) -> None:
        console.print(f"{self.name}: step {done}/{self.plan.steps}  validation loss {loss:.4f}")
        self.write(done, {"validation_loss": loss})

    def write(self, done: int, values: dict[str, float]) -> None:
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            # JSON lacks NaN.
            numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}
            file.write(json.dumps({"step": done, **numbers}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, done)
            self.board.flush()


def duration(seconds: float) -> str:
    """ "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
