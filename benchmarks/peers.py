"""Runs the same weights without this toolkit beside our loop, and compares speed and pictures.

    diffusers eager    the PyTorch modules, diffusers' scheduler in a Python loop: what a diffusers pipeline does
    torch.compile      the same with a compiled UNet
    plain ONNX Runtime an export of the bare networks, session calls, diffusers' scheduler: what optimum does
    OpenVINO           the same files and loop in OpenVINO with its own defaults, as optimum-intel has it: free shapes,
                       bfloat16 for all networks where the processor has it
    OpenVINO f32, bf16 the same for fixed shapes, after optimum-intel's `reshape`, in either precision; without the
                       rewrites that are ours (`engines/openvino_rewrites.py`)
    ours in float32    ONNX Runtime, where what is measured runs with OpenVINO in bfloat16

All run the same requests: same noise, steps, solver and guidance. Each makes the hands itself from the same prompt.
Each peer takes turns with ours, A B A B, so that other load on the machine hits both alike, and ratios are taken turn
by turn. Their pictures are compared with ours, so that a peer cannot be faster by doing less. With guidance 1 peers
leave the unconditional half out, as diffusers does.

Only this file of the room imports PyTorch. As a program it is one of the peers in its own process:

    python -m handiffuser.benchmarks.peers CHECKPOINT BUNDLE '{"prompt": "a fist", "steps": 12}'
"""

from __future__ import annotations

import copy
import gc
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .. import cpu, shipped
from ..contract import TOKENIZER, GraphSpec, Manifest, TensorSpec
from ..cpu import usable_cores
from ..engines import Engine, OnnxRuntimeEngine, openvino
from ..engines.backends import BACKENDS
from ..engines.onnxruntime import session_options
from ..errors import CheckpointError, EngineError, RequestError
from ..evaluation.eager import Eager, Mark, Network, scheduler_of
from ..export.graphs import PRECISIONS, encode_text
from ..models.checkpoint import Checkpoint
from ..models.smplh import SMPLH
from ..models.text_hand_encoder import word_states
from ..runtime.pipeline import HanDiffuser
from ..runtime.requests import Request, Resolver, resolve
from ..tokens import PromptTokenizer
from . import measure

OPSET = 23  # as the bundle's graphs
Way = Callable[[Sequence[Request], Mark], np.ndarray]  # -> uint8 [B, H, W, 3] in the order of the requests


class Peer(NamedTuple):
    """Another way to run the same weights."""

    name: str
    skipped: str  # why it is left out; "" where it is measured
    load: Callable[[], Way]


class PlainUNet(nn.Module):
    """The UNet as optimum exports it, with the context as an input of every step."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return self.unet(x, timestep, context).sample


class PlainText(nn.Module):
    """The text encoder as it is. The hand prior computes what it needs from its states at every step."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.text_encoder, self.eos = checkpoint.text_encoder, checkpoint.special_tokens["eos"]

    def forward(self, input_ids: Tensor) -> Tensor:
        return word_states(encode_text(self.text_encoder, input_ids), input_ids, self.eos, input_ids.shape[1])


