"""`/metrics` for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from .messages import Measured

if TYPE_CHECKING:
    from .dispatch import Dispatcher

PREFIX = "handiffuser_"
REQUEST_SECONDS = (0.01, 0.03, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
STAGE_SECONDS = (0.0003, 0.001, 0.003, *REQUEST_SECONDS)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.queued = Gauge(PREFIX + "num_queue_reqs", "Pictures in the queue.", registry=registry)
        self.running = Gauge(PREFIX + "num_running_reqs", "Pictures that workers have.", registry=registry)
        self.ready = Gauge(PREFIX + "workers_ready", "Workers that take requests.", registry=registry)
        self.rate = Gauge(PREFIX + "steps_per_second", "Steps a second while busy.", registry=registry)
        self.memory = Gauge(PREFIX + "gpu_memory_bytes", "GPU memory in use.", ["worker"], registry=registry)
        self.requests = Counter(
            PREFIX + "requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self.restarts = Counter(PREFIX + "worker_restarts", "Workers that ended and started again.", registry=registry)
        self.pictures = Counter(PREFIX + "pictures", "Pictures made.", registry=registry)
        self.stages = Gauge(
            PREFIX + "stage_seconds_total", "Seconds spent in each graph (CPU).", ["worker", "stage"], registry=registry
        )
        self.latency = Histogram(
            PREFIX + "request_latency_seconds",
            "Seconds from request to answer.",
            ["path"],
            buckets=REQUEST_SECONDS,
            registry=registry,
        )
        self.waiting = Histogram(
            PREFIX + "queue_time_seconds", "Seconds from request to worker.", buckets=REQUEST_SECONDS, registry=registry
        )
        self.making = Histogram(
            PREFIX + "stage_latency_seconds",
            "Seconds of each run of a graph, for a batch, step or picture; and of queue, hands, picture, encoding.",
            ["stage"],
            buckets=STAGE_SECONDS,
            registry=registry,
        )
        self.batches = Histogram(
            PREFIX + "generation_batch_size", "Pictures that a step advanced.", buckets=BATCH_SIZES, registry=registry
        )

    def waited(self, seconds: float) -> None:
        """From a request's arrival to a worker."""
        self.waiting.observe(seconds)
        self.took("queue", seconds)

    def took(self, stage: str, seconds: float) -> None:
        """stage: queue, hands, picture, encoding or the name of a graph."""
        self.making.labels(stage).observe(seconds)
        if stage == "picture":
            self.pictures.inc()

    def measured(self, worker: int, message: Measured) -> None:
        for size, steps in message.batches.items():
            for _ in range(steps):
                self.batches.observe(size)
        for stage, spent in message.totals.items():
            self.stages.labels(str(worker), stage).set(spent)
        for stage, runs in message.runs.items():
            for spent in runs:
                self.took(stage, spent)
        if message.gpu_memory:
            self.memory.labels(str(worker)).set(message.gpu_memory[0])

    def text(self, dispatcher: Dispatcher) -> bytes:
        self.queued.set(len(dispatcher.queue))
        self.running.set(dispatcher.running)
        self.ready.set(sum(bool(worker.slots) for worker in dispatcher.workers))
        self.rate.set(dispatcher.rate)
        return generate_latest(self.registry)
