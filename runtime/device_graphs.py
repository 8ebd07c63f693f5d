"""Graphs of a bundle on a GPU: their buffers, their engines, and their captured launches.

    graphs = connect(cuda, manifest, Sized(load, buckets=[1, 4]))
    graphs["hand_features"].launch(stream, count=3)       # over the first 3 rows, with the engine for 4

The inputs and outputs of a graph lie in buffers that are allocated once, for the largest bucket. An output that the
next graph reads is one shared buffer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..contract import ALL_GRAPHS, BRANCHES, PICTURES, GraphSpec, Manifest, Size, TensorSpec
from ..engines.base import DeviceEngine, Sized
from ..errors import EngineError
from ..settings import MAX_STEPS

After = Callable[[Any, int], None]  # (stream, bucket): enqueues work after a run


class DeviceGraph:
    """A graph of the bundle with its buffers, and one engine and one captured launch per bucket.

    buckets: batch sizes of the engines. load: (bucket, guidance branches) -> engine, called at its first use. shared:
    outputs of another graph, by input name. any_size: one engine takes every size up to the largest bucket; it is bound
    to its tensors each time, and not captured. single: buckets that also have an engine of the conditional branch
    alone; its inputs with one entry per branch lie in `alone`.
    """

    def __init__(
        self,
        cuda: Any,
        spec: GraphSpec,
        buckets: Sequence[int],
        load: Callable[[int, int], DeviceEngine],
        shared: Mapping[str, Any] | None = None,
        capture: bool = True,
        single: Collection[int] = (),
        any_size: bool = False,
    ) -> None:
        self.spec, self.buckets, self.load, self.capture = spec, sorted(buckets), load, capture
        self.any_size = any_size
        shared = shared or {}

        def buffer(tensor: TensorSpec, branches: int = 2) -> Any:
            rest = (branches if size == BRANCHES else size for size in tensor.shape[1:])
            return cuda.zeros((self.buckets[-1], *rest), tensor.dtype)

        self.inputs = {t.name: shared[t.name] if t.name in shared else buffer(t) for t in spec.inputs}
        self.outputs = {t.name: buffer(t) for t in spec.outputs}
        self.single = frozenset(single) if spec.branched else frozenset()
        self.alone = {t.name: buffer(t, 1) for t in spec.inputs if self.single and t.name in spec.branched}
        self._launches: dict[tuple[int, int], Callable[[Any], None]] = {}
        self._engine: DeviceEngine | None = None  # for any size
        self.refused: list[int] = []  # buckets whose capture was refused

    def bucket(self, count: int) -> int:
        """The smallest bucket that holds `count` rows."""
        for bucket in self.buckets:
            if bucket >= count:
                return bucket
        raise EngineError(
            f"A batch of {self.spec.file} must have at most {self.buckets[-1]} rows, got {count}. "
            f"Build a larger engine: hd-engines build FOLDER --batch-sizes {count}."
        )

    def launch(self, stream: Any, count: int, after: After | None = None, alone: bool = False) -> None:
        """Enqueues one run over the first `count` rows, and the work of `after` for its bucket.

        alone: runs the conditional guidance branch alone, where there is an engine for that. The first run loads the
        kernels; then it is captured, and the captured launch serves from then on.
        """
        if self.any_size:
            if self._engine is None:
                self._engine = self.load(self.bucket(count), 2)
            self._bind(self._engine, count)
            self._engine.enqueue(stream)
            return
        bucket = self.bucket(count)
        key = (bucket, 1 if alone and bucket in self.single else 2)
        if key in self._launches:
            self._launches[key](stream)
            return
        engine = self.load(*key)
        self._bind(engine, *key)

        def work(stream: Any) -> None:
            engine.enqueue(stream)
            if after is not None:
                after(stream, bucket)

        work(stream)
        graph = None
        if self.capture:
            if not engine.own_graph and engine.capturable(stream):
                graph = stream.capture(lambda: work(stream))
            if graph is None and not engine.own_graph:
                self.refused.append(bucket)
        self._launches[key] = work if graph is None else _Captured(graph, engine)

    def warm_up(self, stream: Any, rows: int, after: After | None = None) -> Iterator[int]:
        """Loads, runs and captures the engines for up to `rows` rows; yields 1 for every engine.

        It overwrites the buffers: do not call it while requests are in them.
        """
        buckets = [1] if self.any_size else [b for b in self.buckets if b <= self.bucket(rows)]
        kinds = [(bucket, alone) for bucket in buckets for alone in (False, True) if not alone or bucket in self.single]
        for bucket, alone in kinds:
            self.launch(stream, bucket, after, alone)
            yield 1

    def close(self) -> None:
        """Releases engines, captured launches and buffers. The streams must be idle."""
        self._launches.clear()
        self._engine = self.load = None  # type: ignore[assignment]  # `load` knows engines and sessions, too
        self.inputs, self.outputs, self.alone = {}, {}, {}

    def _bind(self, engine: DeviceEngine, count: int, branches: int = 2) -> None:
        inputs = {**self.inputs, **self.alone} if branches == 1 else self.inputs
        engine.bind(
            {name: array[:count] for name, array in inputs.items()},
            {name: array[:count] for name, array in self.outputs.items()},
        )


class _Captured:
    """A captured launch, and the engine that owns its memory and kernels."""

    def __init__(self, graph: Any, engine: DeviceEngine) -> None:
        self.graph, self.engine = graph, engine

    def __call__(self, stream: Any) -> None:
        self.graph.launch(stream)


class Staging:
    """Pinned host memory for copies under way; a buffer is reused when its copy is done."""

    def __init__(self, cuda: Any) -> None:
        self.cuda = cuda
        self.free: dict[tuple[Any, ...], list[np.ndarray]] = {}
        self.busy: deque[tuple[Any, np.ndarray]] = deque()
        self.lent: dict[int, np.ndarray] = {}  # by id: keeps arrays until their copies are done

    def take(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """A pinned array with undefined content; `give` returns it."""
        self.sweep()
        kept = self.free.get((shape, np.dtype(dtype).str))
        array = kept.pop() if kept else self.cuda.pinned(shape, dtype)
        self.lent[id(array)] = array
        return array

    def give(self, array: np.ndarray) -> None:
        self.lent.pop(id(array), None)
        self.free.setdefault((array.shape, array.dtype.str), []).append(array)

    def read(self, stream: Any, source: Any) -> np.ndarray:
        """Enqueues a copy to pinned memory, which is valid after the stream's next event."""
        pinned = self.take(tuple(source.shape), source.dtype)
        stream.copy(pinned, source)
        return pinned

    def upload(self, stream: Any, target: Any, value: np.ndarray) -> None:
        """Copies a host array into a device array of its size, without waiting."""
        pinned = self.take(tuple(value.shape), target.dtype)
        pinned[...] = value
        stream.copy(target, pinned)
        self.busy.append((stream.record(), pinned))

    def reclaim(self) -> None:
        """Takes back all arrays. No copy may be under way."""
        self.busy.clear()
        for array in list(self.lent.values()):
            self.give(array)

    def forget(self) -> None:
        """Frees the arrays that are not in use: pictures of other sizes need other ones."""
        self.free.clear()

    def sweep(self) -> None:
        """Takes back the buffers whose copies are done."""
        for _ in range(len(self.busy)):
            event, array = self.busy.popleft()
            if event.done():
                self.give(array)
            else:
                self.busy.append((event, array))


