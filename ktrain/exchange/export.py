"""A committed checkpoint's tensors as files that other programs read: safetensors, Hugging Face's layout, DCP's.

Invariant: a file under its final name is whole, and holds only bytes that were proven against their digests; nothing
that is there is ever written over. Tensors pass one by one, so that memory is bounded by the largest. torch is imported
for DCP alone.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from ktrain.base import ids, settings
from ktrain.base.job import canonical_url, local_path
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.stored import ProvenRanges, StoredCheckpoint, StoredTensor, assemble, open_kept, ranges_of
from ktrain.errors import CapacityError, ConfigError, NotFoundError, UnavailableError
from ktrain.exchange.foreign import INDEX_FILE, SINGLE_FILE
from ktrain.exchange.parts import kinds_of, module_names
from ktrain.format import dtype as dtypes
from ktrain.format.payload import lay_out
from ktrain.format.shard import Box, Role, Shard

MAX_SHARD_NBYTES = 5_000_000_000
_FOR_TORCH = {"format": "pt"}
_MAX_LISTED = 10


class ExportForm(StrEnum):
    """What an export is made for."""

    SAFETENSORS = "safetensors"  # one file
    HF = "hf"  # a folder of files of bounded size with an index, as `transformers` loads it
    DCP = "dcp"  # a folder that torch.distributed.checkpoint loads


@dataclass(frozen=True, slots=True)
class Exported:
    """What was exported. `left_out`: names of what the form cannot hold, such as a module's extra state."""

    step: int
    epoch: int
    form: str
    path: str
    files: tuple[str, ...]
    num_tensors: int
    nbytes: int
    left_out: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class _Part:
    """The tensors of a module, and its names for tensors that stand under another name too."""

    tensors: list[StoredTensor]
    aliases: dict[str, str]
    left_out: tuple[str, ...]


def export_run(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    form: str,
    step: int | None = None,
    part: str | None = None,
    max_shard_nbytes: int = MAX_SHARD_NBYTES,
) -> Exported:
    """Writes the tensors of a part of a committed checkpoint to `out`, a path on this machine.

    Args:
        form: one of `ExportForm`.
        step: None is the newest checkpoint on the run's line.
        part: the module; None is "model", or the only module. For DCP None is every part that is not a rank's own.
        max_shard_nbytes: for "hf", bytes of tensors in one file; a larger tensor has a file of its own.

    Raises:
        NotFoundError: no such run, step or part, or it was collected in this moment.
        ConfigError: `out` is there already, or the form cannot hold a tensor. Nothing was written.
        CorruptionError: a byte cannot be proven; names it. Nothing is left at `out`.
    """
    with _opened(run, out, form, step) as (stored, chosen, target):
        names, held = _write(stored, chosen, part, target, max_shard_nbytes)
    return _exported(stored, chosen, target, names, held)


def plan_export(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    form: str,
    step: int | None = None,
    part: str | None = None,
    max_shard_nbytes: int = MAX_SHARD_NBYTES,
) -> Exported:
    """What `export_run` would write with the same arguments, and what it would refuse. Reads manifests, writes nothing.

    The files of a DCP folder are named by torch's writer, so none are named here.
    """
    with _opened(run, out, form, step) as (stored, chosen, target):
        names: Sequence[str] = []
        if chosen is ExportForm.DCP:
            from ktrain.exchange.torch_write import plan_dcp

            plan = plan_dcp(stored, part)
            held = _Part(plan.tensors, {}, tuple(plan.left_out))
        else:
            held = _module(stored, part)
            _require_storable(held.tensors)
            several = chosen is ExportForm.HF
            names = _names_hf(len(_split(held.tensors, max_shard_nbytes))) if several else [target.name]
    return _exported(stored, chosen, target, names, held)


@contextlib.contextmanager
def _opened(
    run: str | os.PathLike[str], out: str | os.PathLike[str], form: str, step: int | None
) -> Iterator[tuple[StoredCheckpoint, ExportForm, Path]]:
    """The checkpoint, kept from collectors, and where it is to go."""
    target = _local(out)
    if form not in list(ExportForm):
        raise ConfigError(f"export: expected a form of {', '.join(ExportForm)}, found {form!r}")
    _require_free(target)
    catalog = RunCatalog.open(canonical_url(os.fspath(run)), timeouts=settings.timeouts(), create=False)
    try:
        with open_kept(catalog, step, timeouts=settings.timeouts()) as stored:
            yield stored, ExportForm(form), target
    finally:
        catalog.tier.close()


