"""What could go from a bucket, and why: pure functions over what lies there (ADR 0012).

Invariant: an object is named here only if ktrain gives it this very name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from ktrain.abc.tier import Stored
from ktrain.base import contract
from ktrain.checkpoint.catalog import AttemptRecord, Listing, RunCatalog, commit_path
from ktrain.checkpoint.lineage import on_line
from ktrain.checkpoint.marks import Marks, Reader, Write, numbers, read_marks, write_of
from ktrain.checkpoint.retention import Committed, Retention, superseded
from ktrain.format import record as records
from ktrain.format.manifest import Identity
from ktrain.format.record import CommitRecord

_FILE = re.compile(
    rf"{contract.CHECKPOINTS_DIR}/step-(\d{{8,19}})/data-(\d{{6,19}})-([0-9a-z]{{1,64}})/(.+)", re.ASCII | re.DOTALL
)
_RANK_FILE = re.compile(r"rank-(\d{5,})\.(?:safetensors|json)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Seen:
    """What lies in the run's directory, read in this order: what is protected is read last."""

    listing: Listing
    attempts: list[AttemptRecord]
    marks: Marks

    @classmethod
    def read(cls, catalog: RunCatalog) -> Seen:
        return cls(catalog.listing(), catalog.attempts(), read_marks(catalog))

    def line(self) -> list[CommitRecord]:
        """Commits on the line, newest last."""
        return [commit for commit in self.listing.commits if on_line(commit.identity, self.attempts)]

    def metrics_of(self, commit: CommitRecord) -> dict[str, float]:
        """Values of the commit's step: from its record, then what was logged later."""
        late = self.marks.metrics.get((commit.identity.step, commit.identity.epoch), {})
        return {**numbers(commit.origin.get("metrics")), **late}


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms something goes.

    Attributes:
        policy: what stays of the line; None keeps all of it.
        epoch: the attempt on whose behalf this is done; a newer one ends it.
        newest: what must be the newest of the line, where that is known.
        holds_run: nobody else runs: attempts that recorded their end write no more, and what is off the line may go.
        set_aside: checkpoints that no restore may choose: they neither go nor count, also not as the newest.
    """

    policy: Retention | None
    epoch: int
    newest: Identity | None = None
    holds_run: bool = False
    set_aside: Callable[[Identity], bool] | None = None

    def usable(self, commits: Iterable[CommitRecord]) -> list[CommitRecord]:
        """Without those that are set aside."""
        return [commit for commit in commits if self.set_aside is None or not self.set_aside(commit.identity)]


@dataclass(frozen=True, slots=True)
class Removal:
    """One try to commit that goes: its record, if it has one, and then these files."""

    write: Write
    why: (
        str  # "superseded", "off the line", "never committed", "half removed", "asked for", "its record cannot be read"
    )
    files: tuple[Stored, ...]
    record: str | None = None

    @property
    def step(self) -> int:
        return self.write[0]

    def to_json(self) -> dict[str, Any]:
        step, epoch, write_id = self.write
        nbytes = sum(stored.nbytes for stored in self.files)
        return {"step": step, "epoch": epoch, "write_id": write_id, "why": self.why, "nbytes": nbytes}


# What could go, each for its reason


def given_up(seen: Seen, terms: Terms) -> list[Removal]:
    """What the policy does not keep of the line; pinned steps do not count."""
    if terms.policy is None:
        return []
    free = [commit for commit in terms.usable(seen.line()) if commit.identity.step not in seen.marks.pins]
    by_key: dict[tuple[int, int], list[CommitRecord]] = {}
    for commit in free:
        by_key.setdefault((commit.identity.step, commit.identity.epoch), []).append(commit)
    found = [Committed(*key, commits[0].time, seen.metrics_of(commits[0])) for key, commits in by_key.items()]
    gone = [commit for old in superseded(found, terms.policy) for commit in by_key[old.step, old.epoch]]
    return _removals(seen, gone, "superseded")


def off_line(seen: Seen, terms: Terms) -> list[Removal]:
    """Checkpoints that were left by going back, where the line has a durable commit of that attempt or a later one."""
    newest = max((commit.identity.epoch for commit in terms.usable(seen.line())), default=0)
    durable = [attempt for attempt in seen.attempts if attempt.epoch <= newest]
    gone = [commit for commit in terms.usable(seen.listing.commits) if not on_line(commit.identity, durable)]
    return _removals(seen, gone, "off the line")


def _removals(seen: Seen, commits: Iterable[CommitRecord], why: str) -> list[Removal]:
    return [removal_of(commit, seen.listing, why) for commit in commits if is_plain(commit)]


def removal_of(commit: CommitRecord, listing: Listing, why: str) -> Removal:
    """The removal of a committed checkpoint with all its files."""
    files = _files_by_write(listing).get(write_of(commit), ())
    named = {name for each in commit.ranks for name in (each.payload, each.manifest)}
    own = tuple(stored for stored in files if stored.name in named)
    return Removal(write_of(commit), why, own, commit_path(commit))


def is_plain(commit: CommitRecord) -> bool:
    """Whether a record names the files that ktrain gives it, and none of another's."""
    identity = commit.identity
    at = (identity.step, identity.epoch, commit.write_id)
    return all(
        files.payload == records.payload_name(*at, files.rank)
        and files.manifest == records.manifest_name(*at, files.rank)
        for files in commit.ranks
    )


