"""AOTInductor: a graph that PyTorch itself compiled, for GPUs without TensorRT. It alone needs PyTorch when it runs.

engine = InductorEngine("engines/unet.pt2", manifest.graphs["unet"], device="cuda")
outputs = engine(feeds)                 # numpy in, numpy out
on_gpu = InductorDeviceEngine(engine)   # bound to device arrays, enqueued on a stream

A `.pt2` file holds native code, and loading it runs that code: trust it as you trust a program. Load only what you
compiled yourself, and only after you verified the SHA-256 that was noted when it was written, as `host_engines` does.
Such a file is bound to the kind of processor and to the PyTorch that compiled it.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from ..commands import imported
from ..contract import MAX_ROWS, GraphSpec, Manifest, TensorSpec
from ..cpu import usable_cores
from ..errors import EngineError
from .base import DeviceEngine, DeviceEngines, Engine, check_feeds, powers_of_two
from .cuda import Cuda
from .plans import Plan, PlanStore, belongs

REMEDY = "Compile it again on this machine: hd-export CHECKPOINT OUT --backend inductor."


class InductorEngine:
    """One compiled graph. See `Engine` for calling it.

    device: "cpu" or "cuda", which the file was compiled for. batch: the only batch size that it takes, or None.
    """

    batches: Sequence[int] | None = None

    def __init__(
        self,
        path: str | Path,
        spec: GraphSpec,
        device: str = "auto",
        threads: int | None = None,
        asynchronous: bool = False,
    ) -> None:
        """Loads `path`, whose SHA-256 the caller has verified: this runs code from it.

        device: "cpu", "cuda", or "auto" for the one that the file was compiled for. threads: of the CPU; by default
        as many as there are usable cores. asynchronous: all runs come from one thread on one stream, which is order
        enough; otherwise a run waits for the end of the one before it.

        Raises EngineError when PyTorch is missing, when the file is damaged or none of ours, when it was compiled
        for another device, processor or PyTorch, or when its tensors differ from `spec`.
        """
        torch = _import_torch()
        self.spec = spec
        self.threads = threads or usable_cores()
        # What `torch._inductor.aoti_load_package` ends in. By itself it takes milliseconds; that function imports the
        # whole compiler (3 s), runs the C++ compiler to tell the processor, and calls a damaged file an outdated one.
        loader = torch._C._aoti.AOTIModelPackageLoader
        try:
            noted = loader.load_metadata_from_package(str(path), "model")  # reads, runs nothing
        except Exception as error:
            raise EngineError(f"{path} is damaged or no compiled graph ({_sentence(error)}). {REMEDY}") from error
        self._check_origin(path, noted, device)
        self.device: str = noted["device"]
        self.batch = int(noted["batch"]) if noted["batch"] else None
        if self.device == "cuda":
            forbid_tf32()  # compiled code asks again when it calls cuDNN and cuBLAS
        try:
            self._model = loader(str(path), "model", asynchronous, 1, -1)  # one runner, the current GPU
        except Exception as error:
            raise EngineError(f"PyTorch cannot load {path} ({_sentence(error)}). {REMEDY}") from error

    def _check_origin(self, path: str | Path, noted: Mapping[str, str], device: str) -> None:
        """Raises EngineError unless the file was made for `spec`, for `device` and for this machine."""
        if not noted.keys() >= {"device", "batch", "processor", "torch", "tensors"}:
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
        size = feeds[want.name].shape[0]
        if self.batch in (None, size) and size <= MAX_ROWS:
            return
        allowed = f"exactly {self.batch}" if self.batch else f"at most {MAX_ROWS}"
        raise EngineError(
            f"The graph {Path(self.spec.file).stem} got {want.name} of shape {list(feeds[want.name].shape)}; it was "
            f"compiled for {want}, where {want.shape[0]} is {allowed}. Send batches of that size, or compile others: "
            f"hd-export CHECKPOINT OUT --backend inductor --batch-sizes {size}."
        )


class InductorDeviceEngine:
    """A graph compiled for the GPU, on given device arrays: see `DeviceEngine`. Load it with `asynchronous`.

    PyTorch reads the inputs where they are. Its outputs are in memory of its own, and copied from there into the bound
    arrays: two copies of the state a step, which is little beside the step.
    """

    own_graph = False

    def __init__(self, engine: InductorEngine) -> None:
        self.engine, self.spec = engine, engine.spec

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
        # PyTorch's allocator must know of a capture: what it hands out meanwhile would be used for other things while
        # the captured graph still writes there. It knows of captures by torch.cuda.graph only, and not of ours.
        return False

    def _tensor(self, array: Any) -> Any:
        """A tensor over the memory of a device array."""
        torch = _import_torch()
        tensor = torch.as_tensor(array, device="cuda")
        if tensor.data_ptr() != array.pointer:  # a copy would be computed on in silence
            raise EngineError("PyTorch uses another GPU than the one that holds the arrays. Leave it one to see.")
        return tensor.view(torch.bfloat16) if str(array.dtype) == "bfloat16" else tensor

    def _on(self, stream: Any) -> AbstractContextManager[Any]:
        """Makes a stream PyTorch's current one."""
        torch = _import_torch()
        return torch.cuda.stream(torch.cuda.ExternalStream(int(stream.handle)))


