"""Two servers as one would write them in an afternoon, over the same engines: what hd-serve is measured against.

    python -m handiffuser.benchmarks.plain_servers lock demo --port 8001
    python -m handiffuser.benchmarks.plain_servers static demo --port 8002

lock      one request after the other, whoever holds the lock
static    what has come in, up to the batch size, is run as a batch; the next one begins when its longest member is done
"""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from typing import Any

import click
import uvicorn
from fastapi import FastAPI
from PIL import Image

from ..runtime.pipeline import HanDiffuser
from ..runtime.requests import Request
from ..runtime.results import Picture


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


@click.command()
@click.argument("kind", type=click.Choice(["lock", "static"]))
@click.argument("engines")
@click.option("--port", type=int, required=True)
@click.option("--threads", type=int)
@click.option("--batch-size", type=int, default=8)
@click.option("--device", default="auto")
@click.option("--backend", default="auto")
def main(kind: str, engines: str, port: int, threads: int | None, batch_size: int, device: str, backend: str) -> None:
    pipeline = HanDiffuser.load(engines, device, threads, batch_size, backend)
    app = with_a_lock(pipeline) if kind == "lock" else in_batches(pipeline)

    @app.get("/readyz")
    def ready() -> dict[str, Any]:
        return {}

    uvicorn.run(app, port=port, log_level="critical")


if __name__ == "__main__":
    main()
