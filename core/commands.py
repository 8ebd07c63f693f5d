"""Where the commands begin. Each loads its libraries late, so that Ctrl-C while they load is a sentence, too."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from importlib import import_module
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from . import streams
from .errors import HanDiffuserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import click

INTERRUPTED = 130  # what a shell reports for Ctrl-C
PATIENCE = 3.0  # seconds from Ctrl-C until the process ends, although its main thread does not come to `ending`
ONCE = 3.0  # seconds in which Ctrl-C pressed again is the same Ctrl-C
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # `kill` and `docker stop` end a command as Ctrl-C does

_ending = threading.Event()
_lost = threading.Event()  # KeyboardInterrupt came where Python drops what is raised
_signalled = 0  # the signal that came last
_last = -ONCE
_held = _waiting = False  # whether Ctrl-C is to wait, and whether one does
_sentence = ""  # what is said of the command when it is interrupted; empty: nobody looks on yet


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt, and none while the last one is being cleaned up after."""
    global _last, _signalled, _waiting
    now = time.monotonic()
    if now - _last >= ONCE or _lost.is_set():  # later ones count again: a library may have swallowed the first
        _last, _signalled = now, number
        _lost.clear()
        if _held:
            _waiting = True
        else:
            raise KeyboardInterrupt


def _dropped(unraisable: sys.UnraisableHookArgs) -> None:
    """Python's hook for what a destructor or a callback of a weak reference raised: it would print that, and go on."""
    if _signalled and issubclass(unraisable.exc_type, KeyboardInterrupt):
        _lost.set()
    else:
        sys.__unraisablehook__(unraisable)


def listen() -> None:
    """From here on SIGNALS raise KeyboardInterrupt, once. A shell's background jobs ignore Ctrl-C, and still do."""
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _interrupt)


