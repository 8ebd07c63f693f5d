"""AOTInductor: graphs that PyTorch itself compiled, for GPUs without TensorRT. They alone need PyTorch to run.

engine = InductorEngine("engines/unet.pt2", manifest.graphs["unet"], device="cuda")
outputs = engine(feeds)                 # numpy in, numpy out
on_gpu = InductorDeviceEngine(engine)   # bound to device arrays, enqueued on a stream

A `.pt2` file holds native code, and loading it runs that code: trust it as you trust a program. Load only what you
compiled yourself, and only after you verified the SHA-256 that was noted when it was written, as `host_engines` does.
Such a file is bound to the kind of processor and to the PyTorch that compiled it.

A graph with convolutions has a file for each shape: Inductor lays channels last only where it knows all sizes. Such a
file is code alone. The weights are in one more file, and are loaded once for all shapes; see `inductor_files.py`.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from ..commands import imported
from ..contract import BRANCHES, MAX_ROWS, PICTURES, GraphSpec, Manifest, Size, TensorSpec
from ..cpu import usable_cores
from ..errors import EngineError
from .base import DeviceEngine, DeviceEngines, Sized, check_feeds, enough
from .cuda import Cuda
from .inductor_files import Compiled, Here, find_compiled
from .plans import Plan, PlanStore

COMPILE = "hd-export CHECKPOINT OUT --backend inductor"
REMEDY = f"Compile it again on this machine: {COMPILE}."


class InductorEngine:
    """One compiled graph. See `Engine` for calling it.

    device: "cpu" or "cuda", which the file was compiled for.
    """

    batches: Sequence[int] | None = None

    def __init__(
        self,
        path: str | Path,
        spec: GraphSpec,
        device: str = "auto",
        threads: int | None = None,
        asynchronous: bool = False,
        weights: Mapping[str, Any] | None = None,
    ) -> None:
        """Loads `path`, whose SHA-256 the caller has verified: this runs code from it.

        device: "cpu", "cuda", or "auto" for the one that the file was compiled for. threads: of the CPU; by default
        as many as there are usable cores. asynchronous: all runs come from one thread on one stream, which is order
        enough; otherwise a run waits for the end of the one before it. weights: tensors by name, of a file that is code
        alone; other files of the same graph may share them.

        Raises EngineError when PyTorch is missing, when the file is damaged or none of ours, when it was compiled
        for another device, processor or PyTorch, or when its tensors differ from `spec`.
        """
        torch = _import_torch()
        self.spec = spec
        self.threads = threads or usable_cores()
        # What `torch._inductor.aoti_load_package` ends in. By itself it takes milliseconds; that function imports the
        # whole compiler (3 s), runs the C++ compiler to tell the processor, and calls a damaged file an outdated one.
        package = torch._C._aoti.AOTIModelPackageLoader
        try:
            noted = package.load_metadata_from_package(str(path), "model")  # reads, runs nothing
        except Exception as error:
            raise EngineError(f"{path} is damaged or no compiled graph ({_sentence(error)}). {REMEDY}") from error
        self._check_origin(path, noted, device)
        self.device: str = noted["device"]
        if self.device == "cuda":
            forbid_tf32()  # compiled code asks again when it calls cuDNN and cuBLAS
        try:
            self._model = package(str(path), "model", asynchronous, 1, -1)  # one runner, the current GPU
            if weights is not None:
                lacking = sorted(set(self._model.get_constant_fqns()) - weights.keys())
                if lacking:
                    raise EngineError(f"its weights lack {', '.join(lacking[:3])}")
                taken = {name: weights[name] for name in self._model.get_constant_fqns()}
                self._model.load_constants(taken, False, True, True)  # all of them, where they are
                self.weights = weights
        except Exception as error:
            raise EngineError(f"PyTorch cannot load {path} ({_sentence(error)}). {REMEDY}") from error

    def _check_origin(self, path: str | Path, noted: Mapping[str, str], device: str) -> None:
        """Raises EngineError unless the file was made for `spec`, for `device` and for this machine."""
        if not noted.keys() >= {"device", "processor", "torch", "tensors"}:
            raise EngineError(f"{path} was not compiled by hd-export. {REMEDY}")
        made_for = noted["device"]
        if made_for == "cuda" and not _import_torch().cuda.is_available():
            raise EngineError(f"{path} was compiled for an NVIDIA GPU, and PyTorch finds none here. {REMEDY}")
        if device not in ("auto", made_for):
            raise EngineError(f"{path} was compiled for {made_for}, not for {device}. {REMEDY}")
        here = origin(made_for)
        if lacking := set(noted["processor"].split()) - set(here["processor"].split()):
            raise EngineError(
                f"{path} needs a processor with {', '.join(sorted(lacking))}; this one has none. {REMEDY}"
            )
        if noted["torch"] != here["torch"]:
            raise EngineError(f"{path} was compiled by PyTorch {noted['torch']}; this is {here['torch']}. {REMEDY}")
        # Tensors go in by their order and nothing below looks at their shapes: another graph's file would read
        # memory that is not its own.
        pairs = zip_longest(noted["tensors"].split("; "), tensors(self.spec.inputs, names(self.spec)).split("; "))
        for theirs, ours in pairs:
            if theirs != ours:
                raise EngineError(
                    f"{path} was compiled from another graph than {self.spec.file}: it has {theirs or 'nothing'} where "
                    f"the bundle has {ours or 'nothing'}. {REMEDY}"
                )

    def prepare(self, sizes: Mapping[str, int]) -> None:
        """Nothing: the file holds code for every size that it takes."""

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Arrays in, arrays out, whatever the device.

        Raises EngineError for wrong feeds (see `check_feeds`), for a batch that was not compiled, and when there is
        not enough memory.
        """
        torch = _import_torch()
        check_feeds(self.spec, feeds)
        self.check_batch(feeds)
        # PyTorch has one number of threads for all graphs, and each thread that calls must take it over.
        if self.device == "cpu" and torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        try:
            # Compiled code takes every tensor for contiguous; PyTorch warns of arrays that are not writable.
            arrays = [np.require(feeds[want.name], requirements=("C", "W")) for want in self.spec.inputs]
            values = self._model.run([torch.from_numpy(array).to(self.device) for array in arrays])
            return {name: value.cpu().numpy() for name, value in zip(names(self.spec), values, strict=True)}
        except Exception as error:
            raise self.failure(error) from error

    def failure(self, error: Exception) -> EngineError:
        """What PyTorch's exception means for the user."""
        name, text = Path(self.spec.file).stem, str(error).lower()
        if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
            return EngineError(f"There is not enough memory to run {name}. Take a smaller --batch-size.")
        return EngineError(f"The compiled graph {name} failed: {_sentence(error)}.")

    def check_batch(self, feeds: Mapping[str, Any]) -> None:
        want = self.spec.inputs[0]
        if feeds[want.name].shape[0] > MAX_ROWS:
            raise EngineError(
                f"The graph {Path(self.spec.file).stem} got {want.name} of shape {list(feeds[want.name].shape)}; it "
                f"was compiled for {want}, where {want.shape[0]} is at most {MAX_ROWS}. Send smaller batches."
            )


