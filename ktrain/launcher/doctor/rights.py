"""Whether this user may do what a job takes, asked of the server itself and not guessed from roles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ktrain.launcher.backends.kubernetes.client import path_of
from ktrain.launcher.backends.kubernetes.submit import object_path
from ktrain.launcher.doctor.finding import Finding, Outcome
from ktrain.launcher.doctor.looks import Looks
from ktrain.launcher.render.job import Rendered

_REVIEWS = path_of("authorization.k8s.io/v1", "selfsubjectaccessreviews")


@dataclass(frozen=True, slots=True, order=True)
class Right:
    """One verb on one kind; `resource` may name a part of it, as in `pods/log`."""

    group: str
    resource: str
    verb: str

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}{f'.{self.group}' if self.group else ''}"


_JOBSETS = ("jobset.x-k8s.io", "jobsets")
_FOLLOW = (
    *(Right(*_JOBSETS, verb) for verb in ("get", "list", "watch")),
    *(Right("", "pods", verb) for verb in ("get", "list")),
    Right("", "pods/log", "get"),
    Right("", "events", "list"),
    Right("", "configmaps", "get"),
    Right("batch", "jobs", "list"),
)
_ACTIVE = (Right("", "namespaces", "create"), Right("", "namespaces", "delete"))


def needed(rendered: Rendered) -> tuple[Right, ...]:
    """What submitting, releasing and undoing this very job takes, and the pods of its dry run."""
    kinds = {(_group(obj["apiVersion"]), object_path(obj).split("/")[-2]) for obj in rendered.objects}
    kinds |= {("", "secrets"), ("", "pods")}
    rights = {Right(group, plural, "create") for group, plural in kinds}
    owned = kinds - {("", "pods")}
    rights |= {Right(group, plural, verb) for group, plural in owned for verb in ("get", "delete")}
    return tuple(sorted({*rights, Right(*_JOBSETS, "patch"), Right("", "pods", "get")}))


def look_at_rights(looks: Looks, rendered: Rendered) -> Iterator[Finding]:
    """The rights that a submission takes, and those of following it."""
    wanted = needed(rendered)
    lacking = [right for right in wanted if not may(looks, right, looks.namespace)]
    if lacking:
        yield Finding(
            "permissions",
            Outcome.FAILED,
            f"in namespace {looks.namespace} this user may not {', '.join(map(str, lacking))}",
            "the job is refused before anything of it is created",
            "have a Role with these verbs bound to you in that namespace",
        )
    else:
        yield Finding("permissions", Outcome.OK, f"all {len(wanted)} rights that the submission takes")
    blind = [right for right in _FOLLOW if right not in wanted and not may(looks, right, looks.namespace)]
    if blind:
        yield Finding(
            "permissions to follow",
            Outcome.WARNING,
            f"this user may not {', '.join(map(str, blind))}",
            "the job runs, and `ktrain status`, `logs` or `events` show less of it",
            "have these verbs added to the Role",
        )


def lacking_for_tests(looks: Looks) -> list[Right]:
    """Which of the rights that the active tests take this user lacks."""
    return [right for right in _ACTIVE if not may(looks, right, None)]


def may(looks: Looks, right: Right, namespace: str | None) -> bool:
    """Asks the server; the review is an answer, and nothing is stored."""
    resource, _, part = right.resource.partition("/")
    asked = {"group": right.group, "resource": resource, "verb": right.verb}
    asked |= {} if namespace is None else {"namespace": namespace}
    asked |= {"subresource": part} if part else {}
    body = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": asked},
    }
    return bool(looks.client.create(_REVIEWS, body)["status"]["allowed"])


def _group(api_version: str) -> str:
    return api_version.rpartition("/")[0]