def export_plain(module: nn.Module, names: Sequence[str], example: Sequence[Tensor], file: Path) -> GraphSpec:
    """Exports a network of one output with a free batch axis N."""
    axes = tuple({0: torch.export.Dim("N", min=1, max=4096)} for _ in example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            tuple(example),
            str(file),
            input_names=list(names),
            dynamic_shapes=axes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    inputs = [
        TensorSpec(name, str(value.dtype).removeprefix("torch."), ("N", *value.shape[1:]))
        for name, value in zip(names, example, strict=True)
    ]
    with torch.no_grad():
        shape = module(*example).shape
    return GraphSpec(file.name, inputs, [TensorSpec("output", "float32", ("N", *shape[1:]))])


def feeds_of(spec: GraphSpec, values: Sequence[Tensor]) -> dict[str, np.ndarray]:
    return {
        tensor.name: value.contiguous().numpy().astype(tensor.dtype, copy=False)
        for tensor, value in zip(spec.inputs, values, strict=True)
    }


def plain_session(file: Path, spec: GraphSpec, threads: int) -> Network:
    """A plainly exported network in ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), session_options(threads), providers=["CPUExecutionProvider"])
    return lambda *values: torch.from_numpy(session.run(None, feeds_of(spec, values))[0])


class FreeShapes:
    """A graph in OpenVINO as it is compiled by default."""

    device, batches = "cpu", None

    def __init__(self, file: Path, spec: GraphSpec, threads: int) -> None:
        self.spec = spec
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        self.request = openvino.shared_core().compile_model(file, "CPU", options).create_infer_request()

    def prepare(self, sizes: Mapping[str, int]) -> None:
        """Nothing: it takes every size."""

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = self.request.infer(dict(feeds), share_inputs=True, share_outputs=True)
        values = [found[index].copy() for index in range(len(self.spec.outputs))]
        return {tensor.name: value for tensor, value in zip(self.spec.outputs, values, strict=True)}


class PlainOnnx(Eager):
    """ONNX Runtime for all networks, called from a Python loop. The bundle gives the graphs that are alike."""

    words: Network

    def __init__(self, eager: Eager, folder: Path, manifest: Manifest, work: Path, threads: int) -> None:
        self.checkpoint, self.encode, self.device = eager.checkpoint, eager.encode, "cpu"
        self.mean, self.std = eager.mean, eager.std
        self.folder, self.work, self.threads = folder, work, threads
        checkpoint, batch = eager.checkpoint, 2
        graphs = ("hand_features", "text_hand_encoder", "image_decoder")
        self.specs = {name: manifest.graphs[name] for name in graphs}
        self.plain: dict[str, GraphSpec] = {}

        def export(name: str, module: nn.Module, **example: Tensor) -> None:
            self.plain[name] = export_plain(module, list(example), list(example.values()), work / f"{name}.onnx")

        ids, timestep = torch.zeros(batch, checkpoint.special_tokens["length"]).long(), torch.full((batch,), 500.0)
        export("text_encoder", PlainText(checkpoint), input_ids=ids)
        x = torch.zeros(batch, len(checkpoint.hand_prior.mean))
        with torch.no_grad():
            condition = eager.text(ids)
        export("hand_prior", checkpoint.hand_prior, x=x, timestep=timestep, condition=condition)
        latents = torch.zeros(batch, checkpoint.unet.config.in_channels, *checkpoint.latent_size)
        keys = manifest.graphs["unet_context"].at(manifest.sides())  # for prompts of one chunk
        shape = next(spec for spec in keys.inputs if spec.name == "context").shape
        context = torch.zeros(batch, *(int(size) for size in shape[2:]))
        export("unet", PlainUNet(checkpoint.unet), x=latents, timestep=timestep, condition=context)

    def in_onnxruntime(self) -> PlainOnnx:
        """The files in ONNX Runtime."""
        out = copy.copy(self)
        out.take(lambda file, spec: OnnxRuntimeEngine(file, spec, self.threads))
        out.words, out.prior, out.unet = (
            plain_session(self.work / self.plain[name].file, self.plain[name], self.threads)
            for name in ("text_encoder", "hand_prior", "unet")
        )
        return out

    def take(self, engine: Callable[[Path, GraphSpec], Engine]) -> None:
        """Loads the bundle's graphs with `engine`."""
        self.engines = {name: engine(self.folder / spec.file, spec) for name, spec in self.specs.items()}
        asked = [tensor.name for tensor in self.specs["hand_features"].inputs]

        def features(x: torch.Tensor) -> dict[str, torch.Tensor]:
            feeds = {"x": x.numpy(), "span": np.ones(len(x), np.float32)}
            return _tensors(self.engines["hand_features"]({name: feeds[name] for name in asked}))

        self.features = features
        self.decode = lambda x: torch.from_numpy(self.engines["image_decoder"]({"latents": x.numpy()})["image"])

    def in_openvino(self, precision: str = "") -> PlainOnnx:
        """The same files and the same loop, computed by OpenVINO.

        precision: "fp32" or "bf16", of all networks, each for the shapes that it is called with; by default what
        OpenVINO chooses, and free shapes.
        """

        def engine(file: Path, spec: GraphSpec) -> Engine:
            if precision:
                return openvino.OpenVinoEngine(file, spec, precision, self.threads, rewritten=False)
            return FreeShapes(file, spec, self.threads)

        def network(name: str) -> Network:
            spec = self.plain[name]
            run = engine(self.work / spec.file, spec)
            return lambda *values: torch.from_numpy(run(feeds_of(spec, values))["output"])

        out = copy.copy(self)
        out.take(engine)
        out.words, out.prior, out.unet = network("text_encoder"), network("hand_prior"), network("unet")
        return out

    def text(self, ids: Tensor) -> Tensor:
        return self.words(ids)

    def context(self, ids: Tensor, hands: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        engine = self.engines["text_hand_encoder"]
        names = [spec.name for spec in engine.spec.inputs]
        feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy())}
        feeds = {name: feeds[name] if name in feeds else hands[name].numpy() for name in names}
        context = _tensors(engine(feeds))["context"]
        return context[:, 0], context[:, 1]


