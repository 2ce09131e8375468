"""Tensors as parts hold them: plain ones, and DTensors as boxes of a global tensor."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from ktrain.errors import ConfigError
from ktrain.format.dtype import is_dtype
from ktrain.format.shard import Box, Role

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor of a part, live, under the name it is stored by.

    `holders` are the ranks that hold these same bytes, sorted; they divide them. `anchor` is the name
    whose owner stores this leaf too, so that a parameter and its optimizer state stay together.
    """

    name: str
    tensor: torch.Tensor
    role: Role
    holders: tuple[int, ...]
    anchor: str


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` gives `float32`."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The opposite of `dtype_name`.

    Raises:
        ConfigError: this torch does not know the type.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(
            f"dtype {name!r} is not known to torch {torch.__version__}; restore with the torch that saved"
        )
    return dtype


def is_dtensor(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    if type(tensor) in PLAIN_TYPES:  # nearly all are; this runs several times for every tensor of every save
        return False
    # Whoever made a DTensor has imported its module; importing it here would cost every program its time.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The rank's own part of a tensor, detached, on the live storage."""
    if not is_dtensor(tensor):
        return tensor.detach() if tensor.requires_grad else tensor
    with torch.no_grad():
        return tensor.to_local().detach()


def part_of(tensor: torch.Tensor) -> torch.Tensor:
    """As `local_of`, where it can be without making a view: that costs ten microseconds for a DTensor."""
    if not is_dtensor(tensor):
        return tensor
    part = tensor._local_tensor
    return part if type(part) in PLAIN_TYPES else local_of(tensor)


def box_of(tensor: torch.Tensor) -> Box:
    """The box of the global tensor that this rank holds; without items where it holds nothing.

    Raises:
        ConfigError: the rank's part is not one box.
    """
    if not is_dtensor(tensor):
        return Box.whole(tuple(tensor.shape))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, mesh = tuple(tensor.shape), tensor.device_mesh
    if any(type(placement).__name__ == "_StridedShard" for placement in tensor.placements):
        _require_contiguous(tensor)
    lengths, offsets = compute_local_shape_and_global_offset(shape, mesh, tensor.placements)
    if len(offsets) != len(shape):  # this rank is not part of the mesh
        return Box((0,) * len(shape), (0,) * len(shape))
    return Box(tuple(map(int, offsets)), tuple(map(int, lengths)))


def holders_of(tensor: DTensor) -> tuple[int, ...]:
    """The ranks that hold the same box as this one: its neighbours along the replicated mesh axes."""
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return ()
    index = tuple(
        slice(None) if placement.is_replicate() else at
        for placement, at in zip(tensor.placements, coordinate, strict=True)
    )
    return tuple(sorted(mesh.mesh[index].reshape(-1).tolist()))


class Spreads:
    """Boxes and holders of tensors; where many are alike, as nearly always, these are found once.

    For one walk over a state: this process's place in a mesh is taken to stay the same.
    """

    def __init__(self) -> None:
        self._boxes: dict[tuple[Any, ...], Box] = {}
        self._holders: dict[tuple[Any, ...], tuple[int, ...]] = {}

    def box_of(self, tensor: torch.Tensor) -> Box:
        """As the function; raises as it does."""
        key: tuple[Any, ...] = tensor.shape
        if is_dtensor(tensor):
            key = tensor.device_mesh, tensor.placements, tensor.shape
        found = self._boxes.get(key)
        if found is None:
            found = self._boxes[key] = box_of(tensor)
        return found

    def holders_of(self, tensor: DTensor) -> tuple[int, ...]:
        """As the function."""
        key = tensor.device_mesh, tensor.placements
        found = self._holders.get(key)
        if found is None:
            found = self._holders[key] = holders_of(tensor)
        return found


def like(template: DTensor, local: torch.Tensor) -> DTensor:
    """The local part joined to a DTensor that is spread as the template is."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        template.device_mesh,
        template.placements,
        run_check=False,
        shape=template.shape,
        stride=template.stride(),
    )


def require_shape(name: str, tensor: torch.Tensor) -> None:
    """Refuses the parameters of lazy modules, and nested tensors.

    Raises:
        ConfigError: the tensor has no shape, or none yet.
    """
    if tensor.is_nested:
        raise ConfigError(f"tensor {name!r} cannot be stored: it is nested; store its values and offsets instead")
    if torch.nn.parameter.is_lazy(tensor):
        raise ConfigError(
            f"tensor {name!r} cannot be stored: it has no shape yet; run its module once before the first save"
        )


def require_base_type(name: str, tensor: torch.Tensor) -> None:
    """Refuses a tensor of a class of its own where a new one would be made of the stored bytes.

    Raises:
        ConfigError: it would come back as a plain tensor.
    """
    if type(tensor) not in PLAIN_TYPES and not is_dtensor(tensor):
        raise ConfigError(
            f"tensor {name!r} cannot be stored: it is a {type(tensor).__name__} and would come back as a plain tensor; "
            "return plain tensors or DTensors from state_dict()"
        )


def require_storable(name: str, tensor: torch.Tensor) -> None:
    """Refuses tensors whose bytes are not plainly there.

    Raises:
        ConfigError: the tensor is sparse, without memory, a pending sum, or a wrapper around others.
    """
    reason = _unstorable(tensor)
    if reason is not None:
        raise ConfigError(f"tensor {name!r} cannot be stored: {reason}")


def require_box(name: str, tensor: torch.Tensor, box: Box) -> None:
    """Refuses a DTensor whose local part is not what its placements say: other ranks would take its rows for theirs.

    Raises:
        ConfigError: the shapes differ.
    """
    if not is_dtensor(tensor):
        return
    found = tuple(part_of(tensor).shape)
    if found != box.lengths and (box.numel or 0 not in found):
        raise ConfigError(
            f"tensor {name!r} cannot be stored: placements {tensor.placements} of shape {tuple(tensor.shape)} give "
            f"this rank a part of {list(box.lengths)}, found {list(found)}; divide it as torch does, or give parts of "
            "other sizes as plain tensors of each rank's own"
        )


def _unstorable(tensor: torch.Tensor) -> str | None:
    if is_dtensor(tensor):
        if any(placement.is_partial() for placement in tensor.placements):
            return f"placements {tensor.placements} hold a pending sum; redistribute it first"
        return _unstorable(part_of(tensor))
    if _is_wrapper(type(tensor)):
        return f"it is a {type(tensor).__name__} around other tensors; give plain tensors or DTensors"
    if tensor.layout != torch.strided:
        return f"its layout is {tensor.layout}; expected torch.strided; store its indices and values instead"
    if tensor.device.type == "meta":
        return "it is on the meta device and has no data; materialize the module first"
    if not is_dtype(dtype_name(tensor.dtype)):
        return f"its dtype is {tensor.dtype}; convert it first"
    if tensor.device.type == "cpu" and tensor.numel() and not _has_memory(tensor):
        return "it has no memory of its own; was it freed, or is it of a tracer?"
    return None


def _is_wrapper(kind: type[torch.Tensor]) -> bool:
    """Whether tensors of a class answer operators themselves, and so need not have their bytes in their own memory."""
    return kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ or kind.__name__ == "ShardedTensor"


def _has_memory(tensor: torch.Tensor) -> bool:
    try:
        return tensor.untyped_storage().data_ptr() != 0
    except (RuntimeError, NotImplementedError):  # torch's answer for tensors of its transforms
        return False


def _require_contiguous(tensor: DTensor) -> None:
    """A strided shard (tensor parallelism under fully_shard) is one box only where the sizes divide."""
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return
    rows = {dim: list(range(size)) for dim, size in enumerate(tensor.shape)}
    for axis, (placement, at) in enumerate(zip(tensor.placements, coordinate, strict=True)):
        found: Any = placement
        if hasattr(found, "dim"):
            rows[found.dim] = _split(rows[found.dim], mesh.size(axis), at, getattr(found, "split_factor", 1))
    for kept in rows.values():
        if kept and kept[-1] - kept[0] + 1 != len(kept):
            raise ConfigError(
                f"a tensor of shape {tuple(tensor.shape)} with placements {tensor.placements} on mesh "
                f"{tuple(mesh.shape)} gives ranks parts that are not boxes; make the sharded dimension "
                "divisible by the product of the mesh axes"
            )


def _split(rows: list[int], num_parts: int, part: int, split_factor: int) -> list[int]:
    """The rows that torch gives one part: pieces `part`, `part + num_parts`, ... of equal chunks."""
    num_pieces = num_parts * split_factor
    size = -(-len(rows) // num_pieces)
    return [
        row
        for turn in range(split_factor)
        for row in rows[(turn * num_parts + part) * size : (turn * num_parts + part + 1) * size]
    ]
