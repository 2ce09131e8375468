"""This process's part in an attempt of a run that is written through DCP: epoch, names, and the commit.

DCP calls storage on every rank and gives it no channel of its own: what the coordinator decides travels in the plan,
and
a planner that caches plans hands out an old one. So that word is the same for the whole attempt, and what differs from
save to save, its number, is counted by every rank alike (ADR 0014).
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ktrain.base import contract, ids, settings
from ktrain.base.clock import SYSTEM_CLOCK
from ktrain.base.events import make
from ktrain.base.faults import FaultPoints
from ktrain.base.job import local_path
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.commit import commit_drain
from ktrain.checkpoint.drain import Drain
from ktrain.checkpoint.holder import Holder
from ktrain.checkpoint.log import open_log
from ktrain.checkpoint.stored import choose_commit
from ktrain.errors import ConfigError, ConflictError, CorruptionError, KtrainError, NotFoundError
from ktrain.format.manifest import Identity, Manifest
from ktrain.format.record import RankFiles

_LOG = logging.getLogger(__name__)
Chunks = list[tuple[tuple[int, ...], tuple[int, ...]]]  # offsets and lengths, sorted


@dataclass(frozen=True, slots=True)
class Word:
    """What the coordinator tells a rank, in the plan: equal for all saves of an attempt but for `rank`."""

    url: str
    run: str
    epoch: int
    nonce: str
    world_size: int
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Save:
    """One save of this process; `number` counts them, on every rank alike."""

    step: int
    number: int

    def write_id(self, word: Word) -> str:
        """Names the files of this save, as no other save's."""
        return f"{word.nonce}n{self.number}"


class DcpAttempt:
    """An attempt of a run in this process, on the coordinator or another rank. Safe from any thread."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._timeouts = settings.timeouts()
        self._lock = threading.RLock()  # guards all below
        self._catalog: RunCatalog | None = None
        self._holder: Holder | None = None
        self._word: Word | None = None  # of the coordinator alone
        self._committed: int | None = None  # newest step of this attempt
        self._recorded: int | None = None  # the newest epoch whose first commit the run directory knows
        self._loaded: Identity | None = None
        self._num_saves = 0

    def next_save(self, step: int) -> Save:
        """Counts a save; every rank calls it once for each."""
        with self._lock:
            self._num_saves += 1
            return Save(step, self._num_saves)

    def note_loaded(self, identity: Identity) -> None:
        """The state of this process is that of a checkpoint now: the next save begins a new attempt there."""
        with self._lock:
            self._loaded, self._word, self._committed = identity, None, None

    def begin(self, world_size: int, step: int) -> Word:
        """The coordinator's word for a save of `step`; begins the attempt at the first one.

        Raises:
            ConflictError: the run is live elsewhere, or has this step or a newer one already.
            UnavailableError: the store could not be asked.
        """
        with self._lock:
            catalog = self._open(create=True)
            if self._holder is None:
                self._holder = Holder(catalog.tier, local_path=local_path(self._url), timeouts=self._timeouts)
            self._check_step(catalog, step)
            if self._word is None or self._word.world_size != world_size:
                self._word = self._begin(catalog, world_size)
            return self._word

    def _begin(self, catalog: RunCatalog, world_size: int) -> Word:
        nonce = ids.random_id()
        epoch = catalog.next_epoch(
            {"by": ids.process_name(), "world_size": world_size, "nonce": nonce, "writer": "dcp"}
        )
        before = self._loaded or _newest_on_line(catalog)  # who loaded nothing adds beyond what is there
        restored: dict[str, Any] = {"step": 0, "epoch": 0, "identity": None}
        if before is not None:
            restored = {"step": before.step, "identity": before.to_json(), "tier": contract.TIER_BUCKET}
        catalog.record(epoch, "restored", restored)
        self._emit(catalog, "attempt_started", epoch, world_size=world_size, launcher="dcp")
        return Word(self._url, catalog.run_id, epoch, nonce, world_size)

    def _check_step(self, catalog: RunCatalog, step: int) -> None:
        """A save goes beyond what this attempt has: its own last step, what it loaded, or else the run's newest."""
        newest, whose = self._committed, "this attempt committed"
        if newest is None and self._loaded is not None:
            newest, whose = self._loaded.step, "this process loaded"
        if newest is None:
            found = _newest_on_line(catalog)
            newest, whose = None if found is None else found.step, "the run holds"
        if newest is not None and step <= newest:
            raise ConflictError(
                f"run {catalog.tier.url}: expected a save beyond step {newest}, which {whose}, found step {step}; load "
                "the step to go on from through RunStorageReader first, or save into another run"
            )

    def join(self, word: Word) -> RunCatalog:
        """The run, as the word names it.

        Raises:
            ConfigError: this rank sees another run at the same place.
        """
        with self._lock:
            catalog = self._open(create=False)
        if catalog.run_id != word.run:
            raise ConfigError(
                f"rank {word.rank}: {catalog.tier.url} is run {catalog.run_id} here, and run {word.run} in the plan of "
                "rank 0; name a run that all nodes share; a planner with enable_plan_caching keeps one run's plan for "
                "the next one"
            )
        return catalog

    def commit(
        self, save: Save, word: Word, reports: Sequence[dict[str, Any]], expected: Mapping[str, Chunks | None]
    ) -> None:
        """Proves what all ranks wrote and makes it a checkpoint.

        Raises:
            ConflictError: the ranks wrote for an attempt that has ended; nothing is committed.
            CorruptionError: it is not whole, or not what the planner says of it; nothing is committed.
            UnavailableError, DeadlineError: it could not be told; nothing is known to be committed.
        """
        with self._lock:
            catalog, current = self._open(create=False), self._word
        if current is None or (current.epoch, current.nonce) != (word.epoch, word.nonce):
            raise ConflictError(
                f"step {save.step}: the ranks wrote for the attempt of epoch {word.epoch}, which has ended since; "
                "nothing is committed; turn enable_plan_caching off, or load in a new process"
            )
        identity = Identity(word.run, save.step, word.epoch, word.world_size)
        drain = Drain(identity, SYSTEM_CLOCK.monotonic(), save.write_id(word))
        for report in reports:
            if report["write_id"] == drain.write_id:
                drain.add(RankFiles(**report["files"]), str(report["plan_digest"]))
        if not drain.complete():
            late = sorted(set(range(word.world_size)) - set(drain.files))
            raise CorruptionError(
                f"step {save.step}: ranks {late} wrote under another name than rank 0, or nothing; nothing is committed"
            )
        _check_content(catalog, drain, expected)
        faults = FaultPoints.from_environment(word.epoch)
        commit_drain(catalog, drain, clock=SYSTEM_CLOCK, faults=faults)
        self._note_committed(catalog, drain)

    def _note_committed(self, catalog: RunCatalog, drain: Drain) -> None:
        """Tells the run what the commit record says already; where that fails the checkpoint is there all the same."""
        identity = drain.identity
        with self._lock:
            self._committed = identity.step
            is_recorded = self._recorded == identity.epoch
        nbytes = sum(files.nbytes for files in drain.files.values())
        seconds = SYSTEM_CLOCK.monotonic() - drain.started_s
        fields = {"step": identity.step, "tier": contract.TIER_BUCKET, "nbytes": nbytes, "seconds": seconds}
        try:
            if not is_recorded:
                first = {"step": identity.step, "tier": contract.TIER_BUCKET}
                catalog.record(identity.epoch, "committed", first)
                catalog.record(identity.epoch, "durable", {"step": identity.step})
                with self._lock:
                    self._recorded = identity.epoch
            self._emit(catalog, "committed", identity.epoch, **fields)
        except (KtrainError, OSError) as error:
            _LOG.warning(
                "%s is committed; what is told of it beside its record could not be written: %s", identity, error
            )

    def _emit(self, catalog: RunCatalog, kind: str, epoch: int, **fields: Any) -> None:
        log = open_log(self._url, catalog.tier, timeouts=self._timeouts)
        log.emit(make(kind, epoch, **fields))
        log.close()

    def _open(self, *, create: bool) -> RunCatalog:
        if self._catalog is None:
            self._catalog = RunCatalog.open(self._url, timeouts=self._timeouts, create=create)
        return self._catalog

    def close(self) -> None:
        """Ends the attempt and lets go of the run. May be called again."""
        with self._lock:
            word, self._word, self._committed, self._loaded = self._word, None, None, None
            if word is not None and self._catalog is not None:
                try:
                    self._catalog.record(word.epoch, "end", {"outcome": "closed"})
                except KtrainError:
                    pass  # an attempt without an end is one whose process died: nothing rests on it
            if self._holder is not None:
                self._holder.close()
                self._holder = None
            if self._catalog is not None:
                self._catalog.tier.close()
                self._catalog = None


