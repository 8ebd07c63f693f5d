"""Model ids of the Hugging Face Hub: what a user types becomes a folder in huggingface_hub's cache.

    folder = fetch("stable-diffusion-v1-5/stable-diffusion-v1-5", "stable-diffusion")
    folder = fetch("hf://org/name@revision", "bundle")

A folder of that name wins, and nothing is downloaded unless an id was typed. It fetches what the toolkit reads, and
nothing else: safetensors, ONNX, JSON and text, never a pickle. huggingface_hub does the work: cache, token, proxies,
Xet, and HF_HUB_OFFLINE. Small files come first: a model of the wrong kind is refused before its weights travel.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import re
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .contract import MANIFEST, Manifest, file_digest
from .errors import BundleError, CheckpointError, HubError
from .files import written
from .schema import MisfitError, read_json, read_python_json

PREFIX = "hf://"
MODEL_INDEX = "model_index.json"
HEADS = {"bundle": MANIFEST, "checkpoint": MODEL_INDEX, "stable-diffusion": MODEL_INDEX}
STABLE_DIFFUSION = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
BODY = "body/smplh.npz"  # of a checkpoint that has its own, licence-free body
SMALL = (".json", ".txt")
BUNDLED = (".onnx", ".data", ".json")  # suffixes of a bundle's files
MAX_SMALL_BYTES = 1 << 27  # bytes of one configuration or vocabulary
VARIANTS = (None, "fp16", "bf16")  # of weights; the first that exists is read
REVISION = "main"

_NAME = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(rf"({_NAME}/{_NAME})(?:@([\w./-]+))?", re.ASCII)
_FILES = (".safetensors", ".ckpt", ".pt", ".onnx", ".json", ".jsonl", ".npz", ".plan", ".txt", ".toml")


class Id(NamedTuple):
    """A repository of models on the Hub, and a branch, tag or commit of it (None: its main branch)."""

    repo: str
    revision: str | None

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "")


def parse(name: str | Path) -> Id | None:
    """The id that a user typed; None for a path.

    `hf://org/name` is always an id. `org/name` is one where neither that path nor the folder `org` is here: in a
    folder that exists, the name is a misspelt path. Raises HubError for a bad id after `hf://`.
    """
    if isinstance(name, Path):
        return None
    found = _ID.fullmatch(name.removeprefix(PREFIX))
    if name.startswith(PREFIX):
        if found is None:
            raise HubError(f"A Hub id must be hf://ORGANISATION/NAME or hf://ORGANISATION/NAME@REVISION, got {name}.")
        return Id(found[1], found[2])
    if found is None or name.endswith(_FILES) or Path(name).exists() or Path(name).parent.exists():
        return None
    return Id(found[1], found[2])


def fetch(
    name: str,
    kind: str,
    variant: str | None = None,
    check: Callable[[Path], object] = lambda folder: None,
    quiet: bool = False,
) -> Path:
    """The folder of an id, in the Hub's cache; it downloads what is not there yet.

    kind: of HEADS. variant: "fp16" or "bf16" where the repository has such weights; by default float32, then these.
    check: called with the folder when it holds its small files, before weights are downloaded.
    Raises HubError for what is missing, gated, unreachable, damaged or too large for the disk; and what `check` raises,
    with the id in place of the folder.
    """
    found = parse(name)
    if found is None:
        raise HubError(f"A Hub id must be hf://ORGANISATION/NAME or hf://ORGANISATION/NAME@REVISION, got {name}.")
    return _fetch(found, kind, variant, check, quiet)


@functools.cache  # a command asks more than once
def _fetch(id: Id, kind: str, variant: str | None, check: Callable[[Path], object], quiet: bool) -> Path:
    with explained(id):
        copy = Snapshot.open(id, HEADS[kind], quiet)
    with _named(copy.folder, id):
        if kind == "bundle":
            copy.get(files := _bundle_files(copy))
            _without_links(copy.folder, [MANIFEST, *files])
        else:
            parts = _parts(copy, kind)
            copy.get(name for name in copy.sizes if _is_small(name, parts))
            check(copy.folder)
            chosen = [name for part in parts for name in weights(copy, part, variant)]
            copy.get([*chosen, *((BODY,) if kind == "checkpoint" and BODY in copy.sizes else ())])
    return copy.folder


@dataclass
class Snapshot:
    """One commit of a repository, in the cache: its folder, and the files that the Hub has for it."""

    id: Id
    folder: Path
    sizes: dict[str, int]  # bytes of each file; offline: of those in the cache
    digests: dict[str, str] = field(default_factory=dict)  # SHA-256 of large files, as the Hub states them
    online: bool = False
    quiet: bool = False

    @classmethod
    def open(cls, id: Id, head: str, quiet: bool) -> Snapshot:
        """The commit that an id names now; offline, or where the Hub does not answer, the one in the cache.

        head: a file that tells what the repository is. Raises errors of huggingface_hub.
        """
        from huggingface_hub import hf_hub_download

        listing = _listing(id)
        if listing is not None and head not in (names := {file.rfilename for file in listing.siblings or []}):
            raise HubError(_not_ours(id, head, names))
        # With the name of the branch, so that the cache remembers where the branch was.
        folder = Path(hf_hub_download(id.repo, head, revision=id.revision, local_files_only=listing is None)).parent
        if listing is None:
            there = (path for path in folder.rglob("*") if path.is_file())
            sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in there}
            return cls(id, folder, sizes, quiet=quiet)
        if listing.sha != folder.name:  # the branch moved meanwhile
            listing = _listing(Id(id.repo, folder.name)) or listing
        files = listing.siblings or []
        sizes = {file.rfilename: file.size or 0 for file in files}
        digests = {file.rfilename: file.lfs.sha256 for file in files if file.lfs is not None}
        return cls(id, folder, sizes, digests, online=True, quiet=quiet)

    def get(self, names: Iterable[str]) -> None:
        """Downloads files that the cache lacks, and checks their hashes. Raises HubError."""
        from huggingface_hub import hf_hub_download

        missing = [name for name in dict.fromkeys(names) if not (self.folder / name).is_file()]
        if not missing:
            return
        total = sum(self.sizes[name] for name in missing)
        self._check_room(total)
        show_bars(sys.stderr.isatty() and not self.quiet)
        if not self.quiet and total > MAX_SMALL_BYTES // 128:
            _say(f"Fetching {len(missing)} files of {self.id} ({_size(total)}).")
        for name in missing:
            with explained(self.id, name):
                path = Path(hf_hub_download(self.id.repo, name, revision=self.folder.name))
            if name in self.digests and file_digest(path) != self.digests[name]:
                path.resolve().unlink()
                path.unlink(missing_ok=True)
                raise HubError(
                    f"{name} of {self.id} arrived damaged: its SHA-256 differs from the Hub's. It was removed. Run the "
                    "same command again."
                )

    def _check_room(self, needed: int) -> None:
        from huggingface_hub.constants import HF_HUB_CACHE

        there = next(path for path in (Path(HF_HUB_CACHE), *Path(HF_HUB_CACHE).parents) if path.exists())
        free = shutil.disk_usage(there).free
        if free < needed:
            raise HubError(
                f"The disk of {HF_HUB_CACHE} must have {_size(needed)} free for {self.id}, got {_size(free)}. Free "
                "some, or set HF_HOME to a folder on another disk."
            )

    def read(self, name: str) -> dict[str, Any]:
        """A JSON object of the snapshot. Raises HubError."""
        try:
            value = read_python_json(self.folder / name)
        except (OSError, MisfitError) as error:
            raise HubError(f"{name} of {self.id} cannot be read: {_first(error)}.") from None
        if not isinstance(value, dict):
            raise HubError(f"{name} of {self.id} must hold a JSON object.")
        return value


def candidates(stem: str, variant: str | None) -> tuple[str, str]:
    """Names of a part's weights as the libraries save them: one file, or the index of several."""
    dot = f".{variant}" if variant else ""
    return f"{stem}{dot}.safetensors", f"{stem}.safetensors.index{dot}.json"


