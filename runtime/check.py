"""`hd-run --check`: what is installed, what runs here, and what to install for the rest.

It needs nothing beyond the base dependencies, starts no model, and downloads nothing.
"""

from __future__ import annotations

import platform
import re
import sys
from importlib import metadata
from importlib.util import find_spec

from .. import cpu
from ..commands import imported
from ..engines import onnxruntime
from ..engines.backends import BACKENDS, DEFAULT, Backend
from ..engines.cuda import Cuda
from ..engines.plans import user_cache
from ..errors import HanDiffuserError
from ..installed import version
from .loading import DRIVER

HIDDEN = {"test"}  # extras for developers
PYTHON = re.compile(r"python_version\s*(<|>=)\s*[\"'](\d+)\.(\d+)")


def report() -> tuple[list[str], int]:
    """The lines to print, and the exit code: 0 where at least one backend makes pictures here, else 1."""
    gpu, why_not = find_gpu()
    lines = [
        f"handiffuser {version('handiffuser') or '(not installed)'}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}",
        f"CPU: {cpu.cpu_name()}, {cpu.usable_cores()} usable cores, {'fast' if cpu.has_bf16() else 'no fast'} bfloat16",
        f"GPU: {gpu or why_not}",
        f"NVIDIA driver: {driver_version() or 'not loaded'}",
        f"Cache: {cache_size()}",
        "",
        "Backends (--backend):",
    ]
    works = False
    for one in BACKENDS.values():
        words, good = state(one, gpu is not None)
        works = works or good
        lines.append(f"  {one.name:13} {words}")
    lines += ["", "Extras:"]
    for extra, lacking in extras().items():
        first = "pip uninstall -y onnxruntime && " if extra == "cuda" and version("onnxruntime") else ""
        remedy = f'lacks {", ".join(lacking)}: {first}pip install "handiffuser[{extra}]"'
        lines.append(f"  {extra:13} {remedy if lacking else 'complete'}")
    if not works:
        lines += ["", 'No backend makes pictures here. Install one: pip install "handiffuser[cpu]".']
    return lines, 0 if works else 1


def find_gpu() -> tuple[str | None, str]:
    """(name and compute capability, "") of the first NVIDIA GPU, or (None, why there is none)."""
    try:
        cuda = Cuda()
    except HanDiffuserError as error:
        return None, str(error) if DRIVER.exists() else "none, because no NVIDIA driver is loaded"
    return f"{cuda.name}, compute capability {cuda.compute_capability}", ""


def driver_version() -> str | None:
    """Of NVIDIA's kernel module, such as "580.95.05"; None where the system does not tell."""
    try:
        found = re.search(r"Kernel Module.*?(\d+(?:\.\d+)+)", DRIVER.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return found[1] if found else None


def cache_size() -> str:
    """Where runs of this user keep what they compile, and how much that is."""
    folder = user_cache().folder.parent
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    return f"{folder}, {size / 1e6:.0f} MB"


def extras() -> dict[str, list[str]]:
    """Each extra of this package -> its packages that are not installed, as the package's own metadata lists them."""
    try:
        wanted = metadata.requires("handiffuser") or []
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, list[str]] = {}
    for line in wanted:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra == [\"']([\w-]+)", marker)
        if extra is None or extra[1] in HIDDEN or not applies(marker):
            continue
        lacking = found.setdefault(extra[1], [])
        package = re.match(r"[\w.-]+", requirement)
        assert package is not None
        if package[0] == "handiffuser":
            for name in re.findall(r"[\w-]+", requirement.partition("[")[2]):
                lacking += found.get(name, [])
        elif version(package[0]) is None:
            lacking.append(package[0])
    return found


def applies(marker: str) -> bool:
    """Whether a requirement is for this Python, such as `python_version < "3.13" and extra == "eval"`."""
    for sign, major, minor in PYTHON.findall(marker):
        older = sys.version_info[:2] < (int(major), int(minor))
        if older != (sign == "<"):
            return False
    return True


def state(one: Backend, gpu: bool) -> tuple[str, bool]:
    """What a line says of a backend, and whether it makes pictures here."""
    if not one.installed():
        return f"no. Install it: {one.install}", False
    number = version(one.package)
    if not one.compiles:  # PyTorch, which takes seconds to import
        try:
            module = imported(one.package)
            number = number or getattr(module, "__version__", None)
        except Exception as error:  # a missing library of the system fails in many ways
            return f"no. {one.package} cannot be imported ({error}). Install it again: {one.install}", False
    devices = [device for device in one.devices if device == "cpu" or gpu]
    if one.name == DEFAULT and not onnxruntime.has_cuda_provider():
        devices = ["cpu"]
    if not devices:
        return f"no. {one.package} {number} is installed, and needs an NVIDIA GPU.", False
    words = f"yes ({number}): {' and '.join(devices)}"
    if one.name == DEFAULT and "cuda" in devices:
        lacks = f"slower without onnx-ir ({one.install.replace('[cpu]', '[cuda]')})"
        words += f"; {'with graphs derived for cuda' if find_spec('onnx_ir') else lacks}"
    return words, True
