"""Engines: an ONNX graph of a bundle becomes something that runs. One module a backend, one small protocol.

manifest, engines = load_engines("engines/")
text = engines["text_encoder"]({"input_ids": ids})["text"]
"""

from .base import Engine, check_feeds
from .onnxruntime import OnnxRuntimeEngine, load_engines

__all__ = ["Engine", "OnnxRuntimeEngine", "check_feeds", "load_engines"]
