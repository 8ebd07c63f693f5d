"""Several processes of one training: started on a CPU, or sharding one module's weights (FSDP2).

run_processes(work, 2, folder)       # work(folder) in two processes that average their gradients
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..commands import end_with_parent, undisturbed
from ..errors import TrainingError

SHARDED_FROM = 1_000_000  # parameters from which a module is a shard of its own


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded over processes; all of them must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def put(target: Tensor, whole: Tensor) -> None:
    """Copies a whole tensor into one that may be sharded over processes. Raises TrainingError for another shape."""
    if target.shape != whole.shape:
        raise TrainingError("The run in this folder is of another network. Name another --run.")
    if isinstance(target, DTensor):
        whole = distribute_tensor(whole.to(target.device), target.device_mesh, target.placements)
    local(target).copy_(local(whole))


def spread(module: nn.Module, world: int) -> nn.Module:
    """Shards the module's weights over the processes (FSDP2): each large block by itself, the rest together."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if world == 1:
        raise TrainingError("--shard needs several processes, got 1. Start them with torchrun or accelerate launch.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (world,))
    module.to(device)
    # Only a block with a `forward` of its own can gather its weights: lists have none.
    for block in list(module.modules())[::-1]:
        held = sum(p.numel() for p in block.parameters() if not isinstance(p, DTensor))
        runs = not isinstance(block, (nn.ModuleList, nn.ModuleDict, nn.ParameterList))
        if runs and block is not module and held >= SHARDED_FROM:
            fully_shard(block, mesh=mesh)
    # The outermost block, too, frees its weights after each run, or a validation's would stay for the next step.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return module


def run_processes(function: Callable[..., None], processes: int, *args: Any) -> None:
    """Calls `function(*args)` in several one-thread processes that average their gradients (gloo).

    On a CPU, two processes of one thread are far faster than one process of two threads.
    """
    if processes <= 1:
        function(*args)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        with undisturbed():
            started = torch.multiprocessing.spawn(
                _process, (processes, port, function, args), nprocs=processes, join=False
            )
        while not started.join():
            pass
    except torch.multiprocessing.ProcessRaisedException as error:  # its text is the process's traceback
        last = str(error).strip().splitlines()[-1]
        kind, _, sentence = last.partition(": ")
        if kind.rsplit(".", 1)[-1].endswith("Error") and sentence and kind.startswith("handiffuser."):
            raise TrainingError(sentence) from error
        raise


def _process(rank: int, processes: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    end_with_parent()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Grad strides do not match")  # costs nothing at these sizes
    function(*args)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
