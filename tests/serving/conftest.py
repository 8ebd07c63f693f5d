"""A server over the toy bundle. Tests set how long a step takes."""

from __future__ import annotations

import time
from importlib import util
from pathlib import Path

import pytest

_spec = util.spec_from_file_location("toy_bundle", Path(__file__).parents[1] / "runtime" / "conftest.py")
assert _spec is not None and _spec.loader is not None
_toy = util.module_from_spec(_spec)
_spec.loader.exec_module(_toy)
toy_bundle, sized_bundle, pair_bundle = _toy.toy_bundle, _toy.sized_bundle, _toy.pair_bundle

# These tests need the extra `serve`.
if any(util.find_spec(name) is None for name in ("fastapi", "uvicorn", "prometheus_client", "httpx")):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="module")
def served(toy_bundle, tmp_path_factory):
    from served import serving

    with serving(toy_bundle, tmp_path_factory.mktemp("served"), warm_up=True) as one:
        yield one


@pytest.fixture
def slow(monkeypatch):
    """slow(seconds): from now on a step of either stage takes so long."""
    from handiffuser.runtime.sampler import StepSampler

    step = StepSampler.step

    def slow(seconds):
        def stepping(sampler):
            time.sleep(seconds)
            return step(sampler)

        monkeypatch.setattr(StepSampler, "step", stepping)

    return slow