def abandoned(seen: Seen, terms: Terms) -> list[Removal]:
    """Uploads without any record, of attempts that surely write no more."""
    named = {records.parse_commit_name(stored.name) for stored in seen.listing.stored}
    return [
        Removal(write, "never committed", files)
        for write, files in _files_by_write(seen.listing).items()
        if write not in named
        and write not in seen.marks.doomed
        and all(_is_rank_file(stored.name, write) for stored in files)
        and _has_ended(write[1], seen.attempts, terms)
    ]


def unreadable(seen: Seen, whole: Collection[tuple[int, int]]) -> list[Removal]:
    """Records that are torn or damaged, with the files of their try, where nobody can need them.

    `whole`: (step, epoch) of checkpoints that are proven by another record. Files that a readable record names stay,
    and so does what a newer ktrain wrote.
    """
    files = _files_by_write(seen.listing)
    named = {name for commit in seen.listing.commits for each in commit.ranks for name in (each.payload, each.manifest)}
    found = []
    for name, _ in seen.listing.broken:
        write = records.parse_commit_name(name)
        if write is None or name in seen.listing.newer or write[:2] not in whole:
            continue
        own = tuple(stored for stored in files.get(write, ()) if _is_rank_file(stored.name, write))
        if not any(stored.name in named for stored in own):
            found.append(Removal(write, "unreadable record", own, name))
    return found


def _has_ended(epoch: int, attempts: list[AttemptRecord], terms: Terms) -> bool:
    fenced = any(attempt.epoch > epoch and attempt.durable is not None for attempt in attempts)
    since = [attempt for attempt in attempts if attempt.epoch >= epoch]
    return fenced or (terms.holds_run and bool(since) and all(attempt.end is not None for attempt in since))


def unfinished(seen: Seen) -> list[Removal]:
    """Removals that a collector began: the mark is there, the record is not."""
    named = {records.parse_commit_name(stored.name) for stored in seen.listing.stored}
    files = _files_by_write(seen.listing)
    return [
        Removal(write, "half removed", tuple(s for s in files.get(write, ()) if _is_rank_file(s.name, write)))
        for write in sorted(seen.marks.doomed)
        if write not in named
    ]


def why_protected(removal: Removal, marks: Marks, readers: Iterable[Reader]) -> str | None:
    """Who wants this step to stay; None when nobody does."""
    if removal.why == "half removed":
        return None  # it is no checkpoint any more: nobody can read it
    if removal.step in marks.pins:
        return "it is pinned"
    if (removal.step, removal.write[1]) in marks.unclear:
        return "its metrics cannot be read"
    return next((f"{reader.who} reads it" for reader in readers if reader.reads(removal.step)), None)


def _files_by_write(listing: Listing) -> dict[Write, tuple[Stored, ...]]:
    found: dict[Write, list[Stored]] = {}
    for stored in listing.stored:
        match = _FILE.fullmatch(stored.name)
        if match is not None:
            found.setdefault((int(match[1]), int(match[2]), match[3]), []).append(stored)
    return {write: tuple(files) for write, files in found.items()}


def _is_rank_file(name: str, write: Write) -> bool:
    """Whether ktrain gives this very name to a file of this try."""
    match = _RANK_FILE.fullmatch(name.rpartition("/")[2])
    if match is None:
        return False
    names: tuple[Callable[..., str], ...] = (records.payload_name, records.manifest_name)
    return name in [make(*write, int(match[1])) for make in names]
