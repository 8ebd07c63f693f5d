"""The loop on a GPU, with the engines of a backend of the table.

loop, sentences = load_device_loop(Bundle.load(folder), folder, "tensorrt-rtx", slots=8)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..engines.adapted import Chosen
from ..engines.backends import BACKENDS
from ..engines.base import DeviceEngines, check_gpu
from ..engines.cuda import Cuda
from .bundle import Bundle
from .device import DeviceLoop
from .device_graphs import STREAM, Streams, connect


def load_device_loop(
    bundle: Bundle,
    folder: Path,
    backend: str,
    slots: int,
    overlap: bool = True,
    onnxruntime_graphs: bool = False,
    adapters: Sequence[Chosen] = (),
) -> tuple[DeviceLoop, list[str]]:
    """The loop of a bundle on this machine's GPU, and what the user should know about it.

    backend: one of the table that runs on GPUs. onnxruntime_graphs: see `onnxruntime_cuda.device_engines`. adapters:
    for TensorRT, whose plans get them as they are loaded.
    Raises EngineError without a GPU, without the backend, or without engines for them.
    """
    cuda, manifest = Cuda(), bundle.manifest
    bundle.adapts = False
    check_gpu(manifest, cuda)
    streams = Streams.make(cuda, overlap)
    make, more = BACKENDS[backend].on_gpu().device_engines, {"adapters": adapters} if adapters else {}
    stream_of = lambda graph: getattr(streams, STREAM[graph])  # noqa: E731
    found: DeviceEngines = make(backend, folder, manifest, cuda, stream_of, slots, onnxruntime_graphs, **more)
    own = found.at(manifest.image_size)
    loop = DeviceLoop(bundle, cuda, connect(cuda, manifest, own), streams, min(slots, own.buckets[-1]), found)
    loop.after_run, loop.at_close = found.after_run, found.close
    bundle.engine_sizes, bundle.room, bundle.reader.engine_chunks = found.sizes, loop.sizes.room, 1
    command = "hd-export CHECKPOINT" if BACKENDS[backend].compiles else "hd-engines build"
    bundle.build_sizes = f"{command} {folder} --backend {BACKENDS[backend].plans_of or backend} --sizes"
    bundle.made_by |= {"device": cuda.name, "backend": backend}
    return loop, found.sentences
