"""The kinds that a launcher meets: group, version, plural, scope and subresources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind of object in one version of its API group.

    Versions of one group and plural share their objects: what is written in one is read in the other.
    `counts_generation` is false for kinds whose objects carry no `metadata.generation`.
    """

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True
    subresources: tuple[str, ...] = ()
    short_names: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    counts_generation: bool = False

    @property
    def api_version(self) -> str:
        """`v1` or `batch/v1`: what `apiVersion` of its objects says."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def qualified(self) -> str:
        """`pods` or `jobs.batch`: the name in error messages."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def qualified_kind(self) -> str:
        """`Pod` or `Job.batch`: the name in messages about an invalid object."""
        return f"{self.kind}.{self.group}" if self.group else self.kind

    @property
    def storage(self) -> tuple[str, str]:
        """What its objects are stored under: group and plural, whatever the version."""
        return self.group, self.plural

    @property
    def is_custom(self) -> bool:
        """Whether a custom resource definition serves it, as for every group outside of Kubernetes' own."""
        return "." in self.group and not self.group.endswith(".k8s.io") or self.group.endswith(".x-k8s.io")

    def at(self, version: str) -> Resource:
        """The same kind in another version of its group."""
        return replace(self, version=version)

    def path(self, namespace: str | None = None, name: str | None = None) -> str:
        """The path of a collection or of one object on an API server."""
        root = f"/apis/{self.api_version}" if self.group else f"/api/{self.version}"
        scope = f"/namespaces/{namespace}" if self.namespaced and namespace else ""
        return f"{root}{scope}/{self.plural}" + (f"/{name}" if name else "")


_STATUS = ("status",)
_ALL = ("all",)
_POD_PARTS = ("binding", "eviction", "log", "status")

BINDING = Resource("", "v1", "bindings", "Binding")
CONFIG_MAP = Resource("", "v1", "configmaps", "ConfigMap", short_names=("cm",))
EVENT = Resource("", "v1", "events", "Event", short_names=("ev",))
NAMESPACE = Resource("", "v1", "namespaces", "Namespace", False, _STATUS, ("ns",))
NODE = Resource("", "v1", "nodes", "Node", False, _STATUS, ("no",))
PERSISTENT_VOLUME_CLAIM = Resource("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim", True, _STATUS, ("pvc",))
POD = Resource("", "v1", "pods", "Pod", True, _POD_PARTS, ("po",), _ALL, counts_generation=True)
SECRET = Resource("", "v1", "secrets", "Secret")
SERVICE = Resource("", "v1", "services", "Service", True, _STATUS, ("svc",), _ALL)
SERVICE_ACCOUNT = Resource("", "v1", "serviceaccounts", "ServiceAccount", short_names=("sa",))

JOB = Resource("batch", "v1", "jobs", "Job", True, _STATUS, (), _ALL, counts_generation=True)
LEASE = Resource("coordination.k8s.io", "v1", "leases", "Lease")
EVENT_V1 = Resource("events.k8s.io", "v1", "events", "Event", short_names=("ev",))
NETWORK_POLICY = Resource(
    "networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy", short_names=("netpol",), counts_generation=True
)
POD_DISRUPTION_BUDGET = Resource(
    "policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget", True, _STATUS, ("pdb",), counts_generation=True
)
ROLE = Resource("rbac.authorization.k8s.io", "v1", "roles", "Role")
ROLE_BINDING = Resource("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding")
PRIORITY_CLASS = Resource(
    "scheduling.k8s.io", "v1", "priorityclasses", "PriorityClass", False, (), ("pc",), counts_generation=True
)
WORKLOAD = Resource("scheduling.k8s.io", "v1alpha2", "workloads", "Workload")
POD_GROUP = Resource("scheduling.k8s.io", "v1alpha2", "podgroups", "PodGroup", True, _STATUS)
CSI_DRIVER = Resource("storage.k8s.io", "v1", "csidrivers", "CSIDriver", False)
DEVICE_CLASS = Resource("resource.k8s.io", "v1", "deviceclasses", "DeviceClass", False, counts_generation=True)
RESOURCE_CLAIM = Resource("resource.k8s.io", "v1", "resourceclaims", "ResourceClaim", True, _STATUS)
RESOURCE_CLAIM_TEMPLATE = Resource("resource.k8s.io", "v1", "resourceclaimtemplates", "ResourceClaimTemplate")
RESOURCE_SLICE = Resource("resource.k8s.io", "v1", "resourceslices", "ResourceSlice", False, counts_generation=True)
CUSTOM_RESOURCE_DEFINITION = Resource(
    "apiextensions.k8s.io",
    "v1",
    "customresourcedefinitions",
    "CustomResourceDefinition",
    False,
    _STATUS,
    ("crd", "crds"),
    ("api-extensions",),
    counts_generation=True,
)

