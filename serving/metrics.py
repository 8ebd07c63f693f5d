"""`/metrics` for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

if TYPE_CHECKING:
    from .dispatch import Dispatcher

PREFIX = "handiffuser_"
SECONDS = (0.01, 0.03, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
STAGE_SECONDS = (0.0003, 0.001, 0.003, *SECONDS)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.queued = Gauge(PREFIX + "num_queue_reqs", "Pictures that wait.", registry=registry)
        self.running = Gauge(PREFIX + "num_running_reqs", "Pictures that are being made.", registry=registry)
        self.ready = Gauge(PREFIX + "workers_ready", "Workers that take requests.", registry=registry)
        self.rate = Gauge(PREFIX + "steps_per_second", "Measured rate while busy.", registry=registry)
        self.memory = Gauge(PREFIX + "gpu_memory_bytes", "Of the GPU, in use.", ["worker"], registry=registry)
        self.requests = Counter(PREFIX + "requests", "By path and status.", ["path", "status"], registry=registry)
        self.restarts = Counter(PREFIX + "worker_restarts", "Workers that ended and began again.", registry=registry)
        self.pictures = Counter(PREFIX + "pictures", "Pictures made.", registry=registry)
        self.stages = Gauge(
            PREFIX + "stage_seconds_total", "Seconds spent in each graph (CPU).", ["worker", "stage"], registry=registry
        )
        self.latency = Histogram(
            PREFIX + "request_latency_seconds", "From request to answer.", ["path"], buckets=SECONDS, registry=registry
        )
        self.waiting = Histogram(
            PREFIX + "queue_time_seconds", "From request to a worker.", buckets=SECONDS, registry=registry
        )
        self.making = Histogram(
            PREFIX + "stage_latency_seconds",
            "Graphs, each time they run for a batch, a step, a picture; and queue, hands, picture, encoding.",
            ["stage"],
            buckets=STAGE_SECONDS,
            registry=registry,
        )
        self.batches = Histogram(
            PREFIX + "generation_batch_size", "Pictures that a step advanced.", buckets=SIZES, registry=registry
        )

    def observe(self, kind: str, value: Any) -> None:
        """queue_time, hands_time, picture_time, encoding_time: seconds. batches: {rows: how often}. stages: (worker,
        {graph: seconds so far}, {graph: [seconds of each run]})."""
        if kind == "queue_time":
            self.waiting.observe(value)
            self.making.labels("queue").observe(value)
        elif kind == "picture_time":
            self.pictures.inc()
            self.making.labels("picture").observe(value)
        elif kind == "hands_time":
            self.making.labels("hands").observe(value)
        elif kind == "encoding_time":
            self.making.labels("encoding").observe(value)
        elif kind == "batches":
            for rows, times in value.items():
                for _ in range(times):
                    self.batches.observe(rows)
        elif kind == "stages":
            worker, seconds, laps = value
            for stage, spent in seconds.items():
                self.stages.labels(str(worker), stage).set(spent)
            for stage, each in laps.items():
                making = self.making.labels(stage)
                for spent in each:
                    making.observe(spent)
        elif kind == "restart":
            self.restarts.inc()

    def text(self, dispatcher: Dispatcher) -> bytes:
        self.queued.set(len(dispatcher.queue))
        self.running.set(dispatcher.running)
        self.ready.set(sum(bool(worker.slots) for worker in dispatcher.workers))
        self.rate.set(dispatcher.rate)
        for worker, (used, _) in dispatcher.gpu_memory.items():
            self.memory.labels(str(worker)).set(used)
        return generate_latest(self.registry)
