"""`hd-serve ENGINES`: OpenAI's images API over HTTP, and a page in the browser.

hd-serve demo
hd-serve engines/ --host 0.0.0.0 --api-keys keys.txt --devices 0,1
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import uvicorn
from uvicorn.config import Config

from .. import commands, shipped
from ..contract import Manifest
from ..engines.backends import CHOICES, DEVICES
from ..errors import HanDiffuserError
from ..runtime.bundle import Bundle
from ..settings import SETTINGS
from .app import make_app
from .dispatch import STUCK_SECONDS, Dispatcher
from .guard import Protocol
from .keys import Keys
from .metrics import Metrics
from .proxy import checked_origin, checked_url
from .service import Front, Limits, Service, private_folder
from .worker import Options

LOOP_EXIT_SECONDS = 3.0  # for a step to end, before the process ends without it


def _named(_: click.Context, parameter: click.Parameter, given: Any) -> Any:
    """Refuses an empty name of the model, which is usually a variable of the shell that is not set."""
    for name in given if isinstance(given, tuple) else [given]:
        if name is not None and not name.strip():
            raise click.UsageError(
                f"{parameter.opts[0]} must have at least one character, got {name!r}. Leave it out, or give a name."
            )
    return given


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True})
@click.argument("engines", metavar="ENGINES")
@click.option("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 means all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="Port to listen on; 0 takes a free one.")
@click.option("--api-keys", metavar="FILE", help="File of API keys, one `name: key` a line. SIGHUP reads it again.")
@click.option("--name", callback=_named, help="Name of the model.  [default: the folder's name]")
@click.option("--queue", type=click.IntRange(1, 100_000), default=64, help="Most pictures in the queue.")
@click.option("--max-n", type=click.IntRange(1, 1024), default=8, help="Most pictures of a request.")
@click.option("--max-steps", type=click.IntRange(1, 1000), default=100, help="Most steps of a picture.")
@click.option("--max-upload", type=click.IntRange(1, 1024), default=32, metavar="MB",
              help="Most megabytes of a request that brings pictures.")  # fmt: skip
@click.option("--timeout", type=click.FloatRange(1, 3600), default=300, help="Seconds until a request fails.")
@click.option("--grace", type=click.FloatRange(0, 3600), default=30,
              help="Seconds that requests have to finish after SIGTERM.")  # fmt: skip
@click.option("--stuck-after", type=click.FloatRange(1, 86400), default=STUCK_SECONDS,
              help="Seconds without a step after which a worker with requests hangs: the server kills it and starts it "
              "again. Ten times the slowest step, if that is longer.")  # fmt: skip
@click.option("--cors", multiple=True, metavar="ORIGIN",
              help="Origin whose pages may send requests, such as https://example.org. May be repeated.")  # fmt: skip
@click.option("--alias", multiple=True, callback=_named, metavar="NAME",
              help="Another name of the model in requests. May be repeated.")  # fmt: skip
@click.option("--any-size", is_flag=True, help="Scale pictures to the size of the request instead of refusing it.")
@click.option("--response-format", type=click.Choice(["b64_json", "url"]), default="b64_json",
              help="Form of pictures when a request does not name one.")  # fmt: skip
@click.option("--default-negative-prompt", default="", metavar="TEXT",
              help="Negative prompt of requests that give none.")  # fmt: skip
@click.option("--plain-prompts", is_flag=True, help=SETTINGS["plain_prompts"].help)
@click.option("--lora-folder", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Adapters (LoRA, .safetensors) that requests may name. On a CPU only.")  # fmt: skip
@click.option("--lora-memory", type=click.FloatRange(0, 10_000, min_open=True), metavar="GB",
              help="Memory of each worker for engines with adapters.  [default: half of what is free]")  # fmt: skip
@click.option("--public-url", metavar="URL",
              help="URL of this server behind a proxy: the URLs in answers begin with it.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1, 4096), default=8, help="Pictures that a worker makes at once.")
@click.option("--backend", type=click.Choice(CHOICES), default="auto")
@click.option("--device", type=click.Choice(DEVICES), default="auto")
@click.option("--devices", metavar="0,1,...", help="GPUs, with a worker process each, behind one port.")
@click.option("--workers", type=click.IntRange(1, 256), default=1, help="Worker processes on a CPU.")
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads of each worker.  [default: an equal share]")
@click.option("--no-warm-up", is_flag=True, help="Take requests before the engines have run once.")
@click.version_option(package_name="handiffuser", prog_name="hd-serve")
def serve(engines: str, **options: Any) -> int:
    """Serves ENGINES, a bundle folder that hd-export made or the word `demo`, over HTTP.

    The API is OpenAI's images API, with more paths for hands; / is a page for the browser. After SIGTERM or Ctrl-C
    requests have --grace seconds to finish; a second signal stops at once. The log on stderr has a line of JSON for
    each request.
    """
    folder = shipped.resolve(engines, "bundle")
    bundle = Bundle.load(folder, Manifest.load(folder, verify=False))
    keys = Keys(options["api_keys"])
    gpus = _gpus(options["devices"])
    if gpus and options["workers"] > 1:
        raise click.UsageError(
            f"--workers must be 1 with --devices, got {options['workers']}. Leave it out: each GPU gets one worker."
        )
    threads = options["threads"]
    if threads is None and options["workers"] > 1:
        threads = max(1, (os.cpu_count() or 1) // options["workers"])
    one = Options(
        str(folder),
        options["device"],
        threads,
        options["batch_size"],
        options["backend"],
        not options["no_warm_up"],
        lora_memory=options["lora_memory"],
    )
    each = [replace(one, device="cuda", gpu=gpu) for gpu in gpus] or [one] * options["workers"]
    metrics = Metrics()
    own_processes = len(each) > 1 or bool(gpus)
    dispatcher = Dispatcher(each, own_processes, options["queue"], metrics, _say, options["stuck_after"])
    name = options["name"] or ("demo" if engines == "demo" else Path(engines).resolve().name)
    limits = Limits(options["max_n"], options["max_steps"], options["timeout"], upload=options["max_upload"] << 20)
    front = Front(
        options["alias"],
        options["any_size"],
        options["response_format"],
        checked_url(options["public_url"]) if options["public_url"] else None,
        tuple(checked_origin(origin) for origin in options["cors"]),
        options["default_negative_prompt"],
        options["plain_prompts"],
        options["lora_folder"],
    )
    if front.negative_prompt and bundle.manifest.defaults["guidance"] == 1:
        _say("--default-negative-prompt has an effect on requests with a guidance alone: this bundle's guidance is 1.")
    failure: HanDiffuserError | None = None
    with private_folder() as private:
        service = Service(bundle, dispatcher, name, limits, keys, metrics, Path(private), front)
        if misfit := service.misfit():
            raise HanDiffuserError(misfit)
        app = make_app(service)
        try:
            code = asyncio.run(_serve(service, app, options["host"], options["port"], options["grace"]))
        except HanDiffuserError as error:
            code, failure = 1, error
    if dispatcher.left(LOOP_EXIT_SECONDS):  # an ordinary exit would take the interpreter away from the loop
        if failure is not None:
            _say(str(failure))
        sys.stderr.flush()
        os._exit(code)
    if failure is not None:
        raise failure
    return code


def _gpus(text: str | None) -> list[str]:
    if text is None:
        return []
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise click.UsageError(f"--devices must be different GPUs such as 0,1, got {text!r}.")
    return names


def _say(sentence: str) -> None:
    with suppress(OSError, ValueError):  # the server goes on without its log when the disk is full
        click.echo(f"hd-serve: {sentence}", err=True)


def more_files() -> None:
    """Raises the limit on open files as far as allowed: each connection is one, and the usual limit is 1024."""
    with suppress(ImportError, OSError, ValueError):  # not on Windows
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def on_signal(loop: asyncio.AbstractEventLoop, number: int, function: Callable[[], None]) -> None:
    """Calls a function in the event loop when a signal comes."""
    try:
        loop.add_signal_handler(number, function)
    except NotImplementedError:  # Windows
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(function))


class Trouble:
    """Handles errors of the event loop itself. Too many connections would log thousands of lines a second."""

    said = -math.inf

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif time.monotonic() - self.said > 60:
            self.said = time.monotonic()
            _say("The connections reach the limit on open files (ulimit -n). New ones wait.")


class Server(uvicorn.Server):
    """uvicorn without its own handlers of signals."""

    @contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


async def _serve(service: Service, app: Any, host: str, port: int, grace_seconds: float) -> int:
    """Serves until a signal stops it. Returns the exit code."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    config = Config(
        app,
        host=host,
        port=port,
        http=Protocol,
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,  # `proxy.Forwarded` reads them
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=32 << 10,
    )
    try:
        listening = config_socket(host, port)
    except OSError as error:
        raise HanDiffuserError(
            f"The server cannot listen on {host}:{port}: {error.strerror or error}. Choose another --port."
        ) from None
    server, dispatcher = Server(config), service.dispatcher
    signals = 0
    code = 0
    loop = asyncio.get_running_loop()
    stopping: list[asyncio.Task[None]] = []

    async def stop() -> None:
        nonlocal code
        left = await dispatcher.drain(grace_seconds)
        if left:
            _say(f"{left} pictures are not finished.")
            code = 1
            await asyncio.sleep(0.2)  # for their answers to go out
        server.should_exit = True

    def signalled() -> None:
        nonlocal signals, code
        signals += 1
        if signals == 1:
            _say(f"Stopping; requests have {grace_seconds:g} s to finish. The next signal stops at once.")
            stopping.append(loop.create_task(stop()))
        else:
            code = 1 if dispatcher.fail_all("The server was stopped. Send the request again.") else code
            server.should_exit = True

    def reload() -> None:
        try:
            service.keys.load()
            _say("The server has read the keys again.")
        except HanDiffuserError as error:
            _say(f"{error} The old keys stay.")

    more_files()
    loop.set_exception_handler(Trouble())
    for number in commands.SIGNALS:
        on_signal(loop, number, signalled)
    if hasattr(signal, "SIGHUP"):
        on_signal(loop, signal.SIGHUP, reload)

    async def watch() -> None:
        await dispatcher.changed.wait()
        if dispatcher.fatal is None:
            _say(f"Ready: http://{'localhost' if host in ('127.0.0.1', '::1') else host}:{listening.getsockname()[1]}")
        while dispatcher.fatal is None:
            dispatcher.changed.clear()
            await dispatcher.changed.wait()
        server.should_exit = True

    _say(f"Loading; listening on {host}:{listening.getsockname()[1]}.")
    watching = loop.create_task(watch())
    await server.serve(sockets=[listening])
    watching.cancel()
    if dispatcher.fatal is not None:
        raise HanDiffuserError(dispatcher.fatal)
    return code


def config_socket(host: str, port: int) -> Any:
    """A bound socket. Raises OSError if the port is taken."""
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # The system drops clients whose machines have vanished within a minute, not after its usual two hours.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("KEEPIDLE", 30), ("KEEPINTVL", 10), ("KEEPCNT", 3), ("USER_TIMEOUT", 60_000)):
        if hasattr(socket, f"TCP_{name}"):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)
    try:
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    sock.set_inheritable(False)
    return sock


def main() -> None:
    """Entry point."""
    commands.run("hd-serve", serve)


if __name__ == "__main__":
    main()