def _newest_on_line(catalog: RunCatalog) -> Identity | None:
    """The newest committed checkpoint on the run's line; None where there is none."""
    try:
        return choose_commit(catalog, None).identity
    except NotFoundError:
        return None


def _check_content(catalog: RunCatalog, drain: Drain, expected: Mapping[str, Chunks | None]) -> None:
    """What lies in the store is what the planner's metadata says, item by item."""
    found: dict[str, Chunks] = {}
    for rank in sorted(drain.files):
        name = drain.files[rank].manifest
        manifest = Manifest.from_bytes(catalog.tier.read(name, deadline=catalog.transfer_deadline(0)))
        for entry in manifest.entries:
            box = entry.shard.box
            found.setdefault(entry.shard.name, []).append((box.offsets, box.lengths))
    wrong = [
        fqn
        for fqn in {*found, *expected}
        if fqn not in found
        or fqn not in expected
        or (expected[fqn] is not None and sorted(found[fqn]) != expected[fqn])
    ]
    if wrong:
        raise CorruptionError(
            f"step {drain.identity.step}: what the ranks wrote is not what was planned, among it {sorted(wrong)[:5]}; "
            "nothing is committed"
        )


_attempts: dict[str, DcpAttempt] = {}  # by URL of the run
_lock = threading.Lock()


def attempt_of(url: str) -> DcpAttempt:
    """This process's attempt of a run; one for all writers of it."""
    with _lock:
        return _attempts.setdefault(url, DcpAttempt(url))


def note_loaded(url: str, identity: Identity) -> None:
    """Tells the writers of this process what its state is."""
    attempt_of(url).note_loaded(identity)


@atexit.register
def _close_all() -> None:
    for attempt in list(_attempts.values()):
        attempt.close()
