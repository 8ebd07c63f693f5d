"""Distillation into few steps: the student jumps to where its guided teacher arrives after several steps.

    bank = PictureBank(Path("runs/fast/bank"), teacher, cache, rows, plan, digest)    # or HandBank, of stage 1
    bank.make(rank, world)
    stage = jump_stage(student, bank, plan, 4, "distill-4")                           # or hand_jump_stage

A bank holds the teacher's guided trajectories from pure noise, with the words (and hands) of the data. It keeps each
state where a jump begins or ends. The student learns the output whose one DDIM step leads from one kept state to the
next (progressive distillation, Salimans & Ho 2022, arXiv 2202.00512, with the teacher's own states instead of noised
samples). It needs neither guidance nor the unconditional branch. Both walk the same "trailing" timesteps: those of few
steps are among those of many.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..data.latents import LatentCache, encode_prompts
from ..errors import TrainingError
from ..files import written
from ..models.checkpoint import Checkpoint
from ..schedules import NoiseSchedule, solve
from .draws import Draws, generator_for, order
from .loop import Stage, usable
from .recipe import DistillHandsPlan, DistillPlan
from .sample import CUES, Network, initial_noise
from .stages import HandJumpLoss, Inputs, PictureLoss, edges, states_of_words

PER_FILE = 64  # trajectories of a file
BATCH = 8  # trajectories computed together on a CPU
GPU_FILES = 8  # files computed together on a GPU
VALIDATION_TRAJECTORIES = 64  # trajectories to validate on
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def grid(plan: DistillPlan | DistillHandsPlan) -> list[int]:
    """The teacher's steps whose states the bank keeps: where any of the students jumps from or to.

    Raises TrainingError where a student's runs do not divide the teacher's steps.
    """
    kept: set[int] = set()
    for runs in plan.runs:
        if plan.teacher_steps % runs:
            raise TrainingError(
                f"runs must divide the teacher's {plan.teacher_steps} steps, got {runs}. Take others, or "
                f"--set teacher_steps={-(-plan.teacher_steps // runs) * runs}."
            )
        kept |= set(range(0, plan.teacher_steps + 1, plan.teacher_steps // runs))
    return sorted(kept)


def few_steps(schedule: dict[str, Any]) -> dict[str, Any]:
    """The schedule that teacher and student sample with."""
    return {**schedule, "timestep_spacing": "trailing"}


def becomes_student(checkpoint: Checkpoint, runs: int) -> None:
    """Makes `runs` DDIM steps without guidance the defaults of a checkpoint's stage 2."""
    checkpoint.scheduler = few_steps(checkpoint.scheduler)
    checkpoint.defaults = {**checkpoint.defaults, "steps": runs, "solver": "ddim", "guidance": 1.0}


def becomes_hand_student(checkpoint: Checkpoint, runs: int) -> None:
    """Makes `runs` DDIM steps without guidance the defaults of a checkpoint's stage 1."""
    checkpoint.hand_scheduler = few_steps(checkpoint.hand_scheduler)
    few = {"hand_steps": runs, "hand_solver": "ddim", "hand_guidance": 1.0}
    checkpoint.defaults = {**checkpoint.defaults, **few}