class Streams(NamedTuple):
    """main: the steps of stage 2. side: stage 1. out: the image decoder."""

    main: Any
    side: Any
    out: Any

    @classmethod
    def make(cls, cuda: Any, overlap: bool) -> Streams:
        """Three streams, or one under three names. Steps go first: they are what pictures wait for."""
        main = cuda.stream(first=overlap)
        return cls(main, cuda.stream(), cuda.stream()) if overlap else cls(main, main, main)

    def synchronize(self) -> None:
        """Waits until none of them has work."""
        for stream in {*self}:
            stream.synchronize()


# The stream of each graph's engines. Engines of one stream never run at once, and share their scratch memory.
STREAM = dict.fromkeys(ALL_GRAPHS, "side") | {"unet": "main", "unet_time": "main", "image_decoder": "out"}


def connect(
    cuda: Any, manifest: Manifest, engines: Sized, capture: bool = True, size: Size | None = None
) -> dict[str, DeviceGraph]:
    """The bundle's graphs with their buffers; an output that the next graph reads is one shared buffer.

    size: only the graphs of PICTURES, for this height and width; None: all graphs, for the bundle's own size.
    """
    manifest = manifest.fixed(size)  # buffers and captured launches are for one size
    load, buckets, single, _ = engines
    graphs: dict[str, DeviceGraph] = {}
    feeds = {"text_hand_encoder": "hand_features", "unet_context": "text_hand_encoder"}
    for name in [name for name in (ALL_GRAPHS if size is None else PICTURES) if name in manifest.graphs]:
        spec = manifest.graphs[name]
        shared = graphs[feeds[name]].outputs if name in feeds else {}
        free = {axis for tensor in spec.inputs for axis in tensor.shape if isinstance(axis, str)}
        # A schedule has any length, and is prepared once.
        one_axis = free == {"S"}
        graphs[name] = DeviceGraph(
            cuda,
            spec,
            range(1, MAX_STEPS + 1) if one_axis else buckets,
            lambda bucket, branches, name=name: load(name, bucket, branches),  # type: ignore[misc]
            shared,
            capture,
            single.get(name, ()),
            any_size=one_axis,
        )
    return graphs