def find_compiled(folder: Path, manifest: Manifest, device: str = "auto") -> tuple[str, dict[str, Plan]]:
    """The compiled graphs of a folder for this PyTorch, and the device they are for.

    device: "cpu", "cuda", or "auto" for the GPU where there is one and all is compiled for it, else the CPU.
    Raises EngineError when a graph is missing.
    """
    torch = _import_torch()
    version, gpu = torch.__version__.partition("+")[0], torch.cuda.is_available()
    tried = (device,) if device != "auto" else ("cuda", "cpu") if gpu else ("cpu", "cuda")
    missing = []
    for target in tried:
        plans = {
            plan.graph: plan
            for plan in PlanStore(folder)
            if belongs(plan, manifest)
            and plan.parts["backend"] == "inductor"
            and plan.parts["version"].partition("+")[0] == version
            and plan.parts["target"].partition(" ")[0] == target
        }
        if plans.keys() >= manifest.graphs.keys():
            return target, plans
        missing.append(next(name for name in manifest.graphs if name not in plans))
    raise EngineError(f"{folder} has no compiled {missing[0]} for PyTorch {version} on {tried[0]}. {REMEDY}")


def device_for(folder: Path, device: str) -> str:
    """The device that the folder's graphs are compiled for. Raises EngineError where one is missing."""
    return find_compiled(folder, Manifest.load(folder, verify=False), device)[0]


def host_engines(folder: Path, manifest: Manifest, threads: int | None, *_: int) -> dict[str, Engine]:
    """The compiled graphs of a folder for the CPU, verified."""
    plans = find_compiled(folder, manifest, "cpu")[1]
    store = PlanStore(folder)
    engines: dict[str, Engine] = {}
    for name, spec in manifest.fixed().graphs.items():  # compiled for pictures of the bundle's own size
        store.read(plans[name])
        engines[name] = InductorEngine(plans[name].path, spec, "cpu", threads)
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
    """One compiled file a graph, and one binding a bucket.

    A file is verified and loaded when the loop first uses it, on the thread and for the stream that it stays with.
    """
    _, plans = find_compiled(folder, manifest, "cuda")
    store, loaded = PlanStore(folder), dict[str, InductorEngine]()

    def load(graph: str, bucket: int, branches: int) -> DeviceEngine:
        if graph not in loaded:
            store.read(plans[graph])
            loaded[graph] = InductorEngine(plans[graph].path, manifest.fixed().graphs[graph], "cuda", asynchronous=True)
        return InductorDeviceEngine(loaded[graph])

    buckets = powers_of_two(slots)
    return DeviceEngines(load, buckets, {graph: buckets for graph, spec in manifest.graphs.items() if spec.steps})


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
