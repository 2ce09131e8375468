"""Storage for `torch.distributed.checkpoint` (DCP): a save through it is an ordinary checkpoint of a run (ADR 0014).

    writer = RunStorageWriter("s3://bucket/net-a")
    dcp.save({"model": model}, storage_writer=writer, checkpoint_id="step-100")
    dcp.load({"model": model}, storage_reader=RunStorageReader("s3://bucket/net-a"))

Invariant: the commit record is written by the coordinator, last, after every rank's payload was found in the store with
its full size and every manifest was read back and proven; the planner's bytes are stored as they are and never opened.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ktrain.base import settings
from ktrain.base.faults import FaultPoints
from ktrain.base.job import canonical_url
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.dcp_attempt import Save, Word, attempt_of, note_loaded
from ktrain.checkpoint.dcp_memory import NearCopies
from ktrain.checkpoint.dcp_payload import PART, Written, capture, memory_of
from ktrain.checkpoint.stored import ProvenRanges, StoredCheckpoint, choose_commit, open_kept, span, strides_of
from ktrain.errors import ConfigError, ConflictError, CorruptionError, InternalError, KtrainError, NotFoundError
from ktrain.format import objects
from ktrain.format.payload import Entry
from ktrain.format.shard import Box
from ktrain.state.tensors import dtype_of

_LOG = logging.getLogger(__name__)
_FILES = MetadataIndex("ktrain/files")  # the result that names what a rank wrote
_STEP = re.compile(r"(?:.*/)?(?:step[-_]?)?(\d+)/?", re.DOTALL)


def step_of(checkpoint_id: str | int | os.PathLike[str]) -> int:
    """The step that a checkpoint id names: `100`, `"step-100"`, `"some/folder/step-100"`.

    Raises:
        ConfigError: it names none.
    """
    match = _STEP.fullmatch(str(checkpoint_id) if isinstance(checkpoint_id, int) else os.fspath(checkpoint_id))
    if match is None:
        raise ConfigError(
            f"checkpoint_id {checkpoint_id!r}: expected a step, such as 100, 'step-100' or 'folder/step-100'; the run "
            "is named where the storage is made"
        )
    return int(match[1])


def newest_step(run: str | os.PathLike[str]) -> int | None:
    """The newest committed step on the run's line; None where there surely is none.

    Raises:
        UnavailableError, DeadlineError: it could not be told.
    """
    try:
        catalog = RunCatalog.open(canonical_url(os.fspath(run)), timeouts=settings.timeouts(), create=False)
    except NotFoundError:
        return None
    try:
        return choose_commit(catalog, None).identity.step
    except NotFoundError:
        return None
    finally:
        catalog.tier.close()


class RunStorageWriter(StorageWriter):
    """Writes DCP saves into a run. Every rank makes one; keep it, or make one for each save.

    Holds the run from the first save until `close()` or the end of the process, so that no other job writes to it.

    Args:
        run: path or URL of the run.
        step: the step of the next save, where `checkpoint_id` does not name it.
        keep_in_memory: copies of each rank's share that stay in this node's memory volume, for fast loads; they stay
            until `ktrain ckpt rm --volume`.
    """

    def __init__(self, run: str | os.PathLike[str], *, step: int | None = None, keep_in_memory: int = 0) -> None:
        self._run = canonical_url(os.fspath(run))
        self._step = step
        self._keep_in_memory = keep_in_memory
        self._is_coordinator = False
        self._save: Save | None = None
        self._own: Written | None = None  # the coordinator's, until its manifest is written

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self._step = step_of(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True):
            raise ConfigError("RunStorageWriter: use_collectives=False gives no coordinator to commit; leave it out")
        if self._step is None:
            raise ConfigError(
                "RunStorageWriter: no step is named; pass checkpoint_id='step-N' or RunStorageWriter(step=N)"
            )
        self._is_coordinator = is_coordinator
        self._own = None
        self._save = attempt_of(self._run).next_save(self._step)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        word = attempt_of(self._run).begin(len(plans), self._current().step)
        return [replace(plan, storage_data=replace(word, rank=rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        save, word = self._current(), plan.storage_data
        if not isinstance(word, Word):
            raise ConfigError(
                "RunStorageWriter: the plan of this save was made for other storage; turn enable_plan_caching off, it "
                "shares plans between all savers of the process"
            )
        catalog = attempt_of(self._run).join(word)
        faults = FaultPoints.from_environment(word.epoch)
        payload = capture(plan, planner, catalog.format)
        written = Written(word, save, payload, self._keep_in_memory)
        faults.reached("drain.payload", step=save.step, rank=word.rank)
        deadline = catalog.transfer_deadline(payload.layout.nbytes)
        catalog.tier.write(written.payload_name, payload.memory, deadline=deadline)
        if not self._keep_in_memory:
            payload.release()
        if self._is_coordinator:
            self._own = written  # its manifest holds what the planner knows of all ranks, which finish() is told
            return _done([])
        faults.reached("drain.manifest", step=save.step, rank=word.rank)
        report = written.write_manifest(catalog, {})
        return _done([WriteResult(_FILES, payload.layout.nbytes, report)])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        save, own = self._current(), self._own
        if own is None:
            raise InternalError(f"RunStorageWriter: step {save.step} is finished by a rank that wrote nothing of it")
        attempt = attempt_of(self._run)
        encoded = objects.encode(metadata.planner_data, tensor=_no_tensor, path="planner_data")
        faults = FaultPoints.from_environment(own.word.epoch)
        faults.reached("drain.manifest", step=save.step, rank=own.word.rank)
        reports = [own.write_manifest(attempt.join(own.word), {"planner_data": encoded})]
        reports += [result.storage_data for row in results for result in row if result.index == _FILES]
        attempt.commit(save, own.word, reports, _expected(metadata))
        self._own = None

    def close(self) -> None:
        """Lets go of the run in this process. May be called again; a later save takes it again, as a new attempt."""
        attempt_of(self._run).close()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return _STEP.fullmatch(os.fspath(checkpoint_id)) is not None

    def _current(self) -> Save:
        if self._save is None:
            raise InternalError("RunStorageWriter: DCP set up no save")
        return self._save


def _no_tensor(value: Any, path: str) -> None:
    del value, path


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def _expected(metadata: Metadata) -> dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]] | None]:
    """By name, the chunks that make a tensor, in order; None for the planner's bytes."""
    return {
        fqn: None
        if isinstance(about, BytesStorageMetadata)
        else sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in about.chunks)
        for fqn, about in metadata.state_dict_metadata.items()
    }


