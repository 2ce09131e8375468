"""The head's side of reading a checkpoint once a job: what the ranks want, who fills what, and when it is enough.

Not thread-safe; the restore's director calls it under the coordinator's lock, `opens` excepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ktrain.base import contract, settings
from ktrain.base.clock import Clock, Deadline
from ktrain.base.settings import Spread, Timeouts
from ktrain.checkpoint import spread
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.lineage import Candidate, Copy
from ktrain.checkpoint.log import read_backwards
from ktrain.checkpoint.roster import Attempt, Member, Roster
from ktrain.checkpoint.spread import Choice, Rates
from ktrain.errors import KtrainError
from ktrain.format.manifest import Identity

_PATIENCE = 4  # times what was estimated


class Spreading:
    """Of one restore: weighed at most once."""

    def __init__(self, catalog: RunCatalog, attempt: Attempt, timeouts: Timeouts, clock: Clock) -> None:
        self._catalog = catalog
        self._attempt = attempt
        self._timeouts = timeouts
        self._clock = clock
        self._mode = settings.restore_spread()
        self._is_weighed = False
        self._saved: frozenset[int] = frozenset()  # ranks whose every copy is in the bucket
        self._rates = Rates()
        self._choice = Choice("")
        self._round = (0, 0)
        self._deadline: Deadline | None = None
        self._fillers: dict[str, str] = {}  # node -> the keeper that fills; one that comes after its death does not
        self.has_wire = False  # whether a Ray cluster carries the peers' bytes

    @property
    def reason(self) -> str | None:
        """What was chosen and why; None where there was nothing to choose."""
        return self._choice.reason or None

    @property
    def is_chosen(self) -> bool:
        """Whether fills were chosen."""
        return self._deadline is not None

    def opens(self, candidate: Candidate) -> bool:
        """Whether the ranks are to say what they want before they read. Reads the event log."""
        if self._is_weighed:
            return False
        self._is_weighed = True
        self._saved = frozenset(
            saved
            for saved, copies in candidate.copies.items()
            if all(copy.tier == contract.TIER_BUCKET for copy in copies)
        )
        if not self._saved or len(self._attempt.home) < 2:
            return False
        if self._mode is Spread.NEVER:
            self._choice = Choice("every rank reads for itself: it is set so")
            return False
        self._rates = self._measured()
        if self._mode is Spread.AUTO and self._rates.bucket_bytes_per_s is None:
            self._choice = Choice("every rank reads for itself: no drain was measured")
            return False
        return True

    def _measured(self) -> Rates:
        tier = self._catalog.tier
        try:
            found = spread.measured(read_backwards(tier.url, tier, timeouts=self._timeouts, clock=self._clock))
        except (KtrainError, OSError):
            return Rates()
        # Drains that are held back say nothing on the bucket.
        return found if settings.drain_bytes_per_s() is None else Rates(None, found.wire_bytes_per_s)

    def choose(self, reports: Mapping[int, Mapping[str, Any]], number: int, roster: Roster) -> bool:
        """Weighs what the ranks have said; true where nodes are to fill slots first."""
        wants: dict[str, list[dict[int, int]]] = {node: [] for node in self._attempt.nodes}
        sizes: dict[int, int] = {}
        for rank, node in self._attempt.home.items():
            said = {int(saved): pair for saved, pair in reports[rank]["wants"].items()}
            wants[node].append({saved: int(nbytes) for saved, (nbytes, _) in said.items()})
            sizes |= {saved: int(size) for saved, (_, size) in said.items() if saved in self._saved}
        choice = spread.choose(wants, sizes, self._rates, self._mode)
        if choice.fills and len(wants) > 1 and not self.has_wire and not roster.wires():
            choice = Choice("every rank reads for itself: there is no wire between the nodes")
        self._choice = choice
        if not choice.fills:
            return False
        expected_s = self._timeouts.restore_s if choice.once_s is None else _PATIENCE * choice.once_s
        patience_s = min(expected_s + self._timeouts.call_s, self._timeouts.restore_s / 4)
        for member in roster.members():  # in plain python a node may have several
            self._fillers.setdefault(member.node, member.instance)
        self._round, self._deadline = (self._attempt.epoch, number), Deadline.after(patience_s, self._clock)
        return True

    def wanted_from(self, member: Member, candidate: Candidate) -> dict[str, Any] | None:
        """What a keeper is to fill; None for nothing."""
        mine = [saved for saved, node in self._choice.fills.items() if node == member.node]
        if not mine or self._deadline is None or self._fillers.get(member.node) != member.instance:
            return None
        return {
            "round": list(self._round),
            "copies": [candidate.copies[saved][0].to_json() for saved in sorted(mine)],
            "timeout_s": self._deadline.remaining_s(),
        }

    def is_settled(self, identity: Identity, roster: Roster) -> bool:
        """Whether the ranks may read: all is there, or nothing more is to be waited for."""
        if self._deadline is None or self._deadline.expired():
            return True
        held, now_s = roster.inventories(), self._clock.monotonic()
        by_instance = {member.instance: member for member in roster.members()}
        for saved, node in self._choice.fills.items():
            filler = by_instance.get(self._fillers.get(node, ""))
            if filler is None or now_s - filler.heard_s > self._timeouts.lease_s:
                continue
            if (saved, identity) not in held.get(node, ()) and not self._has_failed(saved, filler):
                return False
        return self._is_wired(roster)

    def _has_failed(self, saved: int, filler: Member) -> bool:
        return any(said["rank"] == saved and said["reason"] is not None for said in self._said_by(filler))

    def _said_by(self, member: Member) -> list[Mapping[str, Any]]:
        return [said for said in member.filled if tuple(said["round"]) == self._round]

    def _is_wired(self, roster: Roster) -> bool:
        return len(self._attempt.nodes) == 1 or set(self._attempt.nodes) <= set(roster.wires())

    def with_fills(self, candidate: Candidate, roster: Roster) -> Candidate:
        """The candidate with what was filled, as copies in memory before those in the bucket."""
        held = roster.inventories() if self._is_wired(roster) else {}
        copies = dict(candidate.copies)
        for saved, node in self._choice.fills.items():
            if (saved, candidate.identity) in held.get(node, ()):
                copies[saved] = (Copy(contract.TIER_MEMORY, node, saved, candidate.identity), *copies[saved])
        return Candidate(candidate.identity, copies)

    def filled(self, candidate: Candidate) -> set[int]:
        """Saved ranks that were read from the bucket by a fill."""
        memory = {saved for saved, copies in candidate.copies.items() if copies[0].tier == contract.TIER_MEMORY}
        return memory & set(self._choice.fills)

    def nbytes(self, roster: Roster) -> int:
        """What the fills have read from the bucket."""
        return sum(int(said["nbytes"]) for member in roster.members() for said in self._said_by(member))
