"""How far a bundle of lower precision is from the float32 bundle of the same checkpoint.

    report = fidelity("bundle", "bundle_fp16")
    if not report.passes:
        print(*report.sentences(), sep="\\n")

It compares every graph alone, on its inputs in a real run of the reference. It also runs both stages with the same
seeds, which shows the effect of all errors on the picture. The bars are in `engines/verdict.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..contract import EIGHT_BITS, Manifest
from ..engines import Engine, load_engines
from ..engines.backends import BACKENDS
from ..engines.loading import open_engine
from ..engines.verdict import EQUAL, PSNR_MUST, RMS_MAY, Verdict, psnr
from ..errors import BundleError, EngineError
from ..runtime.bundle import Bundle
from ..runtime.comparing import asked, load_host_loop, measure, timed
from ..runtime.host import HostLoop
from ..runtime.pipeline import HanDiffuser
from ..runtime.results import Failure, Picture
from .record import PROMPTS, Feeds, record, run_all

# Entries in which two bundles of one checkpoint agree.
SHARED = ("image_size", "latent_size", "num_history", "schedules", "tokenizer", "params_mean", "params_std")

Judge = Callable[[np.ndarray], Any]  # uint8 pictures [N, H, W, 3] -> labels [N] or [N, L]


@dataclass
class GraphError:
    """A graph's error on the recorded inputs. The worst of its outputs counts; `tensor` is its name."""

    rms: float  # root mean square of the differences, relative to that of the values
    max: float  # largest difference, relative to the largest value
    tensor: str
    not_finite: int = 0  # NaN and infinite numbers in its outputs, and rows that it reports as not finite


@dataclass
class PictureError:
    """One request, run by both bundles."""

    prompt: str
    seed: int
    psnr: float  # dB; infinite for equal pictures, 0 where the candidate failed
    joints: float  # pixels: the largest distance that a finger joint of a hand in the picture moved
    failure: str = ""  # why the candidate made no picture


