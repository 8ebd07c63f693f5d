"""Pictures of several sizes on a GPU: for each size the slots of its UNet, its decoder and what pictures bring.

    easel = sizes.get((768, 512))          # made where it is missing; None while it lacks memory
    sizes.submit(stream, job, easel)
    sizes.step(main, out)                  # of the size of the oldest job

It is `sampler.SizedSamplers` on a device. A step advances pictures of one size: that of the oldest job. So each job is
the oldest one day, and none starves. What a size needs stays on the GPU until another size wants the memory. Then the
least recently used goes; that of the bundle's own size always stays.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

from ..contract import IMAGE_ENCODER, PICTURES, GraphSpec, Manifest, Size
from ..engines.base import DeviceEngines
from ..engines.cuda import itemsize
from .device_batches import Exit
from .device_graphs import DeviceGraph, Staging, Streams, connect
from .device_noise import DeviceNoise
from .device_pictures import DevicePictures
from .device_sampler import LOG_STEPS, DeviceJob, DeviceSampler, Steps
from .room import Room
from .steptimes import StepTimes

# Latents that wait for the decoder, and a copy of the log of their steps: so many of each, so that the UNet never waits
# for the decoder.
EXITS = 3


class Easel:
    """What pictures of one size need on the device.

    graphs: at least the UNet and the decoder, for this size. nbytes: what closing it frees.
    """

    def __init__(
        self,
        cuda: Any,
        size: Size,
        graphs: dict[str, DeviceGraph],
        slots: int,
        noise: DeviceNoise,
        steps: Steps,
        nbytes: int = 0,
    ) -> None:
        self.size, self.graphs, self.nbytes = size, graphs, nbytes
        unet = graphs["unet"]
        latents = unet.inputs["latents"].shape[1:]
        self.sampler = DeviceSampler(cuda, unet, "latents", slots, noise, StepTimes(unet.buckets), steps=steps)
        self.pictures = DevicePictures(cuda, noise, graphs.get(IMAGE_ENCODER), latents)
        lines = self.sampler.log.shape
        self.exits: list[tuple[Any, Any, Any]] = [  # latents, log, event: the decoder has read them
            (cuda.zeros((slots, *latents), "float32"), cuda.zeros(lines, "float32"), None) for _ in range(EXITS)
        ]

    def step(self, main: Any, out: Any, staging: Staging) -> tuple[int, list[Exit]]:
        """Enqueues one step of stage 2; finished requests go to the decoder. Returns how many made it, and those."""
        buffer, log, busy = self.exits[0]
        if busy is not None:
            main.wait(busy)  # until the decoder has read this buffer
        finished: list[DeviceJob] = []

        def take(job: DeviceJob, state: Any) -> None:
            main.copy(buffer[len(finished)], state)
            finished.append(job)

        count = self.sampler.step(main, take)
        if not finished:
            return count, []
        main.copy(log, self.sampler.log)
        out.wait(main.record())
        rows, decoder = len(finished), self.graphs["image_decoder"]
        out.copy(decoder.inputs["latents"][:rows], buffer[:rows])
        decoder.launch(out, rows)
        image, finite = (staging.read(out, decoder.outputs[name][:rows]) for name in ("image", "finite"))
        leaving = Exit(finished, image, finite, staging.read(out, log))
        leaving.event = out.record()
        self.exits = [*self.exits[1:], (buffer, log, leaving.event)]
        return count, [leaving]

    def close(self) -> None:
        """Frees it. The streams must be idle."""
        for graph in self.graphs.values():
            graph.close()
        self.exits.clear()


class DeviceSizes:
    """The easels of a loop; together they hold `slots` jobs.

    own: the easel of the bundle's own size. engines: what the backend gives; None: it paints the own size alone.
    """

    def __init__(
        self,
        cuda: Any,
        manifest: Manifest,
        own: Easel,
        engines: DeviceEngines | None,
        slots: int,
        noise: DeviceNoise,
        steps: Steps,
        streams: Streams,
    ) -> None:
        self.cuda, self.manifest, self.own, self.engines = cuda, manifest, own, engines
        self.slots, self.noise, self.steps, self.streams = slots, noise, steps, streams
        self.easels: dict[Size, Easel] = {own.size: own}  # the least recently used first
        self.taken: dict[Hashable, Easel] = {}  # by requests that were taken in and have no result yet
        self.flying: dict[Hashable, Easel] = {}  # keys of the jobs in flight, the oldest first
        self.room = Room(manifest, self.available)

    def available(self) -> int:
        """Bytes on the device that a new size may take: what is free, and what the easels hold that have no work."""
        return int(self.cuda.free_memory()) + sum(easel.nbytes for easel in self._idle())

    def get(self, size: Size) -> Easel | None:
        """The easel of a size. None: it does not fit beside those that have work; try again when these are done.

        Raises RequestError where it never fits, and EngineError where there are no engines for this size.
        """
        if size not in self.easels:
            assert self.engines is not None, "the bundle refuses sizes without engines"
            sized = self.engines.at(size)
            rows = min(self.room.rows(size, 1, self.slots), sized.buckets[-1])
            nbytes = sized.weights + self._buffers(size, sized.buckets[-1])
            # Whatever ran before: what a size takes was given back when it was dropped.
            if not self._make_room(size, nbytes + self.room.needed(size, rows)):
                return None
            graphs = connect(self.cuda, self.manifest, sized, size=size)
            self.easels[size] = Easel(self.cuda, size, graphs, rows, self.noise, self.steps, nbytes)
        self.easels[size] = self.easels.pop(size)
        return self.easels[size]

    def _make_room(self, size: Size, needed: int) -> bool:
        """Drops what is least recently used until a new size fits; False where it does not fit beside the others."""
        while needed > self.cuda.free_memory():
            if not self._idle():
                if not self.taken:
                    self.room.refuse(size, needed)
                return False
            self.drop(self._idle()[0].size)
        return True

    def drop(self, size: Size) -> None:
        """Frees what a size takes; the next picture of this size makes it again."""
        self.streams.synchronize()
        self.easels.pop(size).close()
        self.noise.staging.forget()

    def _idle(self) -> list[Easel]:
        """Those that may go, the least recently used first."""
        busy = [self.own, *self.taken.values()]
        return [easel for easel in [*self.easels.values()] if all(easel is not one for one in busy)]

    def _buffers(self, size: Size, rows: int) -> int:
        """Bytes of the buffers of a size."""
        graphs = self.manifest.fixed(size).graphs
        exits = EXITS * math.prod(self.manifest.latents_at(size)) + (1 + EXITS) * LOG_STEPS
        return 4 * rows * exits + sum(buffer_bytes(graphs[name], rows) for name in PICTURES if name in graphs)

    # -- the jobs in flight, as `sampler.SizedSamplers` has them ------------------------------------------------------

    @property
    def active(self) -> int:
        """Jobs in flight."""
        return len(self.flying)

    def free(self, easel: Easel | None = None) -> int:
        """Jobs that can be submitted now; easel: of this size."""
        free = self.slots - self.active
        return free if easel is None else min(free, easel.sampler.free)

    def submit(self, stream: Any, job: DeviceJob, easel: Easel) -> None:
        """See `DeviceSampler.submit`."""
        easel.sampler.submit(stream, job)
        self.flying[job.key] = easel

    def hungry(self) -> bool:
        """Whether the device may soon be idle although there are steps to make."""
        return self.steps.hungry() and bool(self.flying)

    def step(self, main: Any, out: Any) -> tuple[int, list[Exit]]:
        """Enqueues one step of the size of the oldest job. See `Easel.step`."""
        count, leaving = next(iter(self.flying.values())).step(main, out, self.noise.staging)
        for job in (job for one in leaving for job in one.jobs):
            del self.flying[job.key]
        return count, leaving

    def drop_job(self, stream: Any, key: Hashable) -> None:
        """Takes a job out between two steps."""
        self.flying.pop(key).sampler.drop(stream, key)

    def find(self, key: Hashable) -> tuple[DeviceSampler, int] | None:
        """The sampler and row of a job in flight; None for any other."""
        if key not in self.flying:
            return None
        sampler = self.flying[key].sampler
        return sampler, next(i for i, job in enumerate(sampler.jobs) if job.key == key)

    def clear(self) -> None:
        """Forgets the jobs and requests."""
        self.flying.clear()
        self.taken.clear()
        self.steps.clear()
        for easel in self.easels.values():
            easel.sampler.clear()

    def reclaim(self) -> None:
        """Takes back what pictures brought. The streams must be idle."""
        for easel in self.easels.values():
            easel.pictures.reclaim()

    def close(self) -> None:
        """Frees the easels. The streams must be idle."""
        self.clear()
        for easel in self.easels.values():
            easel.close()
        self.easels.clear()
        self.engines, self.room.free = None, lambda: None  # they refer to the easels


def buffer_bytes(spec: GraphSpec, rows: int) -> int:
    """Bytes of a graph's inputs and outputs for so many rows with both guidance branches."""
    return sum(
        math.prod(size if isinstance(size, int) else rows if size == "B" else 2 for size in tensor.shape)
        * itemsize(tensor.dtype)
        for tensor in (*spec.inputs, *spec.outputs)
    )
