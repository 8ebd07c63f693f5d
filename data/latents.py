"""Latents, token ids and hand features of each sample, computed once and kept in shards beside the pictures.

Training reads them through the page cache, so that its memory does not grow with the dataset.

    make_latents(checkpoint, "photos")                            # hd-data latents CHECKPOINT photos
    cache = LatentCache.open(checkpoint, "photos")
    rows = cache.rows([7, 3])                                     # mean, std, ids, joints, rotations, ...

Two caches lie in the dataset's folder, each a safetensors file a shard: `hands-KEY/` (ids, parameters, features) and
`latents-KEY/` (the VAE's posterior). KEY hashes everything the rows depend on (tokenizer, body, basis, size; VAE,
size): another VAE has another cache, and `key.json` lists the inputs. An interrupted run goes on at its shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor

from ..contract import file_digest
from ..errors import CheckpointError, DatasetError
from ..files import written
from ..models.checkpoint import Checkpoint
from ..models.hand_features import HandFeatures
from ..models.smplh import SMPLH
from ..placeholders import runs, spread
from ..schema import MisfitError
from .augment import Hands, centre_box, crop_hands, fit_picture, flip
from .dataset import Index
from .hands import most_visible, people_rows, plain_features
from .samples import Bad, Sample, person, picture, picture_size

FORMAT = 3  # of the files; raise it when the rows change
HAND_ROWS = ("ids", "params", "joints", "rotations", "bps", "visibility", "labels")
LATENT_ROWS = ("mean", "std")
PEOPLE = ("most-visible", "each")
BATCH = 16  # pictures, or people, at a time


class LatentCache:
    """Rows of a dataset, ready to train on. Make one with `open` or `make_latents`.

    A row is a sample with its most visible people, as many as the checkpoint knows; or with people="each" one person of
    a sample. `len` counts the rows; samples [R]: each row's sample. usable: the rows to train on (with `pictures`:
    those whose picture could be encoded). annotated: bool [R], rows whose hands the data states; stage 1 learns from
    these alone. left_out: a Bad for each sample without a usable row, and for each damaged shard. labels: name -> its
    classes, in the order of the numbers of `rows()["labels"]`.
    """

    def __init__(self, index: Index, hands: list[_File], latents: list[_File] | None) -> None:
        self.index, self.pictures = index, latents is not None
        self._hands, self._latents = hands, latents
        groups = index.groups * (len(hands) // max(1, len(index.groups)))  # once more for mirror images
        counts = [len(file["sample"]) for file in hands]
        self._starts = np.cumsum([0, *counts])  # the first row of each group
        self.samples = np.concatenate(
            [file["sample"].numpy() + first for file, (_, first, _) in zip(hands, groups, strict=True)]
        )
        valid = [np.ones(count, bool) for count in counts]
        if latents is not None:
            valid = [have["valid"][file["sample"]].numpy() for have, file in zip(latents, hands, strict=True)]
        self.usable = np.flatnonzero(np.concatenate(valid))
        bad = (bad for file in (*hands, *(latents or ())) for bad in file.bad)
        self.left_out = list(dict.fromkeys((*index.problems, *bad)))
        self.annotated = np.concatenate([file["annotated"].numpy() for file in hands])
        self.wordings = max((file["ids"].shape[1] for file in hands if len(file["sample"])), default=1)
        self.labels = _merged(file.labels for file in hands)

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        folder: str | Path,
        *,
        pictures: bool = True,
        body: Path | None = None,
        people: str = "most-visible",
        flipped: bool = False,
        bf16: bool = False,
        cache: Path | None = None,
    ) -> LatentCache:
        """The cache of this checkpoint's VAE, tokenizer and body (`body`: a file of yours) for a dataset.

        pictures: with latents; without them the cache serves stage 1. flipped: of the mirror images. bf16: encoded in
        bfloat16, several times as fast on GPUs and on CPUs with AMX. cache: its folder, if not the dataset's own.
        Raises DatasetError where the cache is incomplete.
        """
        work = _Work(checkpoint, folder, pictures, body, people, flipped, bf16, cache)
        files = {kind: [work.valid(kind, number) for number in range(len(work.index.groups))] for kind in work.kinds}
        missing = [
            name
            for number, (name, *_) in enumerate(work.index.groups)
            if any(files[kind][number] is None for kind in work.kinds)
        ]
        if missing:
            raise DatasetError(
                f"{folder} lacks this checkpoint's latents for {len(missing)} of its {len(work.index.groups)} shards "
                f"(such as {missing[0]}). Run: hd-data latents CHECKPOINT {folder}{' --flipped' if flipped else ''}"
            )
        found = {kind: [file for file in files[kind] if file is not None] for kind in work.kinds}
        return cls(work.index, found["hands"], found.get("latents"))

    def joined(self, other: LatentCache) -> LatentCache:
        """This cache's rows, then those of another one of the same dataset: of its mirror images."""
        latents = None if self._latents is None or other._latents is None else [*self._latents, *other._latents]
        return LatentCache(self.index, [*self._hands, *other._hands], latents)

    def __len__(self) -> int:
        return len(self.samples)

    def rows(self, rows: Sequence[int] | np.ndarray, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Some rows: mean, std float16 [N, C, h, w] (not scaled), ids int64 [N, W, 77] (W wordings; fewer are
        repeated), joints [N, H, 21, 2], rotations [N, H, 16, 6], bps [N, H, 512], visibility [N, H], params [N, P]
        (all float32; H hands: two of each person), labels int64 [N, len(labels)] (-1: unlabelled). names: these alone.
        """
        wanted = list(names) if names is not None else [*HAND_ROWS, *(LATENT_ROWS if self.pictures else ())]
        rows = np.asarray(rows, np.int64)
        groups = np.searchsorted(self._starts, rows, "right") - 1
        out: dict[str, Tensor] = {}
        for group in np.unique(groups).tolist():
            at = np.flatnonzero(groups == group)
            local = torch.from_numpy(rows[at] - self._starts[group])
            target = torch.from_numpy(at)
            for name in wanted:
                value = self._part(group, name, local)
                if name not in out:
                    out[name] = value.new_empty(len(rows), *value.shape[1:])
                out[name][target] = value
        return out

    def _part(self, group: int, name: str, local: Tensor) -> Tensor:
        file = self._hands[group]
        if name in LATENT_ROWS:
            if self._latents is None:
                raise DatasetError(
                    "This cache was opened without pictures: it has no latents. Open it with pictures=True."
                )
            return self._latents[group][name][file["sample"][local]]
        value = file[name][local]
        if name == "ids":
            return value[:, torch.arange(self.wordings) % value.shape[1]].long()
        if name == "labels":
            return _renumbered(value, file.labels, self.labels)
        return value.float()


def make_latents(
    checkpoint: Checkpoint,
    folder: str | Path,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    pictures: bool = True,
    body: Path | None = None,
    people: str = "most-visible",
    flipped: bool = False,
    bf16: bool = False,
    cache: Path | None = None,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world: int = 1,
) -> None:
    """Fills what is missing of the cache that `LatentCache.open` opens.

    on_progress: called with (samples done, samples in all). rank, world: each of several processes makes its share of
    the shards; all must finish before any opens the cache. Unreadable samples: see `LatentCache.left_out`.
    """
    work = _Work(checkpoint, folder, pictures, body, people, flipped, bf16, cache)
    missing = [number for number in range(len(work.index.groups)) if work.lacking(number)][rank::world]
    total = sum(work.index.groups[number][2] - work.index.groups[number][1] for number in missing)
    done = 0
    for number in missing:
        kinds = work.lacking(number)
        size = work.index.groups[number][2] - work.index.groups[number][1]
        for turn, kind in enumerate(kinds):
            for share in work.make(kind, number, device):
                if on_progress is not None:
                    on_progress(done + int(size * (turn + share) / len(kinds)), total)
        done += size


# --- one shard's file ---


class _File:
    """Tensors of a safetensors file, mapped: memory holds only the pages that are read."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.layout, self.content = said["layout"], json.loads(said["content"])
        self.bad = [Bad(*entry) for entry in json.loads(said["bad"])]
        self.labels: dict[str, list[str]] = json.loads(said["labels"])

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


class _Work:
    """The two caches of a dataset: where they are, what is missing, how it is made."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        folder: str | Path,
        pictures: bool,
        body: Path | None,
        people: str,
        flipped: bool,
        bf16: bool,
        cache: Path | None,
    ) -> None:
        if people not in PEOPLE:
            raise DatasetError(f"people must be one of {', '.join(PEOPLE)}, got {people!r}.")
        path = body or checkpoint.body
        if path is None:
            raise CheckpointError("This checkpoint comes without a body. Name your SMPL-H file: --body SMPLH.npz.")
        self.index, self.checkpoint = Index.open(folder), checkpoint
        self.people, self.flipped, self.bf16 = people, flipped, bf16
        self.size = checkpoint.image_size
        self.kinds = ("hands", "latents") if pictures else ("hands",)
        self.body = SMPLH.load(path)
        self.features: HandFeatures = plain_features(
            self.body, checkpoint.text_hand_encoder.basis, self.size[1] / self.size[0]
        )
        shared = {"format": FORMAT, "height": self.size[0], "width": self.size[1], "flipped": flipped}
        self.says = {
            "hands": {
                **shared,
                "people": people,
                **({"num_people": checkpoint.num_people} if checkpoint.num_people > 1 else {}),
                "tokenizer": _digest([checkpoint.tokenizer.to_str(), json.dumps(checkpoint.special_tokens)]),
                "body": _digest(self.body.buffers()),
                "basis": _digest([checkpoint.text_hand_encoder.basis]),
            }
        }
        if pictures:
            encoder = (checkpoint.vae.encoder, checkpoint.vae.quant_conv)  # a trained decoder changes no latents
            state = [tensor for part in encoder if part is not None for tensor in part.state_dict().values()]
            self.says["latents"] = {**shared, "bf16": bf16, "vae": _digest(state)}
        base = Path(cache) if cache is not None else self.index.folder
        self.folders = {
            kind: base / f"{kind}-{_digest([json.dumps(said, sort_keys=True)])[:16]}"
            for kind, said in self.says.items()
        }
        self._layouts = self.index.digests()

    def file(self, kind: str, group: int) -> Path:
        return self.folders[kind] / (Path(self.index.groups[group][0]).stem + ".safetensors")

    def lacking(self, group: int) -> list[str]:
        """The kinds whose file is missing, or was made of another state of the shard."""
        return [kind for kind in self.kinds if self.valid(kind, group) is None]

    def valid(self, kind: str, group: int) -> _File | None:
        """The file of a group, if it was made of this shard as it is."""
        try:
            file = _File(self.file(kind, group))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None
        if file.layout != self._layouts[group]:
            return None
        shard = self.index.path(group)
        # A copy of the shard has another time: its content decides.
        if shard is None or file.content["mtime"] == shard.stat().st_mtime_ns:
            return file
        return file if file.content["sha256"] == file_digest(shard) else None

    def make(self, kind: str, group: int, device: str | torch.device) -> Iterator[float]:
        """Computes and writes one group's file; yields the share done so far."""
        _, first, last = self.index.groups[group]
        shard = self.index.path(group)
        content = {} if shard is None else {"mtime": shard.stat().st_mtime_ns, "sha256": file_digest(shard)}
        place = "" if shard is None else shard.name
        maker = _Hands(self, place) if kind == "hands" else _Latents(self, place, device)
        for start in range(first, last, BATCH):
            maker.add(start - first, [self.sample(i) for i in range(start, min(start + BATCH, last))])
            yield (min(start + BATCH, last) - first) / (last - first)
        tensors = maker.tensors(last - first)
        said = {
            "layout": self._layouts[group],
            "content": json.dumps(content),
            "bad": json.dumps([(bad.key, bad.shard, bad.sentence) for bad in maker.bad]),
            "labels": json.dumps(maker.labels),
        }
        self.folders[kind].mkdir(parents=True, exist_ok=True)
        path = self.file(kind, group)
        try:
            (self.folders[kind] / "key.json").write_text(json.dumps(self.says[kind], indent=1) + "\n")
            with written(path) as temporary:
                temporary.write_bytes(save(tensors, said))  # whose OSError save_file would hide
        except OSError as error:
            raise DatasetError(
                f"{path} cannot be written: {error.strerror or error}. Finished files are kept. Run the same command "
                "again to go on."
            ) from error

    def sample(self, i: int) -> Sample | Bad:
        sample = self.index.sample(i)
        if not self.flipped or isinstance(sample, Bad):
            return sample
        try:
            return flip(sample)
        except MisfitError as error:
            return Bad(sample.key, self.index.entry(i).shard, str(error))


class _Hands:
    """Collects ids, parameters and features of a shard's people."""

    def __init__(self, work: _Work, shard: str) -> None:
        self.work, self.shard = work, shard
        self.bad: list[Bad] = []
        self.labels: dict[str, list[str]] = {}
        self.parts: list[dict[str, Tensor]] = []
        self.of: list[int] = []
        self.words: list[list[str]] = []
        self.said: list[dict[str, str]] = []
        self.annotated: list[bool] = []

    def add(self, first: int, samples: list[Sample | Bad]) -> None:
        pictures: list[list[Hands | None]] = []
        for number, sample in enumerate(samples, first):
            if isinstance(sample, Bad):
                self.bad.append(sample)
                continue
            try:
                hands = self.framed(sample)
            except MisfitError as error:
                self.bad.append(Bad(sample.key, self.shard, str(error)))
                continue
            if hands is None:
                chosen: list[list[Hands | None]] = [[None]]
            elif self.work.people == "each":
                chosen = [[person(hands, one)] for one in range(sample.people)]
            else:
                most = most_visible(hands, self.work.body, self.work.checkpoint.num_people)
                chosen = [[person(hands, one) for one in most]]
            for people in chosen:
                pictures.append(people)
                self.of.append(number)
                self.words.append(sample.prompts)
                self.said.append(sample.meta.get("labels") or {})
                self.annotated.append(sample.annotated)
        if pictures:
            self.parts.append(self.rows(pictures))

    def rows(self, pictures: list[list[Hands | None]]) -> dict[str, Tensor]:
        """Parameters and features, a row a picture."""
        return people_rows(pictures, self.work.features, self.work.checkpoint.num_people)

    def framed(self, sample: Sample) -> Hands | None:
        """The hands in the cropped picture."""
        size = picture_size(sample)
        if sample.hands is None or size is None:
            return sample.hands
        return crop_hands(sample.hands, size, centre_box(size, self.work.size))

    def tensors(self, count: int) -> dict[str, Tensor]:
        checkpoint = self.work.checkpoint
        width = max(map(len, self.words), default=1)
        padded = [text for words in self.words for text in (words[i % len(words)] for i in range(width))]
        ids = encode_prompts(padded, checkpoint.tokenizer, checkpoint.special_tokens).to(torch.int32)
        names = sorted({name for said in self.said for name in said})
        self.labels = {name: sorted({said[name] for said in self.said if name in said}) for name in names}
        numbers = [[self.labels[n].index(said[n]) if n in said else -1 for n in names] for said in self.said]
        rows = len(self.of)
        empty = self.rows([[None]])
        out = {name: torch.cat([part[name] for part in self.parts] or [empty[name][:0]]) for name in empty}
        return {
            **out,
            "bps": out["bps"].half(),
            "ids": ids.reshape(rows, width, -1),
            "labels": torch.tensor(numbers, dtype=torch.int16).reshape(rows, len(names)),
            "sample": torch.tensor(self.of, dtype=torch.int64),
            "annotated": torch.tensor(self.annotated, dtype=torch.bool),
        }


class _Latents:
    """Collects the VAE's posterior of a shard's pictures."""

    def __init__(self, work: _Work, shard: str, device: str | torch.device) -> None:
        self.work, self.shard, self.device = work, shard, device
        self.vae = work.checkpoint.vae.to(device)
        self.bad: list[Bad] = []
        self.labels: dict[str, list[str]] = {}
        self.parts: list[Tensor] = []
        self.of: list[int] = []

    @torch.no_grad()
    def add(self, first: int, samples: list[Sample | Bad]) -> None:
        images = []
        for number, sample in enumerate(samples, first):
            if isinstance(sample, Bad):
                self.bad.append(sample)
                continue
            try:
                image, _ = fit_picture(picture(sample), None, self.work.size)
            except MisfitError as error:
                self.bad.append(Bad(sample.key, self.shard, str(error)))
                continue
            images.append(image)
            self.of.append(number)
        if images:
            batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1
            with torch.autocast(batch.device.type, torch.bfloat16, enabled=self.work.bf16):
                posterior = self.vae.encode(batch).latent_dist
            self.parts.append(torch.stack([posterior.mean, posterior.std]).half().cpu())

    def tensors(self, count: int) -> dict[str, Tensor]:
        height, width = self.work.checkpoint.latent_size
        shape = (self.work.checkpoint.vae.config.latent_channels, height, width)
        found = torch.cat(self.parts, 1) if self.parts else torch.zeros(2, 0, *shape, dtype=torch.float16)
        out = torch.zeros(2, count, *shape, dtype=torch.float16)
        out[:, self.of] = found
        valid = torch.zeros(count, dtype=torch.bool)
        valid[self.of] = True
        return {"mean": out[0], "std": out[1], "valid": valid}


def encode_prompts(prompts: Sequence[str], tokenizer: Tokenizer, special: dict[str, int]) -> Tensor:
    """Prompts -> token ids int64 [N, length]: bos, at most length - 2 tokens, eos, padding."""
    length, table = special["length"], runs(tokenizer)
    ids = torch.full((len(prompts), length), special["pad"], dtype=torch.int64)
    for row, encoding in enumerate(tokenizer.encode_batch(list(prompts), add_special_tokens=False)):
        tokens = [special["bos"], *spread(encoding.ids, table)[: length - 2], special["eos"]]
        ids[row, : len(tokens)] = torch.tensor(tokens)
    return ids


def count_tokens(prompt: str, tokenizer: Tokenizer) -> int:
    """The tokens of a prompt, without begin and end."""
    return len(spread(tokenizer.encode(prompt, add_special_tokens=False).ids, runs(tokenizer)))


def _digest(parts: Iterable[Tensor | str]) -> str:
    """SHA-256 of tensors' bytes, or texts."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part.detach().cpu().contiguous().numpy().tobytes()
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def _merged(many: Iterable[dict[str, list[str]]]) -> dict[str, list[str]]:
    classes: dict[str, set[str]] = {}
    for labels in many:
        for name, words in labels.items():
            classes.setdefault(name, set()).update(words)
    return {name: sorted(classes[name]) for name in sorted(classes)}


def _renumbered(values: Tensor, own: dict[str, list[str]], shared: dict[str, list[str]]) -> Tensor:
    """A shard's label numbers [N, own] as the dataset's [N, shared]."""
    out = torch.full((len(values), len(shared)), -1, dtype=torch.int64)
    for column, name in enumerate(own):
        table = torch.tensor([shared[name].index(word) for word in own[name]] + [-1])  # -1 finds the last
        out[:, list(shared).index(name)] = table[values[:, column].long()]
    return out
