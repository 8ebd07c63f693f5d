"""Engines run a bundle's ONNX graphs. Each backend is a module; `backends.py` lists them.

manifest, engines = load_engines("engines/")
text = engines["text_encoder"]({"input_ids": ids})["text"]
"""

from .base import Engine, check_feeds
from .loading import load_engines
from .onnxruntime import OnnxRuntimeEngine

__all__ = ["Engine", "OnnxRuntimeEngine", "check_feeds", "load_engines"]
