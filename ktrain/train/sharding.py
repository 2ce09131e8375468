"""A model made ready for many ranks: built alike everywhere, then sharded (FSDP2) or replicated (DDP)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ktrain.data.samples import map_tensors
from ktrain.errors import ConfigError
from ktrain.train.world import World


class Mesh(StrEnum):
    """How the ranks share a model."""

    FSDP = "fsdp"  # every rank keeps a part of each tensor
    DDP = "ddp"  # every rank keeps the whole model
    NONE = "none"  # one rank


class Precision(StrEnum):
    """What the forward and backward passes compute in; parameters and the optimizer stay in float32."""

    FP32 = "fp32"
    BF16 = "bf16"


def build(model: nn.Module | Callable[[], nn.Module], *, seed: int, world: World) -> nn.Module:
    """The whole model on this rank's device, with the same values on every rank.

    A factory is called under a generator seeded for it, on the CPU, so that its initial values depend on
    neither the sharding nor the device. The whole model must fit into host memory and onto the device for a
    moment: building on the meta device and filling after the sharding is still to come. A module that
    exists is copied from rank 0.
    """
    if isinstance(model, nn.Module):
        module = model.to(world.device)
        if world.topology.world_size > 1:
            for tensor in [*module.parameters(), *module.buffers()]:
                dist.broadcast(tensor.detach(), src=0)
        return module
    if not callable(model):
        raise ConfigError(f"shard: expected a module or a function that makes one, found {type(model).__name__}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        module = model()
    if not isinstance(module, nn.Module):
        raise ConfigError(f"shard: the factory was to return a torch module, it returned {type(module).__name__}")
    return module.to(world.device)


def distribute(module: nn.Module, *, mesh: Mesh, precision: Precision, world: World) -> nn.Module:
    """The module spread over all ranks; a module that is spread already stays as it is.

    FSDP2 gathers the elements of each `ModuleList` one by one (the usual place of a model's blocks) and
    what is left as one more unit. Models that want other units call `fully_shard` themselves before.
    """
    if is_distributed(module):
        return module
    if mesh is Mesh.FSDP and world.topology.world_size > 1:
        _shard_fully(module, precision, world)
        return module
    if precision is Precision.BF16:
        _compute_in_bf16(module, world.device)
    if mesh is Mesh.DDP and world.topology.world_size > 1:
        return DistributedDataParallel(module, device_ids=None if world.device.type == "cpu" else [world.device])
    return module


def is_distributed(module: nn.Module) -> bool:
    """True where some rank-spanning wrapper takes care of the gradients."""
    return isinstance(module, DistributedDataParallel) or any(
        isinstance(value, DTensor) for value in module.parameters()
    )


@contextmanager
def gradient_sync(modules: list[nn.Module], *, enabled: bool) -> Iterator[None]:
    """Within it, backward passes of the modules reduce gradients over the ranks, or only add them up
    locally."""
    with ExitStack() as stack:
        for tracked in modules:
            module = getattr(tracked, "_orig_mod", tracked)  # what torch.compile wrapped
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(enabled)
            elif isinstance(module, DistributedDataParallel) and not enabled:
                stack.enter_context(module.no_sync())  # covers the forward pass too, as DDP asks for
        yield


def _shard_fully(module: nn.Module, precision: Precision, world: World) -> None:
    mesh = init_device_mesh(world.device.type, (world.topology.world_size,), mesh_dim_names=("data",))
    half = torch.bfloat16 if precision is Precision.BF16 else None
    reduce = torch.float32 if precision is Precision.BF16 else None
    inner = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=reduce)
    outer = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=reduce, output_dtype=reduce)
    for child in module.modules():
        if isinstance(child, nn.ModuleList):
            for element in child:
                if any(True for _ in element.parameters()) and not isinstance(element, nn.ModuleList):
                    fully_shard(element, mesh=mesh, mp_policy=inner)
    fully_shard(module, mesh=mesh, mp_policy=outer)


def _compute_in_bf16(module: nn.Module, device: torch.device) -> None:
    """Wraps the module's forward in autocast and gives its results back in float32, as FSDP2's policy
    does."""
    forward = module.forward

    def autocast_forward(*args: object, **kwargs: object) -> object:
        with torch.autocast(device.type, torch.bfloat16):
            outputs = forward(*args, **kwargs)
        return map_tensors(outputs, lambda tensor: tensor.float() if tensor.dtype is torch.bfloat16 else tensor)

    module.forward = autocast_forward  # a wrapper module would change every name
