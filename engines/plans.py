"""The engine cache: compiled plans beside a bundle, each named by a hash of everything that could make it stale.

    store = PlanStore(folder)
    wanted = parts(manifest, "unet", {"B": 4}, backend="tensorrt-rtx", version="1.7.1", target="...", options=Options())
    if store.find(wanted) is None:
        print(store.why(wanted))                    # "the bundle's graph or its weights changed"
        store.add(wanted, plan, {"types": ...}, seconds=26.0)

The plans of the shipped demo are in the user's cache, in a folder of their own. So is what runs compile: `shelf.py`.

`plans/` holds `<graph>.<sizes>.<key>.plan` and a `.json` of the same name, which is written last: a plan without it is
unfinished. Files never change in place, so two builds and a running server do not disturb each other.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from msgspec import Meta

from ..contract import BRANCHES, SIDES, GraphSpec, Manifest, Size, file_digest, shown_size
from ..errors import EngineError
from ..files import written
from ..schema import MisfitError, Sha256, Word, fit, read_json
from ..shipped import is_shipped
from .base import check_sizes, powers_of_two

FOLDER = "plans"
LAYERS = ".layers"  # beside a plan: its layers, see `inspect.py`
VERDICT = ".verdict"  # beside a UNet's plan of lower precision: whether it is good enough, see `verdict.py`
KERNELS = ".kernels"  # beside a plan: the kernels that TensorRT-RTX compiled for this machine's GPU
# What a plan depends on, and the words for a miss.
WORDS = {
    "graph": "the bundle's graph or its weights changed",
    "sizes": "the sizes changed",
    "precision": "the precision changed",
    "backend": "the backend changed",
    "version": "the backend's version changed",
    "target": "the GPU changed",
    "options": "the build options changed",
    "tf32": "TF32 in float32 layers changed",
}
# What a part was in plans from before it was noted: the default of all backends.
BEFORE = {"tf32": "on"}
# Of free axes: one size, a range (least, best, most), or several sizes. "B=4", "B=1-4-8", "B=1+2+4".
Sizes = Mapping[str, "int | tuple[int, int, int] | list[int]"]


_SIZE = r"[A-Za-z]=\d{1,5}(-\d{1,5}-\d{1,5}|(\+\d{1,5}){1,99})?"
Bytes = Annotated[int, Meta(ge=0, le=1 << 50, description="a number of bytes")]
Counts = Annotated[dict[Word, Bytes], Meta(max_length=1000, description="numbers by name")]
Text = Annotated[str, Meta(max_length=10_000)]

if TYPE_CHECKING:  # made and read as a plain dict
    Parts = dict[str, str]
else:

    class Needed(TypedDict):
        """Everything that could make a plan stale; see WORDS."""

        name: Word
        graph: Word
        sizes: Annotated[str, Meta(pattern=rf"^{_SIZE}(,{_SIZE}){{0,9}}\Z", description="like B=4 or B=1-4-8")]
        precision: Word
        backend: Word
        version: Word
        target: Text
        options: Text

    class Parts(Needed, total=False):
        """With later additions: see BEFORE. adapters: of a plan that a refit wrote, `refit.Adapted.key`."""

        tf32: Word
        adapters: Text


class Proof(TypedDict, total=False):
    """Entries of a plan's proof that other modules read."""

    types: Counts
    memory: Counts


