"""The same weights run as one would without this toolkit, beside our loop: who is how much faster, and is it the same?

    diffusers eager    the PyTorch modules, diffusers' scheduler in a Python loop: what a diffusers pipeline does
    torch.compile      the same with a compiled UNet
    plain ONNX Runtime an export of the bare networks, session calls, diffusers' scheduler: what optimum does
    OpenVINO           the same files and loop in OpenVINO with its own defaults, as optimum-intel has it: free shapes,
                       bfloat16 for all networks where the processor has it
    OpenVINO f32, bf16 the same for fixed shapes, after optimum-intel's `reshape`, in either precision
    ours in float32    ONNX Runtime, where what is measured runs with OpenVINO in bfloat16

All make the same requests: same noise, steps, solver, guidance; each makes the hands itself from the same prompt. They
take turns, A B C A B C, so that whatever else the machine does hits all alike, and ratios are taken turn by turn. What
they paint is compared with our pictures, so that nobody is faster by doing less. Where the guidance is 1, peers leave
the unconditional half out, as diffusers does.

Alone in this room this file imports PyTorch. As a program it is one of the peers in a process of its own:

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
from pathlib import Path
from typing import Any

import diffusers
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
from ..export.graphs import PRECISIONS, encode_text
from ..models.checkpoint import Checkpoint
from ..models.hand_features import HandFeatures
from ..models.smplh import SMPLH
from ..models.text_hand_encoder import word_states
from ..runtime.clash import clash
from ..runtime.noise import HANDS, LATENTS, drawn_again, initial
from ..runtime.pipeline import HanDiffuser
from ..runtime.requests import Request, Resolver, resolve
from ..tokens import PromptTokenizer
from ..training.sample import CUES, decode
from . import measure

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
}
OPSET = 23  # as the bundle's graphs
Network = Callable[..., Tensor]  # x, timestep [N], condition -> output
Mark = Callable[[], None]  # called at every step of stage 2
Way = Callable[[Sequence[Request], Mark], np.ndarray]  # -> uint8 [B, H, W, 3] in the order of the requests


def scheduler_of(solver: str, config: dict[str, Any], steps: int) -> Any:
    """diffusers' scheduler for one of our solvers, with its timesteps set.

    Raises RequestError for a solver that adds noise in its steps: diffusers would draw other numbers.
    """
    if solver not in SCHEDULERS:
        raise RequestError(
            f"--peers compares pictures, and {solver} adds noise that diffusers draws otherwise. "
            f"Choose --solver {', '.join(SCHEDULERS)}."
        )
    name, settings = SCHEDULERS[solver]
    scheduler = getattr(diffusers, name).from_config({**config, **settings})
    scheduler.set_timesteps(steps)
    return scheduler


def solve(
    scheduler: Any, network: Network, noise: Tensor, given: Tensor, without: Tensor, guidance: float, mark: Mark
) -> Tensor:
    """A sampling loop as diffusers' pipelines have it, both guidance branches in one batch unless guidance is 1."""
    both = torch.cat([without, given]) if guidance != 1 else given
    x = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        mark()
        shown = scheduler.scale_model_input(torch.cat([x, x]) if guidance != 1 else x, timestep)
        output = network(shown, timestep.expand(len(shown)).to(shown.device), both)
        if guidance != 1:
            u, c = output.chunk(2)
            output = u + guidance * (c - u)
        x = scheduler.step(output, timestep, x).prev_sample
    return x


