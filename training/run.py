"""A run: a folder that trains a checkpoint from a dataset, stage by stage.

    run = Run(Path("runs/demo"), Path("world"), Recipe.load("demo"))
    run.train("hand-prior")
    run.checkpoint().save("checkpoint")

    recipe.toml  tokenizer.json (of a new checkpoint)  vae.json  samples/
    vae/ hand-prior/ encoder/ pictures/ distill-N/ distill-hands-N/    state.safetensors  log.jsonl  tensorboard/
    bank/ hand-bank/ (of the teachers)                                 [adapter.safetensors]

A stage reads the other stages' results from the folder, never from memory: each stage can train by itself, and any can
be interrupted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import Tensor, nn

from .. import shipped
from ..data import files as data_files
from ..data.augment import fit_picture, flip_words
from ..data.dataset import Index
from ..data.latents import LatentCache, encode_prompts, make_latents
from ..data.samples import Sample, picture
from ..errors import DatasetError, TrainingError
from ..files import written
from ..grammar import words_of
from ..models import lora
from ..models.autoencoder import PatchAutoencoderKL
from ..models.checkpoint import BODY, Checkpoint, random_checkpoint
from ..models.configs import CONFIGS
from ..models.vocabulary import make_tokenizer
from ..schema import MisfitError
from .distill import (
    PER_FILE,
    Bank,
    HandBank,
    PictureBank,
    becomes_hand_student,
    becomes_student,
    grid,
    hand_jump_stage,
    jump_stage,
)
from .draws import spread_over
from .grow import with_people
from .loop import Stage, console, fit, usable
from .recipe import PLANS, STUDENTS, Recipe
from .sample import CUES, decode, encode, hands_of, image_grid, means_of, sample_hands, sample_pictures
from .stages import (
    EncoderLoss,
    HandJumpLoss,
    HandPriorLoss,
    PictureLoss,
    VaeLoss,
    encoder_inputs,
    hand_prior_inputs,
    images_to_float,
    normalisation,
    picture_inputs,
    vae_inputs,
)
from .state import averages, changes, data_of, finished

ADAPTER = "adapter.safetensors"
SOME = 64  # pictures for the autoencoder's principal components, and for the scale of its latents
MEASURED_SAMPLES = 4096  # samples for means and deviations
GRID_SAMPLES = 16  # held-out samples of a sample grid
MAX_BAD_SAMPLES = 20  # left-out samples to report
MAX_WORDS = 10_000  # a checkpoint with more lists none: its vocabulary is broad
VOCABULARY = 20_000  # samples that train a new checkpoint's tokenizer
HELD_BITS = 1 << 32


class Run:
    """A run folder with its dataset, recipe and start."""

    def __init__(self, folder: Path, data: Path, recipe: Recipe, start: Path | None = None) -> None:
        """start: the checkpoint folder to start from; else the recipe's `new` gives the sizes.

        Raises TrainingError without either.
        """
        self.folder, self.recipe, self.start = folder, recipe, start
        if start is None and recipe.new is None:
            raise TrainingError(
                "This recipe must start from a checkpoint. Give --start CHECKPOINT; `hd-train init` makes one from "
                "Stable Diffusion."
            )
        self.index = Index.open(data)
        self.digest = hashlib.sha256("".join(self.index.digests()).encode()).hexdigest()[:16]
        limit = recipe.held_out * HELD_BITS
        digests = (hashlib.sha256(self.index.entry(i).key.encode()).digest() for i in range(len(self.index)))
        self.held = np.fromiter((int.from_bytes(d[:4], "big") < limit for d in digests), bool, len(self.index))

    def prepare(self) -> None:
        """Writes a run's first files, before several processes read them.

        Raises TrainingError for an adapter that would fit no checkpoint.
        """
        people = self.recipe.num_people or 1
        if self.start is not None and people > 1 and (self.recipe.pictures.lora or self.recipe.distill.lora):
            known = Checkpoint.load(self.start, mapped=True).num_people
            if people > known:
                raise TrainingError(
                    f"num_people must be at most {known} with --lora, as {self.start} has it, got {people}. Train a "
                    "checkpoint of more people without --lora, and give it as --start."
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "tokenizer.json"
        if self.start is None and not path.exists():
            assert self.recipe.new is not None
            samples = (self.index.sample(i) for i in range(min(len(self.index), VOCABULARY)))
            texts = [prompt for sample in samples if isinstance(sample, Sample) for prompt in sample.prompts]
            texts += [flip_words(text) for text in texts] if self.recipe.mirrored else []
            make_tokenizer(texts, CONFIGS[self.recipe.new].vocab_size).save(str(path))
        self.recipe.save(self.folder / "recipe.toml")

    def begin(self) -> Checkpoint:
        """The checkpoint before training."""
        if self.start is not None:
            start = Checkpoint.load(self.start)
            return with_people(start, self.recipe.num_people or start.num_people)
        assert self.recipe.new is not None
        config = CONFIGS[self.recipe.new]
        config = replace(config, num_people=self.recipe.num_people or config.num_people)
        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        own = self.index.folder / data_files.BODY  # whose hands the data has
        body = own if own.is_file() else shipped.checkpoint_path() / BODY
        checkpoint = random_checkpoint(config, self.recipe.vae.seed, body=body, tokenizer=tokenizer)
        if checkpoint.position_kernel is not None:
            checkpoint.position_kernel.focus()
        for module in checkpoint.modules().values():
            module.eval().requires_grad_(False)
        checkpoint.attach_kernel()
        return checkpoint

    def checkpoint(self, students: bool = True) -> Checkpoint:
        """The checkpoint with every stage trained so far. students: also the distilled ones."""
        checkpoint = self.begin()
        modules: dict[str, Callable[[], nn.Module]] = {
            "vae": lambda: VaeLoss(checkpoint, self.recipe.vae),
            "hand-prior": lambda: HandPriorLoss(checkpoint),
            "encoder": lambda: nn.ModuleDict({"encoder": checkpoint.text_hand_encoder}),
            "pictures": lambda: PictureLoss(checkpoint, self.recipe.pictures),
        }
        if students:
            modules |= dict.fromkeys(self.parts("distill"), modules["pictures"])
            modules |= dict.fromkeys(self.parts("distill-hands"), lambda: HandJumpLoss(checkpoint))
        for name, make in modules.items():
            learned = averages(self.folder / name)
            if name == "encoder":  # without the linear heads
                learned = {key: value for key, value in learned.items() if key.startswith("encoder.")}
            if any(".lora_A." in key for key in learned):
                lora.merge(checkpoint, self.write_adapter(name))
            elif learned:
                module = make()
                known = module.state_dict()  # the state lacks frozen parts
                other = [key for key in known if key.endswith(".person") and key not in learned]
                other = [key for key in other if f"{key.removesuffix('person')}place" in learned]  # of fewer people
                if other or any(key not in known or known[key].shape != value.shape for key, value in learned.items()):
                    raise TrainingError(
                        f"{self.folder / name} must be of this network, got another. Name another --run."
                    )
                module.load_state_dict(learned, strict=False)
            stage, _, runs = name.rpartition("-")
            if learned and stage in STUDENTS:
                {"distill": becomes_student, "distill-hands": becomes_hand_student}[stage](checkpoint, int(runs))
        measured = self.folder / "vae.json"
        if measured.exists():
            checkpoint.vae.register_to_config(**json.loads(measured.read_text()))
        for part in checkpoint.modules().values():
            part.eval().requires_grad_(False)
        checkpoint.attach_kernel()
        return checkpoint

    def write_adapter(self, stage: str = "pictures") -> Path:
        """Writes a stage's LoRA as a file of its own, and returns its path."""
        path = self.folder / stage / ADAPTER
        learned = averages(self.folder / stage)
        rank = next(len(value) for name, value in learned.items() if ".lora_A." in name)
        trained = {name.replace(".default.weight", ".weight"): value for name, value in learned.items()}
        lora.save({name: value for name, value in trained.items() if ".basis" not in name}, path, rank)
        return path

    def mirrored(self, stage: str) -> bool:
        """Whether a stage trains on mirror images, too: labels name sides in words that `flip` does not know."""
        return self.recipe.mirrored and stage not in ("vae", "encoder")

    def data(self, stage: str) -> str:
        """What a stage trains on, which its folder must keep."""
        return f"{self.digest}-mirrored" if self.mirrored(stage) else self.digest

    def latents(self, checkpoint: Checkpoint, stage: str, make: bool = True) -> LatentCache:
        """Token ids and hand features of a stage's data for this checkpoint, and latents for the stage pictures.

        It takes latents that were encoded in float32 or in bfloat16, whichever are there, and adds what is faster here.
        Those of the mirror images follow. make: adds missing ones.
        """
        pictures = stage == "pictures"
        cache = self._latents_of(checkpoint, pictures, make, False)
        return cache.joined(self._latents_of(checkpoint, pictures, make, True)) if self.mirrored(stage) else cache

    def _latents_of(self, checkpoint: Checkpoint, pictures: bool, make: bool, flipped: bool) -> LatentCache:
        folder, device = self.index.folder, "cuda" if torch.cuda.is_available() else "cpu"
        fast = usable("bf16") == "bf16"
        for bf16 in (fast, not fast):
            with contextlib.suppress(DatasetError):
                return LatentCache.open(checkpoint, folder, pictures=pictures, flipped=flipped, bf16=bf16)
        if make:
            columns = (TextColumn("latents"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            with Progress(*columns, console=console, transient=True) as bar:
                task = bar.add_task("", total=None)

                def show(done: int, total: int) -> None:
                    bar.update(task, completed=done, total=total)

                make_latents(checkpoint, folder, show, pictures=pictures, flipped=flipped, bf16=fast, device=device)
        try:
            return LatentCache.open(checkpoint, folder, pictures=pictures, flipped=flipped, bf16=fast)
        except DatasetError as error:
            raise TrainingError(f"{error} Or start with one process, which makes them.") from None

    def images(self, numbers: Sequence[int], size: tuple[int, int]) -> Tensor:
        """Pictures of some samples, uint8 [n, H, W, 3]. The next readable picture replaces an unreadable one."""
        images = []
        for number in numbers:
            for turn in range(len(self.index)):
                sample = self.index.sample((number + turn) % len(self.index))
                try:
                    if isinstance(sample, Sample) and sample.image is not None:
                        images.append(fit_picture(picture(sample), None, size)[0])
                        break
                except MisfitError:
                    continue
            else:
                raise TrainingError(
                    f"{self.index.folder} must hold a readable picture. hd-data check names the problems."
                )
        return torch.from_numpy(np.stack(images))

    def some_pictures(self, size: tuple[int, int]) -> Tensor:
        """Up to SOME pictures from all over the data, uint8 [n, H, W, 3], none held out. Raises TrainingError."""
        rows = np.flatnonzero(self.index.has_picture & ~self.held)
        if not len(rows):
            raise TrainingError(
                f"{self.index.folder} must hold a picture to train on, got none. Add data: see hd-data."
            )
        return self.images(spread_over(rows, SOME).tolist(), size)

    def parts(self, stage: str) -> list[str]:
        """The folders of a stage: one, or one for each student."""
        return [f"{stage}-{runs}" for runs in self.recipe.plan(stage).runs] if stage in STUDENTS else [stage]

    def done(self, stage: str) -> bool:
        plan = self.recipe.plan(stage)
        return all(finished(self.folder / part, plan.steps, plan.minutes) for part in self.parts(stage))

    def otherwise(self, stage: str) -> str:
        """Of a finished stage: a sentence if its settings differ from the plan's, else ""."""
        known = [changes(self.folder / part, self.recipe.plan(stage)) for part in self.parts(stage)]
        said = next((words for words in known if words), "")
        if any(data_of(self.folder / part) not in ("", self.data(stage)) for part in self.parts(stage)):
            said = f"another dataset{said and ', ' + said}"
        return f", with other settings: {said}. To train with the new ones, name another --run." if said else ""

    def ready(self, stage: str) -> None:
        """Makes missing latents and the like, before several processes read them."""
        if stage in STUDENTS:
            grid(self.recipe.plan(stage))  # refuses a bad plan first
            self.latents(self.checkpoint(), stage)
        else:
            self.stage(stage)

    def stage(self, name: str, make: bool = True) -> Stage:
        """A stage's module and data. make: adds missing latents; otherwise they raise TrainingError."""
        recipe, checkpoint = self.recipe, self.checkpoint()
        empty = encode_prompts([""], checkpoint.tokenizer, checkpoint.special_tokens)[0]
        common: dict[str, Any] = {"data": self.data(name)}
        if name == "vae":
            size = checkpoint.image_size
            read = lambda rows: {"images": self.images(rows, size)}  # noqa: E731
            module = VaeLoss(checkpoint, recipe.vae)
            pictures = self.index.has_picture
            common |= {"train": np.flatnonzero(pictures & ~self.held), "held": np.flatnonzero(pictures & self.held)}
            common |= {"fixed": module.fixed, "slow": module.slow}
            if isinstance(checkpoint.vae, PatchAutoencoderKL) and not checkpoint.vae.begun:
                checkpoint.vae.begin(images_to_float(self.some_pictures(size)))
            stage = Stage(name, module, read, vae_inputs(checkpoint, recipe.vae), **common)
            stage.on_save = lambda step: self.show_vae(checkpoint, step)
            module.requires_grad_(True)
            return stage
        if name == "pictures" and isinstance(checkpoint.vae, PatchAutoencoderKL) and not checkpoint.vae.begun:
            raise TrainingError(
                "The autoencoder of --start must be trained before stage 2. Train it first: hd-train vae."
            )
        cache = self.latents(checkpoint, name, make)
        held = self.held[cache.samples[cache.usable]]
        common |= {"train": cache.usable[~held], "held": cache.usable[held]}
        for bad in cache.left_out[:MAX_BAD_SAMPLES] if make else ():
            console.print(f"left out: {bad}", style="yellow")
        if name == "hand-prior":
            common = {**common, **{part: self.known(cache, common[part]) for part in ("train", "held")}}
            prior = checkpoint.hand_prior
            if not prior.mean.any():  # an untrained prior lacks its normalisation
                rows = cache.rows(spread_over(common["train"], MEASURED_SAMPLES), ("params",))
                mean, std = normalisation(rows["params"].float())
                prior.mean.copy_(mean)
                prior.std.copy_(std)
            read = lambda rows: cache.rows(rows, ("params", "ids"))  # noqa: E731
            inputs = hand_prior_inputs(checkpoint, recipe.hand_prior, empty)
            stage = Stage(name, HandPriorLoss(checkpoint), read, inputs, **common)
            stage.module.requires_grad_(True)
            return stage
        if name == "encoder":
            classes = [len(values) for values in cache.labels.values()]
            if not classes:
                raise TrainingError(
                    "The stage encoder must have samples with labels, got none. A checkpoint from Stable Diffusion "
                    "does not need that stage: its encoder is CLIP."
                )
            read = lambda rows: cache.rows(rows, ("ids", "labels", *CUES))  # noqa: E731
            torch.manual_seed(recipe.encoder.seed)
            reader = EncoderLoss(checkpoint.text_hand_encoder, classes)
            stage = Stage(name, reader, read, encoder_inputs(recipe.encoder, empty), **common)
            stage.module.requires_grad_(True)
            return stage
        self.measure_vae(
            checkpoint, lambda: cache.rows(spread_over(common["train"], MEASURED_SAMPLES), ("mean",))["mean"].float()
        )
        if recipe.pictures.lora:
            torch.manual_seed(recipe.pictures.seed)
            lora.inject(checkpoint, recipe.pictures.lora)
        painter = PictureLoss(checkpoint, recipe.pictures)
        if not recipe.pictures.lora:
            painter.requires_grad_(True)
        read = lambda rows: cache.rows(rows, ("mean", "std", "ids", *CUES))  # noqa: E731
        stage = Stage(name, painter, read, picture_inputs(checkpoint, recipe.pictures, empty), **common)
        rows = (stage.held if len(stage.held) else stage.train)[:GRID_SAMPLES]
        stage.on_save = partial(self.show_pictures, checkpoint, cache, name, rows, empty)
        return stage

    def known(self, cache: LatentCache, rows: np.ndarray) -> np.ndarray:
        """The rows whose hands are annotated. Raises TrainingError without any."""
        if not cache.annotated.any():
            raise TrainingError(
                f"{self.index.folder} must have annotated hands for stage 1, got pictures alone. Train stage 2 on it: "
                "hd-train pictures."
            )
        return rows[cache.annotated[rows]]

    def train(self, name: str, make: bool = True) -> None:
        """Trains a stage in this process, alone or as one of several."""
        if name in STUDENTS:
            self.distill(name, make)
        else:
            fit(self.stage(name, make), self.recipe.plan(name), self.folder / name)

    def distill(self, name: str, make: bool) -> None:
        """A bank of the teacher's trajectories, then one student after the other, each from the one before."""
        plan, state = self.recipe.plan(name), PartialState(cpu=not torch.cuda.is_available())
        teacher = self.checkpoint(students=False)
        cache = self.latents(teacher, name, make)
        rows = cache.usable[~self.held[cache.samples[cache.usable]]]
        if not len(rows):
            raise TrainingError(
                f"{self.index.folder} must have one sample to make trajectories of, got 0. Add data: see hd-data."
            )
        bank: Bank
        if name == "distill":
            bank = PictureBank(self.folder / "bank", teacher, cache, rows, plan, self.data(name))
            PictureLoss(teacher, plan).to(state.device)  # all of stage 2
        else:
            rows = self.known(cache, rows)
            if not teacher.hand_prior.mean.any():
                raise TrainingError("The hand prior of --start must be trained. Train it first: hd-train hand-prior.")
            bank = HandBank(self.folder / "hand-bank", teacher, cache, rows, plan, self.data(name))
            HandJumpLoss(teacher).to(state.device)
        said = [-1]

        def show(done: int, total: int) -> None:
            if state.is_main_process and 20 * done // total > said[0]:
                said[0] = 20 * done // total
                console.print(f"{name}: {done * PER_FILE} of {total * PER_FILE} trajectories")

        bank.make(state.process_index, state.num_processes, show, str(state.device))
        state.wait_for_everyone()
        empty = encode_prompts([""], teacher.tokenizer, teacher.special_tokens)[0]
        for runs, part in zip(plan.runs, self.parts(name), strict=True):
            if finished(self.folder / part, plan.steps, plan.minutes):
                continue
            student = self.checkpoint()
            if isinstance(bank, HandBank):
                becomes_hand_student(student, runs)
                stage = hand_jump_stage(student, bank, plan, runs, part)
            else:
                assert isinstance(bank, PictureBank)
                if plan.lora:
                    torch.manual_seed(plan.seed)
                    lora.inject(student, plan.lora)
                becomes_student(student, runs)
                stage = jump_stage(student, bank, plan, runs, part)
                stage.on_save = partial(self.show_pictures, student, cache, part, rows[:GRID_SAMPLES], empty)
            stage.data = self.data(name)
            fit(stage, plan, self.folder / part)

    def measure_vae(self, checkpoint: Checkpoint, means: Callable[[], Tensor]) -> None:
        """Scales and shifts the latents of a VAE trained here to mean 0 and deviation 1, and keeps both numbers.

        means: latents [n, C, h, w] of pictures, not scaled.
        """
        path = self.folder / "vae.json"
        if path.exists() or not averages(self.folder / "vae") or self.recipe.vae.decoder_only:
            return
        mean = means()
        found = {"scaling_factor": float(1 / mean.std()), "shift_factor": float(mean.mean())}
        with written(path) as temporary:
            temporary.write_text(json.dumps(found) + "\n")
        checkpoint.vae.register_to_config(**found)

    def show_vae(self, checkpoint: Checkpoint, step: int) -> None:
        images = self.images(np.flatnonzero(self.index.has_picture)[:8].tolist(), checkpoint.image_size)
        device = next(checkpoint.vae.parameters()).device
        with torch.no_grad():
            again = decode(checkpoint, encode(checkpoint, images_to_float(images).to(device))).cpu()
        self.write("vae", step, torch.cat([images, again]))

    def show_pictures(
        self, checkpoint: Checkpoint, cache: LatentCache, stage: str, samples: np.ndarray, empty: Tensor, step: int
    ) -> None:
        """Draws some samples with their own hands, then the recipe's prompts with the hand prior's."""
        if self.recipe.plan(stage.partition("-")[0]).lora:
            self.write_adapter(stage)
        device = next(checkpoint.unet.parameters()).device
        rows = cache.rows(samples, ("ids", *CUES))
        ids, hands = rows["ids"][:, -1], {name: rows[name].float() for name in CUES}
        if self.recipe.prompts and checkpoint.hand_prior.mean.any() and checkpoint.body is not None:
            asked = encode_prompts(self.recipe.prompts, checkpoint.tokenizer, checkpoint.special_tokens)
            found = hands_of(checkpoint, sample_hands(checkpoint, asked))
            ids = torch.cat([ids, asked])
            hands = {name: torch.cat([value, found[name].float()]) for name, value in hands.items()}
        parts = []
        for first in range(0, len(ids), 8):
            some = {name: value[first : first + 8].to(device) for name, value in hands.items()}
            parts.append(sample_pictures(checkpoint, ids[first : first + 8].to(device), empty.to(device), some).cpu())
        self.write(stage, step, torch.cat(parts))

    def write(self, name: str, step: int, images: Tensor) -> None:
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        Image.fromarray(image_grid(images, 8).numpy()).save(folder / f"{name}-{step:06d}.png")

    def save(self, output: Path, half: bool = False) -> None:
        """Writes the checkpoint folder, or the adapter alone to a name that ends in .safetensors."""
        if output.suffix == ".safetensors":
            if not self.recipe.pictures.lora:
                raise TrainingError(
                    f"{output} must be a folder, got an adapter's name. Or train an adapter with --lora RANK."
                )
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_bytes(self.write_adapter().read_bytes())
            return
        checkpoint = self.checkpoint()
        if self.start is None or checkpoint.words:  # without CLIP it knows only its training words
            samples = (self.index.sample(i) for i in range(len(self.index)))
            prompts = (prompt for sample in samples if isinstance(sample, Sample) for prompt in sample.prompts)
            words = {word for prompt in prompts for word in words_of(prompt)} | set(checkpoint.words)
            if self.recipe.mirrored:
                words |= {flip_words(word) for word in words}
            checkpoint.words = sorted(words) if len(words) <= MAX_WORDS else []
        self.measure_vae(checkpoint, lambda: means_of(checkpoint, self.some_pictures(checkpoint.image_size)))
        trained = {name: {"steps": self.recipe.plan(name).steps, "data": self.data(name)} for name in PLANS
                   if finished(self.folder / name)}  # fmt: skip
        for name in STUDENTS:
            if self.done(name):
                trained[name] = {"runs": list(self.recipe.plan(name).runs), "data": self.data(name)}
        checkpoint.notes = {**checkpoint.notes, "trained": {**_stages(checkpoint.notes), **trained}}
        checkpoint.save(output, half=half)


def _stages(notes: dict[str, Any]) -> dict[str, Any]:
    """The trained stages in a checkpoint's notes."""
    before = notes.get("trained")
    return before if isinstance(before, dict) else {}