class InductorDeviceEngine:
    """A graph compiled for the GPU, on given device arrays: see `DeviceEngine`. Load it with `asynchronous`.

    PyTorch reads the inputs where they are. Its outputs are in memory of its own, and copied from there into the bound
    arrays: two copies of the state a step, which is little beside the step.

    pool: of PyTorch's allocator. What a run hands out and takes back there is used again by runs of this pool alone, so
    a captured run writes nowhere else when it is replayed. Engines of one stream share a pool.
    """

    own_graph = False

    def __init__(self, engine: InductorEngine, pool: Any = None) -> None:
        self.engine, self.spec, self.pool = engine, engine.spec, pool

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        check_feeds(self.spec, inputs)
        self.engine.check_batch(inputs)
        self.inputs = [self._tensor(inputs[tensor.name]) for tensor in self.spec.inputs]
        self.outputs = [self._tensor(outputs[name]) for name in names(self.spec)]
        self.bound = (dict(inputs), dict(outputs))  # keeps them alive

    def enqueue(self, stream: Any) -> None:
        with self._on(stream):
            self.run()

    def run(self) -> None:
        """One run on PyTorch's current stream."""
        try:
            values = self.engine._model.run(self.inputs)
            for target, value in zip(self.outputs, values, strict=True):
                target.copy_(value, non_blocking=True)
        except Exception as error:
            raise self.engine.failure(error) from error

    def capturable(self, stream: Any) -> bool:
        """Whether its memory comes from a pool. The run before the capture has filled it, so nothing is allocated."""
        return self.pool is not None

    def _tensor(self, array: Any) -> Any:
        """A tensor over the memory of a device array."""
        torch = _import_torch()
        tensor = torch.as_tensor(array, device="cuda")
        if tensor.data_ptr() != array.pointer:  # a copy would be computed on in silence
            raise EngineError("PyTorch uses another GPU than the one that holds the arrays. Leave it one to see.")
        return tensor.view(torch.bfloat16) if str(array.dtype) == "bfloat16" else tensor

    @contextlib.contextmanager
    def _on(self, stream: Any) -> Iterator[None]:
        """Makes a stream PyTorch's current one, and its memory that of the pool."""
        torch = _import_torch()
        pool = torch.cuda.use_mem_pool(self.pool) if self.pool is not None else contextlib.nullcontext()
        with torch.cuda.stream(torch.cuda.ExternalStream(int(stream.handle))), pool:
            yield


