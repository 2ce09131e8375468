"""The submissions of a run's jobs, kept in the run: they outlive the cluster's objects (ADR 0040).

One object each, `submissions/NNNNNN-ID.json`, numbered in the order in which the run was told; written once under a
name of its own, like all records of a run. What is in it is the launcher's business.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ktrain.abc.tier import Tier
from ktrain.base import atomic, contract
from ktrain.base.clock import SYSTEM_CLOCK, Clock, Deadline
from ktrain.base.settings import Timeouts
from ktrain.errors import KtrainError, NotFoundError
from ktrain.tier.location import open_tier

_LOG = logging.getLogger(__name__)


def keep(tier: Tier, value: Mapping[str, Any], *, timeouts: Timeouts, clock: Clock = SYSTEM_CLOCK) -> None:
    """Writes a submission, unless the run has it: sender and head both tell it.

    Raises:
        KtrainError: the run could not be asked or written.
    """
    places = _places(tier, timeouts, clock)
    if any(_is_whole(tier, name, timeouts, clock) for name in places if name.endswith(_suffix(value))):
        return
    number = max(places.values(), default=0) + 1
    name = f"{contract.SUBMISSIONS_DIR}/{number:06d}{_suffix(value)}"
    tier.write(name, json.dumps(value).encode(), deadline=Deadline.after(timeouts.storage_s, clock))


def read_all(tier: Tier, *, timeouts: Timeouts, clock: Clock = SYSTEM_CLOCK) -> list[dict[str, Any]]:
    """All submissions, the oldest first, each once; one that is torn counts as not written.

    Raises:
        KtrainError: the run could not be asked.
    """
    found: dict[str, dict[str, Any]] = {}
    places = _places(tier, timeouts, clock)
    for name in sorted(places, key=lambda name: (places[name], name)):
        value = _try_read(tier, name, timeouts, clock)
        if value is not None:
            found.setdefault(value["id"], value)
    return list(found.values())


def keep_own(work: Path, run: str, *, timeouts: Timeouts, clock: Clock = SYSTEM_CLOCK) -> None:
    """What a pod's head does with the submission that made it. A run that is away costs the record, no training."""
    try:
        value = atomic.try_read_json(work / contract.SUBMISSION_FILE)
        if value is None:
            return
        with contextlib.closing(open_tier(run, timeouts=timeouts)) as tier:
            keep(tier, value, timeouts=timeouts, clock=clock)
    except KtrainError as error:
        _LOG.warning("the run has no record of this submission: %s", error)


def _try_read(tier: Tier, name: str, timeouts: Timeouts, clock: Clock) -> dict[str, Any] | None:
    try:
        value = json.loads(tier.read(name, deadline=Deadline.after(timeouts.storage_s, clock)))
    except (ValueError, NotFoundError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("id"), str) else None


def _is_whole(tier: Tier, name: str, timeouts: Timeouts, clock: Clock) -> bool:
    """Whether its writer got to the end."""
    return _try_read(tier, name, timeouts, clock) is not None


def _places(tier: Tier, timeouts: Timeouts, clock: Clock) -> dict[str, int]:
    """Name -> place in the order."""
    found = tier.list(f"{contract.SUBMISSIONS_DIR}/", deadline=Deadline.after(timeouts.storage_s, clock))
    numbers = {stored.name: stored.name.rpartition("/")[2].partition("-")[0] for stored in found}
    return {name: int(number) for name, number in numbers.items() if number.isascii() and number.isdecimal()}


def _suffix(value: Mapping[str, Any]) -> str:
    return f"-{value['id']}.json"