@dataclass
class Report:
    """The comparison, and whether the candidate is good enough."""

    precision: str  # of the candidate
    device: str
    emulated: bool  # half precision was rounded as on a GPU, see `emulate`
    rms_may: float  # the bar for every graph's `rms`
    graphs: dict[str, GraphError]
    pictures: list[PictureError]
    agreement: list[float] = field(
        default_factory=list
    )  # by label: share of pictures that get the same label from both
    psnr_must: float = PSNR_MUST

    @property
    def psnr_mean(self) -> float:
        """dB over the pictures that differ, so that an equal one does not hide another; infinite if all are equal."""
        values = [picture.psnr for picture in self.pictures if picture.psnr < math.inf]
        return sum(values) / len(values) if values else math.inf

    @property
    def psnr_min(self) -> float:
        return min(picture.psnr for picture in self.pictures)

    @property
    def joints_max(self) -> float:
        """Pixels."""
        return max(picture.joints for picture in self.pictures)

    @property
    def passes(self) -> bool:
        return not self.sentences()

    def sentences(self) -> list[str]:
        """A sentence for each bar that the candidate fails."""
        found = []
        for name, graph in self.graphs.items():
            if graph.not_finite:
                found.append(
                    f"{name} gives NaN or infinity ({graph.not_finite} times): {self.precision} overflows there. "
                    "Keep the nodes that overflow in float32 (keep_sensitive)."
                )
            elif not graph.rms <= self.rms_may:
                found.append(
                    f"{name} is {graph.rms:.2g} from the reference in {graph.tensor} (root mean square, relative); "
                    f"{self.precision} may be {self.rms_may:g}. Keep its sensitive nodes in float32 (keep_sensitive)."
                )
        if failed := [picture for picture in self.pictures if picture.failure]:
            found.append(
                f"{len(failed)} of {len(self.pictures)} requests failed, the first of them {failed[0].prompt!r} with "
                f"seed {failed[0].seed}: {failed[0].failure}"
            )
        if not self.psnr_mean >= self.psnr_must:
            found.append(
                f"Pictures must be at least {self.psnr_must:g} dB from the reference's on average, got "
                f"{self.psnr_mean:.1f} dB ({self.psnr_min:.1f} dB at worst)."
            )
        return found

    def summary(self) -> str:
        """The figures in one line."""
        worst = max(self.graphs, key=lambda name: self.graphs[name].rms)
        how = "emulated " if self.emulated else ""
        return (
            f"{how}{self.precision} beside float32, {len(self.pictures)} pictures: {self.psnr_mean:.1f} dB on average, "
            f"{self.psnr_min:.1f} dB at worst; graphs within {self.graphs[worst].rms:.1e} ({worst}); "
            f"finger joints within {self.joints_max:.2f} pixels"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`. Infinity, which JSON lacks, becomes the text "inf"."""
        summary = {name: getattr(self, name) for name in ("passes", "psnr_mean", "psnr_min", "joints_max")}
        return _plain({**summary, "sentences": self.sentences(), **asdict(self)})


def fidelity(
    reference: str | Path,
    candidate: str | Path,
    prompts: Sequence[str] = PROMPTS,
    seeds: Sequence[int] = (0,),
    device: str = "cpu",
    judge: Judge | None = None,
    *,
    emulated: bool | None = None,
    threads: int | None = None,
    backend: str = "",
    **settings: Any,
) -> Report:
    """Compares a bundle with the float32 bundle of the same checkpoint, on every prompt with every seed.

    judge: reads labels from pictures; the report says how often both bundles get the same ones.
    emulated: round half precision as a GPU stores it, see `emulate`; by default on the CPU, which does not round, and
    in bfloat16, which numpy cannot feed to a graph.
    backend: of the CPU, runs the candidate, if not ONNX Runtime. The candidate may be the reference.
    settings: steps, solver, guidance, ... as in `Request`.
    Raises BundleError when the bundles are not of one checkpoint, EngineError when the reference itself fails.
    """
    reference, candidate = Path(reference), Path(candidate)
    ours, theirs = Manifest.load(reference), Manifest.load(candidate)
    _check_same(ours, theirs)
    inference = BACKENDS[backend].on_host().inference() if backend else ""
    if backend:
        emulated = False
    emulated = device == "cpu" or theirs.precision == "bf16" if emulated is None else emulated
    precision = theirs.precision if theirs.precision in EIGHT_BITS else inference or theirs.precision

    def others(manifest: Manifest) -> dict[str, Engine]:
        return dict(BACKENDS[backend].on_host().host_engines(candidate, manifest, threads, 1, 1)) if backend else {}

    inputs, expected = record(reference, prompts, seeds, device, threads=threads, **settings)
    for result in expected:
        if isinstance(result, Failure):
            raise EngineError(f"The reference {reference} itself fails at {result.request.prompt!r}: {result.sentence}")
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if emulated:
            from .emulate import emulate_bundle  # needs the onnx package

            emulate_bundle(candidate, Path(folder) / "emulated")
            candidate = Path(folder) / "emulated"
        manifest, engines = load_engines(candidate, device, threads, verify=False, others=others)
        bundle = Bundle.load(candidate, manifest)
        pipeline = HanDiffuser(bundle, HostLoop(bundle, engines))
        results = run_all(pipeline, [result.request for result in expected])
        graphs = {}
        for name, spec in ours.graphs.items():
            exact = open_engine(reference / spec.file, spec, device, threads, manifest.sides())
            graphs[name] = compare(exact, engines[name], inputs[name])
    pairs = [(a, b) for a, b in zip(expected, results, strict=True) if isinstance(a, Picture)]
    agreement = []
    made = [(a.image, b.image) for a, b in pairs if isinstance(b, Picture)]
    if judge is not None and made:
        read = [np.asarray(judge(np.stack(images))) for images in zip(*made, strict=True)]
        agreement = np.atleast_1d((read[0] == read[1]).mean(0)).tolist()
    return Report(
        precision=precision,
        device=pipeline.made_by["device"],
        emulated=emulated,
        rms_may=RMS_MAY.get(precision, RMS_MAY["fp16"]),
        graphs=graphs,
        pictures=[_compare_pictures(*pair) for pair in pairs],
        agreement=agreement,
    )


def compare(reference: Engine, candidate: Engine, calls: Iterable[Feeds]) -> GraphError:
    """Compares both engines of one graph on the same inputs, cast to the candidate's types."""
    sums = {tensor.name: np.zeros(4) for tensor in reference.spec.outputs}
    not_finite = 0
    for feeds in calls:
        exact = reference(feeds)
        got = candidate({spec.name: feeds[spec.name].astype(spec.dtype, copy=False) for spec in candidate.spec.inputs})
        for name, total in sums.items():
            value, other = exact[name].astype(np.float64), got[name].astype(np.float64)
            difference = np.abs(value - other)
            bad = ~np.isfinite(difference)
            difference[bad] = np.inf
            # Pixels cannot be NaN: the row's `finite` tells of a loss before them.
            not_finite += int((other < value).sum() if name == "finite" else bad.sum())
            total[:2] = np.maximum(total[:2], [difference.max(), np.abs(value).max()])
            total[2:] += np.square(difference).sum(), np.square(value).sum()
    errors = {
        name: (math.sqrt(relative(total[2], total[3])), relative(total[0], total[1])) for name, total in sums.items()
    }
    tensor = max(errors, key=lambda name: errors[name])
    return GraphError(*errors[tensor], tensor, not_finite)


def relative(difference: float, value: float) -> float:
    """difference / value; 0 where nothing differs, infinite where the value is 0 and something differs."""
    if difference == 0:
        return 0.0
    return float(difference / value) if value else math.inf


def _compare_pictures(expected: Picture, result: Picture | Failure) -> PictureError:
    request = expected.request
    if isinstance(result, Failure):
        return PictureError(request.prompt, request.seed or 0, 0.0, 0.0, result.sentence)
    height, width = expected.image.shape[:2]
    ours, theirs = expected.hands, result.hands
    # Only hands that either picture shows: an absent hand's joints mean nothing.
    shown = np.maximum(ours["visibility"], theirs["visibility"]) > 0.5
    moved = np.linalg.norm((theirs["joints_2d"] - ours["joints_2d"])[shown] * (width, height), axis=-1)
    return PictureError(
        request.prompt, request.seed or 0, psnr(expected.image, result.image), float(moved.max(initial=0.0))
    )


def _check_same(ours: Manifest, theirs: Manifest) -> None:
    """Raises BundleError unless two manifests may be of one checkpoint."""
    for name in SHARED:
        if getattr(ours, name) != getattr(theirs, name):
            raise BundleError(
                f"Both bundles must come from one checkpoint, and they differ in {name}. Export both from the same one."
            )
    for name in ours.graphs:
        for kind in ("inputs", "outputs"):
            sides = [{(tensor.name, tensor.shape) for tensor in getattr(m.graphs[name], kind)} for m in (ours, theirs)]
            if sides[0] != sides[1]:
                raise BundleError(
                    f"Both bundles must come from one checkpoint, and they differ in the {kind} of {name}. Export both "
                    "again."
                )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def beside_bfloat16(exact: Path, quantized: Path, count: int, backend: str = "openvino") -> Verdict:
    """Compares pictures of a quantised bundle with those of its float32 bundle in bfloat16, by one backend, in turns.

    A single picture of each is made with one bundle loaded after the other, which is how large models fit.
    """
    if count == 1:
        (exactly, slow), (eight, fast) = (_one_of(folder, backend) for folder in (exact, quantized))
        return Verdict(min(psnr(exactly.image, eight.image), EQUAL), slow, fast)
    ours, theirs = (load_host_loop(folder, backend, threads=1) for folder in (exact, quantized))
    engines = [{name: timed.engine for name, timed in loop.engines.items()} for loop in (ours, theirs)]
    return measure(ours.bundle, engines[0], engines[1], count=count)


def _one_of(folder: Path, backend: str) -> tuple[Picture, float]:
    """A picture of a bundle, and the CPU seconds that it took."""
    loop = load_host_loop(folder, backend, threads=1)
    return timed(loop, asked(loop.bundle, 1)[0])
