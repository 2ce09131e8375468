"""A cluster as a whole: its version, its clock, what it serves for jobs, the requirements of AI conformance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ktrain.launcher.backends.kubernetes.connect import Door
from ktrain.launcher.doctor import conformance
from ktrain.launcher.doctor.admission import look_at_jobset_controller
from ktrain.launcher.doctor.clocks import date_of_server, look_at_clock
from ktrain.launcher.doctor.finding import Check, Finding, Outcome, Report, run_checks
from ktrain.launcher.doctor.job import examine
from ktrain.launcher.doctor.looks import Looks, condition
from ktrain.launcher.spec import JobSpec


def look_at_cluster(looks: Looks, door: Door, *, has_job: bool) -> tuple[Finding, ...]:
    """What holds of a cluster whatever runs on it; with a job some of it is among the checks of the job."""
    checks = [
        Check("API server", lambda: _server(looks)),
        Check("clock of the API server", lambda: _clock(looks, door)),
    ]
    if not has_job:
        checks += [
            Check("JobSet", lambda: _jobset(looks)),
            Check("nodes", lambda: _nodes(looks)),
        ]
    return run_checks(checks)


def _clock(looks: Looks, door: Door) -> Iterator[Finding]:
    return look_at_clock("the API server", lambda: date_of_server(door), looks.client.clock)


def _server(looks: Looks) -> Iterator[Finding]:
    facts = looks.facts()
    version = "of a version that it does not tell" if facts.version is None else "{}.{}".format(*facts.version)
    if facts.served is None:
        yield Finding("API server", Outcome.UNKNOWN, f"Kubernetes {version}; what it serves may not be read")
    else:
        yield Finding("API server", Outcome.OK, f"Kubernetes {version}, {len(facts.served)} kinds of resources")


def _jobset(looks: Looks) -> Iterator[Finding]:
    if looks.facts().serves("jobset.x-k8s.io", "jobsets") is False:
        cost = "no job of ktrain can be sent to this cluster"
        yield Finding(
            "JobSet", Outcome.FAILED, "jobset.x-k8s.io is not served", cost, "have JobSet 0.8 or later set up"
        )
        return
    yield from look_at_jobset_controller(looks)


def _nodes(looks: Looks) -> Iterator[Finding]:
    nodes = looks.list("", "nodes")
    ready = [node for node in nodes if condition(node, "Ready") in (None, "True")]
    closed = sum(bool((node.get("spec") or {}).get("unschedulable")) for node in ready)
    said = f"{len(ready)} of {len(nodes)} nodes are ready{f', {closed} of them cordoned' if closed else ''}"
    if len(ready) > closed:
        yield Finding("nodes", Outcome.OK, said)
    else:
        yield Finding("nodes", Outcome.FAILED, said, "no pod starts", "look at `kubectl describe nodes`")


def report(
    looks: Looks,
    door: Door,
    spec: JobSpec | None,
    archive: bytes | None = None,
    more: Callable[[], tuple[Finding, ...]] = tuple,
) -> Report:
    """Everything that can be read; `more` finds what is not read of the cluster: its bucket, what tests show.

    Raises:
        UnavailableError: the API server is out of reach, or does not let this user in.
    """
    looks.client.get("/version")
    found = look_at_cluster(looks, door, has_job=spec is not None)
    found += () if spec is None else examine(looks, spec, archive)
    tests = more()
    return _with_conformance(looks, spec, (*found, *tests), tests)


def _with_conformance(
    looks: Looks, spec: JobSpec | None, findings: tuple[Finding, ...], tests: Iterable[Finding]
) -> Report:
    name, standings = conformance.stand(looks, tests)
    version = looks.facts().version
    notes = []
    if name is None:
        notes.append("the conformance programme begins with Kubernetes 1.33; this cluster is older")
    elif version is None or name != "{}.{}".format(*version):
        notes.append(f"conformance: held against the list of {name}, the newest that is known here for this cluster")
    known = "" if version is None else " {}.{}".format(*version)
    return Report(
        target=f"Kubernetes{known}, namespace {looks.namespace}",
        job=None if spec is None else spec.name,
        findings=findings,
        conformance=standings,
        conformance_source="" if name is None else f"{conformance.SOURCE} ({name})",
        notes=tuple(notes),
    )
