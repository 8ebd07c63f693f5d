"""The toy bundle of the runtime's tests, for the engines' tests too."""

from __future__ import annotations

from importlib import util
from pathlib import Path

_spec = util.spec_from_file_location("toy_bundle", Path(__file__).parents[1] / "runtime" / "conftest.py")
assert _spec is not None and _spec.loader is not None
_toy = util.module_from_spec(_spec)
_spec.loader.exec_module(_toy)
sized_bundle, toy_bundle, toy_copy = _toy.sized_bundle, _toy.toy_bundle, _toy.toy_copy
