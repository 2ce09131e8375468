"""Making a checkpoint exist in the bucket: prove that every rank's files are there, then write the record last.

The failures that this order answers (ADR 0003): a writer dies in mid payload (no report, no record); a reply is lost
(read back); two heads commit the same step (names differ by epoch and write id, either record is true); the record is
torn (it does not parse, another try has another name).
"""

from __future__ import annotations

from collections.abc import Callable

from ktrain.base.clock import Clock
from ktrain.base.faults import FaultPoints
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.drain import Drain
from ktrain.checkpoint.lineage import on_line
from ktrain.checkpoint.policy import superseded
from ktrain.errors import CorruptionError, KtrainError
from ktrain.format import record as records
from ktrain.format.digest import join_digests
from ktrain.format.manifest import Identity
from ktrain.format.record import CommitRecord


def commit_drain(catalog: RunCatalog, drain: Drain, *, clock: Clock, faults: FaultPoints) -> CommitRecord:
    """Proves that what the ranks reported is in the store, complete, and writes the commit record.

    Every manifest is read back and compared with the digest that its rank reported; every payload must be listed
    with its full size; together the manifests must cover every tensor.

    Raises:
        CorruptionError: something that was reported is not there or not whole; nothing is committed.
        UnavailableError, DeadlineError: the store cannot be asked; nothing is known to be committed.
    """
    identity = drain.identity
    ranks = tuple(drain.files[rank] for rank in sorted(drain.files))
    commit = CommitRecord(
        identity=identity,
        write_id=drain.write_id,
        plan_digest=join_digests([drain.plan_digests[files.rank] for files in ranks]),
        ranks=ranks,
        time=clock.wall(),
        origin={},
    )
    _prove(catalog, commit)
    faults.reached("commit.begin", step=identity.step)
    catalog.write_commit(commit)
    faults.reached("commit.record", step=identity.step)
    return commit


def _prove(catalog: RunCatalog, commit: CommitRecord) -> None:
    """Every payload is listed with its size, every manifest is the one of the record, every tensor is covered."""
    folder = commit.ranks[0].payload.rpartition("/")[0]
    sizes = {stored.name: stored.nbytes for stored in catalog.tier.list(folder, deadline=catalog.transfer_deadline(0))}
    for files in commit.ranks:
        if sizes.get(files.payload) != files.nbytes:
            raise CorruptionError(
                f"checkpoint of step {commit.identity.step}: expected {files.nbytes} bytes in {files.payload}, "
                f"found {sizes.get(files.payload, 'no such object')}"
            )
    records.check_coverage([catalog.read_manifest(commit, files) for files in commit.ranks])


def _nothing(identity: Identity) -> bool:
    del identity
    return False


def collect(catalog: RunCatalog, *, keep: int, spared: Callable[[Identity], bool] = _nothing) -> list[CommitRecord]:
    """Removes committed checkpoints beyond the newest `keep` on the line; returns what was removed.

    Only data named by a valid record of this run is ever removed. What is off the line, torn, foreign or unknown
    stays, and so does what is `spared` (steps that are set aside), which does not count among the newest either.
    Nothing is removed before the newest one that stays was found in the store, whole and covered.
    """
    commits = catalog.listing().commits
    attempts = catalog.attempts()
    line = [commit for commit in commits if on_line(commit.identity, attempts) and not spared(commit.identity)]
    by_key: dict[tuple[int, int], list[CommitRecord]] = {}
    for commit in line:
        by_key.setdefault((commit.identity.step, commit.identity.epoch), []).append(commit)
    doomed = superseded(list(by_key), keep)
    if not doomed:
        return []
    newest = line[-1]
    try:
        _prove(catalog, newest)
    except KtrainError:
        return []  # the newest cannot be proven now, so the older ones are what is left
    removed = [commit for key in doomed for commit in by_key[key]]
    for commit in removed:
        catalog.delete(commit)
    return removed