class Eager:
    """PyTorch modules and diffusers' schedulers. The networks can be replaced: compiled, or by an ONNX session.

    device, dtype: where the networks run, and what they compute in; kinematics and sampling stay float32. The
    checkpoint's modules are moved there.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        body: SMPLH,
        tokenizer: PromptTokenizer,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.checkpoint, self.tokenizer, self.device, self.dtype = checkpoint, tokenizer, device, dtype
        height, width = checkpoint.image_size
        prior, encoder = checkpoint.hand_prior, checkpoint.text_hand_encoder
        self.features: Callable[[Tensor], dict[str, Tensor]] = HandFeatures(
            body, prior.mean.float(), prior.std.float(), encoder.basis.float(), width / height
        ).eval()
        self.features.to(device)  # type: ignore[attr-defined]
        for module in checkpoint.modules().values():
            module.to(device, dtype)
        self.prior: Network = lambda x, timestep, text: prior(x.to(dtype), timestep, text.to(dtype)).float()
        self.unet: Network = self.network(checkpoint.unet)
        self.decode: Callable[[Tensor], Tensor] = lambda latents: decode(checkpoint, latents.to(dtype))

    def network(self, unet: Callable[..., Any]) -> Network:
        """A diffusers UNet, perhaps compiled, as float32 in, float32 out."""
        dtype = self.dtype
        return lambda x, timestep, context: unet(x.to(dtype), timestep, context.to(dtype)).sample.float()

    def text(self, ids: Tensor) -> Tensor:
        hidden = self.checkpoint.text_encoder(ids).last_hidden_state
        return word_states(hidden, ids, self.checkpoint.special_tokens["eos"], ids.shape[1]).float()

    def context(self, ids: Tensor, hands: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Token ids [B, 2, 77] and hand features -> unconditional and conditional context [B, L, W]."""
        # Joints stay float32: half of a pixel matters to the position codes.
        cues = {name: hands[name] if name == "joints" else hands[name].to(self.dtype) for name in CUES}
        blank = {**cues, "visibility": torch.zeros_like(cues["visibility"])}
        encoder = self.checkpoint.text_hand_encoder
        return encoder(ids[:, 0], **blank), encoder(ids[:, 1], **cues)

    def hands(
        self, requests: Sequence[Request], asked: Tensor, empty: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], list[int]]:
        """Stage 1 of requests with the same settings: x [B, P], hand features, and how often each was drawn.

        asked: ids of the prompts [B, 77]. empty: those of "" [1, 77].
        """
        first, prior = requests[0], self.checkpoint.hand_prior
        assert first.hand_steps and first.hand_solver and first.hand_guidance is not None
        given = self.text(asked)
        without = self.text(empty).expand_as(given) if first.hand_guidance != 1 else given
        mean, std = prior.mean.float().cpu(), prior.std.float().cpu()
        x = torch.empty(len(requests), len(mean), device=self.device)
        draws, drawing = [0] * len(requests), list(range(len(requests)))
        while drawing:
            streams = [drawn_again(HANDS, draws[row]) for row in drawing]
            start = np.stack([initial(requests[row].seed or 0, stream, (len(mean),))
                              for row, stream in zip(drawing, streams, strict=True)])  # fmt: skip
            scheduler = scheduler_of(first.hand_solver, self.checkpoint.hand_scheduler, first.hand_steps)
            noise = torch.from_numpy(start).to(self.device)
            x[drawing] = solve(
                scheduler, self.prior, noise, given[drawing], without[drawing], first.hand_guidance, lambda: None
            )
            features = self.features(x)
            joints, seen = (features[name].float().cpu().numpy() for name in ("joints_3d", "visibility"))
            params = (x.cpu() * std + mean).numpy()
            for row in drawing:
                draws[row] += 1
            drawing = [row for row in drawing if draws[row] <= (requests[row].hand_redraws or 0)
                       and clash(joints[row], seen[row], params[row])]  # fmt: skip
        return x, features, draws

    @torch.no_grad()
    def __call__(self, requests: Sequence[Request], mark: Mark) -> np.ndarray:
        """Requests with the same settings but for prompt and seed -> their pictures, uint8 [B, H, W, 3]."""
        first, checkpoint, tokens = requests[0], self.checkpoint, self.tokenizer
        assert first.steps and first.solver and first.guidance is not None
        pairs = [[tokens.encode(text)[0] for text in (r.negative_prompt, r.prompt)] for r in requests]
        ids = torch.from_numpy(np.array(pairs)).to(self.device)  # [B, 2, 77]

        def noise(stream: str, *shape: int, offset: float = 0.0) -> Tensor:
            drawn = np.stack([initial(r.seed or 0, stream, shape, offset, r.prompt) for r in requests])
            return torch.from_numpy(drawn).to(self.device)

        empty = torch.from_numpy(tokens.encode("")[0])[None].to(self.device)
        _, features, _ = self.hands(requests, ids[:, 1], empty)
        without, given = self.context(ids, features)
        scheduler = scheduler_of(first.solver, checkpoint.scheduler, first.steps)
        shape = (checkpoint.unet.config.in_channels, *checkpoint.latent_size)
        start = noise(LATENTS, *shape, offset=first.noise_offset or 0.0)
        latents = solve(scheduler, self.unet, start, given, without, first.guidance, mark)
        return self.decode(latents).cpu().numpy()


