"""The body that a bundle shows, as a skeleton: what fits hands to a picture needs nothing else of a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .. import shipped
from ..contract import Manifest
from ..engines.loading import open_engine
from ..hands import NO_HANDS, load_hands


def joints_at_rest(path: str | Path) -> np.ndarray:
    """The joints [62, 3] of a bundle's body in the template's pose, metres, float64.

    path: a bundle, or the word demo. `hand_features` runs once, on the CPU. Raises BundleError and EngineError."""
    folder = shipped.resolve(path, "bundle")
    manifest = Manifest.load(folder, verify=False)
    spec = manifest.graphs["hand_features"]
    manifest.check_files(folder, [spec.file])
    params = np.tile(load_hands(NO_HANDS).params, manifest.num_people)
    x = (params - np.array(manifest.params_mean)) / np.array(manifest.params_std)
    feeds = {"x": x.astype(np.float32)[None], "span": np.ones(1, np.float32)}
    names = [tensor.name for tensor in spec.inputs]
    found = open_engine(folder / spec.file, spec, threads=1)({name: feeds[name] for name in names})
    return found["joints_3d"].reshape(-1, *found["joints_3d"].shape[-2:])[0].astype(np.float64)