JOB_SET = Resource("jobset.x-k8s.io", "v1alpha2", "jobsets", "JobSet", True, _STATUS, ("js",), counts_generation=True)
KUEUE_WORKLOAD = Resource(
    "kueue.x-k8s.io", "v1beta2", "workloads", "Workload", True, _STATUS, ("wl",), counts_generation=True
)
LOCAL_QUEUE = Resource(
    "kueue.x-k8s.io",
    "v1beta2",
    "localqueues",
    "LocalQueue",
    True,
    _STATUS,
    ("queue", "queues", "lq"),
    counts_generation=True,
)
CLUSTER_QUEUE = Resource(
    "kueue.x-k8s.io", "v1beta2", "clusterqueues", "ClusterQueue", False, _STATUS, ("cq",), counts_generation=True
)
RESOURCE_FLAVOR = Resource(
    "kueue.x-k8s.io", "v1beta2", "resourceflavors", "ResourceFlavor", False, (), ("flavor",), counts_generation=True
)
WORKLOAD_PRIORITY_CLASS = Resource(
    "kueue.x-k8s.io", "v1beta2", "workloadpriorityclasses", "WorkloadPriorityClass", False
)
TOPOLOGY = Resource("kueue.x-k8s.io", "v1beta2", "topologies", "Topology", False, counts_generation=True)
VOLCANO_POD_GROUP = Resource(
    "scheduling.volcano.sh",
    "v1beta1",
    "podgroups",
    "PodGroup",
    True,
    (),
    ("pg", "podgroup-v1beta1"),
    counts_generation=True,
)
VOLCANO_QUEUE = Resource(
    "scheduling.volcano.sh",
    "v1beta1",
    "queues",
    "Queue",
    False,
    _STATUS,
    ("q", "queue-v1beta1"),
    counts_generation=True,
)
COSCHEDULING_POD_GROUP = Resource(
    "scheduling.x-k8s.io", "v1alpha1", "podgroups", "PodGroup", True, _STATUS, ("pg", "pgs"), counts_generation=True
)
KAI_POD_GROUP = Resource(
    "scheduling.run.ai", "v2alpha2", "podgroups", "PodGroup", True, _STATUS, ("pg",), counts_generation=True
)
COMPUTE_DOMAIN = Resource(
    "resource.nvidia.com", "v1beta1", "computedomains", "ComputeDomain", True, _STATUS, (), counts_generation=True
)

_LEAVES = frozenset({str, int, bool, type(None), float})


def seen(resource: Resource, obj: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a stored object for its reader, in the version that the reader asked for."""
    return {"apiVersion": resource.api_version, "kind": resource.kind, **untyped(obj)}


def untyped(obj: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of an object as it is stored: without its kind and version, which each reader chooses."""
    return {key: copied(value) for key, value in obj.items() if key not in ("apiVersion", "kind")}


def copied(value: Any) -> Any:
    """A copy of what JSON can say; several times as fast as a copy of anything."""
    if isinstance(value, dict):
        return {key: item if type(item) in _LEAVES else copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [item if type(item) in _LEAVES else copied(item) for item in value]
    return value


def known() -> Iterator[Resource]:
    """Every kind named in this module."""
    return (value for value in globals().values() if isinstance(value, Resource))
