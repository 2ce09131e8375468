"""What the ranks of a run wrote, from the run and from the machine that it runs on."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path

from ktrain.base import contract
from ktrain.base.clock import Deadline
from ktrain.base.job import local_path
from ktrain.base.settings import Timeouts
from ktrain.errors import NotFoundError
from ktrain.tier.location import open_tier

_NAME = re.compile(rf"{contract.LOGS_DIR}/attempt-(\d+)/rank-(\d+)\.log$")


def read_logs(run: str, rank: int | None, attempt: int | None, *, work: Path | None = None, timeouts: Timeouts) -> str:
    """The log of one rank or of all, of an attempt or of the newest; lines of several ranks begin with theirs.

    Logs of a live launch of a run in a bucket lie in its work directory, `work`.

    Raises:
        NotFoundError: there are none of that rank or attempt.
    """
    texts = _Texts(run, local_path(run) or work, timeouts)
    found = texts.names()
    newest = max((number for number, _ in found), default=None) if attempt is None else attempt
    wanted = sorted(key for key in found if key[0] == newest and rank in (None, key[1]))
    if not wanted:
        there = ", ".join(f"rank {one} of attempt {number}" for number, one in sorted(found)) or "none yet"
        raise NotFoundError(f"run {run}: no log of rank {rank} in attempt {newest}; there are: {there}")
    read = {one: texts.read(found[number, one]) for number, one in wanted}
    if len(read) == 1:
        return next(iter(read.values()))
    return "".join(f"[{one}] {line}\n" for one, text in read.items() for line in text.splitlines())


class _Texts:
    """Files of one run's logs: those of this machine first, since they are the newest."""

    def __init__(self, run: str, folder: Path | None, timeouts: Timeouts) -> None:
        self._run = run
        self._folder = folder
        self._timeouts = timeouts

    def names(self) -> dict[tuple[int, int], str]:
        """(attempt, rank) -> name in the run."""
        names = []
        if self._folder is not None:
            files = self._folder.glob(f"{contract.LOGS_DIR}/attempt-*/rank-*.log")
            names += [file.relative_to(self._folder).as_posix() for file in files]
        if local_path(self._run) is None:
            with closing(open_tier(self._run, timeouts=self._timeouts)) as tier:
                stored = tier.list(f"{contract.LOGS_DIR}/", deadline=Deadline.after(self._timeouts.storage_s))
            names += [item.name for item in stored]
        matches = (_NAME.fullmatch(name) for name in names)
        return {(int(match[1]), int(match[2])): match[0] for match in matches if match}

    def read(self, name: str) -> str:
        if self._folder is not None:
            try:
                return (self._folder / name).read_text(errors="replace")
            except FileNotFoundError:
                pass  # it is in the bucket by now
        with closing(open_tier(self._run, timeouts=self._timeouts)) as tier:
            data = tier.read(name, deadline=Deadline.after(self._timeouts.storage_s))
        return data.decode(errors="replace")