@dataclass
class Plan:
    """The record of one compiled plan. Its annotations are the limits of what a record may contain."""

    graph: Word
    key: Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")]
    parts: Parts
    sha256: Sha256
    size: Bytes
    seconds: Annotated[float, Meta(ge=0, le=1e9, description="a time in seconds")]  # of building
    proof: dict[Word, Any]
    path: Path = Path()  # of the plan; not stored

    @property
    def batch(self) -> tuple[int, int]:
        """The least and the largest size of its free first axis."""
        numbers = [int(n) for n in re.split("[-+]", self._first)]
        return numbers[0], numbers[-1]

    @property
    def batches(self) -> list[int]:
        """The sizes of its first axis that it was compiled for one by one; empty for a range."""
        return [] if "-" in self._first else [int(n) for n in self._first.split("+")]

    @property
    def _first(self) -> str:
        return self._axes["B"] if "B" in self._axes else next(iter(self._axes.values()))

    @property
    def _axes(self) -> dict[str, str]:
        return dict(part.split("=") for part in self.parts["sizes"].split(","))  # type: ignore[misc]

    def sides(self) -> list[dict[str, int]]:
        """The sides of pictures that its profiles are for; one without sides where its graph has none."""
        named = {axis: [int(n) for n in text.split("+")] for axis, text in self._axes.items() if axis in SIDES}
        count = max(map(len, named.values()), default=1)
        every = [{axis: numbers[i % len(numbers)] for axis, numbers in named.items()} for i in range(count)]
        return [one for i, one in enumerate(every) if one not in every[:i]]

    def batches_at(self, sides: Mapping[str, int]) -> list[int]:
        """The batch sizes to take it for with pictures of these sides; empty where it is for other ones."""
        least, most = self.batch
        if "-" in self._first:
            sizes = [size for size in powers_of_two(most) if least <= size <= most]
            return sorted({*sizes, most}) if all(one.items() <= sides.items() for one in self.sides()) else []
        named = {axis: [int(n) for n in text.split("+")] for axis, text in self._axes.items() if axis in SIDES}
        return sorted(
            {
                batch
                for i, batch in enumerate(self.batches)
                if all(numbers[i % len(numbers)] == sides[axis] for axis, numbers in named.items())
            }
        )

    def shown(self, manifest: Manifest) -> str:
        """Its sizes in words: "B=1,G=2 512x768"."""
        if "T" in self._axes:  # see `inductor_files.py`
            return "weights"
        others = ((axis, text.split("+")) for axis, text in self._axes.items() if axis not in SIDES)
        rest = [f"{axis}={'+'.join(dict.fromkeys(numbers))}" for axis, numbers in others]
        sizes = [shown_size(manifest.size_at(one)) for one in self.sides() if one]
        return " ".join((",".join(rest), *(["+".join(sizes)] if sizes else [])))

    @property
    def version_compatible(self) -> bool:
        """Whether later versions of its backend load it (`tensorrt.Options`)."""
        return '"version_compatible": true' in self.parts["options"]  # JSON of `parts`; a record may hold any text

    @property
    def refittable(self) -> bool:
        """Whether adapters can be put into it (`tensorrt.Options`)."""
        return not self.adapters and '"refittable": true' in self.parts["options"]

    @property
    def stripped(self) -> bool:
        """Whether it lacks the bundle's weights, which it gets when it is loaded (`tensorrt.Options`)."""
        return not self.adapters and '"stripped": true' in self.parts["options"]

    @property
    def adapters(self) -> str:
        """The key of the adapters that a refit put into it; "" for the bundle's own weights."""
        return self.parts.get("adapters", "")

    @property
    def made_for(self) -> str:
        """What built it, and for which GPU or CPU, in words."""
        later = " or later" if self.version_compatible else ""
        return f"{self.parts['backend']} {self.parts['version']}{later}, {self.parts['target']}"

    @property
    def branches(self) -> int:
        """Guidance branches that a step graph's plan runs: 2, or 1 for the conditional one alone."""
        return 1 if f"{BRANCHES}=1" in self.parts["sizes"].split(",") else 2


@dataclass(frozen=True)
class Wanted:
    """What to build. batch_sizes: empty for the backend's default. options: of the backend (`tensorrt.Options`).

    dynamic: one plan for all sizes up to the largest. shared: one plan that is compiled for each size. guidance_free:
    also UNets that run the conditional branch alone. pictures: sizes beside the bundle's own.
    """

    batch_sizes: tuple[int, ...] = ()
    dynamic: bool = False
    shared: bool = False
    guidance_free: bool = False
    options: Any = None
    pictures: tuple[Size, ...] = ()


@dataclass
class Built:
    """A plan of a build. why: the reason for building it, or "" where it was there."""

    plan: Plan
    why: str


# Called before and while a plan is built: (number of the plan, of so many, graph, sizes, why, done 0..1) -> go on?
OnBuild = Callable[[int, int, str, Sizes, str, float], bool]


def parts(
    manifest: Manifest, graph: str, sizes: Sizes, backend: str, version: str, target: str, options: Any
) -> dict[str, str]:
    """Everything that could make a plan of `graph` stale. options: a dataclass of build options."""
    return {
        "name": graph,
        "graph": graph_digest(manifest, graph),
        "sizes": size_text(sizes),
        "precision": manifest.precision,
        "backend": backend,
        "version": version,
        "target": target,
        "options": json.dumps({k: v for k, v in asdict(options).items() if v not in (None, (), [])}, sort_keys=True),
        "tf32": "off",
    }


def picture_sizes(manifest: Manifest, wanted: Iterable[Size]) -> list[Size]:
    """The sizes of pictures to compile for, the bundle's own first. Raises EngineError for what it cannot paint."""
    check_sizes(wanted := [*wanted], manifest.size_multiple, manifest.image_size)
    return list(dict.fromkeys((manifest.image_size, *wanted)))


