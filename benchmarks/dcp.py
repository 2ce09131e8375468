"""torch's own distributed checkpoints with the options that make them fastest on a CPU, as peers of ktrain.

Those are: one file per rank, written by two threads without fsync, the plan cached between saves, and for asynchronous
saves a stager that keeps its buffers, in shared memory, and copies beside the loop, so that only the next optimizer
step waits for it.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import _async_process_executor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

State = Mapping[str, torch.Tensor]


@contextmanager
def process_group(rank: int = 0, world_size: int = 1, port: int | None = None) -> Iterator[None]:
    """A gloo group on this machine while it lasts; afterwards no process of torch's saver is left."""
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port())}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        yield
    finally:
        _async_process_executor._CHECKPOINT_PROCESS = None  # its end ends the process
        dist.destroy_process_group()
        for name, text in before.items():
            if text is None:
                del os.environ[name]
            else:
                os.environ[name] = text


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def save(state: State, folder: Path) -> None:
    """Until every file is written."""
    with _quiet():
        dcp.save(dict(state), storage_writer=_writer(folder), planner=_planner())


def load(into: State, folder: Path) -> None:
    """Into the tensors that are given."""
    with _quiet():
        dcp.load(dict(into), checkpoint_id=folder)


def stager() -> DefaultStager:
    """One whose buffers stay, and which copies beside the loop; savers that take turns may share it."""
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=False, use_shared_memory=True, use_async_staging=True, use_non_blocking_copy=False
        )
    )


class AsyncSaver:
    """`async_save` by a thread or a process. The stager belongs to the caller, who closes it after `finish`."""

    def __init__(self, how: AsyncCheckpointerType, stager: DefaultStager) -> None:
        self._how = how
        self._stager = stager
        self._staged: Future[Any] | None = None
        self._saved: Future[Any] | None = None

    def begin(self, state: State, folder: Path) -> None:
        """Returns while the copy runs; `wait` before the state changes."""
        with _quiet():
            answer = dcp.async_save(
                dict(state),
                storage_writer=_writer(folder),
                planner=_planner(),
                async_checkpointer_type=self._how,
                async_stager=self._stager,
            )
        self._staged, self._saved = answer.staging_completion, answer.upload_completion

    def wait(self) -> None:
        """Until the state may change."""
        if self._staged is not None:
            self._staged.result()
            self._staged = None

    def finish(self) -> None:
        """Until every file is written."""
        self.wait()
        if self._saved is not None:
            self._saved.result()
            self._saved = None


def _writer(folder: Path) -> FileSystemWriter:
    return FileSystemWriter(folder, single_file_per_rank=True, sync_files=False, thread_count=2)


def _planner() -> DefaultSavePlanner:
    return DefaultSavePlanner(enable_plan_caching=True)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
