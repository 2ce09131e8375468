"""Code in a run's bucket: sent before its job is, fetched and proven in the pod (ADR 0043).

    python -P -m ktrain.run.code RUN SHA256 SIZE SCRATCH TARGET

is what the init container runs. Imports neither torch nor ray.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ktrain.base import contract, settings
from ktrain.base.clock import Deadline
from ktrain.base.faults import FaultPoints
from ktrain.base.settings import Timeouts
from ktrain.errors import KtrainError, NotFoundError
from ktrain.launcher.code import bucket, unpack
from ktrain.launcher.code.archive import CodeArchive
from ktrain.launcher.spec import JobSpec
from ktrain.tier.location import open_tier

_FILE = "code.zip"


def send_code(spec: JobSpec, archive: CodeArchive | None) -> str:
    """Sends code that goes by the bucket, before its job is created; says what was done.

    Without an archive it has to be there: a job that is started again needs no directory.

    Raises:
        NotFoundError: it is not there, and was not given.
        KtrainError: it is not surely there; no job may be created that would look for it.
    """
    sha256, size = spec.code.archive, spec.code.size
    assert spec.code.is_in_bucket and sha256 is not None and size is not None
    where = f"{spec.run}/{bucket.archive_name(sha256)}"
    timeouts = settings.timeouts()
    deadline = _deadline(timeouts, size)
    store = open_tier(spec.run, timeouts=timeouts)
    try:
        if archive is not None:
            sent = bucket.send(store, archive, faults=FaultPoints.from_environment(epoch=1), deadline=deadline)
        elif bucket.look(store, deadline=deadline).is_whole(sha256, size):
            sent = False
        else:
            raise NotFoundError(f"code: {where} is not there, or not whole; launch with --code DIR")
    finally:
        store.close()
    return f"code: sent to {where}" if sent else f"code: {where} is there already; nothing was sent"


def fetch_code(run: str, sha256: str, size: int, *, scratch: Path, target: Path) -> int:
    """Fetches an archive, proves and unpacks it; returns the number of files.

    Raises:
        KtrainError: as `bucket.fetch` and `unpack.unpack_file`; nothing was unpacked.
    """
    timeouts = settings.timeouts()
    store = open_tier(run, timeouts=timeouts)
    try:
        with open(scratch / _FILE, "w+b") as file:
            bucket.fetch(store, sha256, size, file, deadline=_deadline(timeouts, size))
            FaultPoints.from_environment(epoch=1).reached("code.fetched")
            file.seek(0)
            return unpack.unpack_file(file, sha256, target, what=f"code archive {bucket.archive_name(sha256)}")
    finally:
        store.close()


def _deadline(timeouts: Timeouts, size: int) -> Deadline:
    """For one archive, which is written and read back at 1 MB/s at least."""
    return Deadline.after(timeouts.start_s + 2 * size / 1e6)


def main(argv: list[str]) -> int:
    run, sha256, size, scratch, target = argv
    try:
        fetch_code(run, sha256, int(size), scratch=Path(scratch), target=Path(target))
    except (KtrainError, OSError) as error:
        return unpack.said(error)
    return contract.EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
