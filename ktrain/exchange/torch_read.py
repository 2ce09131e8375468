"""Files of torch as weights: its DCP folders, and what `torch.save` wrote.

Invariant: nothing of a foreign file is unpickled but tensors, by torch's own weights-only reader, and the few named
classes of DCP's metadata; any other object in them stays closed.
"""

from __future__ import annotations

import errno
import importlib
import pickle  # noqa: TID251 -- torch's DCP metadata is a pickle; it is read by a list of names alone, see _Metadata
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from ktrain.errors import (
    CapacityError,
    ConfigError,
    CorruptionError,
    KtrainError,
    NotFoundError,
    UnavailableError,
)
from ktrain.exchange.foreign import Weights
from ktrain.format.dtype import is_dtype
from ktrain.state.tensors import dtype_name, dtype_of

# Classes and functions that a DCP folder's `.metadata` names; all of them only hold values.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "pathlib._local": ("PosixPath", "PurePosixPath"),  # the same, by Python 3.13
    "collections": ("OrderedDict",),
}
_MAX_LISTED = 10


def read_pt(path: Path, key: str | None, part: str) -> Weights:
    """The tensors of a file of `torch.save`, below `key` (parts joined by dots), or below `part` where it is there.

    Raises:
        ConfigError: it holds other objects than tensors and plain values, or no tensors there.
    """
    try:
        value = _load(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"{path}: torch cannot read it with weights_only=True ({reason}); save the state dict of tensors alone"
        ) from error
    if key is None and isinstance(value, Mapping) and isinstance(value.get(part), Mapping):
        key = part
    for name in [] if key is None else [key] if isinstance(value, Mapping) and key in value else key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: expected a dictionary of tensors at {key!r}, found {type(value).__name__}")
    tensors = {str(name): tensor for name, tensor in value.items() if isinstance(tensor, torch.Tensor)}
    if not tensors:
        raise ConfigError(
            f"{path}: there are no tensors; there are {sorted(map(str, value))[:_MAX_LISTED]}: name one by --key"
        )
    forms = {name: _form(path, name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()}

    def fill(targets: Mapping[str, memoryview]) -> None:
        for name, target in targets.items():
            _view(target, forms[name]).copy_(tensors[name].detach())

    return Weights(forms, fill, tuple(str(name) for name in value if str(name) not in tensors))


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # noqa: TID251 -- weights only
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        # Files older than torch 1.6 cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 -- weights only


def read_dcp(folder: Path, key: str | None, part: str) -> Weights:
    """The tensors of a DCP folder, below `key` of its state dict, or below `part` where it is there.

    Raises:
        NotFoundError: it is no DCP folder.
        ConfigError: its metadata names what is not read, or there are no tensors there.
    """
    metadata = _read_metadata(folder)
    paths = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    names = {fqn: _path(fqn, paths.get(fqn)) for fqn in metadata.state_dict_metadata}
    if key is None and any(len(path) > 1 and path[0] == part for path in names.values()):
        key = part
    start = () if key is None else tuple(key.split("."))
    below = {fqn: ".".join(path[len(start) :]) for fqn, path in names.items() if path[: len(start)] == start}
    forms: dict[str, tuple[str, tuple[int, ...]]] = {}
    source: dict[str, str] = {}
    for fqn, name in below.items():
        about = metadata.state_dict_metadata[fqn]
        if isinstance(about, TensorStorageMetadata) and name:
            forms[name] = _form(folder, fqn, about.properties.dtype, about.size)
            source[name] = fqn
    if not forms:
        tops = sorted({path[0] for path in names.values()})
        raise ConfigError(
            f"{folder}: there are no tensors below {key!r}; there are {tops[:_MAX_LISTED]}: name one by --key"
        )

    def fill(targets: Mapping[str, memoryview]) -> None:
        state = {source[name]: _view(target, forms[name]) for name, target in targets.items()}
        planner = DefaultLoadPlanner(flatten_state_dict=False, allow_partial_load=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            try:
                load(state, storage_reader=_Reader(folder, metadata), planner=planner, no_dist=True)
            except CheckpointException as error:
                raise error_of(error, folder) from error

    taken = set(source.values())
    return Weights(forms, fill, tuple(fqn for fqn in names if fqn not in taken))


def error_of(error: CheckpointException, folder: Path) -> KtrainError:
    """DCP's exception, which is no Exception, as the error of ours that it carries or stands for."""
    first = next(iter(error.failures.values()))[0]
    if isinstance(first, KtrainError):
        return first
    if isinstance(first, OSError):
        cls = CapacityError if first.errno in (errno.ENOSPC, errno.EDQUOT) else UnavailableError
        return cls(f"{folder}: {first}; free space, or check the path")
    return CorruptionError(f"{folder}: torch could not read or write it ({type(first).__name__}: {first})")


def _path(fqn: str, path: Any) -> tuple[str, ...]:
    return tuple(map(str, path)) if isinstance(path, tuple) and path else (fqn,)


def _form(where: Path, name: str, dtype: torch.dtype, shape: torch.Size) -> tuple[str, tuple[int, ...]]:
    text = dtype_name(dtype)
    if not is_dtype(text):
        raise ConfigError(f"{where}: tensor {name!r}: dtype {dtype} cannot be stored; convert it first")
    return text, tuple(shape)


def _view(memory: memoryview, form: tuple[str, tuple[int, ...]]) -> torch.Tensor:
    return torch.frombuffer(memory, dtype=dtype_of(form[0])).view(form[1])


class _Reader(FileSystemReader):
    """torch's reader, given the metadata that was read by names alone."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata.storage_meta is None:
            self._metadata.storage_meta = StorageMeta()
        return self._metadata


class _Unpickler(pickle.Unpickler):
    """Knows the classes of DCP's metadata, torch's dtypes, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return getattr(importlib.import_module(module), name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise ConfigError(f"its metadata names {module}.{name}, which is not read; convert it by torch's own tools")


def _read_metadata(folder: Path) -> Metadata:
    path = folder / ".metadata"
    try:
        with open(path, "rb") as file:
            found = _Unpickler(file).load()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"{folder}: it has no .metadata, so it is no whole DCP checkpoint") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:  # noqa: BLE001 -- a damaged pickle raises whatever its bytes happen to say
        raise CorruptionError(
            f"{path}: it cannot be read ({type(error).__name__}: {error}); take another copy"
        ) from error
    if not isinstance(found, Metadata):
        raise CorruptionError(f"{path}: expected DCP's metadata, found {type(found).__name__}")
    return found
