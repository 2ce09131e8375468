"""What a head leaves for the next one of its launch: spent budgets, a request to stop, how many heads there were.

On one machine a file of the work directory. Where the head is a pod its directories go with it, so there it is an
object of the run (ADR 0038).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Protocol

from ktrain.abc.tier import Tier
from ktrain.base import atomic, contract
from ktrain.base.clock import SYSTEM_CLOCK, Clock, Deadline
from ktrain.base.job import LaunchSpec, WorkDir
from ktrain.base.settings import Timeouts
from ktrain.errors import KtrainError, NotFoundError

_LOG = logging.getLogger(__name__)


class Notes(Protocol):
    """Where a launch's heads write to each other. Write from one thread at a time."""

    def read(self) -> dict[str, Any]:
        """What the last head of this launch left; empty for the first one.

        Raises:
            KtrainError: the run could not be asked.
        """

    def write(self, value: dict[str, Any]) -> None:
        """Replaces what is there."""


class FileNotes:
    """Notes in a file of this machine."""

    def __init__(self, path: Path, launch_id: str) -> None:
        self._path = path
        self._launch_id = launch_id

    def read(self) -> dict[str, Any]:
        return _of_launch(atomic.try_read_json(self._path), self._launch_id)

    def write(self, value: dict[str, Any]) -> None:
        atomic.write_json(self._path, {"launch_id": self._launch_id, **value})


class RunNotes:
    """Notes in the run. A store that is away does not end a head: the next note is written whole again."""

    def __init__(self, tier: Tier, launch_id: str, *, timeouts: Timeouts, clock: Clock = SYSTEM_CLOCK) -> None:
        self._tier = tier
        self._launch_id = launch_id
        self._timeouts = timeouts
        self._clock = clock

    def read(self) -> dict[str, Any]:
        try:
            data = self._tier.read(contract.HEAD_FILE, deadline=self._deadline())
            value = json.loads(data)
        except (NotFoundError, ValueError):  # torn: its writer died while it wrote
            return {}
        return _of_launch(value, self._launch_id)

    def write(self, value: dict[str, Any]) -> None:
        data = json.dumps({"launch_id": self._launch_id, **value}).encode()
        try:
            self._tier.write(contract.HEAD_FILE, data, deadline=self._deadline())
        except KtrainError as error:
            _LOG.warning("notes of the head: not written: %s", error)

    def _deadline(self) -> Deadline:
        return Deadline.after(self._timeouts.storage_s, self._clock)


def open_notes(spec: LaunchSpec, work: WorkDir, tier: Tier, *, timeouts: Timeouts, clock: Clock) -> Notes:
    """The notes of a job's heads, where its next head will find them."""
    if spec.pod is None:
        return FileNotes(work.head_state, spec.launch_id)
    return RunNotes(tier, spec.launch_id, timeouts=timeouts, clock=clock)


def _of_launch(value: object, launch_id: str) -> dict[str, Any]:
    return value if isinstance(value, dict) and value.get("launch_id") == launch_id else {}