def ending() -> None:
    """Says that KeyboardInterrupt was caught, and that what is still to do is meant and may take its time."""
    _ending.set()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Meanwhile Ctrl-C waits: a process whose start it cut short would end with a traceback of its own.

    Those that are started begin with it blocked. That alone holds back nothing: whichever thread a signal comes to, it
    is the main one that hears of it.
    """
    global _held, _waiting
    can_block = hasattr(signal, "pthread_sigmask")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ()) if can_block else set()
    _held, _waiting = True, False
    try:
        if can_block:
            from multiprocessing import resource_tracker

            resource_tracker.ensure_running()  # it comes with the first of them, and unblocks when it has been started
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        yield
    finally:
        _held = False
        if can_block:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if _waiting:
        raise KeyboardInterrupt


def end_with_parent() -> None:
    """For processes that multiprocessing started: from here on this one ends when the first one does, also by kill -9.

    A worker waits for work at a pipe whose other end its neighbours hold, too, and would wait for ever.
    """
    import multiprocessing

    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


# What a module that is not installed comes with: the name of an extra, or of two to choose from.
EXTRAS = {
    **dict.fromkeys(("torch", "diffusers", "transformers", "accelerate", "safetensors"), "[export]"),
    **dict.fromkeys(("onnx", "onnx_ir", "onnxscript"), "[export]"),
    "onnxruntime": "[cpu]; [cuda] instead for NVIDIA GPUs",
    **dict.fromkeys(("smplx", "webdataset", "peft", "tensorboard"), "[train]"),
    "matplotlib": "[bench]",
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "prometheus_client"), "[serve]"),
    "ray": "[ray]",
    "polygraphy": "[debug]",
}


TRAINING = ("hd-train", "hd-data")


def lacking(error: ImportError, command: str) -> str:
    """A sentence for a module that is not installed. Raises the error again when that is none of EXTRAS."""
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS or not isinstance(error, ModuleNotFoundError):
        raise error
    extra = EXTRAS[module]
    if command in TRAINING and extra == "[export]":
        extra = "[train]"  # which brings the other
    if command == "hd-eval" and module in ("torch", "safetensors", "matplotlib"):
        extra = "[eval]"
    return f"This needs {module}, which is not installed. It comes with handiffuser{extra}."


def start(command: str, module: str) -> None:
    """Runs `main` of a module of this package; exit code INTERRUPTED when Ctrl-C comes first."""
    streams.open_standard()
    try:
        hear_interrupts(f"{command}: Interrupted.")
        import_module(module, "handiffuser").main()
    except SystemExit:
        raise
    except BaseException as error:
        if interrupted(error):
            print(_sentence, file=sys.stderr)
            leave(INTERRUPTED)
        if not isinstance(error, ImportError):
            raise
        print(f"{command}: {lacking(error, command)}", file=sys.stderr)
        sys.exit(1)


def run(name: str, command: click.Command, sentence: str = "Interrupted.") -> None:
    """Runs a click command; one sentence and an exit code instead of a traceback."""
    streams.open_standard()
    hear_interrupts(f"{name}: {sentence}")
    import click

    from .hints import explained

    try:
        code = command.main(standalone_mode=False)
    except SystemExit as error:  # click's, where the reader of stdout left
        code = error.code
    except (Exception, KeyboardInterrupt) as error:
        code = 1
        if interrupted(error) or isinstance(error, click.exceptions.Abort):
            ending()
            click.echo(_sentence, err=True)
            code = INTERRUPTED
        elif isinstance(error, click.ClickException):
            explained(error).show()
            code = error.exit_code
        elif isinstance(error, HanDiffuserError):
            click.echo(f"{name}: {error}", err=True)
        elif isinstance(error, OSError) and streams.stdout_error() is not None:
            pass  # `leave` says so
        elif isinstance(error, OSError):
            where = f" ({error.filename})" if error.filename is not None else ""
            click.echo(f"{name}: {error.strerror or error}{where}.", err=True)
        elif isinstance(error, MemoryError):
            click.echo(f"{name}: There is not enough memory.", err=True)
        elif isinstance(error, ImportError):
            click.echo(f"{name}: {lacking(error, name)}", err=True)
        else:
            raise
    if code != INTERRUPTED and (lost := streams.stdout_error()) is not None:
        code = streams.give_up_stdout(name, lost)
    leave(code)


def interrupted(error: BaseException) -> bool:
    """Whether it is Ctrl-C that this comes of. Also in disguise: a module's initialisation in native code makes an
    ImportError of it, and Python 3.11 a RuntimeError where it comes while a class is made."""
    return bool(_signalled) or isinstance(error, KeyboardInterrupt)


def imported(name: str) -> Any:
    """The module of this name. For libraries that one can do without: Ctrl-C while one is loaded stays Ctrl-C, and does
    not become an ImportError after which something else is taken."""
    try:
        return import_module(name)
    except Exception as error:
        if interrupted(error):
            raise KeyboardInterrupt from error
        raise


def leave(code: int) -> NoReturn:
    """Ends the process. After Ctrl-C without ceremony: a thread may still be in native code (TensorRT's builder) that
    nothing stops, and that an ordinary exit would pull the interpreter away from. Otherwise all is done: a signal that
    comes now ends the process at once, with the exit code that it has earned."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if code == INTERRUPTED:
        os._exit(code)
    for number in SIGNALS:
        if signal.getsignal(number) is _interrupt:
            signal.signal(number, lambda *_: os._exit(code or 0))
    sys.exit(code)


def _ignore() -> None:
    """What an exit does last: when the interpreter has let go of its handlers, it would die of a signal."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def hear_interrupts(sentence: str) -> None:
    """Has Ctrl-C end the process with this sentence even where KeyboardInterrupt does not come through.

    Python raises it in its main thread when that is in Python next: after a build, a compilation or a run of a large
    graph that may be minutes. A library may swallow it, and where it came between the lines that take a lock, the
    way out may wait for that lock forever. So a thread looks on, and does not wait longer than PATIENCE. Where Python
    dropped it (`_dropped`), the thread has it raised once more.
    """
    global _sentence
    if threading.current_thread() is not threading.main_thread():
        return
    begun, _sentence = bool(_sentence), sentence  # before anybody listens: Ctrl-C may come with the next line
    listen()
    _ending.clear()
    if begun:
        return
    atexit.register(_ignore)  # what is registered first is called last: until then Ctrl-C ends what an exit waits for
    main = threading.get_ident()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def look_on() -> None:
        while not set(os.read(reader, 64)) & set(SIGNALS):
            pass
        until = time.monotonic() + PATIENCE
        while not _ending.wait(0.1):
            if time.monotonic() > until:
                with contextlib.suppress(OSError):
                    os.write(2, f"{_sentence}\n".encode())
                os._exit(INTERRUPTED)
            if _lost.is_set() and hasattr(signal, "pthread_kill"):
                signal.pthread_kill(main, _signalled)

    sys.unraisablehook = _dropped
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # written to at once, wherever the main thread is
    threading.Thread(target=look_on, name="interrupts", daemon=True).start()


def hd_run() -> None:
    start("hd-run", ".runtime.cli")


def hd_serve() -> None:
    start("hd-serve", ".serving.cli")


def hd_export() -> None:
    start("hd-export", ".export.cli")


def hd_engines() -> None:
    start("hd-engines", ".engines.cli")


def hd_body() -> None:
    start("hd-body", ".models.body")


def hd_data() -> None:
    start("hd-data", ".data.cli")


def hd_train() -> None:
    start("hd-train", ".training.cli")


def hd_bench() -> None:
    start("hd-bench", ".benchmarks.cli")


def hd_eval() -> None:
    start("hd-eval", ".evaluation.cli")