def weights(copy: Snapshot, part: str, variant: str | None) -> list[str]:
    """The files of a part's weights; none for a part without any, such as a tokenizer. Raises HubError."""
    own = {name for name in copy.sizes if name.startswith(f"{part}/")}
    if f"{part}/config.json" not in own:
        return []
    stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    for one in (variant,) if variant else VARIANTS:
        single, index = (f"{part}/{name}" for name in candidates(stem, one))
        if single in own:
            return [single]
        if index in own:
            copy.get([index])
            return [index, *_shards(copy, part, index)]
    files = sorted(name for name in own if name.endswith((".safetensors", ".bin", ".ckpt", ".pt", ".msgpack")))
    if variant and any(name.endswith(".safetensors") for name in files):
        raise HubError(f"{part} of {copy.id} must have {variant} weights for --variant, got {', '.join(files)}.")
    if not copy.online:
        raise HubError(
            f"The cache holds only a part of {copy.id}: it lacks the weights of {part}. Run the command once with a "
            "connection and without HF_HUB_OFFLINE."
        )
    pickled = f", got pickles ({files[0]}), which can run code when opened" if files else ""
    raise HubError(
        f"{part} of {copy.id} must have safetensors weights{pickled}. Take a repository or a revision that has them."
    )


def _shards(copy: Snapshot, part: str, index: str) -> list[str]:
    try:
        names = {f"{part}/{name}" for name in read_json(copy.folder / index)["weight_map"].values()}
    except (OSError, MisfitError, KeyError, TypeError, AttributeError):
        raise HubError(f"{index} of {copy.id} must be an index of weights. Take another revision.") from None
    wrong = sorted(name for name in names if name not in copy.sizes or not name.endswith(".safetensors"))
    if wrong:
        raise HubError(f"{copy.id} must have {wrong[0]}, which {index} names. Take another revision.")
    return sorted(names)


