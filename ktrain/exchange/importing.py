"""Foreign weights as the first checkpoint of a new run, which says of itself that it was imported (ADR 0014)."""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import ktrain
from ktrain import native
from ktrain.base import contract, ids, settings
from ktrain.base.clock import SYSTEM_CLOCK
from ktrain.base.events import make
from ktrain.base.faults import FaultPoints
from ktrain.base.job import canonical_url, local_path
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.commit import commit_drain
from ktrain.checkpoint.drain import Drain
from ktrain.checkpoint.holder import Holder
from ktrain.checkpoint.log import open_log
from ktrain.errors import CapacityError, ConfigError, ConflictError, NotFoundError
from ktrain.exchange.foreign import Weights, below, read_hf, read_safetensors
from ktrain.format import record as records
from ktrain.format.digest import digest_text
from ktrain.format.manifest import IMPORTED, Identity, Manifest
from ktrain.format.payload import CHUNK_NBYTES, lay_out, shard_nbytes
from ktrain.format.record import RankFiles
from ktrain.format.shard import Box, Role, Shard

_PART = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")  # what `state=` takes as a name


class ImportForm(StrEnum):
    """What an import is read from."""

    DCP = "dcp"  # a folder that torch.distributed.checkpoint wrote
    PT = "pt"  # a file of torch.save, read with weights_only=True
    SAFETENSORS = "safetensors"  # one file
    HF = "hf"  # a folder with an index, or with one file, as `transformers` writes it


@dataclass(frozen=True, slots=True)
class Selection:
    """Which tensors are taken, and under which names.

    Attributes:
        key: only what lies below this name, which is taken off; None is everything, and for "pt" and "dcp" what lies
            below the part's own name where there is such.
        exclude: names, or beginnings of them up to a dot, that are not taken (after `key`).
        ties: further name of the module -> name of the tensor that it stands for (tied weights are stored once).
    """

    key: str | None = None
    exclude: tuple[str, ...] = ()
    ties: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Imported:
    """What was imported. `left_out`: what the source has beside the tensors that were taken."""

    run: str
    step: int
    epoch: int
    part: str
    num_tensors: int
    nbytes: int
    left_out: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def import_checkpoint(
    source: str | os.PathLike[str],
    run: str | os.PathLike[str],
    *,
    form: str,
    part: str = "model",
    step: int = 0,
    selection: Selection | None = None,
) -> Imported:
    """Makes the tensors of `source`, a path on this machine, the module `part` of a new run's checkpoint of `step`.

    `Checkpointer.restore` of the run then loads them, leaves all other parts as the program made them, and returns
    `step`. Needs as much room in the temporary directory (`TMPDIR`) as the tensors take.

    Raises:
        ConfigError: the source has nothing to take, or something that cannot be stored.
        NotFoundError: there is no such source.
        ConflictError: the run is live, or has committed before; it is left as it is.
        CorruptionError: the source is damaged.
    """
    taken = _read_source(source, form, part, step, selection or Selection())
    url = canonical_url(os.fspath(run))
    catalog = RunCatalog.open(url, timeouts=settings.timeouts())
    try:
        holder = Holder(catalog.tier, local_path=local_path(url), timeouts=settings.timeouts())
        try:
            _require_new(catalog)
            epoch = _write(catalog, step, taken)
            _note(catalog, url, step, epoch)
        finally:
            holder.close()
    finally:
        catalog.tier.close()
    return taken.imported(catalog.tier.url, step, epoch)


def plan_import(
    source: str | os.PathLike[str],
    run: str | os.PathLike[str],
    *,
    form: str,
    part: str = "model",
    step: int = 0,
    selection: Selection | None = None,
) -> Imported:
    """What `import_checkpoint` would do with the same arguments, and what it would refuse. Writes nothing."""
    taken = _read_source(source, form, part, step, selection or Selection())
    url, epoch = canonical_url(os.fspath(run)), 1
    try:
        catalog = RunCatalog.open(url, timeouts=settings.timeouts(), create=False)
    except NotFoundError:
        return taken.imported(url, step, epoch)
    try:
        _require_new(catalog)
        epoch = catalog.newest_epoch() + 1
    finally:
        catalog.tier.close()
    return taken.imported(catalog.tier.url, step, epoch)


@dataclass(frozen=True, slots=True)
class _Source:
    """What is taken of a source. `about`: what the manifest says of it."""

    part: str
    weights: Weights
    names: Sequence[str]
    shards: Sequence[Shard]
    about: dict[str, Any]

    def imported(self, run: str, step: int, epoch: int) -> Imported:
        left_out = (*self.weights.left_out, *(set(self.weights.tensors) - set(self.names)))
        nbytes = sum(map(shard_nbytes, self.shards))
        return Imported(run, step, epoch, self.part, len(self.names), nbytes, tuple(sorted(left_out)))


