"""A recipe: the settings of each stage's training. A small TOML file, one table a stage, with the defaults below.

recipe = Recipe.load("demo")                     # of this folder, or the path of a file
recipe = recipe.changed("pictures", {"steps": 100})
recipe.save(Path("runs/demo/recipe.toml"))       # all settings, defaults too
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from ..contract import MAX_PEOPLE
from ..errors import TrainingError
from ..files import written
from ..models.configs import CONFIGS
from ..schema import MAX_JSON_BYTES, MisfitError, fit, read_file

RECIPES = Path(__file__).parent / "recipes"

Count = Annotated[int, Meta(ge=1, le=10**9, description="a whole number from 1 on")]
Zero = Annotated[int, Meta(ge=0, le=10**9, description="a whole number from 0 on")]
Rate = Annotated[float, Meta(gt=0, le=10, description="a number above 0, at most 10")]
Weight = Annotated[float, Meta(ge=0, le=1e6, description="a number from 0 on")]
Share = Annotated[float, Meta(ge=0, le=1, description="a share from 0 to 1")]
Decay = Annotated[float, Meta(ge=0, lt=1, description="a number from 0 on, below 1")]


def _words(*words: str) -> Meta:
    return Meta(pattern=rf"^({'|'.join(words)})\Z", description=" or ".join(words))


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of all stages. The rate rises linearly for `warmup` steps, then stays or falls in a half cosine.

    With `minutes` a stage takes that much time on any machine: `steps` should then be more than it can reach.
    """

    steps: Count = 1000
    minutes: Weight = 0.0  # of training: it ends there or after `steps`, and the rate falls with the clock; 0: no clock
    batch: Count = 32  # samples a step, for all processes together
    learning_rate: Rate = 1e-4
    warmup: Zero = 100
    schedule: Annotated[str, _words("cosine", "constant")] = "cosine"
    weight_decay: Weight = 0.01
    clip: Rate = 1.0  # of the gradient's norm
    ema: Decay = 0.995
    seed: Zero = 0
    precision: Annotated[str, _words("fp32", "bf16", "fp16")] = "fp32"
    accumulate: Count = 1  # parts of a batch, one after the other, to save memory
    gradient_checkpointing: bool = False
    compile: bool = False
    shard: bool = False  # weights, optimizer and average spread over the processes (FSDP2)
    workers: Zero = 0  # processes that read samples ahead, for each that trains
    resident: bool = False  # keeps all rows and draws noise on the GPU: for small models and data
    log_every: Count = 50
    save_every: Count = 500
    validate_every: Count = 500

    def rate(self, step: int, spent: float = 0.0) -> float:
        """Learning rate of a step in [0, steps). spent: share of `minutes`, where they are set."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        progress = max((step - self.warmup) / max(self.steps - self.warmup, 1), spent)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class VaePlan(Plan, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The autoencoder, for a checkpoint without a trained one."""

    crop: Count = 64  # pixels; a VAE is nearly local, and a crop costs a part of the picture
    kl_weight: Weight = 1e-3  # per latent value, against L1 per pixel value
    decoder_only: bool = False  # keeps the encoder, for a UNet trained on its latents


class HandPriorPlan(Plan, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Stage 1: text to hands."""

    drop_text: Share = 0.1
    wordings: Annotated[str, _words("first", "any")] = "any"  # of a sample's prompts


class EncoderPlan(Plan, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The encoder alone, in place of CLIP's pre-training. Needs samples with labels."""

    drop_text: Share = 0.1
    drop_hands: Share = 0.1
    drop_both: Share = 0.1


class PicturesPlan(Plan, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Stage 2: text and hands to pictures."""

    drop_text: Share = 0.1  # of text alone, of hands alone, and of both: guidance needs these
    drop_hands: Share = 0.1
    drop_both: Share = 0.1
    weighting: Annotated[str, _words("plain", "min-snr", "truncated-snr")] = "plain"
    min_snr: Rate = 5.0  # gamma of Hang et al. 2023: the most that an error in x0 counts
    timestep_shift: Rate = 1.0  # above 1 leans towards noise (Esser et al. 2024, equation 23)
    finger_weight: Weight = 0.0  # extra weight of an error at a hand's joint, against the background
    edge_weight: Weight = 0.0  # largest extra weight of an error where latents change between pixels
    colour_weight: Weight = 0.0  # of the mean error over blocks of 8 x 8 latent pixels
    posterior: Annotated[str, _words("sample", "mean")] = "sample"  # of the VAE's posterior: the picture's latent
    lora: Annotated[int, Meta(ge=0, le=1024, description="a rank from 0 (no LoRA) to 1024")] = 0


class DistillPlan(PicturesPlan, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Stage 2 in few runs of the network: see distill.py. `steps` counts each student's optimizer."""

    weight_decay: Weight = 0.0
    ema: Decay = 0.99
    runs: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=8)] = (4, 2)  # one student after the other
    teacher_steps: Count = 12  # which all runs must divide
    teacher_guidance: Weight = 0.0  # 0: as the checkpoint has it
    trajectories: Count = 8192  # of the teacher
    first: Share = 0.6  # of the samples that begin in pure noise
    drop_hands: Share = 0.1  # of the trajectories


