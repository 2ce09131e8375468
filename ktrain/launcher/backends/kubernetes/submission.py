"""One submission of a job: what was sent, for which cluster, and how the one before it had ended (ADR 0040). Pure.

It lies in the job's ConfigMap while the job is there, in a ticket while the job is replaced, and in the run for good.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ktrain.base import ids
from ktrain.errors import ConfigError
from ktrain.launcher import spec_file
from ktrain.launcher.facts import ClusterFacts
from ktrain.launcher.gang import COSCHEDULING_GROUP, KAI_GROUP, KUEUE_GROUP, NATIVE_GROUP, VOLCANO_GROUP, Gang
from ktrain.launcher.scope import choose_scope
from ktrain.launcher.spec import JobSpec

FORMAT = 1
TOKEN_NBYTES = 32
_TOLD = (  # of these groups it is remembered what was served; a cluster may serve thousands of others
    KUEUE_GROUP, NATIVE_GROUP, VOLCANO_GROUP, KAI_GROUP, COSCHEDULING_GROUP, "jobset.x-k8s.io", "resource.k8s.io",
    "resource.nvidia.com",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A job as it was sent once. Values are those of JSON; secrets are references, as in the job's specification."""

    id: str  # the stamp of the objects that it made
    number: int  # among the submissions of the job, from 1
    time: float  # seconds since 1970 on the sender's clock: for people, never compared
    spec: Mapping[str, Any]
    launch: str | None = None  # by which the run's attempts name it
    facts: Mapping[str, Any] | None = None  # None: not known, it was sent by an older ktrain
    gang: Mapping[str, Any] | None = None
    changes: tuple[str, ...] = ()  # since the one before, in words
    before: Mapping[str, Any] | None = None  # the one before: id, number, state, exit_code, message, restarts

    @property
    def job(self) -> JobSpec:
        """The job, checked again.

        Raises:
            ConfigError: this version cannot run it.
        """
        try:
            return spec_file.from_value(self.spec)
        except ConfigError as error:
            raise ConfigError(
                f"submission {self.number} of {self.spec.get('name')}: {error}; it may be of another version of ktrain"
            ) from error

    def to_value(self) -> dict[str, Any]:
        """As a JSON value."""
        return {
            "format": FORMAT,
            "id": self.id,
            "number": self.number,
            "time": self.time,
            "launch": self.launch,
            "gang": self.gang,
            "facts": self.facts,
            "changes": list(self.changes),
            "before": self.before,
            "spec": self.spec,
        }

    @classmethod
    def from_value(cls, value: Any) -> Submission:
        """The submission of a JSON value; fields that a newer ktrain added are left out.

        Raises:
            ConfigError: it is none, or of a newer format.
        """
        if not isinstance(value, dict) or not isinstance(value.get("format"), int):
            raise ConfigError("submission: expected an object with a format, found something else")
        if value["format"] > FORMAT:
            raise ConfigError(f"submission: written in format {value['format']}, this ktrain knows up to {FORMAT}")
        try:
            return cls(
                id=str(value["id"]),
                number=int(value["number"]),
                time=float(value["time"]),
                spec=dict(value["spec"]),
                launch=value.get("launch"),
                facts=value.get("facts"),
                gang=value.get("gang"),
                changes=tuple(value.get("changes") or ()),
                before=value.get("before"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"submission: it lacks a part or has a wrong one: {error!r}") from error


@dataclass(frozen=True, slots=True)
class Sending:
    """A submission that is about to be made, with the run's new token, which is written nowhere but in a Secret."""

    submission: Submission
    token: str = field(repr=False)


def new_sending(
    spec: JobSpec,
    facts: ClusterFacts,
    gang: Gang,
    *,
    time: float,
    after: Submission | None = None,
    ended: Mapping[str, Any] | None = None,
) -> Sending:
    """A submission with a fresh id and token.

    `after` is the one that it goes on from, and `ended` how that one ended; None: it never came to be, so that what it
    knew of the one before it holds for this one too.
    """
    said: tuple[str, ...] = () if after is None else changes(after, spec, facts, gang)
    before: Mapping[str, Any] | None = None
    if after is not None and ended is None:
        said, before = tuple(dict.fromkeys((*after.changes, *said))), after.before
    elif after is not None:
        before = {"id": after.id, "number": after.number, **(ended or {})}
    token = ids.random_id(TOKEN_NBYTES)
    made = Submission(
        id=ids.random_id(),
        number=1 if after is None else after.number + 1,
        time=time,
        launch=ids.text_digest(f"launch {token}"),  # as its pods derive it (ADR 0038)
        spec=spec_file.to_value(spec),
        facts=_remembered(facts),
        gang={"kind": gang.kind.value, "reason": gang.reason, "queue": gang.queue, "native": gang.native_version},
        changes=said,
        before=before,
    )
    return Sending(made, token)


def _remembered(facts: ClusterFacts) -> dict[str, Any]:
    found = facts.to_value()
    if "served" in found:
        found["served"] = [name for name in found["served"] if name.partition("/")[0] in _TOLD]
    return found


# What changed, in words

_FIELDS = {
    "restart_rules": "restart rules of containers",
    "scheduling_group": "the pods' schedulingGroup",
    "message_patterns": "message patterns of failure rules",
    "image_volumes": "image volumes",
}
_LOST = {
    "restart_rules": "a suspected node is no longer replaced alone",
    "scheduling_group": "there is no native gang",
    "message_patterns": "a disruption counts as a restart",
    "image_volumes": "code cannot come as an image",
}


def changes(before: Submission, spec: JobSpec, facts: ClusterFacts, gang: Gang) -> tuple[str, ...]:
    """What is otherwise than at a submission: the job's fields, the cluster, the gang. Nothing is said twice."""
    return (
        *_job_changes(before.spec, spec_file.to_value(spec), ""),
        *_cluster_changes(before, facts),
        *_scope(before, spec, facts),
        *_gang(before, gang),
    )


def _job_changes(old: Any, new: Any, path: str) -> list[str]:
    if isinstance(old, Mapping | None) and isinstance(new, Mapping | None) and old != new:
        old, new = old or {}, new or {}
        names = sorted({*old, *new})
        return [
            line
            for name in names
            for line in _job_changes(old.get(name), new.get(name), f"{path}.{name}" if path else name)
        ]
    if old == new:
        return []
    return [f"{path}: {_shown(old)} -> {_shown(new)}"]


def _shown(value: Any) -> str:
    return "the default" if value is None else str(value) if isinstance(value, str | int | float) else repr(value)


def _cluster_changes(before: Submission, facts: ClusterFacts) -> list[str]:
    old, new = _try_facts(before.facts), facts
    if old is None:
        return [f"nothing is known of the cluster of submission {before.number}"]
    said = []
    if None not in (old.version, new.version) and old.version != new.version:
        said.append(f"the cluster answers as Kubernetes {_version(new)}, it was {_version(old)}")
    said += _served_changes(
        old.served, frozenset(_remembered(new).get("served", ())) if new.served is not None else None
    )
    for name, words in _FIELDS.items():
        was, now = getattr(old, name), getattr(new, name)
        if was != now:
            cost = f": {_LOST[name]}" if was and not now else ""
            said.append(f"{words}: {_kept(now)}, it was {_kept(was)}{cost}")
    return said


def _try_facts(value: Mapping[str, Any] | None) -> ClusterFacts | None:
    """The facts; None where an older ktrain left none, or a newer one others than this one knows."""
    try:
        return None if value is None else ClusterFacts.from_value(value)
    except ConfigError:
        return None


def _version(facts: ClusterFacts) -> str:
    return "?" if facts.version is None else ".".join(map(str, facts.version))


def _kept(value: bool | None) -> str:
    return {True: "kept", False: "dropped", None: "not known"}[value]


def _served_changes(old: frozenset[str] | None, new: frozenset[str] | None) -> list[str]:
    """By version of a group: that is what appears and disappears when a cluster is upgraded or rolled back."""
    if old is None or new is None:
        return [] if old == new else [f"what the cluster serves is {'not ' if new is None else ''}known now"]
    was, now = ({name.rpartition("/")[0] for name in served} for served in (old, new))
    gone = [f"{name} is no longer served" for name in sorted(was - now)]
    return [*gone, *(f"{name} is served now" for name in sorted(now - was))]


def _scope(before: Submission, spec: JobSpec, facts: ClusterFacts) -> list[str]:
    """What the memory tier belongs to decides what a new pod finds, so `auto` is compared by what it chose."""
    old = _try_facts(before.facts)
    if old is None:
        return []
    now = choose_scope(spec, facts)
    try:
        was = choose_scope(before.job, old)
    except ConfigError:  # a specification of another version
        return []
    return [] if was.scope is now.scope else [f"memory tier: {now.scope.value}, it was {was.scope.value}: {now.reason}"]


def _gang(before: Submission, gang: Gang) -> list[str]:
    if before.gang is None:
        return []
    old = _mechanism(before.gang.get("kind"), before.gang.get("native"), before.gang.get("queue"))
    new = _mechanism(gang.kind.value, gang.native_version, gang.queue)
    return [] if old == new else [f"gang {new}, it was {old}: {gang.reason}"]


def _mechanism(kind: Any, native: Any, queue: Any) -> str:
    return " ".join([str(kind), *([str(native)] if native else []), *([f"({queue})"] if queue else [])])