def _read_source(source: str | os.PathLike[str], form: str, part: str, step: int, chosen: Selection) -> _Source:
    """Opens the source and lays out what is taken of it."""
    if step < 0 or _PART.fullmatch(part) is None:
        raise ConfigError(f"import: expected a step from 0 on and the name of a part, found {step} and {part!r}")
    path = local_path(os.fspath(source))
    if path is None:
        raise ConfigError(f"import: expected SOURCE on this machine, found {os.fspath(source)!r}; copy it here first")
    if not path.exists():
        raise NotFoundError(f"import: {path}: there is no such file or folder")
    if form not in list(ImportForm):
        raise ConfigError(f"import: expected a form of {', '.join(ImportForm)}, found {form!r}")
    weights = _open(ImportForm(form), path, part, chosen.key)
    names = [name for name in weights.tensors if not any(_is_below(name, each) for each in chosen.exclude)]
    _require_ties(chosen.ties, names)
    shards = [_shard(f"{part}/{name}", *weights.tensors[name]) for name in names]
    lay_out(shards)  # what cannot be stored is refused before there is a run
    about = {
        part: {"kind": "module", "keys": [*names, *chosen.ties], "aliases": dict(chosen.ties), "extra": {}},
        IMPORTED: {"from": form, "source": path.name},
    }
    return _Source(part, weights, names, shards, about)


def _open(form: ImportForm, path: Path, part: str, key: str | None) -> Weights:
    if form in (ImportForm.SAFETENSORS, ImportForm.HF):
        weights = read_hf(path) if form is ImportForm.HF else read_safetensors(path)
        return weights if key is None else below(weights, key)
    from ktrain.exchange import torch_read

    read = torch_read.read_pt if form is ImportForm.PT else torch_read.read_dcp
    return read(path, key, part)


def _is_below(name: str, beginning: str) -> bool:
    return name == beginning or name.startswith(f"{beginning}.")


def _require_ties(ties: Mapping[str, str], names: Sequence[str]) -> None:
    if not names:
        raise ConfigError("import: no tensor is left to take; check key and exclude")
    taken = set(names)
    for alias, name in ties.items():
        if name not in taken or alias in taken:
            raise ConfigError(f"import: tie {alias}={name}: expected a name that is not taken, and one that is")


def _shard(name: str, dtype: str, shape: tuple[int, ...]) -> Shard:
    return Shard(name, dtype, shape, Box.whole(shape), Role.REPLICATED)


def _require_new(catalog: RunCatalog) -> None:
    """An import is where a run begins: beside steps that were trained it would be chosen, or never."""
    listing = catalog.listing()
    names = [str(commit.identity) for commit in listing.commits] + [name for name, _ in listing.broken]
    names += [f"epoch {item.epoch}" for item in catalog.attempts() if item.committed or item.durable]
    if names:
        raise ConflictError(
            f"run {catalog.tier.url}: expected a run without checkpoints, it has committed {names[0]}; import into a "
            "new run"
        )


def _write(catalog: RunCatalog, step: int, source: _Source) -> int:
    """Gathers the payload in a temporary file, writes it and the manifest, and commits; returns the epoch."""
    layout = lay_out(source.shards, version=catalog.format)
    epoch = catalog.next_epoch(
        {"by": ids.process_name(), "world_size": 1, "nonce": ids.random_id(), "writer": "import"}
    )
    catalog.record(epoch, "restored", {"step": 0, "epoch": 0, "identity": None})  # it continues nothing
    identity = Identity(catalog.run_id, step, epoch, 1)
    drain = Drain(identity, SYSTEM_CLOCK.monotonic())
    payload = records.payload_name(step, epoch, drain.write_id, 0)
    with tempfile.TemporaryFile(prefix="ktrain-import-") as file:
        _reserve(file.fileno(), layout.nbytes)
        memory = memoryview(mmap.mmap(file.fileno(), layout.nbytes))
        memory[: len(layout.header)] = layout.header
        prefix = f"{source.part}/"
        source.weights.fill(
            {e.shard.name.removeprefix(prefix): memory[e.begin : e.end] for e in layout.entries if e.end > e.begin}
        )
        chunks = native.digest_chunks(memory, chunk_nbytes=CHUNK_NBYTES, num_threads=2)
        catalog.tier.write(payload, memory, deadline=catalog.transfer_deadline(layout.nbytes))
    manifest = Manifest(
        identity=identity,
        rank=0,
        plan_digest=digest_text(json.dumps([entry.key for entry in layout.entries]).encode()),
        nbytes=layout.nbytes,
        chunk_nbytes=CHUNK_NBYTES,
        chunks=tuple(chunks),
        entries=layout.entries,
        objects=source.about,
        origin={"ktrain": ktrain.__version__},
        format=catalog.format,
    )
    data, name = manifest.to_bytes(), records.manifest_name(step, epoch, drain.write_id, 0)
    catalog.tier.write(name, data, deadline=catalog.transfer_deadline(len(data)))
    files = RankFiles(0, payload, layout.nbytes, manifest.payload_digest(), name, len(data), manifest.digest())
    drain.add(files, manifest.plan_digest)
    commit_drain(catalog, drain, clock=SYSTEM_CLOCK, faults=FaultPoints.from_environment(epoch))
    return epoch


def _reserve(fd: int, nbytes: int) -> None:
    """Takes the room on disk now: a mapped file that runs out of it would end the process."""
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise CapacityError(
            f"import: expected {nbytes} bytes of room in {tempfile.gettempdir()}; free space or set TMPDIR"
        ) from error


def _note(catalog: RunCatalog, url: str, step: int, epoch: int) -> None:
    catalog.record(epoch, "durable", {"step": step})
    catalog.record(epoch, "end", {"outcome": "imported"})
    log = open_log(url, catalog.tier, timeouts=settings.timeouts())
    # Of no attempt, as far as a report is concerned: nothing was trained, and nothing failed.
    log.emit(make("notice", 0, message=f"step {step} was imported"))
    log.emit(make("committed", 0, step=step, tier=contract.TIER_BUCKET))
    log.close()
