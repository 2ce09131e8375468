"""The format version of a run: what it began with, raised by each upgrade (ADR 0016).

Upgrades are objects of their own, each written once, so that none can be torn and none is lost.
"""

from __future__ import annotations

import json

from ktrain.abc.tier import Tier
from ktrain.base import contract
from ktrain.base.clock import Clock, Deadline
from ktrain.base.settings import Timeouts
from ktrain.errors import ConflictError, NotFoundError
from ktrain.format import document


def run_format(tier: Tier, began_with: int, *, timeouts: Timeouts, clock: Clock) -> int:
    """The version that all writers of the run use now.

    Raises:
        ConfigError: the run was begun or upgraded by a newer ktrain; names both versions.
        UnavailableError: the store could not be asked.
    """
    version = document.check_version(f"run {tier.url}", began_with)
    while True:
        try:
            tier.read(contract.format_file(version + 1), deadline=Deadline.after(timeouts.storage_s, clock))
        except NotFoundError:
            return version
        version = document.check_version(f"run {tier.url}", version + 1)


def upgrade(tier: Tier, version: int, to: int, *, timeouts: Timeouts, clock: Clock) -> None:
    """Raises the run's version, one by one. Twice, or by two at once, is fine."""
    for each in range(version + 1, to + 1):
        data = json.dumps({"format": each, "time": clock.wall()}).encode()
        try:
            tier.create(contract.format_file(each), data, deadline=Deadline.after(timeouts.storage_s, clock))
        except ConflictError:
            continue  # somebody else has raised it