class DistillHandsPlan(Plan, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Stage 1 in few runs of the hand prior: see distill.py. A sample is a trajectory with all its jumps."""

    weight_decay: Weight = 0.0
    ema: Decay = 0.99
    runs: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=8)] = (4,)  # one student after the other
    teacher_steps: Count = 12  # which all runs must divide
    teacher_guidance: Weight = 0.0  # 0: as the checkpoint has it
    trajectories: Count = 16384  # of the teacher
    drop_text: Share = 0.02  # of the trajectories


PLANS: dict[str, type[Plan]] = {
    "vae": VaePlan,
    "hand-prior": HandPriorPlan,
    "encoder": EncoderPlan,
    "pictures": PicturesPlan,
    "distill": DistillPlan,
    "distill-hands": DistillHandsPlan,
}
STUDENTS = ("distill", "distill-hands")  # stages that train one network after the other, each with fewer runs


class Recipe(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, rename=lambda n: n.replace("_", "-")
):
    """The stages' plans, and the settings of the whole run."""

    new: Annotated[str, Meta(max_length=20)] | None = None  # sizes of the checkpoint to begin with, without --start
    num_people: Annotated[int, Meta(ge=1, le=MAX_PEOPLE)] | None = None  # of a picture at most; None: as it begins
    held_out: Annotated[float, Meta(ge=0, le=0.5, description="a share from 0 to 0.5")] = (
        0.02  # of samples, to validate
    )
    mirrored: bool = False  # both stages train on each sample's mirror image, too, with left and right exchanged
    prompts: Annotated[tuple[Annotated[str, Meta(max_length=1000)], ...], Meta(max_length=64)] = ()  # of sample grids
    stages: tuple[Annotated[str, _words(*PLANS)], ...] = ("hand-prior", "pictures")  # of `hd-train all`, in this order
    vae: VaePlan = VaePlan()
    hand_prior: HandPriorPlan = HandPriorPlan()
    encoder: EncoderPlan = EncoderPlan()
    pictures: PicturesPlan = PicturesPlan()
    distill: DistillPlan = DistillPlan()
    distill_hands: DistillHandsPlan = DistillHandsPlan()

    @classmethod
    def load(cls, name: str | Path) -> Recipe:
        """Reads one of ours by name ("demo", "sd15"), or a file. Raises TrainingError that names a wrong entry."""
        path = RECIPES / f"{name}.toml" if (RECIPES / f"{name}.toml").exists() else Path(name)
        try:
            value = msgspec.toml.decode(read_file(path, MAX_JSON_BYTES))
            for stage, kind in PLANS.items():  # first, for an error that names the entry
                if isinstance(value.get(stage), dict):
                    fit(value[stage], kind)
            recipe = fit(value, cls)
        except FileNotFoundError:
            ours = ", ".join(sorted(file.stem for file in RECIPES.glob("*.toml")))
            raise TrainingError(f"--recipe must be a .toml file or one of {ours}, got {name}.") from None
        except OSError as error:
            raise TrainingError(f"The recipe {path} cannot be read: {error.strerror}.") from error
        except (MisfitError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise TrainingError(f"The recipe {path} is wrong. {error}") from None
        if recipe.new is not None and recipe.new not in CONFIGS:
            raise TrainingError(f"new in the recipe {path} must be one of {', '.join(CONFIGS)}, got {recipe.new!r}.")
        return recipe

    def plan(self, stage: str) -> Any:
        return getattr(self, stage.replace("-", "_"))

    def changed(self, stage: str, values: Mapping[str, Any]) -> Recipe:
        """The recipe with other values in a stage's plan. Raises TrainingError for a value out of range."""
        plan = self.plan(stage)
        try:
            new = fit({**msgspec.to_builtins(plan), **values}, type(plan))
        except MisfitError as error:
            raise TrainingError(f"{stage}: {error}") from None
        return msgspec.structs.replace(self, **{stage.replace("-", "_"): new})

    def save(self, path: Path) -> None:
        """Writes all settings, so that later defaults change nothing."""
        value = msgspec.to_builtins(self)
        tables = {name: part for name, part in value.items() if isinstance(part, dict)}
        lines = [f"{name} = {_toml(part)}" for name, part in value.items() if name not in tables and part is not None]
        for name, table in tables.items():
            lines += ["", f"[{name}]", *(f"{key} = {_toml(part)}" for key, part in table.items())]
        with written(path) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _toml(value: Any) -> str:
    """TOML spells text, numbers, booleans and lists of text as JSON does."""
    return json.dumps(value, ensure_ascii=False)