def _parts(copy: Snapshot, kind: str) -> list[str]:
    """The folders of a repository that the toolkit reads. Raises HubError for another kind of model."""
    index = copy.read(MODEL_INDEX)
    ours = "hand_prior" in index
    if kind == "stable-diffusion":
        if ours:
            raise HubError(
                f"{copy.id} is a HanDiffuser checkpoint already. Export it: hd-export {PREFIX}{copy.id} BUNDLE"
            )
        return list(STABLE_DIFFUSION)
    if not ours:
        raise HubError(
            f"{copy.id} must be a HanDiffuser checkpoint, got a {index.get('_class_name', 'pipeline')}. If it is "
            f"Stable Diffusion 1.x or 2.x, make a checkpoint of it: hd-train init {PREFIX}{copy.id} start"
        )
    return [name for name, entry in index.items() if isinstance(entry, list) and re.fullmatch(r"\w+", name)]


def _is_small(name: str, parts: Iterable[str]) -> bool:
    folder, _, file = name.rpartition("/")
    return folder in parts and file.endswith(SMALL) and ".index." not in file


def _bundle_files(copy: Snapshot) -> list[str]:
    files = list(Manifest.load(copy.folder, verify=False).files)
    for name in files:
        if not name.endswith(BUNDLED):
            raise HubError(f"The files of {copy.id} must end in {', '.join(BUNDLED)}, got {name}.")
        if name not in copy.sizes:
            where = f"{copy.id} lacks" if copy.online else f"The cache holds only a part of {copy.id}: it lacks"
            raise HubError(f"{where} {name}. Export and push it again, or fetch it with a connection.")
    return files


def _without_links(folder: Path, names: Iterable[str]) -> None:
    """Puts files where the cache's folder has links to them, as the cache itself does on systems without links.

    OpenVINO and onnx refuse a graph whose weights lie behind a link, or under two names. A file that other revisions
    link to is copied.
    """
    used = Counter(path.resolve() for path in folder.parent.rglob("*") if path.is_symlink())
    for path in (folder / name for name in names):
        if path.is_symlink():
            blob = path.resolve()
            with contextlib.suppress(OSError), written(path) as temporary:  # a read-only cache keeps its links
                if used[blob] > 1:
                    shutil.copyfile(blob, temporary)
                else:
                    blob.replace(temporary)
                used[blob] -= 1


