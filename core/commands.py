"""Where the commands begin: signals, closed streams, and errors as sentences with an exit code.

Each command loads its libraries late, so that Ctrl-C while they load ends in a sentence, too. The first Ctrl-C is
KeyboardInterrupt, and the command cleans up. The second ends the process at once.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from functools import partial
from importlib import import_module
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from . import streams
from .errors import HanDiffuserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import click

INTERRUPTED = 130  # what a shell reports for Ctrl-C
PATIENCE_SECONDS = 3.0  # from Ctrl-C until the process ends, although its main thread does not come to `ending`
BOUNCE_SECONDS = 0.5  # a second signal this soon is the same Ctrl-C: launchers pass on what the terminal sends as well
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # `kill` and `docker stop` end a command as Ctrl-C does

_signalled = False  # whether a signal came
_held = _waiting = False  # whether Ctrl-C is to wait, and whether one does
_ending = False  # whether the command caught KeyboardInterrupt and finishes its work
_writer: socket.socket | None = None  # where Python writes the numbers of signals; open as long as the process
_sentence = ""  # what the command says when it is interrupted; empty until `hear_interrupts`


def _interrupt(number: int, frame: FrameType | None) -> None:
    """The first signal raises KeyboardInterrupt. `_watch` sees the second, and ends the process."""
    global _signalled, _waiting
    if _signalled:
        return
    _signalled = True
    if _held:
        _waiting = True
    else:
        raise KeyboardInterrupt


def _dropped(unraisable: sys.UnraisableHookArgs) -> None:
    """Python drops what a destructor or a callback of a weak reference raises. KeyboardInterrupt is raised again."""
    global _signalled
    if _signalled and issubclass(unraisable.exc_type, KeyboardInterrupt) and hasattr(signal, "pthread_kill"):
        _signalled = False
        threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(unraisable)


def _watch(reader: socket.socket) -> None:
    """Ends the process on a second signal, and PATIENCE_SECONDS after the first where that has no effect.

    Python raises KeyboardInterrupt when its main thread is next in Python. A build or a run of a large graph delays
    that by minutes. A library may swallow it, or wait for ever for a lock on the way out.

    reader: Python writes the number of each signal to its other end as it comes.
    """
    first, patience = None, None
    while True:
        if select.select([reader], (), (), patience)[0]:
            came = bool(set(reader.recv(64)) & set(SIGNALS))
            if came and first is None:
                first = time.monotonic()
            over = came and time.monotonic() - (first or 0) > BOUNCE_SECONDS
        else:
            over = not _ending
        if over:
            if not _ending:
                with contextlib.suppress(OSError):
                    os.write(2, f"{_sentence}\n".encode())
            os._exit(INTERRUPTED)
        patience = None if first is None or _ending else max(0.0, first + PATIENCE_SECONDS - time.monotonic())


def hear_interrupts(sentence: str) -> None:
    """From here on the first Ctrl-C raises KeyboardInterrupt, and the second ends the process with this sentence.

    A shell's background jobs ignore Ctrl-C, and still do.
    """
    global _ending, _sentence, _writer
    if threading.current_thread() is not threading.main_thread():
        return
    begun, _sentence, _ending = bool(_sentence), sentence, False  # first: Ctrl-C may come with the next line
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _interrupt)
    if begun:
        return
    atexit.register(_ignore)  # what is registered first is called last: until then Ctrl-C ends what an exit waits for
    reader, _writer = socket.socketpair()  # Windows waits for sockets alone
    _writer.setblocking(False)
    sys.unraisablehook = _dropped
    signal.set_wakeup_fd(_writer.fileno(), warn_on_full_buffer=False)  # written to at once, wherever the main thread is
    threading.Thread(target=_watch, args=(reader,), name="interrupts", daemon=True).start()


def ending() -> None:
    """Says that the command caught KeyboardInterrupt and takes the time it needs to finish. A second Ctrl-C ends it."""
    global _ending
    _ending = True


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C waits while this block starts processes: one whose start it cut short would end with a traceback.

    The new processes inherit a mask that blocks SIGINT. The mask alone does not suffice here: any thread may receive
    the signal, and the main thread then raises KeyboardInterrupt.
    """
    global _held, _waiting
    can_block = hasattr(signal, "pthread_sigmask")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ()) if can_block else set()
    _held, _waiting = True, False
    try:
        if can_block:
            from multiprocessing import resource_tracker

            resource_tracker.ensure_running()  # starting it unblocks SIGINT, so it starts first
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        yield
    finally:
        _held = False
        if can_block:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if _waiting:
        raise KeyboardInterrupt