def _tensors(values: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in values.items()}


def load_eager(checkpoint: str, body: str | None, folder: Path, manifest: Manifest, device: str = "cpu") -> Eager:
    """The checkpoint on a device; on a GPU in the bundle's precision.

    Raises CheckpointError without a body, or for a checkpoint that is not the bundle's.
    """
    loaded = Checkpoint.load(shipped.resolve(checkpoint, "checkpoint"))
    path = body or loaded.body
    if path is None:
        raise CheckpointError("The checkpoint must have a body, got none. Name the one of the export: --body FILE.")
    if tuple(loaded.image_size) != tuple(manifest.image_size):
        raise CheckpointError(
            f"--checkpoint must be the one that the bundle was exported from, got {checkpoint} with pictures of "
            f"{loaded.image_size} beside {manifest.image_size}. Name the bundle's own checkpoint."
        )
    dtype = PRECISIONS.get(manifest.precision, torch.float16) if device == "cuda" else torch.float32
    tokenizer = PromptTokenizer(folder / TOKENIZER, manifest.tokenizer)

    def encode(texts: Sequence[str]) -> Tensor:
        return torch.from_numpy(np.stack([tokenizer.encode(text)[0] for text in texts]))

    return Eager(loaded, SMPLH.load(path), encode, device, dtype)


def ours(pipeline: HanDiffuser) -> Way:
    """Our loop as a `Way`."""

    def way(requests: Sequence[Request], mark: Mark) -> np.ndarray:
        results = pipeline.run(list(requests), lambda kind, _: mark() if kind == "steps" else None)
        images = {picture.id: picture.image for picture in measure.finish(list(results))}
        return np.stack([images[str(request.id)] for request in requests])

    return way


def peers_of(eager: Eager, pipeline: HanDiffuser, folder: Path, work: Path, options: dict[str, Any]) -> list[Peer]:
    """The peers of a bundle in the order in which they are measured.

    work: where the plain networks are exported to, when the first peer needs them. options: "threads" and "leave_out".
    """
    threads, gpu = options["threads"], eager.device == "cuda"

    @cache
    def plain() -> PlainOnnx:
        with torch.no_grad():
            return PlainOnnx(eager, folder, pipeline.manifest, work, threads)

    def compiled() -> Way:
        peer = copy.copy(eager)
        peer.unet = eager.network(torch.compile(eager.checkpoint.unet, mode="max-autotune" if gpu else None))
        return peer

    def ours_in_float32() -> Way:
        return ours(HanDiffuser.load(folder, "cpu", threads, pipeline.batch_size, "onnxruntime"))

    def left_out(name: str) -> str:
        return f"--leave-out {name}." if name in options["leave_out"] else ""

    cpu_only = "It is measured on CPUs only." if gpu else ""
    no_compiler = ""
    if not gpu and not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        no_compiler = "It needs a C++ compiler on a CPU: install g++."
    no_openvino = "" if BACKENDS["openvino"].installed() else f"Install it: {BACKENDS['openvino'].install}."
    without_openvino = cpu_only or no_openvino or left_out("openvino")
    found = [
        Peer("diffusers eager", "", lambda: eager),
        Peer("torch.compile", left_out("torch.compile") or no_compiler, compiled),
        Peer("plain ONNX Runtime", cpu_only or left_out("onnxruntime"), lambda: plain().in_onnxruntime()),
        Peer("OpenVINO", without_openvino, lambda: plain().in_openvino()),
    ]
    if not without_openvino:
        found.append(Peer("OpenVINO f32", "", lambda: plain().in_openvino("fp32")))
        if cpu.has_bf16():
            found.append(Peer("OpenVINO bf16", "", lambda: plain().in_openvino("bf16")))
    if pipeline.made_by.get("backend") == "openvino":
        found.append(Peer("ours in float32", "", ours_in_float32))
    return found


