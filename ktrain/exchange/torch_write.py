"""A checkpoint as a DCP folder, by torch's own writer, one tensor in memory at a time."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

from ktrain.checkpoint.stored import ProvenRanges, StoredCheckpoint, StoredTensor, assemble, ranges_of
from ktrain.errors import ConfigError, CorruptionError, NotFoundError
from ktrain.exchange.parts import kinds_of, module_names
from ktrain.exchange.torch_read import error_of
from ktrain.format import objects
from ktrain.state.tensors import dtype_of


@dataclass(frozen=True, slots=True)
class DcpPlan:
    """What a DCP folder is to hold: a state dict on the meta device, and the tensors that it stands for.

    `left_out` names what is of one rank, or of no parameter.
    """

    state: dict[str, Any]
    build: _Build
    left_out: list[str]

    @property
    def tensors(self) -> list[StoredTensor]:
        return list(self.build.used.values())


def plan_dcp(stored: StoredCheckpoint, part: str | None) -> DcpPlan:
    """Parts of a checkpoint as DCP names them.

    A module is `{part: {name: tensor}}`; an optimizer `{part: {"state": {name: ...}, "param_groups": [...]}}`, as
    `torch.distributed.checkpoint.state_dict` has them; any other part is what its `state_dict` gave.
    """
    kinds = kinds_of(stored)
    if kinds.get("dcp") == "dcp":
        raise ConfigError(
            f"{stored.commit.identity} was saved through DCP: load it by ktrain.checkpoint.dcp.RunStorageReader, or "
            "export its tensors --to safetensors"
        )
    if part is not None and part not in kinds:
        raise NotFoundError(f"{stored.commit.identity}: it has no part {part!r}; its parts are {sorted(kinds)}")
    tensors = {tensor.name: tensor for tensor in stored.tensors("")}
    build = _Build(stored, tensors, [name for name, kind in kinds.items() if kind == "module"])
    left_out: list[str] = []
    state: dict[str, Any] = {}
    for name in sorted(kinds) if part is None else [part]:
        about = _abouts(stored, name)[0]
        if part is None and about.get("per_rank"):
            left_out.append(name)  # its value on one rank is not that of another
        else:
            state[name] = build.part(name, about)
            left_out += [f"{name}/{key}" for key in about.get("other", ())]  # of an optimizer, and no parameter's
    return DcpPlan(state, build, left_out)


def write_dcp(
    stored: StoredCheckpoint, part: str | None, folder: Path
) -> tuple[list[str], list[StoredTensor], list[str]]:
    """Writes what `plan_dcp` says into a folder by torch's own writer: files, tensors, and names that are left out."""
    plan = plan_dcp(stored, part)
    writer = FileSystemWriter(folder, thread_count=1)
    with ProvenRanges(stored, ranges_of(plan.tensors)) as proven, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            save(plan.state, storage_writer=writer, planner=_Streaming(plan.build.used, proven), no_dist=True)
        except CheckpointException as error:
            raise error_of(error, folder) from error
    return sorted(path.name for path in folder.iterdir()), plan.tensors, plan.left_out


def _abouts(stored: StoredCheckpoint, part: str) -> list[dict[str, Any]]:
    """The part's JSON of every rank that has the part, by rank."""
    found = (manifest.objects.get(part) for _, manifest in sorted(stored.manifests.items()))
    return [about for about in found if isinstance(about, dict)]


class _Build:
    """Makes a state dict whose tensors are on the meta device; `used` says what each of them stands for, by id."""

    def __init__(self, stored: StoredCheckpoint, tensors: Mapping[str, StoredTensor], modules: list[str]) -> None:
        self._stored = stored
        self._tensors = tensors
        self._modules = modules
        self._made: list[torch.Tensor] = []  # keeps the ids of `used` alive
        self.used: dict[int, StoredTensor] = {}

    def part(self, name: str, about: dict[str, Any]) -> Any:
        """The state dict of one part."""
        if about["kind"] == "module":
            return self._module(name)
        if about["kind"] == "optimizer":
            return self._optimizer(name)
        return objects.decode(about["value"], tensor=self._tensor)

    def _tensor(self, name: str) -> torch.Tensor:
        stored = self._tensors.get(name)
        if stored is None:
            raise CorruptionError(f"tensor {name!r}: named by its part but not stored; take another step")
        made = torch.empty(stored.shape, dtype=dtype_of(stored.dtype), device="meta")
        self._made.append(made)
        self.used[id(made)] = stored
        return made

    def _module(self, part: str) -> dict[str, Any]:
        keys, aliases, _ = module_names(self._stored, part)
        extra = {}
        for _, manifest in sorted(self._stored.manifests.items()):
            extra.update(manifest.objects.get(part, {}).get("extra", {}))
        state: dict[str, Any] = {}
        for key in sorted(keys):
            if key in extra:
                state[key] = objects.decode(extra[key], tensor=self._tensor)
            else:
                state[key] = self._tensor(f"{part}/{aliases.get(key, key)}")
        return state

    def _optimizer(self, part: str) -> dict[str, Any]:
        """Over all ranks: stages of a pipeline have parameters of their own in the same groups."""
        prefix = f"{self._modules[0]}." if len(self._modules) == 1 else ""
        state: dict[str, dict[str, Any]] = {}
        groups: list[dict[str, Any]] = []
        for about in _abouts(self._stored, part):
            for name, index in about["state"].items():
                if name.removeprefix(prefix) in state:
                    continue
                path = objects.child_path(part, name)
                entry = {key: self._tensor(objects.child_path(path, key)) for key in about["keys"][index]}
                values = about["values"].get(name, {})
                entry |= {key: objects.decode(value, tensor=self._tensor) for key, value in values.items()}
                state[name.removeprefix(prefix)] = entry
            for index, encoded in enumerate(about["groups"]):
                group = objects.decode(encoded, tensor=self._tensor)
                names = [name.removeprefix(prefix) for name in group["params"]]
                if index == len(groups):
                    groups.append({**group, "params": []})
                known = groups[index]["params"]
                known += [name for name in names if name not in known]
        return {"state": state, "param_groups": groups}


class _Streaming(DefaultSavePlanner):
    """Plans with tensors that are not there, and reads each when it is to be written."""

    def __init__(self, used: Mapping[int, StoredTensor], proven: ProvenRanges) -> None:
        super().__init__()
        self._used = used
        self._proven = proven

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = super().lookup_object(index)
        stored = self._used.get(id(found))
        if stored is None:
            return found
        flat = torch.from_numpy(assemble(stored, self._proven))
        return flat.view(dtype_of(stored.dtype)).view(stored.shape)