def end_with_parent() -> None:
    """Has a process that multiprocessing started end when its parent ends, also by kill -9.

    Its neighbours hold the other end of the pipe at which it waits for work, so the pipe alone would never close.
    """
    import multiprocessing

    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


# Module -> the extra that installs it.
EXTRAS = {
    **dict.fromkeys(("torch", "diffusers", "transformers", "accelerate", "safetensors"), "[export]"),
    **dict.fromkeys(("onnx", "onnx_ir", "onnxscript"), "[export]"),
    "onnxruntime": "[cpu]; [cuda] instead for NVIDIA GPUs",
    **dict.fromkeys(("smplx", "peft", "tensorboard"), "[train]"),
    "matplotlib": "[bench]",
    "psutil": "[bench]",
    **dict.fromkeys(("cv2", "mediapipe"), "[detect]"),
    **dict.fromkeys(("scipy", "statsmodels"), "[eval]"),
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "prometheus_client"), "[serve]"),
    "ray": "[ray]",
    "polygraphy": "[debug]",
}


TRAINING = ("hd-train", "hd-data")


def lacking(error: ImportError, command: str) -> str:
    """A sentence that names the extra of a missing module. Raises the error again when EXTRAS lacks the module."""
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS or not isinstance(error, ModuleNotFoundError):
        raise error
    extra = EXTRAS[module]
    if command in TRAINING and extra == "[export]":
        extra = "[train]"  # it includes [export]
    if command == "hd-eval" and module in ("torch", "safetensors", "matplotlib"):
        extra = "[eval]"
    line = f'pip install "handiffuser{extra.partition(";")[0]}"'
    return f"This needs {module}, which is not installed. It comes with handiffuser{extra}. Install it: {line}"


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
        sentence = lacking(error, command)
        if sys.argv[1:] == ["--version"]:  # which a command tells without its extra
            from .installed import version

            print(f"{command}, version {version('handiffuser')}")
            return
        print(f"{command}: {sentence}", file=sys.stderr)
        sys.exit(1)


def run(name: str, command: click.Command, sentence: str = "Interrupted.") -> None:
    """Runs a click command; one sentence and an exit code instead of a traceback."""
    streams.open_standard()
    try:
        hear_interrupts(f"{name}: {sentence}")
        import click

        from .hints import explained

        code = command.main(standalone_mode=False)
    except SystemExit as error:  # click raises it when the reader of stdout left
        code = error.code
    except (Exception, KeyboardInterrupt) as error:
        code = 1
        if interrupted(error) or isinstance(error, click.exceptions.Abort):
            ending()
            print(_sentence, file=sys.stderr)  # Ctrl-C may have come before click
            code = INTERRUPTED
        elif isinstance(error, click.ClickException):
            explained(error).show()
            code = error.exit_code
        elif isinstance(error, HanDiffuserError):
            click.echo(f"{name}: {error}", err=True)
        elif isinstance(error, OSError) and streams.stdout_error() is not None:
            pass  # `give_up_stdout` says so below
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
    """Whether Ctrl-C caused this error. Native code that initialises a module turns it into an ImportError, and Python
    3.11 turns it into a RuntimeError while it makes a class."""
    return _signalled or isinstance(error, KeyboardInterrupt)


def imported(name: str) -> Any:
    """Imports an optional library. Ctrl-C meanwhile raises KeyboardInterrupt: the library does not look missing."""
    try:
        return import_module(name)
    except Exception as error:
        if interrupted(error):
            raise KeyboardInterrupt from error
        raise


def leave(code: int) -> NoReturn:
    """Ends the process with this exit code.

    After Ctrl-C it ends at once: a thread may still be in native code (TensorRT's builder), which an ordinary exit
    would crash. Otherwise the work is done: a signal that comes now ends the process with the same exit code.
    """
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
    """Ignores signals at the end of an exit: the interpreter removes its handlers, and a signal would kill it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


hd_run = partial(start, "hd-run", ".runtime.cli")
hd_serve = partial(start, "hd-serve", ".serving.cli")
hd_export = partial(start, "hd-export", ".export.cli")
hd_engines = partial(start, "hd-engines", ".engines.cli")
hd_body = partial(start, "hd-body", ".models.body")
hd_data = partial(start, "hd-data", ".data.cli")
hd_train = partial(start, "hd-train", ".training.cli")
hd_bench = partial(start, "hd-bench", ".benchmarks.cli")
hd_eval = partial(start, "hd-eval", ".evaluation.cli")
hd_repair = partial(start, "hd-repair", ".repair.cli")