def compare(
    pipeline: HanDiffuser,
    engines: str,
    checkpoint: str,
    run: dict[str, Any],
    options: dict[str, Any],
    table: dict[str, Any],
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, np.ndarray]:
    """Fills `table` for one run (batch, steps, solver, guidance): a row for each peer, the first is ours.

    Each peer is loaded beside ours, takes turns with it, and is freed before the next one loads.

    Returns the first picture of each, uint8 [H, W, 3] by name.

    options: "threads", "repeats", "body" and "leave_out". Raises RequestError or CheckpointError for what cannot be
    compared, EngineError when ours runs on a GPU that PyTorch does not find.

    On a GPU the peers are PyTorch's alone, torch.compile runs at "max-autotune", and steps are not timed: the call
    that starts a step returns before the step ends.
    """
    device = "cuda" if pipeline.on_gpu else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise EngineError("PyTorch finds no GPU to run peers on. Install its CUDA wheel, or leave --peers out.")
    folder, options = shipped.resolve(engines, "bundle"), {**options, "threads": options["threads"] or usable_cores()}
    scheduler_of(run["solver"], {}, run["steps"])
    scheduler_of(pipeline.manifest.defaults["hand_solver"], {}, 1)
    torch.set_num_threads(options["threads"])
    settings = {name: run[name] for name in ("steps", "solver", "guidance")}
    requests = measure.make_requests(pipeline, run["batch"], **settings)
    table.update(
        run={"batch": run["batch"], **settings},
        threads=options["threads"],
        repeats=options["repeats"],
        rows=[],
        prompts=[request.prompt for request in requests],
        clock="cpu" if device == "cpu" else "wall",  # the clock of the ratios: a CPU waits while a GPU works
    )
    our_way, our_turns, skipped = ours(pipeline), list[dict[str, Any]](), dict[str, str]()
    with tempfile.TemporaryDirectory(prefix="hd-bench-peers-") as work:
        say("peers: loading the checkpoint")
        eager = load_eager(checkpoint, options["body"], folder, pipeline.manifest, device)
        say("peers: warming up ours")
        pictures = {"ours": our_way(requests, _nothing)}
        try:
            for name, reason, load in peers_of(eager, pipeline, folder, Path(work), options):
                if reason:
                    skipped[name] = reason
                    continue
                say(f"peers: warming up {name}")
                try:
                    way = load()
                    pictures[name] = way(requests, _nothing)
                except Exception as error:
                    skipped[name] = f"It failed: {(str(error).strip() or type(error).__name__).splitlines()[0][:300]}"
                    continue
                turns: list[tuple[dict[str, Any], dict[str, Any]]] = []  # whole rounds: ratios are of neighbours
                steps = device == "cpu" and run["batch"] == 1
                try:
                    for number in range(options["repeats"]):
                        say(f"peers: turn {number + 1} of {options['repeats']}, {name}")
                        turns.append((timed(our_way, requests, steps), timed(way, requests, steps)))
                finally:
                    if turns:
                        own, theirs = map(list, zip(*turns, strict=True))
                        table["rows"].append(row(name, theirs, own, differences(pictures["ours"], pictures[name])))
                        our_turns += own
                del way
                gc.collect()
        finally:
            if our_turns:
                table["rows"].insert(0, row("ours", our_turns, our_turns, differences(*[pictures["ours"]] * 2)))
            table["rows"] += [{"name": name, "skipped": reason} for name, reason in skipped.items()]
    return {name: images[0] for name, images in pictures.items()}


def _nothing() -> None: ...


def timed(way: Way, requests: Sequence[Request], steps: bool = True) -> dict[str, Any]:
    """One turn: wall and CPU seconds of the batch, and of a step of stage 2 (None without `steps`, or of one step).

    Steps of a batch are not timed: our loop may run its rows one by one and decode a picture between them.
    """
    marks: list[tuple[float, float]] = []

    def mark() -> None:
        marks.append((time.perf_counter(), time.process_time()))

    mark()
    way(requests, mark)
    mark()
    start, begun, end = marks[0], marks[1:-1], marks[-1]
    many = len(begun) - 1 if steps else 0
    return {
        "wall": end[0] - start[0],
        "cpu": end[1] - start[1],
        "step_wall": (begun[-1][0] - begun[0][0]) / many if many > 0 else None,
        "step_cpu": (begun[-1][1] - begun[0][1]) / many if many > 0 else None,
    }


