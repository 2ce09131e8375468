"""The local launch's lock on a run's work directory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from ktrain.base.job import WorkDir
from ktrain.errors import ConflictError
from ktrain.launcher.backends.local import lock_work_dir


@pytest.fixture
def work(tmp_path: Path) -> WorkDir:
    tmp_path.chmod(0o700)
    return WorkDir(tmp_path / "ktrain" / "a")


def test_lock_work_dir_second_launch_is_refused_by_pid(work: WorkDir) -> None:
    with lock_work_dir(work), pytest.raises(ConflictError, match=f"process {os.getpid()} "):
        lock_work_dir(work)


def test_lock_work_dir_free_again_once_closed(work: WorkDir) -> None:
    lock_work_dir(work).close()
    lock_work_dir(work).close()


def test_lock_work_dir_removed_by_the_last_holder_is_made_anew(work: WorkDir) -> None:
    with lock_work_dir(work):
        shutil.rmtree(work.path)
        with lock_work_dir(work), pytest.raises(ConflictError):
            lock_work_dir(work)