class RunStorageReader(StorageReader):
    """Reads DCP saves of a run: byte ranges only, each proven, whatever the number of ranks.

    Copies in this machine's memory volume are read first; where one is bad it is set aside and the run's own is read.
    From `read_metadata` to the end of the load nobody collects the checkpoint; a reader that is dropped lets go of it.

    Args:
        run: path or URL of the run.
        step: which step, where `checkpoint_id` does not name one; None is the newest.
    """

    def __init__(self, run: str | os.PathLike[str], *, step: int | None = None) -> None:
        self._run = canonical_url(os.fspath(run))
        self._step = step
        self._stored: StoredCheckpoint | None = None
        self._open = contextlib.ExitStack()  # the run's tier, and the mark that keeps collectors off the checkpoint
        self._entries: dict[str, list[tuple[int, Entry]]] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._drop()
        if checkpoint_id is not None:
            self._step = step_of(checkpoint_id)

    # No **kwargs here and in set_up_storage_reader: DCP then asks for no metadata of single ranks.
    def read_metadata(self) -> Metadata:
        """The metadata of the checkpoint, rebuilt from its manifests.

        Raises:
            NotFoundError: there is no such checkpoint.
            ConfigError: it was not saved through DCP.
            CorruptionError: it cannot be proven.
        """
        try:
            return self._read_metadata()
        except KtrainError as error:
            _LOG.warning("load: %s", error)  # torch 2.11 drops the error and says that there is no metadata
            raise

    def _drop(self) -> None:
        self._stored = None
        self._open.close()

    def _read_metadata(self) -> Metadata:
        self._drop()
        catalog = RunCatalog.open(self._run, timeouts=settings.timeouts(), create=False)
        with contextlib.ExitStack() as opened:
            opened.callback(catalog.tier.close)
            stored = opened.enter_context(open_kept(catalog, self._step, timeouts=settings.timeouts()))
            self._open = opened.pop_all()
        self._stored = stored
        self._entries = {}
        opaque: set[str] = set()
        planner_data: Any = None
        for rank, manifest in sorted(stored.manifests.items()):
            about = manifest.objects.get(PART)
            if not isinstance(about, dict) or about.get("kind") != PART or not isinstance(about.get("bytes"), list):
                raise ConfigError(
                    f"run {catalog.tier.url}: {manifest.identity} was not saved through DCP; restore it by "
                    "Checkpointer, or write it for DCP by `ktrain ckpt export --to dcp`"
                )
            opaque.update(about["bytes"])
            if "planner_data" in about:
                planner_data = objects.decode(about["planner_data"], tensor=_refuse_tensor)
            for entry in manifest.entries:
                self._entries.setdefault(entry.shard.name, []).append((rank, entry))
        found = {fqn: _metadata_of(rows, fqn in opaque) for fqn, rows in self._entries.items()}
        return Metadata(found, planner_data=planner_data)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """The metadata was made here; there is nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        commit = self._current().commit
        return replace(plan, storage_data=(str(commit.identity), commit.write_id))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        chosen = [plan.storage_data for plan in plans]
        for rank, choice in enumerate(chosen):
            if choice != chosen[0]:
                raise ConflictError(
                    f"load: rank 0 reads {chosen[0][0]}, rank {rank} reads {choice[0]}: a checkpoint was committed "
                    "while the ranks looked; name the step by checkpoint_id, or load again"
                )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        try:
            self._read_data(self._current(), plan, planner)
        finally:
            self._drop()
        return _done(None)

    def _read_data(self, stored: StoredCheckpoint, plan: LoadPlan, planner: LoadPlanner) -> None:
        wanted = sorted((self._place(item) for item in plan.items), key=lambda found: found[:3])
        ranges: dict[int, list[tuple[int, int]]] = {}
        for rank, begin, end, _, _ in wanted:
            ranges.setdefault(rank, []).append((begin, end))
        copies = NearCopies(stored.commit)
        with contextlib.closing(copies), ProvenRanges(stored, ranges, near=copies) as proven:
            for rank, begin, end, entry, item in wanted:
                read = partial(proven.copy, rank, begin, end)
                if item.type is LoadItemType.BYTE_IO:
                    data = bytearray(end - begin)
                    read(memoryview(data))
                    planner.load_bytes(item, io.BytesIO(data))
                else:
                    _give(item, entry, end - begin, read, planner)
        note_loaded(self._run, stored.commit.identity)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return _STEP.fullmatch(os.fspath(checkpoint_id)) is not None

    def _current(self) -> StoredCheckpoint:
        if self._stored is None:
            raise InternalError("RunStorageReader: DCP read no metadata before its plan")
        return self._stored

    def _place(self, item: ReadItem) -> tuple[int, int, int, Entry, ReadItem]:
        """Rank, byte range and entry that an item is read from."""
        index = item.storage_index
        rows = self._entries.get(index.fqn, [])
        if item.type is LoadItemType.BYTE_IO and rows:
            rank, entry = rows[0]
            return rank, entry.begin, entry.end, entry, item
        offsets = tuple(index.offset or ())
        for rank, entry in rows:
            box = entry.shard.box
            if box.offsets == offsets and box.numel:
                at = tuple(int(a + b) for a, b in zip(box.offsets, item.storage_offsets, strict=True))
                begin, end = span(entry, Box(at, tuple(map(int, item.lengths))))
                return rank, begin, end, entry, item
        raise InternalError(f"load: the planner asks for {index.fqn!r} at {offsets}, which its metadata does not name")


def _give(item: ReadItem, entry: Entry, nbytes: int, read: Callable[[memoryview], None], planner: LoadPlanner) -> None:
    """Fills the planner's tensor with a box of a stored shard, whose bytes from first to last `read` copies."""
    target = planner.resolve_tensor(item).detach()
    lengths, dtype = tuple(map(int, item.lengths)), dtype_of(entry.shard.dtype)
    if tuple(target.shape) != lengths:
        raise ConfigError(
            f"tensor {item.dest_index.fqn!r}: the planner asks for {lengths} and gives room for {tuple(target.shape)}"
        )
    memory = memory_of(target) if target.dtype == dtype else None
    if memory is not None and memory.nbytes == nbytes:  # the box lies in one piece here and there
        read(memory)
    elif nbytes:
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        read(buffer.numpy().data)
        target.copy_(buffer.view(dtype).as_strided(lengths, strides_of(entry.shard.box.lengths)))
    planner.commit_tensor(item, target)


def _metadata_of(rows: list[tuple[int, Entry]], is_opaque: bool) -> BytesStorageMetadata | TensorStorageMetadata:
    if is_opaque:
        return BytesStorageMetadata()
    shard = rows[0][1].shard
    chunks = [
        ChunkStorageMetadata(torch.Size(entry.shard.box.offsets), torch.Size(entry.shard.box.lengths))
        for _, entry in rows
    ]
    return TensorStorageMetadata(TensorProperties(dtype_of(shard.dtype)), torch.Size(shard.global_shape), chunks)


def _refuse_tensor(key: str) -> Any:
    raise CorruptionError(f"planner_data: names a tensor {key[:80]!r}, which it cannot have; take another copy")
