"""Where `ktrain history` has its rows from: records and events of the run, and what the cluster shows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ktrain.base import settings
from ktrain.base.job import canonical_url
from ktrain.checkpoint.catalog import AttemptRecord, RunCatalog
from ktrain.cli.history import join
from ktrain.cli.status import read_events
from ktrain.errors import ConfigError, KtrainError, NotFoundError
from ktrain.jobs import run_records
from ktrain.launcher.backends.kubernetes.submission import Submission

if TYPE_CHECKING:
    from ktrain.train.report import AttemptRow

_T = TypeVar("_T")
_STANDS = {"succeeded": "done", "stopped": "cancelled"}  # as a cluster's states call it


def of_run(run: str) -> dict[str, Any]:
    """What the run itself has kept.

    Raises:
        NotFoundError: there is no such run.
        KtrainError: it could not be asked.
    """
    run = canonical_url(run)
    records = run_records.read_all(run)
    attempts = _attempts(run)
    if not records and not attempts:
        raise NotFoundError(f"run {run}: it knows of no submission and of no attempt; check the name")
    return _value(run, records, attempts, {}, [])


def of_cluster(target: str, namespace: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the cluster and the run know together. What one of them would not tell is said and costs nothing else.

    Raises:
        NotFoundError: neither knows it.
        ForbiddenError: JobSets may not be read here.
    """
    from ktrain.cli import cluster_run
    from ktrain.launcher.backends.kubernetes import stored
    from ktrain.launcher.backends.kubernetes.find import is_of_run, is_url
    from ktrain.launcher.backends.kubernetes.resume import is_ticket_of
    from ktrain.launcher.backends.kubernetes.status import assess, run_of
    from ktrain.launcher.backends.kubernetes.view import list_jobsets, look
    from ktrain.launcher.spec import default_name

    client = cluster_run.client_of(given)
    run = canonical_url(target) if is_url(target) else None
    unknown: list[str] = []
    shown: list[Submission] = []
    stands: dict[str, Mapping[str, Any]] = {}
    names: list[str] = []
    for jobset in list_jobsets(client, namespace):
        if jobset["metadata"]["name"] != target and (run is None or not is_of_run(jobset, run)):
            continue
        names.append(jobset["metadata"]["name"])
        run = run or run_of(jobset)
        status = assess(look(client, namespace, jobset["metadata"]["name"]))
        found = _told(lambda: stored.try_read_submission(client, jobset), unknown)  # noqa: B023 -- called at once
        if found is not None:
            shown.append(found)
            stands[found.id] = {
                "state": status.state.value,
                "exit_code": status.exit_code,
                "message": status.message,
                "restarts": status.restarts,
            }
    for name in names or {default_name(run) if run is not None else target}:
        ticket = _told(lambda: stored.try_read_ticket(client, namespace, name), unknown)  # noqa: B023 -- called at once
        if ticket is None or ticket.id in stands or (run is not None and not is_ticket_of(ticket, run)):
            continue
        run = run or str(ticket.spec["run"])
        shown.append(ticket)
        stands[ticket.id] = {"state": "cut off"}
    records, attempts = _told_by_run(run, unknown)
    known = {item.id for item in records}
    everything = [*records, *(item for item in shown if item.id not in known)]
    if not everything and not attempts:
        said = "".join(f" ({text})" for text in unknown)
        raise NotFoundError(f"namespace {namespace}: there is no job {target!r} with a history{said}")
    return _value(run, everything, attempts, stands, unknown)


def _told(ask: Callable[[], _T], unknown: list[str]) -> _T | None:
    try:
        return ask()
    except KtrainError as error:
        unknown.append(str(error))
        return None


def _told_by_run(run: str | None, unknown: list[str]) -> tuple[list[Submission], list[dict[str, Any]]]:
    if run is None:
        unknown.append("of which run the job is")
        return [], []
    try:
        return run_records.read_all(run), _attempts(run)
    except KtrainError as error:
        unknown.append(f"what the run has kept: {error}")
        return [], []


def _value(
    run: str | None,
    records: Sequence[Submission],
    attempts: Sequence[Mapping[str, Any]],
    stands: Mapping[str, Mapping[str, Any]],
    unknown: Sequence[str],
) -> dict[str, Any]:
    ends = {str(item.before["id"]): item.before for item in records if item.before is not None}
    ends |= stands  # of the job that is there the cluster's word is the newest
    last = attempts[-1] if attempts else None
    rows = [_submission(item, ends.get(item.id) or _of_attempt(item, last)) for item in records]
    submissions, others = join(rows, attempts)
    return {"run": run, "submissions": submissions, "attempts": others, "unknown": list(unknown)}


def _of_attempt(record: Submission, last: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """How a submission ended of which no cluster tells any more: as the run's last attempt did, if that is its own."""
    if last is None or record.launch is None or last["launch"] != record.launch or last["ended"] is None:
        return {}
    return {"state": _STANDS.get(last["ended"])}


def _submission(record: Submission, end: Mapping[str, Any]) -> dict[str, Any]:
    version = (record.facts or {}).get("version")
    gang = record.gang or {}
    return {
        "number": record.number,
        "id": record.id,
        "job": record.spec.get("name"),
        "time": record.time,
        "kubernetes": ".".join(map(str, version)) if version else None,
        "gang": " ".join(str(gang[key]) for key in ("kind", "native") if gang.get(key)) or None,
        "nodes": _num_nodes(record),
        "outcome": end.get("state"),
        "exit_code": end.get("exit_code"),
        "restarts": end.get("restarts", 0),
        "message": end.get("message"),
        "changes": list(record.changes),
        "launch": record.launch,
    }


def _num_nodes(record: Submission) -> int | None:
    with contextlib.suppress(ConfigError):
        return record.job.num_nodes
    return None


# Attempts


def _attempts(run: str) -> list[dict[str, Any]]:
    """The run's attempts, oldest first; none where there is no such run yet."""
    try:
        catalog = RunCatalog.open(run, timeouts=settings.timeouts(), create=False)
    except NotFoundError:
        return []
    with contextlib.closing(catalog.tier):
        records = catalog.attempts()
    try:
        events = read_events(run)
    except NotFoundError:
        events = []
    from ktrain.train.report import Report

    rows = {row.number: row for row in Report.from_events(events).attempts}
    return [_attempt(record, rows.get(record.epoch)) for record in records]


def _attempt(record: AttemptRecord, row: AttemptRow | None) -> dict[str, Any]:
    start = record.start or {}
    nodes = start.get("nodes")
    return {
        "attempt": record.epoch,
        "time": start.get("time"),
        "nodes": len(nodes) if nodes is not None else None,
        "restored_from": None if row is None else row.restored_tier,
        "step": record.restored_step if row is None else row.restored_step,
        "steps_lost": None if row is None else row.steps_lost,
        "steps": None if row is None else row.num_steps,
        "ended": None if row is None or row.ended == "running" else row.ended,
        "launch": start.get("launch"),
    }
