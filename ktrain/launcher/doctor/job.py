"""The checks of one job on one cluster: tried as `ktrain launch` would try it, then held against what is there."""

from __future__ import annotations

from collections.abc import Iterator

from ktrain.errors import ConfigError, ConflictError, DeadlineError, ForbiddenError, NotFoundError, UnavailableError
from ktrain.launcher import accelerators
from ktrain.launcher.backends.kubernetes.discover import discover
from ktrain.launcher.backends.kubernetes.submit import Tried, try_job
from ktrain.launcher.budget import grace_s
from ktrain.launcher.catalogue import providers
from ktrain.launcher.doctor import admission
from ktrain.launcher.doctor.finding import Check, Finding, Outcome, run_checks
from ktrain.launcher.doctor.looks import Looks
from ktrain.launcher.doctor.nodes import look_at_nodes, wanted_pods
from ktrain.launcher.doctor.rights import look_at_rights
from ktrain.launcher.explain import GANG_SCHEDULER, explain
from ktrain.launcher.quantity import GIB, format_bytes, show_bytes
from ktrain.launcher.render.job import Rendered, render
from ktrain.launcher.spec import JobSpec, Spot

_SHM_OF_A_WORKER = GIB
_CHANGE = "change the job as the message says"


def examine(looks: Looks, spec: JobSpec, archive: bytes | None = None) -> tuple[Finding, ...]:
    """All checks of a job. Nothing is created: objects are tried in dry runs, which no server stores."""
    findings, rendered = _try(looks, spec, archive)
    if rendered is None:
        return findings
    gang, wanted = rendered.gang, wanted_pods(spec, rendered)
    checks = (
        Check("permissions", lambda: look_at_rights(looks, rendered)),
        Check("pod security", lambda: admission.look_at_security(looks, spec)),
        Check("gang", lambda: admission.look_at_gang(looks, gang)),
        Check("JobSet controller", lambda: admission.look_at_jobset_controller(looks)),
        Check("queue", lambda: admission.look_at_queue(looks, gang, wanted)),
        Check("nodes", lambda: look_at_nodes(looks, spec, rendered)),
        Check("references", lambda: admission.look_at_references(looks, spec, gang)),
        Check("shm", lambda: _shm(spec)),
        Check("preemption notice", lambda: _notice(looks, spec)),
    )
    return (*findings, *run_checks(checks))


# The dry run


def _try(looks: Looks, spec: JobSpec, archive: bytes | None) -> tuple[tuple[Finding, ...], Rendered | None]:
    """What the dry run found, and the job as it is rendered for this cluster; None where it cannot be."""
    try:
        tried = try_job(looks.client, spec, archive)
    except ConflictError as error:
        remedy = "end that job, or give this one another name (--name)"
        finding = Finding("name", Outcome.FAILED, str(error), "the submission is refused", remedy)
    except ConfigError as error:
        finding = Finding("dry run", Outcome.FAILED, str(error), "the submission is refused", _CHANGE)
    except NotFoundError as error:
        remedy = f"have the namespace {spec.namespace} made, or name another (--namespace)"
        finding = Finding("dry run", Outcome.FAILED, str(error), "the submission is refused", remedy)
    except ForbiddenError as error:
        finding = _refused(str(error))
    except (UnavailableError, DeadlineError) as error:
        finding = Finding("dry run", Outcome.UNKNOWN, f"no answer: {error}", remedy="try again")
    else:
        return tuple(_told(spec, tried)), tried.rendered
    try:
        return (finding,), render(spec, discover(looks.client, spec))
    except (UnavailableError, DeadlineError):
        return (finding,), None
    except ConfigError as error:
        if finding.check == "dry run" and finding.outcome is Outcome.FAILED:
            return (finding,), None  # the same words again
        return (finding, Finding("dry run", Outcome.FAILED, str(error), "the submission is refused", _CHANGE)), None


def _refused(text: str) -> Finding:
    found = admission.refused(text)
    return (
        found if found is not None else Finding("dry run", Outcome.UNKNOWN, f"the objects could not be tried: {text}")
    )


def _told(spec: JobSpec, tried: Tried) -> Iterator[Finding]:
    """What the dry run lost, and the features without which a recovery costs more."""
    whole = True
    for item in tried.found:
        if item.unknown is not None:
            whole = False
            yield _refused(f"{item.kind} {item.name}: {item.unknown}")
        for lost in item.lost:
            whole = False
            said = f"{item.kind} {item.name}: {lost.path} does not come back"
            yield Finding("fields", Outcome.WARNING, said, lost.cost or "what rests on it does not happen")
    if whole:
        yield Finding("fields", Outcome.OK, "a dry run of every object came back whole")
    for missing in explain(spec, tried.facts, tried.rendered).missing:
        if missing.feature == GANG_SCHEDULER or missing.is_extra:
            continue  # the check of the gang says the one; the job does not ask for the others
        outcome = Outcome.WARNING if missing.is_known else Outcome.UNKNOWN
        said = "is not there" if missing.is_known else "was not seen, nor its absence"
        yield Finding("features", outcome, f"{missing.feature} {said}", missing.cost)


# What the job asks for itself


def _shm(spec: JobSpec) -> Iterator[Finding]:
    least = _SHM_OF_A_WORKER * spec.num_workers
    said = f"/dev/shm of {show_bytes(spec.resources.shm)} for {spec.num_workers} workers of a node"
    if spec.resources.shm >= least:
        yield Finding("shm", Outcome.OK, said)
        return
    cost = "loaders with worker processes pass batches through it; full, they end with a bus error"
    yield Finding("shm", Outcome.WARNING, said, cost, f"--set resources.shm={format_bytes(least)}")


def _notice(looks: Looks, spec: JobSpec) -> Iterator[Finding]:
    """How long a pod has from the word of its end, against the time that its state takes to the bucket."""
    flush_s = spec.memory.state / spec.saving.bucket_bytes_per_s
    takes = f"a node's state takes {flush_s:.0f} s to the bucket at {show_bytes(spec.saving.bucket_bytes_per_s)}/s"
    if spec.placement.spot is Spot.NONE or spec.placement.provider is None:
        yield from _spot_nodes(looks)
        yield Finding("preemption notice", Outcome.OK, f"no spot nodes asked for; grace {grace_s(spec)} s, {takes}")
        return
    provider = accelerators.find_provider(spec.placement.provider)
    said = f"{provider.name} gives {provider.notice_s} s, {takes}"
    if flush_s <= provider.notice_s:
        yield Finding("preemption notice", Outcome.OK, said)
        return
    cost = "where all nodes are taken at once, the job goes back to the newest step that was in the bucket before"
    remedy = "drain more often, keep a replica in memory (memory.replicas), or mix in nodes that are not spot"
    yield Finding("preemption notice", Outcome.WARNING, said, cost, remedy)


def _spot_nodes(looks: Looks) -> Iterator[Finding]:
    """Nodes that bear a provider's mark of spot although the job asked for none, and are open to any pod."""
    nodes = looks.list("", "nodes")
    open_ones = [node for node in nodes if not (node.get("spec") or {}).get("taints")]
    labels = [node["metadata"].get("labels") or {} for node in open_ones]
    for provider in providers().values():
        count = sum(each.get(provider.label) == provider.value for each in labels)
        if count:
            said = f"{count} of {len(nodes)} nodes are {provider.name} spot nodes, and open to any pod"
            cost = f"pods may land there, and are taken back with {provider.notice_s} s of notice"
            remedy = f"--set placement.spot=workers --set placement.provider={provider.name}, or select other nodes"
            yield Finding("spot nodes", Outcome.WARNING, said, cost, remedy)
