"""What GPUs can do at best, from their maker's papers: the rates by which `cost.py` turns a graph into milliseconds.

Products are dense (without structured sparsity) and summed in float32, of int8 in int32. Sources: NVIDIA's data sheets
of H200, H100 SXM, A100 80GB SXM and L4, which give fp8 and most int8 with sparsity, twice the dense rate; the papers
"NVIDIA Ada GPU Architecture" (RTX 4090) and "NVIDIA RTX Blackwell GPU Architecture" (RTX 5090). GeForce cards sum fp8
in float16 twice as fast, which nothing here asks for.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """half: operations a second of tensor cores in float16 or bfloat16. single: in float32, without TF32. bandwidth:
    bytes a second of its memory. int8, fp8: operations a second in these; 0 where the GPU does not know the type."""

    name: str
    half: float
    single: float
    bandwidth: float
    int8: float
    fp8: float

    def rate(self, precision: str) -> float:
        """Operations a second in a precision of a bundle; 0 where the GPU does not know the type."""
        known = {"fp32": self.single, "fp16": self.half, "bf16": self.half, "int8": self.int8, "fp8": self.fp8}
        return known[precision]


GPUS = {
    "h200": Gpu("NVIDIA H200", 989.5e12, 67e12, 4.8e12, 1979e12, 1979e12),
    "h100": Gpu("NVIDIA H100 SXM", 989.5e12, 67e12, 3.35e12, 1979e12, 1979e12),
    "a100": Gpu("NVIDIA A100 80GB SXM", 312e12, 19.5e12, 2.039e12, 624e12, 0),
    "5090": Gpu("NVIDIA GeForce RTX 5090", 209.5e12, 104.8e12, 1.792e12, 838e12, 419e12),
    "4090": Gpu("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12, 1.008e12, 660.6e12, 330.3e12),
    "l4": Gpu("NVIDIA L4", 121e12, 30.3e12, 0.3e12, 242.5e12, 242.5e12),
}