def _not_ours(id: Id, head: str, names: set[str]) -> str:
    """Why a repository without `head` is not what was asked for, and the way out."""
    if head == MANIFEST and MODEL_INDEX in names:
        return (
            f"{id} must be an exported bundle, got a pipeline of PyTorch. Export a HanDiffuser checkpoint: hd-export "
            f"{PREFIX}{id} bundle. Make one of Stable Diffusion first: hd-train init {PREFIX}{id} start"
        )
    if head == MODEL_INDEX and MANIFEST in names:
        return f"{id} must be a checkpoint, got an exported bundle. Paint with it: hd-run {PREFIX}{id} PROMPT"
    single = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    if head == MODEL_INDEX and single:
        return (
            f"{id} must have a {head}, got single files. Fetch one and give its path: hf download {id.repo} "
            f"{single[0]} --local-dir ."
        )
    return f"{id} must have a {head}. Give the id of a whole model."


def _listing(id: Id) -> Any:
    """The files of a repository, with sizes and hashes; None offline, and where the Hub does not answer.

    Raises errors of huggingface_hub.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if offline():
        return None
    try:
        return HfApi().model_info(id.repo, revision=id.revision, files_metadata=True)
    except HfHubHTTPError as error:
        if getattr(error.response, "status_code", 0) < 500:
            raise
        why: Exception = error
    except Exception as error:
        if not _of_network(error):
            raise
        why = error
    _say(f"{constants.ENDPOINT} does not answer ({_first(why)}). A copy in the cache is used where there is one.")
    return None


def _of_network(error: Exception) -> bool:
    """Whether an error comes from the HTTP library of huggingface_hub, which is another one in each major version."""
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3")


@contextlib.contextmanager
def explained(id: Id, file: str = "") -> Iterator[None]:
    """Turns errors of huggingface_hub, the network and the disk into one sentence. Raises HubError."""
    from huggingface_hub import constants, errors

    page, what = f"{constants.ENDPOINT}/{id.repo}", f"{file} of {id}" if file else str(id)
    try:
        yield
    except HubError:
        raise
    except errors.GatedRepoError:
        raise HubError(
            f"{id.repo} is gated: its owners let in who accepts their terms. Accept them at {page}, log in with "
            "`hf auth login` or set HF_TOKEN, and run the same command again."
        ) from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"{id.repo} is neither a folder here nor a repository at {constants.ENDPOINT}. Check the name. If it is "
            "private, log in with `hf auth login` or set HF_TOKEN."
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"The revision must be a branch, tag or commit of {page}, got {id.revision}.") from None
    except errors.LocalEntryNotFoundError:
        how = "HF_HUB_OFFLINE is set" if offline() else f"{constants.ENDPOINT} does not answer"
        raise HubError(
            f"{id} is neither a folder here nor in the cache, and {how}. Connect once, or give a folder."
        ) from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            said = f"refuses your token ({status}). Log in with `hf auth login`, or set HF_TOKEN"
        else:
            said = f"answers with an error ({status}). Try again later"
        raise HubError(f"{constants.ENDPOINT} {said}: {what}.") from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise HubError(
                f"The disk of {constants.HF_HUB_CACHE} is full, and {what} has no room. Free some, or set HF_HOME to a "
                "folder on another disk."
            ) from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
            raise HubError(
                f"The cache {constants.HF_HUB_CACHE} cannot be written ({error.strerror}). Set HF_HOME to a folder of "
                "yours."
            ) from None
        raise HubError(f"{what} did not arrive whole ({_first(error)}). Run the same command again.") from None
    except Exception as error:
        if not _of_network(error):
            raise
        raise HubError(f"{what} did not arrive ({_first(error)}). Run the same command again to go on.") from None


@contextlib.contextmanager
def _named(folder: Path, id: Id) -> Iterator[None]:
    """Puts the id into sentences in place of its folder in the cache, which a user never typed."""
    try:
        yield
    except (CheckpointError, BundleError) as error:
        raise type(error)(str(error).replace(str(folder), f"{PREFIX}{id}")) from None


def show_bars(wanted: bool) -> None:
    """huggingface_hub's progress bars: for a terminal, and not in a log."""
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    with warnings.catch_warnings():  # where HF_HUB_DISABLE_PROGRESS_BARS says otherwise, the user's word counts
        warnings.simplefilter("ignore")
        (enable_progress_bars if wanted else disable_progress_bars)()


def offline() -> bool:
    """Whether the user keeps huggingface_hub off the network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def _first(error: BaseException) -> str:
    said = str(getattr(error, "strerror", None) or error).strip().splitlines() or [type(error).__name__]
    return said[0][:150].rstrip(" .:")