class InductorShapes:
    """A graph with a file for each shape, on arrays of the host. See `Engine` for calling it.

    plans: shape, such as {"B": 1, "G": 2, "h": 64, "w": 64}, and its plan. sizes: of pictures that it takes.
    """

    device = "cpu"

    def __init__(
        self,
        spec: GraphSpec,
        plans: Sequence[tuple[dict[str, int], Plan]],
        sizes: frozenset[Size],
        load: Callable[[Plan, GraphSpec], InductorEngine],
    ) -> None:
        found: dict[tuple[tuple[str, int], ...], set[tuple[int, int]]] = {}  # by size of pictures: batches and branches
        for shape, _ in plans:
            size = tuple(sorted((axis, n) for axis, n in shape.items() if axis not in ("B", BRANCHES)))
            found.setdefault(size, set()).add((shape["B"], shape.get(BRANCHES, 2)))
        # What every size has: a loop asks for the same batches of all.
        shared = set.intersection(*found.values())
        self.batches: Sequence[int] | None = sorted({batch for batch, _ in shared})
        alone = all((batch, 1) in shared for batch in self.batches)
        self.spec = spec if alone else spec.at({BRANCHES: 2})
        self.sizes, self._graph, self._load = sizes, spec, load
        self._plans = {tuple(sorted(shape.items())): plan for shape, plan in plans}
        self._engines: dict[tuple[tuple[str, int], ...], InductorEngine] = {}

    def prepare(self, sizes: Mapping[str, int]) -> None:
        """Loads the file for these sizes."""
        self._engine(sizes)

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        check_feeds(self._graph, feeds)
        shape = {
            size: feeds[tensor.name].shape[axis]
            for tensor in self._graph.inputs
            for axis, size in enumerate(tensor.shape)
            if isinstance(size, str)
        }
        return self._engine(shape)(feeds)

    def _engine(self, sizes: Mapping[str, int]) -> InductorEngine:
        key = tuple(sorted(sizes.items()))
        if key not in self._engines:
            if key not in self._plans:
                there = "; ".join(",".join(f"{axis}={n}" for axis, n in shape) for shape in sorted(self._plans))
                raise EngineError(
                    f"The shape of {Path(self.spec.file).stem} must be one of {there}, got "
                    f"{','.join(f'{axis}={n}' for axis, n in key)}. Compile it: {COMPILE} --batch-sizes {sizes['B']}."
                )
            self._engines[key] = self._load(self._plans[key], self._graph.at(sizes))
        return self._engines[key]


def device_for(folder: Path, device: str) -> str:
    """The device that the folder's graphs are compiled for. Raises EngineError where one is missing."""
    return find_compiled(folder, Manifest.load(folder, verify=False), here(), device).device


def here() -> Here:
    """This process's PyTorch, and whether it sees a GPU."""
    torch = _import_torch()
    return Here(torch.__version__.partition("+")[0], torch.cuda.is_available())


def loader(store: PlanStore, found: Compiled, threads: int | None = None, asynchronous: bool = False) -> Any:
    """A function (plan, spec) -> engine, which verifies a file and loads it. Shapes of a graph share its weights."""
    weights: dict[str, dict[str, Any]] = {}

    def load(plan: Plan, spec: GraphSpec) -> InductorEngine:
        if (problem := store.problem(plan, verify=True)) != "":
            raise EngineError(f"{plan.path}: {problem}. {REMEDY}")
        if plan.graph in found.weights and plan.graph not in weights:
            weights[plan.graph] = read_weights(store, found.weights[plan.graph], found.device)
        own = weights.get(plan.graph)
        return InductorEngine(plan.path, spec, found.device, threads, asynchronous, own)

    return load


def read_weights(store: PlanStore, plan: Plan, device: str) -> dict[str, Any]:
    """The tensors of a file of weights by name, on a device. Those of convolutions lie there with channels last."""
    torch = _import_torch()
    if (problem := store.problem(plan, verify=True)) != "":
        raise EngineError(f"{plan.path}: {problem}. {REMEDY}")
    from safetensors.torch import load_file

    try:
        tensors = load_file(plan.path, device=device if device == "cpu" else torch.cuda.current_device())
    except Exception as error:
        raise EngineError(f"PyTorch cannot read {plan.path} ({_sentence(error)}). {REMEDY}") from error
    return {name: t.permute(0, 3, 1, 2) if t.dim() == 4 else t for name, t in tensors.items()}