def _write(
    stored: StoredCheckpoint, form: ExportForm, part: str | None, target: Path, max_shard_nbytes: int
) -> tuple[Sequence[str], _Part]:
    """Writes the files; returns their names and what they hold."""
    if form is ExportForm.DCP:
        from ktrain.exchange.torch_write import write_dcp

        with _new_folder(target) as folder:
            names, tensors, left_out = write_dcp(stored, part, folder)
        return names, _Part(tensors, {}, tuple(left_out))
    found = _module(stored, part)
    _require_storable(found.tensors)
    with ProvenRanges(stored, ranges_of(found.tensors)) as proven:
        if form is ExportForm.HF:
            with _new_folder(target) as folder:
                return _write_hf(folder, found.tensors, proven, max_shard_nbytes), found
        with _new_file(target) as path:
            _write_file(path, found.tensors, proven, {**found.aliases, **_FOR_TORCH})
        return [target.name], found


def _exported(stored: StoredCheckpoint, form: ExportForm, target: Path, names: Sequence[str], held: _Part) -> Exported:
    identity, nbytes = stored.commit.identity, sum(tensor.nbytes for tensor in held.tensors)
    where = (identity.step, identity.epoch, form.value, str(target), tuple(names))
    return Exported(*where, num_tensors=len(held.tensors), nbytes=nbytes, left_out=held.left_out)


# What is exported


def _module(stored: StoredCheckpoint, part: str | None) -> _Part:
    parts = kinds_of(stored)
    if parts.get("dcp") == "dcp":
        return _dcp_part(stored, part)
    modules = [name for name, kind in parts.items() if kind == "module"]
    if part is None:
        if len(modules) > 1 and "model" not in modules:
            raise ConfigError(f"export: expected one module, found the parts {modules}; name one by --part")
        part = "model" if "model" in modules else next(iter(modules), None)
    if part not in parts:
        raise NotFoundError(f"{stored.commit.identity}: it has no part {part!r}; its parts are {_said(parts)}")
    if part not in modules:
        raise ConfigError(f"export: part {part!r} is no module but {parts[part]!r}; only --to dcp can hold it")
    keys, aliases, extra = module_names(stored, part)
    tensors = [tensor for tensor in stored.tensors(f"{part}/") if tensor.name in keys]
    lacking = sorted(keys - {tensor.name for tensor in tensors} - set(aliases) - extra)
    if lacking:
        raise ConfigError(f"{stored.commit.identity}: no rank stored {lacking[:_MAX_LISTED]} of part {part!r}")
    return _Part(tensors, aliases, tuple(sorted(extra)))


def _dcp_part(stored: StoredCheckpoint, part: str | None) -> _Part:
    """The tensors of a DCP save below a name of its state dict; "dcp" is all of them, under their full names."""
    abouts = [manifest.objects.get("dcp", {}) for manifest in stored.manifests.values()]
    opaque = {name for about in abouts for name in about.get("bytes", ())}
    everything = stored.tensors("")
    part = part or ("model" if any(tensor.name.startswith("model.") for tensor in everything) else "dcp")
    prefix = "" if part == "dcp" else f"{part}."
    tensors = [tensor for tensor in stored.tensors(prefix) if prefix + tensor.name not in opaque]
    if not tensors:
        tops = sorted({tensor.name.partition(".")[0] for tensor in everything})
        raise NotFoundError(f"{stored.commit.identity}: it has no tensors below {part!r}; it has {_said(tops)}")
    return _Part(tensors, {}, tuple(sorted(name for name in opaque if name.startswith(prefix))))


def _said(names: Mapping[str, Any] | Sequence[str]) -> str:
    listed = list(names)
    return ", ".join(map(repr, listed[:_MAX_LISTED])) + (" and more" if len(listed) > _MAX_LISTED else "")


