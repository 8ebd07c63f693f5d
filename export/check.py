"""Runs a graph in ONNX Runtime in a process of its own, so that a crash in native code ends that process alone.

    values = run_apart(Path("unet.onnx"), [{"latents": ..., ...}], "fp16")    # outputs of each call, by name

The other process is `python -m handiffuser.export.check GRAPH FOLDER`: it reads FOLDER/inputs-0.npz and so on, and
writes FOLDER/outputs-0.npz. It loads no PyTorch, starts in a fraction of a second, and ends when its parent does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from .. import installed
from ..errors import ExportError
from ..files import FULL

if TYPE_CHECKING:
    import onnxruntime

Feeds = dict[str, np.ndarray]
LARGE_BYTES = 1 << 29  # bytes of a graph with its weights
FAILED = 1  # exit code when ONNX Runtime gave a reason, which is the last line on stderr
NO_ROOM = 3  # exit code when the disk is full


def run_apart(
    path: Path, calls: list[Feeds], precision: str = "fp32", on_peak: Callable[[float], None] = lambda _: None
) -> list[list[np.ndarray]]:
    """The outputs of each call, in the graph's order. precision: what the graph computes in, for messages. on_peak: is
    told the other process's largest memory in bytes, where the system tells.

    Raises ExportError when ONNX Runtime refuses the graph, or crashes over it, and OSError when the disk is full.
    """
    with TemporaryDirectory(dir=path.parent, prefix=".check-") as name:
        folder = Path(name)
        for number, feeds in enumerate(calls):
            np.savez(folder / f"inputs-{number}.npz", **feeds)  # type: ignore[arg-type]
        command = [sys.executable, "-m", __name__, str(path), str(folder)]
        with open(folder / "stderr", "w+b") as stderr:
            # The pipe is never written to: its end tells the child that this process is gone.
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stderr, stderr=stderr) as process:
                try:
                    code = process.wait()
                except BaseException:
                    process.kill()
                    raise
            stderr.seek(0)
            said = stderr.read().decode(errors="replace").strip()
        if code == NO_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        if code:
            raise ExportError(_sentence(path.stem, precision, code, said))
        if (peak := folder / "peak").exists():
            on_peak(float(peak.read_text(encoding="ascii")))
        results = []
        for number in range(len(calls)):
            with np.load(folder / f"outputs-{number}.npz", allow_pickle=False) as arrays:
                results.append([arrays[key] for key in sorted(arrays.files)])
        return results


def _sentence(graph: str, precision: str, code: int, said: str) -> str:
    another = f"Export with another --opset{'' if precision == 'fp32' else ', or with --precision fp32'}"
    if code == FAILED:
        reason = (said.splitlines() or ["no reason was given"])[-1].rstrip(".")
        return f"ONNX Runtime {version()} does not run {graph}, so nothing was written: {reason}. {another}."
    if code == -9:  # SIGKILL, which Windows lacks
        return f"The check of {graph} was killed, most often because memory ran out; nothing was written."
    how = signal.Signals(-code).name if code < 0 else f"exit code {code:#x}"
    return (
        f"ONNX Runtime {version()} crashed ({how}) over {graph} in {precision}, so nothing was written. {another}, or "
        "install another version of onnxruntime; and please report this."
    )


def version() -> str:
    """ONNX Runtime's version, under either name of its package; empty where it is not installed."""
    return installed.version("onnxruntime") or installed.version("onnxruntime-gpu") or ""


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """The graph on the CPU; the emulation of one that computes in bfloat16, which lacks CPU kernels."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Packed copies of the weights pay off over many runs, and this graph runs twice. It also does without an arena,
    # which grows by doubling. Large graphs do without a second copy of the weights in the layout of convolutions.
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    if sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) > LARGE_BYTES:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    model = onnx.load(path, load_external_data=False)
    if not any(tensor.data_type == onnx.TensorProto.BFLOAT16 for tensor in model.graph.initializer):
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    from ..calibration.emulate import emulate
    from ..calibration.graphs import save_model

    with TemporaryDirectory(dir=path.parent, prefix=".check-") as folder:
        emulation = Path(folder) / path.name
        save_model(emulate(onnx.load(path)), emulation)
        return onnxruntime.InferenceSession(str(emulation), options, providers=["CPUExecutionProvider"])


def peak_memory() -> int:
    """The largest memory of this process so far, in bytes, since `forget_peak`; 0 where the system does not tell."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return 0


def forget_peak() -> None:
    """Makes `peak_memory` start over."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(FAILED)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the parent ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    path, folder = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        session = open_session(path)
        wanted = [value.name for value in session.get_inputs()]
        number = 0
        while (inputs := folder / f"inputs-{number}.npz").exists():
            with np.load(inputs, allow_pickle=False) as arrays:
                outputs = session.run(None, {name: arrays[name] for name in wanted})
            named = {f"{index:04}": value for index, value in enumerate(outputs)}
            np.savez(folder / f"outputs-{number}.npz", **named)  # type: ignore[arg-type]
            number += 1
        if peak := peak_memory():
            (folder / "peak").write_text(str(peak), encoding="ascii")
    except Exception as error:  # ONNX Runtime's exceptions share no base class below Exception
        code = NO_ROOM if isinstance(error, OSError) and error.errno in FULL else FAILED
        with contextlib.suppress(OSError):  # stderr is a file on the disk that may be full
            print(" ".join(str(error).split())[:500], file=sys.stderr, flush=True)
    else:
        code = 0
    os._exit(code)  # a normal exit would wait for the thread that reads stdin


if __name__ == "__main__":
    main()