def usual(spec: GraphSpec, manifest: Manifest, batch: int = 1, size: Size | None = None) -> dict[str, int]:
    """A graph's sizes with the bundle's default guidance: both branches, or the conditional one alone.

    size: height and width of the picture; None: the bundle's own.
    """
    branches = 1 if manifest.defaults["guidance"] == 1 else 2
    sides = {axis: n for axis, n in manifest.sides(size).items() if axis in spec.free}
    return {"B": batch, **({BRANCHES: branches} if spec.branched else {}), **sides}


def graph_digest(manifest: Manifest, graph: str, adapters: str = "") -> str:
    """16 hexadecimal digits that stand for a graph with its weights, and with the adapters of this key."""
    file = manifest.graphs[graph].file
    digests = [manifest.files[file], manifest.files.get(file + ".data", ""), adapters]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def belongs(plan: Plan, manifest: Manifest, adapters: str = "") -> bool:
    """Whether a plan was built from the bundle in its present state, and in the present way, and has these adapters."""
    return (
        plan.graph in manifest.graphs
        and plan.adapters == adapters
        and plan.parts["graph"] == graph_digest(manifest, plan.graph, adapters)
        and plan.parts["precision"] == manifest.precision
        and plan.parts.get("tf32") == "off"
    )


def read_record(record: Path) -> Plan:
    """The plan of a record. Raises OSError, or MisfitError for a record that `add` did not write so."""
    value = read_json(record)
    plan = fit(value, Plan)
    if unknown := sorted(set(value) - {entry.name for entry in fields(Plan)}):
        raise MisfitError(f"The entry {unknown[0][:60]!r} is unknown.")
    fit(plan.proof, Proof)
    if plan.key != key_of(value["parts"]):
        raise MisfitError("Its key is not that of its parts.")
    if plan.graph != plan.parts["name"]:
        raise MisfitError(f"It names two graphs, {plan.graph} and {plan.parts['name']}.")
    return replace(plan, path=record.with_suffix(".plan"))


def size_text(sizes: Sizes) -> str:
    """{"B": 4} -> "B=4"; {"B": (1, 4, 8)} -> "B=1-4-8"; {"B": [1, 4]} -> "B=1+4"."""

    def text(size: int | tuple[int, int, int] | list[int]) -> str:
        return str(size) if isinstance(size, int) else ("+" if isinstance(size, list) else "-").join(map(str, size))

    return ",".join(f"{axis}={text(size)}" for axis, size in sizes.items())


def key_of(wanted: Mapping[str, str]) -> str:
    """16 hexadecimal digits that stand for all parts."""
    return hashlib.sha256(json.dumps(dict(wanted), sort_keys=True).encode()).hexdigest()[:16]