class PlainUNet(nn.Module):
    """What optimum exports: the network as it is, with the context as an input of every step."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return self.unet(x, timestep, context).sample


class PlainText(nn.Module):
    """The text encoder as it is; what the hand prior reads of its states, that computes at every step."""

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
    """ONNX Runtime for all networks, called from a Python loop. What a plain export would be alike is the bundle's."""

    words: Network

    def __init__(self, eager: Eager, folder: Path, manifest: Manifest, work: Path, threads: int) -> None:
        self.checkpoint, self.tokenizer, self.device = eager.checkpoint, eager.tokenizer, "cpu"
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
        shape = next(spec for spec in manifest.graphs["unet_context"].inputs if spec.name == "context").shape
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
        """Has the graphs that are the bundle's run so."""
        self.engines = {name: engine(self.folder / spec.file, spec) for name, spec in self.specs.items()}
        self.features = lambda x: _tensors(self.engines["hand_features"]({"x": x.numpy()}))
        self.decode = lambda x: torch.from_numpy(self.engines["image_decoder"]({"latents": x.numpy()})["image"])

    def in_openvino(self, precision: str = "") -> PlainOnnx:
        """The same files and the same loop, computed by OpenVINO.

        precision: "fp32" or "bf16", of all networks, each for the shapes that it is called with; by default what
        OpenVINO chooses, and free shapes.
        """

        def engine(file: Path, spec: GraphSpec) -> Engine:
            if precision:
                return openvino.OpenVinoEngine(file, spec, precision, self.threads)
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
        names = {spec.name for spec in engine.spec.inputs} - {"input_ids"}
        feeds = {"input_ids": ids.numpy(), **{name: hands[name].numpy() for name in names}}
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
        raise CheckpointError("This checkpoint has no body of its own. Give the one it was exported with: --body FILE.")
    if tuple(loaded.image_size) != tuple(manifest.image_size):
        raise CheckpointError(
            f"The checkpoint {checkpoint} makes pictures of {loaded.image_size}, the bundle of {manifest.image_size}: "
            "one was not exported from the other. Name the bundle's own: --checkpoint FOLDER."
        )
    dtype = PRECISIONS.get(manifest.precision, torch.float16) if device == "cuda" else torch.float32
    return Eager(loaded, SMPLH.load(path), PromptTokenizer(folder / TOKENIZER, manifest.tokenizer), device, dtype)