def weights_digest(*modules: nn.Module) -> str:
    """A hash of networks' weights."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class Bank(ABC):
    """Trajectories of a teacher, in whole files of PER_FILE each. `make` adds missing files."""

    def __init__(
        self,
        folder: Path,
        teacher: Checkpoint,
        cache: LatentCache,
        rows: np.ndarray,
        plan: DistillPlan | DistillHandsPlan,
        what: dict[str, Any],
    ) -> None:
        """rows: of the cache, for the conditions. what: all else that trajectories depend on.

        Raises TrainingError where the folder holds the bank of another teacher, or of other settings.
        """
        self.folder, self.teacher, self.cache = folder, teacher, cache
        self.kept = grid(plan)
        self.files = -(-plan.trajectories // PER_FILE)
        picked = [order(plan.seed, epoch, len(rows)) for epoch in range(-(-self.files * PER_FILE // len(rows)))]
        self.rows = rows[np.concatenate(picked)[: self.files * PER_FILE]]
        what = {
            **what, "teacher_steps": plan.teacher_steps, "kept": self.kept, "seed": plan.seed,
            "precision": usable(plan.precision),
        }  # fmt: skip
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
        path = folder / "key.json"
        if path.exists() and json.loads(path.read_text()).get("key") != key:
            raise TrainingError(f"{folder} must be this teacher's and grid's bank, got another. Name another --run.")
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _write(path, lambda temporary: temporary.write_text(json.dumps({"key": key, **what}, indent=1) + "\n"))

    def __len__(self) -> int:
        return self.files * PER_FILE

    def path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def make(
        self, rank: int = 0, world: int = 1, on_progress: Callable[[int, int], None] | None = None, device: str = "cpu"
    ) -> None:
        """Computes the missing files; each of several processes makes every world-th."""
        mine = [number for number in range(rank, self.files, world) if not self.path(number).exists()]
        together = 1 if device == "cpu" else GPU_FILES
        for begin in range(0, len(mine), together):
            files = mine[begin : begin + together]
            numbers = [number * PER_FILE + at for number in files for at in range(PER_FILE)]
            count = BATCH if device == "cpu" else len(numbers)
            parts = [self._paint(numbers[first : first + count], device) for first in range(0, len(numbers), count)]
            whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            for turn, number in enumerate(files):
                own = {
                    name: value[turn * PER_FILE : (turn + 1) * PER_FILE].contiguous() for name, value in whole.items()
                }
                _write(self.path(number), partial(save_file, own))
            left = len(mine) - begin - len(files)
            if on_progress is not None:  # as if the other processes were as far
                on_progress(max(1, self.files - world * left), self.files)

    @abstractmethod
    def _paint(self, numbers: Sequence[int], device: str) -> dict[str, Tensor]:
        """Some trajectories, among them their states at the kept steps [count, K, ...]."""

    @abstractmethod
    def read(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Some trajectories, with all inputs of a student."""

    def _walk(self, schedule: dict[str, Any], x: Tensor, network: Network) -> Tensor:
        """The states [n, K, ...] of DDIM from noise x [n, ...] at the kept steps."""
        scheduler = DDIMScheduler.from_config(few_steps(schedule))
        scheduler.set_timesteps(self.kept[-1])
        states = [x]
        for step, timestep in enumerate(scheduler.timesteps, 1):
            x = scheduler.step(network(x, timestep), timestep, x).prev_sample
            if step in self.kept:
                states.append(x)
        return torch.stack(states, 1)

    def _wordings(self, ids: Tensor, chance: Sequence[torch.Generator]) -> Tensor:
        """One of each sample's prompts: [n, W, 77] -> [n, 77]."""
        return torch.stack([ids[i, torch.randint(ids.shape[1], (), generator=g)] for i, g in enumerate(chance)])

    def _kept(self, numbers: Sequence[int], names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors of some trajectories from their files."""
        wanted = torch.tensor(list(numbers))
        out: dict[str, Tensor] = {}
        for number in (wanted // PER_FILE).unique().tolist():
            places = (wanted // PER_FILE == number).nonzero()[:, 0]
            try:
                with safe_open(self.path(number), "pt") as file:
                    for name in names:
                        part = file.get_slice(name)  # reads only the wanted rows
                        value = torch.cat([part[at : at + 1] for at in (wanted[places] % PER_FILE).tolist()])
                        out.setdefault(name, value.new_empty(len(wanted), *value.shape[1:]))[places] = value
            except (OSError, SafetensorError) as error:
                raise TrainingError(
                    f"{self.path(number)} cannot be read ({error}). Remove it and run the same command again."
                ) from None
        return out


class PictureBank(Bank):
    """Of stage 2: from noise to pictures, with the hands and words of the data."""

    def __init__(
        self, folder: Path, teacher: Checkpoint, cache: LatentCache, rows: np.ndarray, plan: DistillPlan, data: str
    ) -> None:
        """data: a digest of the data."""
        teacher.check_paints("training")
        self.plan = plan
        self.guidance = plan.teacher_guidance or teacher.defaults["guidance"]
        what = {
            "of": f"{weights_digest(teacher.unet)} {data}", "guidance": self.guidance, "no_hands": plan.drop_hands,
            "noise_offset": teacher.defaults["noise_offset"],
        }  # fmt: skip
        super().__init__(folder, teacher, cache, rows, plan, what)

    @torch.no_grad()
    def _paint(self, numbers: Sequence[int], device: str) -> dict[str, Tensor]:
        """Some trajectories: states [count, K, C, h, w], ids [count, 77], bare [count]."""
        teacher, plan, count = self.teacher, self.plan, len(numbers)
        rows = self.cache.rows(self.rows[list(numbers)], ("ids", *CUES))
        chance = [generator_for(plan.seed, 1, number) for number in numbers]
        ids = self._wordings(rows["ids"], chance)
        bare = torch.stack([torch.rand((), generator=g) for g in chance]) < plan.drop_hands
        hands = {name: rows[name].float().to(device) for name in CUES}
        hands["visibility"] = torch.where(bare[:, None].to(device), 0.0, hands["visibility"])
        blank = {**hands, "visibility": torch.zeros_like(hands["visibility"])}
        empty = encode_prompts([""], teacher.tokenizer, teacher.special_tokens)[0]
        encoder = teacher.text_hand_encoder
        context = torch.cat([encoder(empty.to(device).expand(count, -1), **blank), encoder(ids.to(device), **hands)])
        shape = (teacher.unet.config.in_channels, *teacher.latent_size)
        x = torch.cat([initial_noise(1, shape, teacher.defaults["noise_offset"], g) for g in chance]).to(device)
        precision = usable(plan.precision)
        half = torch.autocast(torch.device(device).type, HALVES.get(precision), enabled=precision in HALVES)

        def network(x: Tensor, timestep: Tensor) -> Tensor:
            with half:
                both = teacher.unet(torch.cat([x, x]), timestep.to(device), context).sample.float()
            without, given = both.chunk(2)
            return without + self.guidance * (given - without)

        return {"states": self._walk(teacher.scheduler, x, network).half().cpu(), "ids": ids, "bare": bare}

    def read(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Some trajectories: states [n, K, C, h, w], ids [n, 77], joints, rotations, bps, visibility."""
        rows = self.cache.rows(self.rows[list(numbers)], CUES)
        out = self._kept(numbers, ("states", "ids", "bare"))
        rows["visibility"] = torch.where(out.pop("bare")[:, None], 0.0, rows["visibility"])
        return {**rows, **out}


class HandBank(Bank):
    """Of stage 1: from noise to hands, with the words of the data."""

    def __init__(
        self, folder: Path, teacher: Checkpoint, cache: LatentCache, rows: np.ndarray, plan: DistillHandsPlan, data: str
    ) -> None:
        """data: a digest of the data."""
        teacher.check_paints("training")
        self.plan = plan
        self.guidance = plan.teacher_guidance or teacher.defaults["hand_guidance"]
        of = weights_digest(teacher.hand_prior, teacher.text_encoder)
        super().__init__(
            folder, teacher, cache, rows, plan,
            {"of": f"{of} {data}", "guidance": self.guidance, "no_text": plan.drop_text},
        )  # fmt: skip

    @torch.no_grad()
    def _paint(self, numbers: Sequence[int], device: str) -> dict[str, Tensor]:
        """Some trajectories: states [count, K, P], ids [count, 77]."""
        teacher, plan, prior = self.teacher, self.plan, self.teacher.hand_prior
        chance = [generator_for(plan.seed, 1, number) for number in numbers]
        ids = self._wordings(self.cache.rows(self.rows[list(numbers)], ("ids",))["ids"], chance)
        bare = torch.stack([torch.rand((), generator=g) for g in chance]) < plan.drop_text
        empty = encode_prompts([""], teacher.tokenizer, teacher.special_tokens)[0]
        ids = torch.where(bare[:, None], empty, ids)
        both = torch.cat([empty.expand_as(ids), ids]).to(device)
        read = prior.read(states_of_words(teacher.text_encoder, both, teacher.special_tokens["eos"]))
        x = torch.stack([torch.randn(len(prior.mean), generator=g) for g in chance]).to(device)

        def network(x: Tensor, timestep: Tensor) -> Tensor:
            without, given = prior.denoise(torch.cat([x, x]), timestep.to(device).expand(len(both)), read).chunk(2)
            return torch.lerp(without, given, self.guidance)

        return {"states": self._walk(teacher.hand_scheduler, x, network).cpu(), "ids": ids}

    def read(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Some trajectories: states [n, K, P], ids [n, 77]."""
        return self._kept(numbers, ("states", "ids"))


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    try:
        with written(path) as temporary:
            write(temporary)
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be written: {error.strerror or error}. Free some space and run the same command again."
        ) from error


def jumps(schedule: dict[str, Any], bank: Bank, stride: int, runs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each jump [runs]: its first timestep, the coefficients of its DDIM step x' = a x + b m, and the bank's kept
    state where it begins; the last entry [runs + 1] is the state where the last jump ends.

    stride: the teacher's steps in each jump. The network's wanted output is m = (x' - a x) / b, whatever it predicts.
    """
    recurrence = solve(NoiseSchedule.from_config(few_steps(schedule)), "ddim", runs)
    a, b = (torch.from_numpy(np.asarray(value[0])).float() for value in (recurrence.A, recurrence.B))
    places = torch.tensor([bank.kept.index(stride * k) for k in range(runs + 1)])
    return torch.from_numpy(recurrence.timesteps).long(), a, b, places


def jump_inputs(schedule: dict[str, Any], bank: Bank, plan: DistillPlan, runs: int) -> Inputs:
    """A kept state of each picture, and the output whose DDIM step leads to the next one.

    rows: from `PictureBank.read`.
    """
    times, a, b, places = jumps(schedule, bank, plan.teacher_steps // runs, runs)

    def inputs(rows: dict[str, Tensor], draws: Draws) -> Sequence[Any]:
        u = draws.uniform()
        device = u.device
        # The first jump, from pure noise, has nearly all the loss: the plan sets its share.
        later = 1 + ((u - plan.first) / (1 - plan.first) * (runs - 1)).long().clamp(0, max(runs - 2, 0))
        jump = torch.where(u < plan.first, 0, later) if runs > 1 else torch.zeros_like(u, dtype=torch.long)
        states, at, kept = rows["states"].float(), torch.arange(len(u), device=device), places.to(device)
        x, there, clean = states[at, kept[jump]], states[at, kept[jump + 1]], states[:, -1]
        signal, slope = (value.to(device)[jump].view(-1, 1, 1, 1) for value in (a, b))
        target = (there - signal * x) / slope
        hands = {name: rows[name].float() for name in CUES}
        one = torch.ones(len(u), device=device)
        return rows["ids"], hands, x, times.to(device)[jump], target, one, one, edges(clean)

    return inputs


def jump_stage(student: Checkpoint, bank: PictureBank, plan: DistillPlan, runs: int, name: str) -> Stage:
    """The stage of a student of `runs` runs: it trains the UNet alone; contexts and positions stay the teacher's."""
    painter = PictureLoss(student, plan)
    if not plan.lora:
        painter.unet.requires_grad_(True)
    return Stage(
        name, painter, bank.read, jump_inputs(student.scheduler, bank, plan, runs), *_split(bank),
        fixed=[painter.text_hand_encoder],
    )  # fmt: skip


def hand_jump_inputs(schedule: dict[str, Any], bank: Bank, plan: DistillHandsPlan, runs: int) -> Inputs:
    """All jumps of each trajectory: their first states, and the outputs whose DDIM steps lead to their last states.

    rows: from `HandBank.read`. All at once, because reading the words costs more than denoising.
    """
    times, a, b, places = jumps(schedule, bank, plan.teacher_steps // runs, runs)

    def inputs(rows: dict[str, Tensor], draws: Draws) -> Sequence[Any]:
        device = rows["states"].device
        states = rows["states"].float()[:, places.to(device)]  # [n, runs + 1, P]
        x, signal, slope = states[:, :-1], a.to(device)[:, None], b.to(device)[:, None]
        return rows["ids"], x, times.to(device).expand(len(x), -1), (states[:, 1:] - signal * x) / slope

    return inputs


def hand_jump_stage(student: Checkpoint, bank: HandBank, plan: DistillHandsPlan, runs: int, name: str) -> Stage:
    """The stage of a student of `runs` runs: it trains the prior alone, without the layers that read the words."""
    module = HandJumpLoss(student)
    module.hand_prior.requires_grad_(True)
    return Stage(
        name, module, bank.read, hand_jump_inputs(student.hand_scheduler, bank, plan, runs), *_split(bank),
        fixed=[module.text_encoder, *module.hand_prior.readers()],
    )  # fmt: skip


def _split(bank: Bank) -> tuple[np.ndarray, np.ndarray]:
    """A bank's trajectories: those to train on, and some to validate on."""
    numbers = np.arange(len(bank))
    held = min(VALIDATION_TRAJECTORIES, len(numbers) // 10)
    return numbers[: len(numbers) - held], numbers[len(numbers) - held :]