def _require_storable(tensors: Sequence[StoredTensor]) -> None:
    for tensor in tensors:
        if dtypes.is_stored_as_bytes(tensor.dtype):
            raise ConfigError(
                f"tensor {tensor.name!r}: its dtype {tensor.dtype} has no name in safetensors that all readers know; "
                "export --to dcp, or convert it"
            )


# How it is written


def _write_file(path: Path, tensors: Sequence[StoredTensor], proven: ProvenRanges, metadata: Mapping[str, str]) -> None:
    by_name = {tensor.name: tensor for tensor in tensors}
    shards = [Shard(t.name, t.dtype, t.shape, Box.whole(t.shape), Role.REPLICATED) for t in tensors]
    layout = lay_out(shards, metadata=metadata)
    with open(path, "xb") as file, _space_is_said(path):
        file.write(layout.header)
        for entry in layout.entries:
            file.write(assemble(by_name[entry.shard.name], proven).data)
        file.flush()
        os.fsync(file.fileno())


def _write_hf(folder: Path, tensors: Sequence[StoredTensor], proven: ProvenRanges, max_nbytes: int) -> list[str]:
    """Files of bounded size and their index; one file needs none, and has the name that loaders look for."""
    files = _split(tensors, max_nbytes)
    written = _names_hf(len(files))
    names = written[: len(files)]
    for name, content in zip(names, files, strict=True):
        _write_file(folder / name, content, proven, _FOR_TORCH)
    if len(files) == 1:
        return written
    weight_map = {t.name: name for name, content in zip(names, files, strict=True) for t in content}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors)}, "weight_map": weight_map}
    with open(folder / INDEX_FILE, "x") as file:
        json.dump(index, file, indent=2, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    return written


def _split(tensors: Sequence[StoredTensor], max_nbytes: int) -> list[list[StoredTensor]]:
    """The tensors of each file."""
    files: list[list[StoredTensor]] = [[]]
    room = max_nbytes
    for tensor in tensors:
        if files[-1] and tensor.nbytes > room:
            files.append([])
            room = max_nbytes
        files[-1].append(tensor)
        room -= tensor.nbytes
    return files


def _names_hf(num_files: int) -> list[str]:
    """The names of the files, and of their index where there are several."""
    if num_files == 1:
        return [SINGLE_FILE]
    names = [f"model-{number:05d}-of-{num_files:05d}.safetensors" for number in range(1, num_files + 1)]
    return [*names, INDEX_FILE]


# Where it becomes visible


def _local(out: str | os.PathLike[str]) -> Path:
    path = local_path(os.fspath(out))
    if path is None:
        raise ConfigError(f"export: expected OUT on this machine, found {os.fspath(out)!r}; copy it there afterwards")
    return path


def _require_free(target: Path) -> None:
    """Refuses what is there, except an empty folder.

    Raises:
        ConfigError: something is there, or there is no folder to put it in.
    """
    if not target.parent.is_dir():
        raise ConfigError(f"export: {target.parent} is no folder; make it first")
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise ConfigError(f"export: {target} is there already; nothing is ever written over: name another place")


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder beside the target, which takes its name at the end of the block, or goes."""
    folder = target.with_name(f".{target.name}.{ids.random_id()}.tmp")
    folder.mkdir()
    try:
        yield folder
        _sync(folder)
        try:
            os.rename(folder, target)  # replaces an empty folder, nothing else
        except OSError as error:
            raise ConfigError(f"export: {target} is there by now ({error.strerror}); name another place") from error
        _sync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _new_file(target: Path) -> Iterator[Path]:
    """A file beside the target, which takes its name at the end of the block, or goes."""
    path = target.with_name(f".{target.name}.{ids.random_id()}.tmp")
    try:
        yield path
        try:
            os.link(path, target)  # unlike a rename it never replaces
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise ConfigError(f"export: {target} is there by now ({error.strerror}); name another place") from error
            _require_free(target)  # file systems without hard links
            os.rename(path, target)
        _sync(target.parent)
    finally:
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _space_is_said(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(f"export: no space is left for {path}; free space or name another place") from error
        if error.errno is None:
            raise
        raise UnavailableError(f"export: {path} cannot be written ({error.strerror})") from error
