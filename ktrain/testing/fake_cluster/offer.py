"""What a cluster offers: its version, the API versions and custom resources that it serves, its feature gates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ktrain.errors import ConfigError
from ktrain.launcher.cluster import resources as known
from ktrain.launcher.cluster.resources import Resource
from ktrain.testing.fake_cluster import gates
from ktrain.testing.fake_cluster.schemas import Definition, Schema, core_schema, metadata_schema, read_definition

ACCESS_REVIEW = Resource("authorization.k8s.io", "v1", "selfsubjectaccessreviews", "SelfSubjectAccessReview", False)
RULES_REVIEW = Resource("authorization.k8s.io", "v1", "selfsubjectrulesreviews", "SelfSubjectRulesReview", False)

_STABLE = "v1"
_KUEUE = (known.CLUSTER_QUEUE, known.KUEUE_WORKLOAD, known.LOCAL_QUEUE, known.RESOURCE_FLAVOR, known.TOPOLOGY)
_VOLCANO = (known.VOLCANO_POD_GROUP, known.VOLCANO_QUEUE)
_GROUPS = (  # Kubernetes' own in the order in which a server lists them; custom ones follow by name
    "authentication.k8s.io",
    "authorization.k8s.io",
    "batch",
    "networking.k8s.io",
    "policy",
    "rbac.authorization.k8s.io",
    "storage.k8s.io",
    "apiextensions.k8s.io",
    "scheduling.k8s.io",
    "coordination.k8s.io",
    "resource.k8s.io",
)
_NOT_SERVED = (known.EVENT_V1, known.BINDING)  # events are served in the core group alone, pods are bound by the store


@dataclass(frozen=True, slots=True)
class Offer:
    """A cluster as its administrator set it up. Immutable; `FakeCluster.offer` changes to another one.

    `version` is Kubernetes' ("1.36", "1.36.2"), `jobset` that of JobSet's CRD ("0.12.0"), None without it. `apis` are
    the alpha and beta versions that are switched on ("scheduling.k8s.io/v1alpha2"); they are served where the
    version of Kubernetes has them. `gates` are the feature gates set by hand. `more` names further CRD files without
    their suffix. `toleration_s` is how long pods stay on a lost node unless they say so themselves.
    """

    version: str = "1.36"
    jobset: str | None = "0.12.0"
    kueue: bool = False
    volcano: bool = False
    coscheduling: bool = False
    kai: bool = False
    apis: frozenset[str] = frozenset()
    gates: Mapping[str, bool] = field(default_factory=dict)
    more: tuple[str, ...] = ()
    toleration_s: int = 300

    @property
    def minor(self) -> int:
        try:
            major, minor = self.version.split(".")[:2]
            if major == "1":
                return int(minor)
        except ValueError:
            pass
        raise ConfigError(f"fake cluster: version {self.version!r}, expected 1.MINOR such as 1.36")


class Served:
    """The resources of an offer and their schemas. Immutable.

    `crds` is the folder of the CRDs' files. Without it custom resources are served without a schema: nothing of them
    is pruned, defaulted or refused.
    """

    def __init__(self, offer: Offer, crds: Path | None) -> None:
        self.offer = offer
        self.gates = gates.are_on(offer.minor, offer.gates)
        self.metadata = metadata_schema(offer.minor)
        self.definitions: list[Definition] = []
        self._resources: dict[tuple[str, str], Resource] = {}  # by api version and plural
        self._schemas: dict[tuple[str, str], Schema] = {}
        for resource in _core_resources(offer):
            schema = core_schema(offer.minor, resource)
            self._add(resource, schema)
        if crds is None:
            for resource in _custom_resources(offer):
                self._add(resource, None)
        else:
            for name in _files(offer, crds):
                self._define(read_definition(crds / f"{name}.yaml"))
            if offer.kai:  # nobody writes its groups but KAI itself
                self._add(known.KAI_POD_GROUP, None)

    def __iter__(self) -> Iterator[Resource]:
        return iter(self._resources.values())

    def find(self, api_version: str, plural: str) -> Resource | None:
        return self._resources.get((api_version, plural))

    def versions(self, group: str) -> list[str]:
        """The versions of a group, the one that clients should prefer first; empty for a group that is not served."""
        found = {resource.version for resource in self if resource.group == group}
        return sorted(found, key=_priority)

    def groups(self) -> list[str]:
        """The names of the groups, without the core group, in the order in which they are listed."""
        found = {resource.group for resource in self if resource.group}
        own = [group for group in _GROUPS if group in found]
        return own + sorted(found - set(own))

    def schema(self, resource: Resource) -> Schema | None:
        return self._schemas.get((resource.api_version, resource.plural))

    def _add(self, resource: Resource, schema: Schema | None) -> None:
        self._resources[resource.api_version, resource.plural] = resource
        if schema is not None:
            self._schemas[resource.api_version, resource.plural] = schema

    def _define(self, definition: Definition) -> None:
        self.definitions.append(definition)
        for resource in definition.resources:
            self._add(resource, self._with_metadata(definition.schemas[resource.version]))

    def _with_metadata(self, schema: Schema) -> Schema:
        """The schema with that of metadata, which a CRD leaves to the server."""
        node = {**schema.node, "properties": {**schema.node["properties"], "metadata": self.metadata.node}}
        return Schema(node, self.metadata.definitions)


def _core_resources(offer: Offer) -> Iterator[Resource]:
    for resource in known.known():
        if resource.is_custom or resource in _NOT_SERVED:
            continue
        if resource.version == _STABLE:
            if resource == known.CUSTOM_RESOURCE_DEFINITION or core_schema(offer.minor, resource) is not None:
                yield resource
            continue
        for api_version in sorted(offer.apis):
            group, _, version = api_version.rpartition("/")
            if group == resource.group and core_schema(offer.minor, resource.at(version)) is not None:
                yield resource.at(version)
    yield from (ACCESS_REVIEW, RULES_REVIEW)


def _custom_resources(offer: Offer) -> Iterator[Resource]:
    if offer.jobset is not None:
        yield known.JOB_SET
    yield from _KUEUE if offer.kueue else ()
    yield from _VOLCANO if offer.volcano else ()
    if offer.coscheduling:
        yield known.COSCHEDULING_POD_GROUP
    if offer.kai:
        yield known.KAI_POD_GROUP
    for resource in known.known():
        if f"{resource.group}_{resource.plural}" in offer.more:
            yield resource


def _files(offer: Offer, crds: Path) -> Iterator[str]:
    if offer.jobset is not None:
        yield f"jobset.x-k8s.io_jobsets-v{offer.jobset.removeprefix('v')}"
    for resource in _custom_resources(offer):
        if resource not in (known.JOB_SET, known.KAI_POD_GROUP):
            yield f"{resource.group}_{resource.plural}"
    known_names = {f"{resource.group}_{resource.plural}" for resource in known.known()}
    yield from (name for name in offer.more if name not in known_names)


def _priority(version: str) -> tuple[int, str]:
    """Stable before beta before alpha, higher before lower, as Kubernetes orders versions."""
    rank = 2 if "alpha" in version else 1 if "beta" in version else 0
    return rank, "".join(chr(0x10FFFF - ord(letter)) for letter in version)