class PlanStore:
    """The plans of one engines folder. Those of the shipped demo are in the user's cache, because an installation is
    often read-only."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = (cache_folder() / "demo" if is_shipped(folder) else Path(folder)) / FOLDER

    def __iter__(self) -> Iterator[Plan]:
        """Every finished plan. It skips unreadable records; `strays` says what is wrong with them."""
        for record in sorted(self.folder.glob("*.json")):
            try:
                yield read_record(record)
            except (OSError, MisfitError):
                continue

    def find(self, wanted: Mapping[str, str], verify: bool = False) -> Plan | None:
        """The plan for exactly these parts, or None. verify: also hash it (about 1 s a GB)."""
        for record in self.folder.glob(f"*.{key_of(wanted)}.json"):
            try:
                plan = read_record(record)
            except (OSError, MisfitError):
                continue
            if plan.parts == dict(wanted) and not self.problem(plan, verify):
                return plan
        return None

    def why(self, wanted: Mapping[str, str]) -> str:
        """Why a plan for these parts is missing: how they differ from the nearest plan."""
        key = key_of(wanted)
        near = [plan for plan in self if plan.graph == wanted["name"] and not plan.adapters]
        for plan in near:
            if plan.key == key:
                return self.problem(plan, verify=True) or "it is there"
        if not near:
            return "never built"
        near = [plan for plan in near if plan.parts.get("sizes") == wanted["sizes"]]
        if not near:
            return f"never built for {wanted['sizes']}"
        differing = [[name for name in WORDS if _part(plan, name) != wanted[name]] for plan in near]
        best, nearest = min(zip(differing, near, strict=True), key=lambda pair: len(pair[0]))
        changes = []
        for name in best:
            old, new = _part(nearest, name), wanted[name]
            changes.append(WORDS[name] + ("" if name in ("graph", "options") else f" from {old} to {new}"))
        return ", ".join(changes)

    def add(self, wanted: Mapping[str, str], plan: bytes | memoryview, proof: dict[str, Any], seconds: float) -> Plan:
        """Writes a plan. Raises EngineError when the disk is full, and leaves no half-written file.

        proof: what `build_plan` says of it; its layers go into a file of their own.
        """
        proof = dict(proof)
        layers = proof.pop("layers", [])
        graph, key = wanted["name"], key_of(wanted)
        sizes = wanted["sizes"].replace("=", "").replace(",", ".")[:80]  # a name has 255 letters at most
        path = self.folder / f"{graph}.{sizes}.{key}.plan"
        digest = hashlib.sha256(plan).hexdigest()
        entry = Plan(graph, key, dict(wanted), digest, len(plan), round(seconds, 2), proof, path)
        record = {name: value for name, value in asdict(entry).items() if name != "path"}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            whole = json.dumps(record, indent=1).encode()  # last: a plan without its record is unfinished
            kept = json.dumps(layers, separators=(",", ":")).encode()
            for target, content in ((path, plan), (path.with_suffix(LAYERS), kept), (path.with_suffix(".json"), whole)):
                with written(target) as temporary:
                    temporary.write_bytes(content)
        except OSError as error:
            why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
            raise EngineError(
                f"The plan of {graph} ({len(plan) / 1e6:.0f} MB) cannot be written to {self.folder}: {why}. Make room "
                "(`hd-engines prune FOLDER` removes stale plans) and run the same command again; what is built stays."
            ) from error
        return entry

    def problem(self, plan: Plan, verify: bool) -> str:
        """What is wrong with a plan's file, in words, or ""."""
        try:
            size = plan.path.stat().st_size
        except OSError:
            return "its plan is missing"
        if size != plan.size:
            return f"its plan is damaged ({size} bytes instead of {plan.size})"
        if verify and file_digest(plan.path) != plan.sha256:
            return "its plan is damaged (its SHA-256 differs)"
        return ""

    def read(self, plan: Plan) -> memoryview:
        """A plan's content, verified. It is mapped, so gigabytes are not copied into the process.

        Raises EngineError for a damaged plan, because a plan is code.
        """
        try:
            with open(plan.path, "rb") as file:
                content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:  # ValueError: it is empty
            why = getattr(error, "strerror", None) or "it is empty"
            raise EngineError(
                f"The plan {plan.path} cannot be read ({why}). Build it again: hd-engines build FOLDER."
            ) from error
        if hashlib.sha256(content).hexdigest() != plan.sha256:
            raise EngineError(
                f"The plan {plan.path} is damaged: its SHA-256 differs. Build it again: hd-engines build FOLDER."
            )
        return content

    def strays(self) -> dict[Path, str]:
        """Files in the folder without a finished plan, and why: leftovers of builds, and wrong records."""
        known = {path for plan in self for path in (plan.path, plan.path.with_suffix(".json"))}
        found = {}
        for path in sorted(self.folder.glob("*")):
            if path in known or path.suffix not in (".plan", ".json", ".tmp"):
                continue
            found[path] = "it belongs to no finished plan"
            if path.suffix == ".json":
                try:
                    read_record(path)
                except (OSError, MisfitError) as error:
                    found[path] = f"its record of a plan is wrong: {str(error).rstrip('.')}"
        return found

    def shrink(self, most: int) -> None:
        """Removes plans until they take at most `most` bytes, the least recently used first."""
        plans = [(plan.path.stat().st_mtime, plan) for plan in self if plan.path.exists()]
        total = sum(plan.size for _, plan in plans)
        for _, plan in sorted(plans, key=lambda pair: pair[0]):
            if total <= most:
                break
            self.remove(plan)
            total -= plan.size

    def remove(self, plan: Plan) -> None:
        """Deletes a plan, its record first, so that an interruption leaves a stray at worst."""
        plan.path.with_suffix(".json").unlink(missing_ok=True)
        plan.path.unlink(missing_ok=True)
        for suffix in (KERNELS, LAYERS, VERDICT):
            plan.path.with_suffix(suffix).unlink(missing_ok=True)


def user_cache() -> PlanStore:
    """The plans that this user's runs compiled, for any bundle."""
    return PlanStore(cache_folder())


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/handiffuser`, else `~/.cache/handiffuser`."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a container's user without a home
        home = Path(os.devnull)  # keeps nothing
    return home / "handiffuser"


def _part(plan: Plan, name: str) -> str:
    return plan.parts.get(name, BEFORE.get(name, ""))