def ours(pipeline: HanDiffuser) -> Way:
    """Our loop as a way among the others."""

    def way(requests: Sequence[Request], mark: Mark) -> np.ndarray:
        results = pipeline.run(list(requests), lambda kind, _: mark() if kind == "steps" else None)
        images = {picture.id: picture.image for picture in measure.finish(list(results))}
        return np.stack([images[str(request.id)] for request in requests])

    return way


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

    Each peer is loaded alone beside ours, takes turns with it, and is let go of: at full size memory holds no more.

    Returns the first picture of each, uint8 [H, W, 3] by name.

    options: "threads", "repeats", "body" and "leave_out". Raises RequestError or CheckpointError for what cannot be
    compared, EngineError when ours runs on a GPU that PyTorch does not find.

    On a GPU the peers are PyTorch's alone, torch.compile at "max-autotune", and steps are not timed: a step there is
    over long after the call that starts it.
    """
    device = "cuda" if pipeline.on_gpu else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise EngineError("PyTorch finds no GPU to run peers on. Install its CUDA wheel, or leave --peers out.")
    folder, threads = shipped.resolve(engines, "bundle"), options["threads"] or usable_cores()
    scheduler_of(run["solver"], {}, run["steps"])
    scheduler_of(pipeline.manifest.defaults["hand_solver"], {}, 1)
    torch.set_num_threads(threads)
    settings = {name: run[name] for name in ("steps", "solver", "guidance")}
    requests = measure.make_requests(pipeline, run["batch"], **settings)
    table.update(
        run={"batch": run["batch"], **settings},
        threads=threads,
        repeats=options["repeats"],
        rows=[],
        prompts=[],
        clock="cpu" if device == "cpu" else "wall",  # what ratios are of: a CPU waits while a GPU works
    )
    table["prompts"] = [request.prompt for request in requests]
    with tempfile.TemporaryDirectory(prefix="hd-bench-peers-") as work:
        say("peers: loading the checkpoint")
        eager = load_eager(checkpoint, options["body"], folder, pipeline.manifest, device)
        ways: dict[str, Callable[[], Way]] = {"diffusers eager": lambda: eager}
        skipped: dict[str, str] = {}
        if "torch.compile" in options["leave_out"]:
            skipped["torch.compile"] = "--leave-out torch.compile."
        elif device == "cpu" and not any(
            shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")
        ):
            skipped["torch.compile"] = "There is no C++ compiler, which it needs on a CPU: install g++."
        else:
            compiled = copy.copy(eager)
            mode = "max-autotune" if device == "cuda" else None
            compiled.unet = eager.network(torch.compile(eager.checkpoint.unet, mode=mode))
            ways["torch.compile"] = lambda: compiled
        if device == "cuda":
            skipped["plain ONNX Runtime"] = "It is measured on CPUs only."
        elif {"onnxruntime", "openvino"} <= set(options["leave_out"]):
            skipped["plain ONNX Runtime"] = "--leave-out onnxruntime."
        else:
            say("peers: exporting the plain networks")
            with torch.no_grad():
                plain = PlainOnnx(eager, folder, pipeline.manifest, Path(work), threads)
            if "onnxruntime" in options["leave_out"]:
                skipped["plain ONNX Runtime"] = "--leave-out onnxruntime."
            else:
                ways["plain ONNX Runtime"] = plain.in_onnxruntime
            if "openvino" in options["leave_out"] or not BACKENDS["openvino"].installed():
                skipped["OpenVINO"] = (
                    "--leave-out openvino."
                    if BACKENDS["openvino"].installed()
                    else f"Install it: {BACKENDS['openvino'].install}."
                )
            else:
                ways["OpenVINO"] = plain.in_openvino
                ways["OpenVINO f32"] = lambda: plain.in_openvino("fp32")
                if cpu.has_bf16():
                    ways["OpenVINO bf16"] = lambda: plain.in_openvino("bf16")
        if pipeline.made_by.get("backend") == "openvino":
            ways["ours in float32"] = lambda: ours(
                HanDiffuser.load(folder, "cpu", threads, pipeline.batch_size, "onnxruntime")
            )

        our_way, our_turns = ours(pipeline), []
        say("peers: warming up ours")
        pictures = {"ours": our_way(requests, lambda: None)}
        try:
            for name, load in ways.items():
                say(f"peers: warming up {name}")
                try:
                    way = load()
                    pictures[name] = way(requests, lambda: None)
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
                        fidelity = differences(pictures["ours"], pictures[name])
                        table["rows"].append(row(name, theirs, own, fidelity))
                        our_turns += own
                del way
                gc.collect()
        finally:
            if our_turns:
                table["rows"].insert(0, row("ours", our_turns, our_turns, differences(*[pictures["ours"]] * 2)))
            table["rows"] += [{"name": name, "skipped": reason} for name, reason in skipped.items()]
    return {name: images[0] for name, images in pictures.items()}


def timed(way: Way, requests: Sequence[Request], steps: bool = True) -> dict[str, Any]:
    """One turn: wall and CPU seconds of the batch, and of a step of stage 2 (None without `steps`, or of one step).

    Not of a batch's steps: our loop may take its rows one after the other, with a picture's decoding between them.
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
    """One picture from the start of a process to its end: hd-run, and diffusers eager; in alternation.

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
    """A process that is diffusers eager alone: CHECKPOINT BUNDLE REQUEST.json OUT.png."""
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
    image = eager(requests, lambda: None)[0]
    Image.fromarray(image).save(out)


if __name__ == "__main__":
    main()