def row(
    name: str, turns: list[dict[str, Any]], ours: list[dict[str, Any]], fidelity: dict[str, float | None]
) -> dict[str, Any]:
    """Medians of the turns, and ratios to our turn of the same round (above 1: the peer takes longer)."""

    def ratio(key: str) -> dict[str, float] | None:
        if any(turn[key] is None for turn in (*turns, *ours)):
            return None
        ratios = [theirs[key] / our[key] for theirs, our in zip(turns, ours, strict=True)]
        q1, median, q3 = np.quantile(ratios, (0.25, 0.5, 0.75))
        return {"q1": float(q1), "median": float(median), "q3": float(q3)}

    out: dict[str, Any] = {"name": name, "samples": turns, "fidelity": fidelity}
    for key in ("wall", "cpu", "step_wall", "step_cpu"):
        values = [turn[key] for turn in turns if turn[key] is not None]
        out[key] = float(np.median(values)) if values else None
        out[f"ratio_{key}"] = ratio(key)
    return out


def differences(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float | None]:
    """Of two uint8 batches of pictures: {"max_difference": levels, "psnr": dB or None where they are the same}."""
    difference = ours.astype(np.float64) - theirs
    error = float(np.mean(difference**2))
    psnr = 10 * float(np.log10(255**2 / error)) if error else None
    return {"max_difference": int(np.abs(difference).max()), "psnr": psnr}


def alone(
    engines: str, checkpoint: str, run: dict[str, Any], options: dict[str, Any], device: str = "cpu"
) -> dict[str, dict[str, Any]]:
    """One picture in a fresh process, from start to end: hd-run and diffusers eager in alternation.

    device: where both run, "cpu" or "cuda". options: as for `compare`, and "backend".
    """
    settings = {name: run[name] for name in ("steps", "solver", "guidance")}
    threads = str(options["threads"] or usable_cores())
    prompt = measure.PROMPTS[0]
    with tempfile.TemporaryDirectory() as folder:
        ours = [sys.executable, "-m", "handiffuser.runtime.cli", engines, prompt, "--quiet"]
        ours += ["--device", device, "--backend", options["backend"]]
        ours += [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        how = {"threads": int(threads), "body": options["body"], "device": device}
        request = json.dumps(settings | {"prompt": prompt} | how)
        theirs = [sys.executable, "-m", "handiffuser.benchmarks.peers", checkpoint, engines, request]
        samples: dict[str, list[dict[str, float]]] = {"hd-run": [], "diffusers eager": []}
        for number in range(min(3, options["repeats"])):
            out = Path(folder) / str(number)  # a new one each time: hd-run skips what is done
            samples["hd-run"].append(measure.fresh([*ours, "--threads", threads, "--output", str(out)]))
            samples["diffusers eager"].append(measure.fresh([*theirs, str(out / "peer.png")]))
    figures = ("wall", "cpu", "peak_mb")
    return {
        name: {"samples": found} | {figure: float(np.median([one[figure] for one in found])) for figure in figures}
        for name, found in samples.items()
    }


def main() -> None:
    """Runs diffusers eager in its own process: CHECKPOINT BUNDLE REQUEST.json OUT.png."""
    from PIL import Image

    checkpoint, engines, text, out = sys.argv[1:]
    values = json.loads(text)
    torch.set_num_threads(values.pop("threads"))
    body, device = values.pop("body"), values.pop("device")
    folder = shipped.resolve(engines, "bundle")
    manifest = Manifest.load(folder, verify=False)
    eager = load_eager(checkpoint, body, folder, manifest, device)
    requests, refused = resolve([Request(**{"seed": 0, **values})], Resolver(manifest.defaults))
    for problem in refused:
        raise RequestError(problem.sentence)
    image = eager(requests, _nothing)[0]
    Image.fromarray(image).save(out)


if __name__ == "__main__":
    main()
