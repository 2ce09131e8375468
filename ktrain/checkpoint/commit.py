"""Making a checkpoint exist in the bucket: prove that every rank's files are there, then write the record last.

The failures that this order answers (ADR 0003): a writer dies in mid payload (no report, no record); a reply is lost
(read back); two heads commit the same step (names differ by epoch and write id, either record is true); the record is
torn (it does not parse, another try has another name); this head slept while another one removed its files (ADR 0012).
"""

from __future__ import annotations

from collections.abc import Mapping

from ktrain.base.clock import Clock
from ktrain.base.faults import FaultPoints
from ktrain.checkpoint.catalog import RunCatalog, commit_path
from ktrain.checkpoint.drain import Drain
from ktrain.checkpoint.marks import doomed_name, write_of
from ktrain.errors import ConflictError, CorruptionError, NotFoundError
from ktrain.format import record as records
from ktrain.format.digest import join_digests
from ktrain.format.record import CommitRecord


def commit_drain(
    catalog: RunCatalog, drain: Drain, *, clock: Clock, faults: FaultPoints, metrics: Mapping[str, float] | None = None
) -> CommitRecord:
    """Proves that what the ranks reported is in the store, complete, and writes the commit record.

    Every manifest is read back and compared with the digest that its rank reported; every payload must be listed
    with its full size; together the manifests must cover every tensor. `metrics` of the step go into the record.

    Raises:
        ConflictError: a collector took the files for an upload that nobody finishes; this commit does not count.
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
        origin={"metrics": dict(metrics)} if metrics else {},
        format=catalog.format,
    )
    prove(catalog, commit)
    faults.reached("commit.begin", step=identity.step)
    if not (drain.is_adopted and _is_written(catalog, commit)):
        catalog.write_commit(commit)
    require_untouched(catalog, commit)
    faults.reached("commit.record", step=identity.step)
    return commit


def _is_written(catalog: RunCatalog, commit: CommitRecord) -> bool:
    """Whether the head that began this drain has committed it: what is good is never written again."""
    try:
        found = catalog.read_commit(commit_path(commit))
    except (NotFoundError, CorruptionError):
        return False
    return (found.identity, found.ranks) == (commit.identity, commit.ranks)


def prove(catalog: RunCatalog, commit: CommitRecord) -> None:
    """Every payload is listed with its size, every manifest and the plan are those of the record, all is covered."""
    _require_payloads(catalog, commit)
    manifests = [catalog.read_manifest(commit, files) for files in commit.ranks]
    records.check_plan(commit, [manifest.plan_digest for manifest in manifests])
    records.check_coverage(manifests)


def require_untouched(catalog: RunCatalog, commit: CommitRecord) -> None:
    """The record is there: now whoever collects sees it, or has left its mark, or has removed files (ADR 0012)."""
    mark = doomed_name(write_of(commit))
    try:
        catalog.tier.read(mark, deadline=catalog.transfer_deadline(0))
    except NotFoundError:
        _require_payloads(catalog, commit)
        return
    raise ConflictError(f"commit of {commit.identity}: {mark} is there, its files are being removed; drain it again")


def _require_payloads(catalog: RunCatalog, commit: CommitRecord) -> None:
    folder = commit.ranks[0].payload.rpartition("/")[0]
    sizes = {stored.name: stored.nbytes for stored in catalog.tier.list(folder, deadline=catalog.transfer_deadline(0))}
    for files in commit.ranks:
        if sizes.get(files.payload) != files.nbytes:
            raise CorruptionError(
                f"checkpoint of step {commit.identity.step}: expected {files.nbytes} bytes in {files.payload}, "
                f"found {sizes.get(files.payload, 'no such object')}"
            )