def host_engines(folder: Path, manifest: Manifest, threads: int | None, *_: int) -> dict[str, Any]:
    """The compiled graphs of a folder for the CPU, verified."""
    found, store = find_compiled(folder, manifest, here(), "cpu"), PlanStore(folder)
    load = loader(store, found, threads)
    engines: dict[str, Any] = {}
    for name, spec in manifest.graphs.items():
        if name in found.loose:
            engines[name] = load(found.loose[name], manifest.fixed().graphs[name])
        else:
            files = [(shape, plan) for shape, plan in found.shapes[name] if manifest.size_at(shape) in found.sizes]
            engines[name] = InductorShapes(spec, files, found.sizes, load)  # of prompts with one chunk, too
            for shape, _file in files:
                if manifest.size_at(shape) == manifest.image_size:
                    engines[name].prepare(shape)
    return engines


def device_engines(
    name: str,
    folder: Path,
    manifest: Manifest,
    cuda: Cuda,
    stream_of: Callable[[str], Any],
    slots: int,
    replay: bool = False,
) -> DeviceEngines:
    """A file for each shape of a graph with convolutions; of the others one file, and one binding a bucket.

    A file is verified and loaded when the loop first uses it, on the thread and for the stream that it stays with.
    """
    found, store = find_compiled(folder, manifest, here(), "cuda"), PlanStore(folder)
    load_plan, loose, pools = loader(store, found, asynchronous=True), dict[str, InductorEngine](), dict[int, Any]()

    def at(size: Size) -> Sized:
        graphs = manifest.fixed(size).graphs

        def load(graph: str, bucket: int, branches: int) -> DeviceEngine:
            stream = int(stream_of(graph).handle)
            if stream not in pools:
                pools[stream] = new_pool()
            if graph in found.loose:
                if graph not in loose:
                    loose[graph] = load_plan(found.loose[graph], graphs[graph])
                return InductorDeviceEngine(loose[graph], pools[stream])
            spec = graphs[graph].at({"B": bucket, BRANCHES: branches})
            return InductorDeviceEngine(
                load_plan(found.plan(graph, manifest, size, bucket, branches), spec), pools[stream]
            )

        buckets = enough(found.batches(manifest, size), slots)
        steps = [graph for graph, spec in manifest.graphs.items() if spec.steps]
        single = {graph: found.batches(manifest, size, 1) if graph in PICTURES else buckets for graph in steps}
        return Sized(load, buckets, single)

    buckets, sentences = found.batches(manifest, manifest.image_size), []
    if slots > buckets[-1]:
        sentences.append(
            f"The engines take up to {buckets[-1]} pictures at once, so the batch size {slots} became that. For "
            f"more: {COMPILE} --batch-sizes {','.join(map(str, (*buckets, slots)))}."
        )
    return DeviceEngines(at, found.sizes, sentences)


def new_pool() -> Any:
    """A pool of PyTorch's memory on the GPU."""
    return _import_torch().cuda.MemPool()


def origin(device: str) -> dict[str, str]:
    """What native code made here for `device` ("cpu", "cuda") depends on: features of the processor, and PyTorch."""
    torch = _import_torch()
    if device == "cuda":
        features = ["sm_{}{}".format(*torch.cuda.get_device_capability())]
    else:
        known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older ones do not tell
        features = [platform.machine(), *sorted(name for name, there in known.items() if there is True)]
    return {"processor": " ".join(features), "torch": ".".join(torch.__version__.split(".")[:2])}


def forbid_tf32() -> None:
    """Has PyTorch, in this process, compute float32 as float32 on GPUs: TF32 keeps 10 of 23 bits, too few for joints.

    Convolutions are in TF32 by default.
    """
    torch = _import_torch()
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def tensors(inputs: Sequence[TensorSpec], outputs: Sequence[str]) -> str:
    """What a graph takes and gives, as it is noted in its compiled file."""
    return "; ".join([*map(str, inputs), *(f"the output {name}" for name in outputs)])


def names(spec: GraphSpec) -> list[str]:
    return [tensor.name for tensor in spec.outputs]


def _import_torch() -> Any:
    try:
        return imported("torch")
    except ImportError as error:
        raise EngineError(
            f"The inductor backend needs PyTorch, which no other backend does, and it cannot be imported ({error}). "
            'Install it with `pip install "handiffuser[export]"`, or take another backend.'
        ) from error


def _sentence(error: Exception) -> str:
    """The first line of PyTorch's message, without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(" .")
