"""The processor: its name, its instructions, and how many cores this process may use. Imports nothing heavy.

cpu_name()        # "AMD EPYC 9B14"
target()          # "x86_64 avx2 avx512_bf16 ...": part of the key of what is compiled for this processor
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

# Instructions that compilers choose kernels by, as Linux spells them on x86 and on Arm.
KINDS = ("sse4", "avx", "fma", "f16c", "amx", "asimd", "sve", "sme", "bf16", "i8mm")
BF16 = frozenset(("avx512_bf16", "amx_bf16"))  # with either of them bfloat16 is faster than float32


@functools.cache
def _info() -> dict[str, str]:
    """The system's entries about its first processor; empty where it has none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def cpu_name() -> str:
    return _info().get("model name") or platform.processor() or platform.machine()


@functools.cache
def features() -> tuple[str, ...]:
    """The instructions that compiled code may use, sorted, such as "avx2", "avx512_bf16"; empty where unknown."""
    flags = (_info().get("flags") or _info().get("Features") or "").split()
    return tuple(sorted(flag for flag in set(flags) if flag.startswith(KINDS)))


def has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 faster than float32."""
    return bool(BF16 & set(features()))


def target() -> str:
    """The processor that compiled code is for: its features, or its name where the system hides them."""
    return " ".join((platform.machine(), *(features() or (cpu_name(),))))


def usable_cores() -> int:
    """Physical cores this process may use: its CPU affinity, without hyperthreads, within its cgroup's quota."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    cores = set()
    for number in cpus:
        siblings = _read(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        cores.add(siblings or str(number))
    count = len(cores)
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        count = min(count, -(-int(quota) // int(period)))
    return max(1, count)


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""
