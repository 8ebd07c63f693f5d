"""The one table of backends: what runs a bundle's graphs, on which device, and which package each of them needs.

    one = BACKENDS["openvino"]
    one.installed(), one.refusal("cuda")
    engines = one.on_host().host_engines(folder, manifest, threads=4, slots=8, pictures=1)

To add a backend, write its module and add a line to `BACKENDS`. Commands offer every name of the table. The table
imports no backend itself: `on_host`, `on_gpu` and `builder` import the module that they return. A module gives:

`host=` a backend of the CPU:
    host_engines(folder, manifest, threads, slots, pictures) -> {graph: Engine}; ONNX Runtime runs the graphs left out.
    If it compiles no weights from a checkpoint: only=names, too, which are the graphs to load.
`gpu=` a backend of NVIDIA GPUs:
    device_engines(name, folder, manifest, cuda, stream_of, slots, replay) -> DeviceEngines; TensorRT's also takes
    adapters
both `host=` and `gpu=`, in the module of the host:
    device_for(folder, device) -> "cpu" or "cuda", what "auto" and the two names mean here
`measured=` a backend that "auto" takes for float32 bundles where it is faster here, and near enough:
    inference() -> the precision in which it runs them; shelf_of(folder, manifest, precision) -> Shelf, where the UNet
    and its verdict are
`plans=` a backend with compiled plans beside a bundle:
    build(name, folder, wanted, on_build) -> Iterator[Built]
    check_build(name, options), which raises EngineError where that cannot work here
    version(name) -> str, of the installed package; elsewhere(name, target) -> why a plan is not for this machine, or ""
`auto=` and `gpu=` together, also where it only runs another's plans (`plans_of=`):
    check_plans(name, folder, manifest, cuda), which raises EngineError where the folder has no plan that runs here
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

DEVICES = ("auto", "cpu", "cuda")
DEVICE_NAMES = {"cpu": "CPUs", "cuda": "NVIDIA GPUs"}
PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "int8")


@dataclass(frozen=True)
class Backend:
    """A line of the table. `host`, `gpu` and `plans` name modules of `engines/`, or are empty.

    package: what Python imports. extra: of handiffuser, brings the package. precisions: of the bundles that hd-export
    makes for it, the default first. auto: whether "auto" may take it for a run. measured: only where it
    was measured to be faster on this processor. compiles: whether hd-export compiles its graphs from the checkpoint.
    plans_of: the backend that builds the plans which this one only runs, on machines where that one is not installed.
    """

    name: str
    package: str
    extra: str
    host: str = ""
    gpu: str = ""
    plans: str = ""
    precisions: tuple[str, ...] = PRECISIONS
    auto: bool = False
    measured: bool = False
    compiles: bool = False
    plans_of: str = ""

    @property
    def devices(self) -> tuple[str, ...]:
        """Devices that it runs on: "cpu", "cuda" or both."""
        return tuple(device for device, module in (("cpu", self.host), ("cuda", self.gpu)) if module)

    @property
    def install(self) -> str:
        """The command that installs it."""
        index = " --extra-index-url https://pypi.nvidia.com" if self.name == "tensorrt" else ""
        return f'pip install "handiffuser[{self.extra}]"{index}'

    def installed(self) -> bool:
        """Whether Python finds its package; does not import it."""
        return find_spec(self.package) is not None

    def refusal(self, device: str) -> str:
        """Why it does not run on a device of DEVICES, and what to do; "" where it may."""
        if device == "auto" or device in self.devices:
            return ""
        kinds = " and ".join(DEVICE_NAMES[one] for one in self.devices)
        instead = "choose another --backend" if device == "cuda" else f"choose --backend {DEFAULT}"
        return f"{self.name} runs on {kinds} only. Leave out --device {device}, or {instead}."

    def on_host(self) -> Any:
        """The module that gives engines of the CPU."""
        return import_module(f".{self.host}", __package__)

    def on_gpu(self) -> Any:
        """The module that gives engines of a GPU."""
        return import_module(f".{self.gpu}", __package__)

    def builder(self) -> Any:
        """The module that builds plans."""
        return import_module(f".{self.plans}", __package__)


BACKENDS = {
    one.name: one
    for one in (
        Backend("onnxruntime", "onnxruntime", "cpu", host="onnxruntime", gpu="onnxruntime_cuda"),
        Backend(
            "openvino", "openvino", "openvino", host="openvino", plans="openvino", precisions=("fp32", "int8"),
            auto=True, measured=True,
        ),
        Backend(
            "tensorrt", "tensorrt", "tensorrt", gpu="tensorrt_loading", plans="build", auto=True,
            precisions=("fp16", "fp32", "bf16", "fp8", "int8"),
        ),
        Backend(
            "tensorrt-lean", "tensorrt_lean", "tensorrt-lean", gpu="tensorrt_loading", auto=True,
            precisions=("fp16", "fp32", "bf16", "fp8", "int8"), plans_of="tensorrt",
        ),
        Backend(
            "tensorrt-rtx", "tensorrt_rtx", "tensorrt-rtx", gpu="tensorrt_loading", plans="build", auto=True,
            precisions=("fp16", "fp32", "bf16", "fp8", "int8"),
        ),
        # For "auto" on a GPU only where hd-export measured a faster step: it needs PyTorch, which no command imports
        # unasked.
        Backend(
            "inductor", "torch", "export", host="inductor", gpu="inductor", precisions=("fp32", "fp16", "bf16"),
            compiles=True,
        ),
    )
}  # fmt: skip
DEFAULT = "onnxruntime"  # runs every graph, and those that another backend of the CPU leaves out
CHOICES = ("auto", *BACKENDS)
PLANNED = tuple(name for name, one in BACKENDS.items() if one.plans)  # hd-engines build
GPU_PLANNED = tuple(name for name in PLANNED if BACKENDS[name].gpu)


def runner(builder: str) -> str:
    """What runs a backend's plans here: that backend, or one that only runs them where that alone is installed."""
    others = [one.name for one in BACKENDS.values() if one.plans_of == builder and one.installed()]
    return others[0] if others and not BACKENDS[builder].installed() else builder
