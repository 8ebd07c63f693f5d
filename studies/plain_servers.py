"""Two minimal servers over the same engines, to compare hd-serve with.

    python studies/plain_servers.py compare demo --batch-size 4 --threads 1 --requests 40
    python studies/plain_servers.py lock demo --port 8001
    python studies/plain_servers.py static demo --port 8002

lock      one request after the other
static    the waiting requests, up to the batch size, run as a batch; the next begins when its longest member is done
"""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from collections.abc import Callable
from typing import Any

import click
import uvicorn
from fastapi import FastAPI
from handiffuser.benchmarks import serve as over_http
from handiffuser.benchmarks.cli import SERVED_STEPS, SHARES
from handiffuser.benchmarks.load import mixed_requests
from handiffuser.benchmarks.serve import OURS
from handiffuser.benchmarks.tables import Tables
from handiffuser.runtime.pipeline import HanDiffuser
from handiffuser.runtime.requests import Request
from handiffuser.runtime.results import Picture
from PIL import Image
from rich.console import Console


def encoded(picture: Picture) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(picture.image).save(buffer, "PNG")
    return {"data": [{"b64_json": base64.b64encode(buffer.getvalue()).decode()}]}


def asked(body: dict[str, Any]) -> Request:
    return Request(
        body["prompt"],
        seed=body["seed"],
        steps=body.get("num_inference_steps"),
        guidance=body.get("guidance_scale"),
        id=body["id"],
    )


def with_a_lock(pipeline: HanDiffuser) -> FastAPI:
    app, lock = FastAPI(), threading.Lock()

    @app.post("/v1/images/generations")
    def generate(body: dict[str, Any]) -> dict[str, Any]:  # in a thread of the pool
        with lock:
            return encoded(pipeline.generate(asked(body))[0])

    return app


def in_batches(pipeline: HanDiffuser) -> FastAPI:
    app = FastAPI()
    waiting: asyncio.Queue[tuple[Request, asyncio.Future[Picture]]] = asyncio.Queue()

    async def work() -> None:
        while True:
            batch = [await waiting.get()]
            while len(batch) < pipeline.batch_size and not waiting.empty():
                batch.append(waiting.get_nowait())
            pictures = await asyncio.to_thread(pipeline.generate, [request for request, _ in batch])
            for picture, (_, future) in zip(pictures, batch, strict=True):
                future.set_result(picture)

    tasks: list[asyncio.Task[None]] = []

    @app.post("/v1/images/generations")
    async def generate(body: dict[str, Any]) -> dict[str, Any]:
        if not tasks:
            tasks.append(asyncio.create_task(work()))
        future: asyncio.Future[Picture] = asyncio.get_running_loop().create_future()
        waiting.put_nowait((asked(body), future))
        return encoded(await future)

    return app


ENGINES = (
    click.argument("engines"),
    click.option("--threads", type=int),
    click.option("--batch-size", type=int, default=8),
    click.option("--device", default="auto"),
    click.option("--backend", default="auto"),
)


def engine_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(ENGINES):
        command = option(command)
    return command


def serve(make: Callable[[HanDiffuser], FastAPI], port: int, engines: str, how: dict[str, Any]) -> None:
    """Serves until a signal comes."""
    app = make(HanDiffuser.load(engines, how["device"], how["threads"], how["batch_size"], how["backend"]))

    @app.get("/readyz")
    def ready() -> dict[str, Any]:
        return {}

    uvicorn.run(app, port=port, log_level="critical")


@click.group()
def commands() -> None:
    pass


@commands.command()
@engine_options
@click.option("--port", type=int, required=True)
def lock(engines: str, port: int, **how: Any) -> None:
    serve(with_a_lock, port, engines, how)


@commands.command()
@engine_options
@click.option("--port", type=int, required=True)
def static(engines: str, port: int, **how: Any) -> None:
    serve(in_batches, port, engines, how)


SERVERS = {**OURS, "lock": (__file__, "lock"), "static": (__file__, "static")}


@commands.command()
@engine_options
@click.option("--requests", type=click.IntRange(1), default=40, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
def compare(engines: str, requests: int, rounds: int, **how: Any) -> None:
    """Measures both and hd-serve in turn, as `hd-bench --serve` measures hd-serve."""
    pipeline = HanDiffuser.load(engines, how["device"], how["threads"], how["batch_size"], how["backend"])
    asked = mixed_requests(pipeline, requests, steps=SERVED_STEPS)
    rows = list(over_http.compare(engines, asked, SHARES, rounds, how, Console(stderr=True).print, SERVERS))
    Tables().serve({"requests": requests, "steps": list(SERVED_STEPS), "rows": rows})


if __name__ == "__main__":
    commands()
