"""One training loop for every stage: AdamW, warm-up and decay, clipping, EMA, validation; resumable to the sample.

    fit(Stage("vae", module, source, inputs), plan, Path("runs/demo/vae"))

It runs on one process, or on all those that `accelerate launch` or `torchrun` have started (data parallel; with
`plan.shard` weights, optimizer and average are spread over them, FSDP2), and on a CPU on those that `run_processes`
starts. Everything that is random follows from (seed, step, row), see `draws.py`: a run that was killed and goes on ends
with the weights of one that was not, bit for bit on one CPU process. State is safetensors, written beside and renamed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from accelerate import Accelerator
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from ..commands import end_with_parent, undisturbed
from ..errors import TrainingError
from .draws import Draws, rows_of
from .recipe import Plan

Rows = dict[str, Tensor]
STATE = "state.safetensors"
SHARDED_FROM = 1_000_000  # parameters from which a module is sharded by itself, and gathered when it runs
PATIENCE = 3  # steps in a row whose gradient is no number, after which the run ends
HELD = 64  # samples of the held-out share that the validation loss is computed from, at most
console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)


@dataclass
class Stage:
    """What is trained on what. `module(*inputs(rows, draws))` is the loss, a mean over the rows."""

    name: str
    module: nn.Module  # what of it requires gradients is trained
    read: Callable[[Sequence[int]], Rows]  # sample numbers -> tensors [n, ...]
    inputs: Callable[[Rows, Draws], Sequence[Any]]  # all that chance decides; both run in workers, too: on the CPU
    train: Any  # sample numbers, a sequence or an array
    held: Any = ()  # sample numbers that are never trained on
    data: str = ""  # digest of the data: a run does not go on with other
    on_save: Callable[[int], Any] | None = None  # called with the step, while the module holds its average
    fixed: list[nn.Module] = field(default_factory=list)  # parts of the module that stay as they are


class _Steps(torch.utils.data.Dataset):
    """step -> the module's inputs for each part of what this process trains on, made by workers ahead of time.

    Noise and all, not only what is read: a GPU would wait for it. Or on `device`, where all rows are held from the
    beginning: sixteen workers do not keep up with a GPU that trains a model as small as the demo's.
    """

    def __init__(self, stage: Stage, plan: Plan, rank: int, world: int, device: torch.device | None = None) -> None:
        self.stage, self.plan, self.rank, self.world = stage, plan, rank, world
        self.device, self.rows = device or torch.device("cpu"), None
        if device is not None:
            try:
                self.rows = _to(stage.read([int(number) for number in stage.train]), device)
            except torch.OutOfMemoryError:
                raise TrainingError(
                    f"The {len(stage.train)} rows of {stage.name} do not fit into the memory of {device} beside the "
                    "model: set resident = false in the recipe, and workers."
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
        for number in range(plan.accumulate):  # every process has a part of every part
            mine = slice(number * len(places) // plan.accumulate, (number + 1) * len(places) // plan.accumulate)
            draws = Draws(plan.seed, step, plan.batch, places[mine], self.device)
            parts.append(self.stage.inputs({name: value[mine] for name, value in rows.items()}, draws))
        return parts


def fit(stage: Stage, plan: Plan, folder: Path) -> nn.Module:
    """Trains `stage.module` in place and returns it holding its exponential moving average, in evaluation mode.

    folder: where `state.safetensors`, `log.jsonl` and TensorBoard's files are kept; a finished run is loaded and
    returned at once. Raises TrainingError when the run in the folder is another one (batch, seed, data), when the batch
    cannot be shared out, or when the loss is no longer a number; a single step whose gradient is none is left out.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=MIXED[plan.precision])
    rank, world, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    if plan.batch % (world * plan.accumulate):
        raise TrainingError(
            f"A batch of {plan.batch} cannot be shared by {world} processes in {plan.accumulate} parts each: take a "
            f"--batch that is a multiple of {world * plan.accumulate}."
        )
    if not len(stage.train):
        raise TrainingError(f"There is no sample to train {stage.name} on.")
    folder.mkdir(parents=True, exist_ok=True)
    module = stage.module.train()
    for part in stage.fixed:
        part.eval().requires_grad_(False)
    if plan.gradient_checkpointing:
        for part in module.modules():
            if getattr(part, "_supports_gradient_checkpointing", False):
                part.enable_gradient_checkpointing()  # type: ignore[operator]
    if plan.compile:
        module.compile()
    model = _spread(module, world) if plan.shard else accelerator.prepare(module)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(), weight_decay=plan.weight_decay, betas=(0.9, 0.99), fused=not plan.shard
    )
    average = Average(parameters)
    start = load_state(folder, plan, stage, parameters, average, optimizer)
    if start >= plan.steps:
        average.copy_to_parameters()
        return module.eval()
    if main and start:
        console.print(f"{stage.name}: goes on at step {start} of {plan.steps}")
        if said := changes(folder, plan):
            console.print(
                f"{stage.name}: goes on with other settings than before: {said}. To go on as before, give those; to "
                "keep both trainings apart, name another --run.",
                style="yellow",
            )
    log = Log(stage.name, folder, plan, start) if main else None
    on_gpu = accelerator.device.type == "cuda"
    steps = _Steps(stage, plan, rank, world, accelerator.device if plan.resident and on_gpu else None)
    torch.backends.cudnn.benchmark = on_gpu  # shapes stay the same: cuDNN measures its algorithms once
    order: Any = range(start, plan.steps)
    # Forked: a stage is made of functions, which cannot be sent to a process that starts afresh (the default of those
    # that `run_processes` starts).
    how = "fork" if plan.workers and "fork" in torch.multiprocessing.get_all_start_methods() else None
    workers = plan.workers if how else 0
    loader: Any = map(steps.__getitem__, order)
    if steps.rows is None:
        loader = DataLoader(
            steps, batch_size=None, sampler=order, num_workers=workers, multiprocessing_context=how, pin_memory=on_gpu
        )
    scaler = accelerator.scaler if hasattr(accelerator, "scaler") else None
    # Steps that were left out, because loss or gradient is no number: one after the other, and all of them.
    spoilt, left_out = (torch.zeros((), device=accelerator.device) for _ in range(2))

    for step, parts in zip(range(start, plan.steps), loader, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        value = torch.zeros((), device=accelerator.device)
        for number, part in enumerate(parts, 1):
            inputs = _to(part, accelerator.device)
            last = number == plan.accumulate
            with contextlib.nullcontext() if last or plan.shard else accelerator.no_sync(model), accelerator.autocast():
                loss = model(*inputs) / plan.accumulate
            accelerator.backward(loss)
            value += loss.detach()
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), plan.clip)
        bad = ~_full(norm).isfinite()
        if scaler is not None:  # its first steps overflow by design, so that the loss alone says that one is bad
            bad = ~accelerator.reduce(value, "mean").isfinite()
            scaler.step(optimizer)
            scaler.update()
        elif plan.shard:
            if not bad:
                optimizer.step()
        else:  # as a scaler does it: the fused kernel asks for itself, and nobody waits for the GPU
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            optimizer.step()
        spoilt, left_out = (spoilt + 1) * bad, left_out + bad
        optimizer.zero_grad(set_to_none=True)
        average.update(min(plan.ema, (1 + step) / (10 + step)))
        done, last = step + 1, step + 1 == plan.steps
        if done % plan.log_every == 0 or last or step == start:
            mean = float(accelerator.reduce(value, "mean"))
            in_a_row = int(spoilt)
            if in_a_row >= PATIENCE or not (in_a_row or math.isfinite(mean)):
                what = "gradient became no number" if math.isfinite(mean) else f"loss became {mean}"
                raise TrainingError(
                    f"{stage.name}: the {what} at step {step}{f' and {in_a_row - 1} before' if in_a_row > 1 else ''}. "
                    f"Lower the --learning-rate; the last saved state in {folder} is sound."
                )
            if log is not None:
                log.step(done, mean, float(_full(norm)), plan.rate(step), int(left_out))
        if len(stage.held) and (done % plan.validate_every == 0 or last):
            with average.in_place():
                score = validate(stage, plan, module, accelerator)
            if log is not None:
                log.validation(done, score)
        if done % plan.save_every == 0 or last:
            save_state(folder, plan, stage, parameters, average, optimizer, done, main)
            if stage.on_save is not None:
                with average.in_place():
                    module.eval()
                    if main or plan.shard:
                        stage.on_save(done)
                    module.train()
                    for part in stage.fixed:
                        part.eval()
            accelerator.wait_for_everyone()
    average.copy_to_parameters()
    return module.eval()


MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def _to(value: Any, device: torch.device) -> Any:
    """Tensors in tuples, lists and dicts, moved."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: _to(part, device) for name, part in value.items()}
    return [_to(part, device) for part in value] if isinstance(value, (list, tuple)) else value


def _full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be spread over processes; all of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _spread(module: nn.Module, world: int) -> nn.Module:
    """Shards the module's weights over the processes (FSDP2): large blocks by themselves, the rest together."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if world == 1:
        raise TrainingError("Sharding needs several processes: start them with torchrun or accelerate launch.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (world,))
    module.to(device)
    # Only blocks whose own `forward` runs them whole can gather themselves: lists have none.
    for block in list(module.modules())[::-1]:
        held = sum(p.numel() for p in block.parameters() if not isinstance(p, DTensor))
        runs = not isinstance(block, (nn.ModuleList, nn.ModuleDict, nn.ParameterList))
        if runs and block is not module and held >= SHARDED_FROM:
            fully_shard(block, mesh=mesh)
    # The outermost, too, lets go of its weights after each run: else those of a validation stay for the next step.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return module


class Average:
    """The exponential moving average of some parameters, float32, spread as they are."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.values = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, decay: float) -> None:
        mine = [_local(value) for value in self.values.values()]
        torch._foreach_lerp_(mine, [_local(p.detach()) for p in self.parameters.values()], 1 - decay)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        for name, parameter in self.parameters.items():
            _local(parameter.detach()).copy_(_local(self.values[name]))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Meanwhile the parameters are the average."""
        kept = {name: _local(p.detach()).clone() for name, p in self.parameters.items()}
        self.copy_to_parameters()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    _local(parameter.detach()).copy_(kept[name])


@torch.no_grad()
def validate(stage: Stage, plan: Plan, module: nn.Module, accelerator: Accelerator) -> float:
    """The mean loss over held-out samples, each time the same ones with the same noise."""
    module.eval()
    held = [int(row) for row in stage.held[:HELD]]
    total = torch.zeros(2, device=accelerator.device)
    part = max(1, min(plan.batch // (accelerator.num_processes * plan.accumulate), len(held)))
    groups = [range(first, min(first + part, len(held))) for first in range(0, len(held), part)]
    # Every process runs equally often, also where that is once more than it has groups: sharded modules run together.
    for turn in range(-(-len(groups) // accelerator.num_processes)):
        number = turn * accelerator.num_processes + accelerator.process_index
        places = groups[min(number, len(groups) - 1)]
        draws = Draws(plan.seed + 1, 0, len(held), places)
        inputs = _to(stage.inputs(stage.read([held[place] for place in places]), draws), accelerator.device)
        with accelerator.autocast():
            value = module(*inputs)
        if number < len(groups):
            total += torch.stack([value.float() * len(places), torch.tensor(float(len(places))).to(value.device)])
    total = accelerator.reduce(total, "sum")
    module.train()
    for fixed in stage.fixed:
        fixed.eval()
    return float(total[0] / total[1])


class Log:
    """A line with the time left now and then, `log.jsonl`, and TensorBoard where that is installed."""

    def __init__(self, name: str, folder: Path, plan: Plan, start: int) -> None:
        self.name, self.folder, self.plan, self.start, self.began = name, folder, plan, start, time.monotonic()
        self.seen: float | None = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=start)
        except ImportError:
            self.board = None

    def step(self, done: int, loss: float, norm: float, rate: float, left_out: int = 0) -> None:
        """left_out: steps so far whose loss or gradient was no number; such a loss is not in the mean."""
        if math.isfinite(loss):
            self.seen = loss if self.seen is None else 0.7 * self.seen + 0.3 * loss
        if done - self.start < 2:  # the first step alone says nothing of the speed
            self.began = time.monotonic()
            return
        speed = (done - self.start - 1) / max(time.monotonic() - self.began, 1e-9)
        left = (self.plan.steps - done) / speed
        seen = "unknown" if self.seen is None else f"{self.seen:.4f}"
        gaps = f" ({left_out} step{'s' * (left_out > 1)} left out: no number)" if left_out else ""
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
            numbers = {
                name: value if math.isfinite(value) else None for name, value in values.items()
            }  # JSON has no NaN
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


MOMENTS = ("step", "exp_avg", "exp_avg_sq")


# What of a plan changes nothing but speed, memory and what is said.
FREE = ("log_every", "save_every", "validate_every", "workers", "resident", "compile", "shard", "accumulate",
        "gradient_checkpointing")  # fmt: skip


def changes(folder: Path, plan: Plan) -> str:
    """Which settings of a stage's saved state differ from the plan's, and what becomes of its learning rate; or "".

    "steps 1000 (now 2000); the learning rate, 0 before, is 5e-05". States that name no plan are of an older version.
    """
    path = folder / STATE
    if not path.exists():
        return ""
    with safe_open(path, "pt") as file:
        known = file.metadata()
    before = json.loads(known.get("plan", "{}"))
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


def identity(plan: Plan, stage: Stage) -> dict[str, str]:
    """What a run cannot change without being another run."""
    return {"batch": str(plan.batch), "seed": str(plan.seed), "data": stage.data}


def save_state(
    folder: Path,
    plan: Plan,
    stage: Stage,
    parameters: dict[str, nn.Parameter],
    average: Average,
    optimizer: torch.optim.Optimizer,
    step: int,
    main: bool,
) -> None:
    """Everything that going on needs, in one file, written beside and renamed. All processes must call it.

    Raises TrainingError when the disk is full; the last state stays.
    """
    tensors: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        whole = _full(value.detach())
        if main:
            tensors[name] = whole.cpu().contiguous().clone()

    for name, parameter in parameters.items():
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
    temporary = folder / f"{STATE}.tmp"
    try:
        save_file(
            tensors,
            temporary,
            metadata={"step": str(step), "plan": json.dumps(msgspec.to_builtins(plan)), **identity(plan, stage)},
        )
        temporary.replace(folder / STATE)
    except Exception as error:  # safetensors' own for a full disk is no OSError
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
        raise TrainingError(
            f"The state of {stage.name} cannot be written to {folder} ({error}; {free / 1e9:.1f} GB are free). Make "
            "room; the same command goes on from the last saved step."
        ) from error


@torch.no_grad()
def load_state(
    folder: Path,
    plan: Plan,
    stage: Stage,
    parameters: dict[str, nn.Parameter],
    average: Average,
    optimizer: torch.optim.Optimizer,
) -> int:
    """Restores what `save_state` wrote; returns the step to go on at, 0 where there is nothing."""
    path = folder / STATE
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            known = file.metadata()
        tensors = load_file(path)
    except Exception as error:  # safetensors' own
        raise TrainingError(
            f"{path} is damaged ({error}). Remove it to begin {stage.name} anew, or put back a copy of it."
        ) from error
    for name, wanted in identity(plan, stage).items():
        if known.get(name) != wanted:
            raise TrainingError(
                f"{folder} was begun with another {name} ({known.get(name)}, now {wanted}). Go on as it was begun, or "
                "name another --run."
            )
    for name, parameter in parameters.items():
        if f"model.{name}" not in tensors:
            raise TrainingError(f"{path} is of another network: it lacks {name}. Name another --run.")
        _put(parameter.detach(), tensors[f"model.{name}"])
        _put(average.values[name], tensors[f"ema.{name}"])
        for moment in MOMENTS:
            if f"{moment}.{name}" in tensors:
                value = tensors[f"{moment}.{name}"]
                if moment == "step":  # AdamW counts where its kernel runs
                    fused = optimizer.defaults["fused"]
                    optimizer.state[parameter][moment] = value.to(parameter.device) if fused else value
                else:
                    optimizer.state[parameter][moment] = torch.zeros_like(parameter)
                    _put(optimizer.state[parameter][moment], value)
    buffers = dict(stage.module.named_buffers())
    for name, value in tensors.items():
        if name.startswith("buffer.") and name[7:] in buffers:
            buffers[name[7:]].copy_(value)
    return int(known["step"])


def _put(target: Tensor, whole: Tensor) -> None:
    """Writes a whole tensor into one that may be spread over processes."""
    if target.shape != whole.shape:
        raise TrainingError("The run in this folder is of another network. Name another --run.")
    if isinstance(target, DTensor):
        from torch.distributed.tensor import distribute_tensor

        whole = distribute_tensor(whole.to(target.device), target.device_mesh, target.placements)
    _local(target).copy_(_local(whole))


def averages(folder: Path) -> dict[str, Tensor]:
    """What a stage has learned: its averaged parameters and its buffers by name; empty where nothing is there."""
    path = folder / STATE
    if not path.exists():
        return {}
    out = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            kind, _, rest = name.partition(".")
            if kind in ("ema", "buffer"):
                out[rest] = file.get_tensor(name)
    return out


def finished(folder: Path, steps: int = 1) -> bool:
    """Whether a stage's run has reached that step."""
    path = folder / STATE
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
    try:
        with undisturbed():
            started = torch.multiprocessing.spawn(
                _process, (processes, port, function, args), nprocs=processes, join=False
            )
        while not started.join():
            pass
    except torch.multiprocessing.ProcessRaisedException as error:  # its text is the other process's traceback
        last = str(error).strip().splitlines()[-1]
        kind, _, sentence = last.partition(": ")
        if kind.rsplit(".", 1)[-1].endswith("Error") and sentence and kind.startswith("handiffuser."):
            raise TrainingError(sentence) from error
        raise


def _process(rank: int, processes: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    end_with_parent()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Grad strides do not match")  # costs nothing at these sizes
    function(*args)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
