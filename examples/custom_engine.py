"""Run one graph with an engine of your own, and leave the rest to the toolkit.

    python examples/custom_engine.py

The toolkit has no backend for your accelerator? Any object with these members can run a graph of a bundle.
"""

from collections.abc import Mapping

import numpy as np
import onnxruntime as ort
from handiffuser import HanDiffuser, shipped
from handiffuser.contract import GraphSpec
from handiffuser.engines import check_feeds, load_engines
from handiffuser.runtime.bundle import Bundle
from handiffuser.runtime.host import HostLoop


class MyEngine:
    device = "my accelerator"  # each picture's metadata names it
    batches = None  # it takes every batch size,
    prepare = staticmethod(lambda sizes: None)  # and needs no compiling for one

    def __init__(self, path: str, spec: GraphSpec) -> None:
        self.spec = spec  # which tensors the graph takes and gives
        self.session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])  # your library, instead

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        check_feeds(self.spec, feeds)  # names the tensor that is wrong, and what to do
        names = [tensor.name for tensor in self.spec.outputs]
        return dict(zip(names, self.session.run(None, dict(feeds)), strict=True))


folder = shipped.resolve("demo", "bundle")
manifest, engines = load_engines(folder, device="cpu")
engines["unet"] = MyEngine(str(folder / manifest.graphs["unet"].file), manifest.graphs["unet"])
with HanDiffuser(Bundle.load(folder, manifest), HostLoop(Bundle.load(folder, manifest), engines)) as pipeline:
    (picture,) = pipeline.generate("two open hands", seed=3)
    print(f"{picture.id}, made on {picture.made_by['device']}: mean colour {picture.image.mean((0, 1)).round()}")
