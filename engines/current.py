"""Whether plans are current: of the bundle as it is now, of the installed versions, and for this machine."""

from __future__ import annotations

import contextlib

from ..contract import Manifest
from ..errors import EngineError
from .backends import BACKENDS, PLANNED, runner
from .plans import Plan, belongs
from .tensorrt import TensorRT, loads


def installed_versions() -> dict[str, str]:
    """Versions of the backends that are installed here."""
    found = {}
    for name in PLANNED:
        with contextlib.suppress(EngineError):
            if BACKENDS[name].installed():
                found[name] = BACKENDS[name].builder().version(name)
    return found


def stale(plan: Plan, manifest: Manifest, versions: dict[str, str]) -> str:
    """Why a plan is outdated, or "". Plans of a backend that is not installed here are kept."""
    backend = plan.parts["backend"]
    if plan.parts.get("tf32") != "off":
        return "stale: built when float32 was computed in TF32"
    if not belongs(plan, manifest, plan.adapters):
        return "stale: the bundle changed"
    if backend in versions and not loads(plan, versions[backend]):
        return f"stale: {backend} is {versions[backend]} now"
    elsewhere: str = BACKENDS[backend].builder().elsewhere(backend, plan.parts["target"]) if backend in PLANNED else ""
    return elsewhere


def shown_adapters(plan: Plan) -> str:
    """ ", with style.safetensors:0.8" of a plan that a refit wrote; "" of others."""
    noted = plan.proof.get("refitted") if plan.adapters else None
    said = noted.get("adapters") if isinstance(noted, dict) else None
    names = [str(one).partition(" sha256 ")[0][:100] for one in said] if isinstance(said, list) else []
    return f", with {' and '.join(names)}" if names else ""


def not_here(plan: Plan) -> str:
    """Why the lean run time does not run a current plan, where it alone is installed; or ""."""
    backend = plan.parts["backend"]
    name = runner(backend)
    if name == backend:
        return ""
    if not plan.version_compatible:
        return f"not for {name}: built without --version-compatible"
    with contextlib.suppress(EngineError):
        version = TensorRT(name).version
        return "" if loads(plan, version) else f"not for {name} {version}"
    return ""
