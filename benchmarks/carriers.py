"""Drains as a node makes them: through its Carrier, with proof of the slot, payload, manifest, and the report."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, Self

from benchmarks.snapshots import Snapshotter
from ktrain.abc.tier import Tier
from ktrain.base import contract, ids
from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.carry import Carrier, Ends, Wanted
from ktrain.checkpoint.lineage import Copy
from ktrain.tier.location import open_tier

_DRAIN_S = 300.0


class Drain:
    """Drains the newest snapshot of a rank to a run's URL, one at a time."""

    def __init__(self, url: str, snapshots: Snapshotter) -> None:
        self.url = url
        self.tier: Tier = open_tier(url, timeouts=Timeouts())
        self._snapshots = snapshots
        self._reported = threading.Event()
        self._report: dict[str, Any] = {}
        self._carrier = Carrier(
            Ends(url, "node-0", volume=lambda: snapshots.volume, disk=lambda: None, transport=None),
            emit=lambda kind, **fields: None,
            drained=self._note,
            filled=lambda: None,
            timeouts=Timeouts(),
            clock=SYSTEM_CLOCK,
        )

    def drain(self) -> None:
        """Until the rank's payload and manifest are there."""
        self._reported.clear()
        identity = self._snapshots.identity.to_json()
        wanted = {"write_id": ids.random_id(), "identity": identity, "ranks": [0], "again": []}
        self._carrier.want(Wanted(drain=wanted, epoch=1))
        if not self._reported.wait(_DRAIN_S):
            raise TimeoutError(f"drain to {self.url}: no report within {_DRAIN_S:g} s")
        if "failure" in self._report:
            raise RuntimeError(self._report["failure"])

    @property
    def payload(self) -> str:
        """Name of the newest drained payload."""
        return str(self._report["files"]["payload"])

    @property
    def copy(self) -> Copy:
        """The newest drained copy, as a restore names it."""
        return Copy(contract.TIER_BUCKET, str(self._report["write_id"]), 0, self._snapshots.identity)

    def read(self) -> bytes:
        return self.tier.read(self.payload, deadline=Deadline.after(_DRAIN_S))

    def remove(self) -> None:
        """Deletes what was drained last."""
        for name in (self.payload, str(self._report["files"]["manifest"])):
            self.tier.delete(name, deadline=Deadline.after(_DRAIN_S))

    def _note(self, report: dict[str, Any]) -> None:
        if "sent_nbytes" not in report:
            self._report = report
            self._reported.set()

    def __enter__(self) -> Self:
        self._carrier.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._carrier.close()
        self.tier.close()
