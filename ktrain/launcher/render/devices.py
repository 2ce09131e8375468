"""The accelerators and the fabric of a worker pod: extended resources, claims of devices, selectors, environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ktrain.errors import ConfigError
from ktrain.launcher import accelerators
from ktrain.launcher.accelerators import Devices, Slices
from ktrain.launcher.catalogue import Fabric
from ktrain.launcher.facts import ClusterFacts
from ktrain.launcher.render.common import WORKER, Manifest, metadata
from ktrain.launcher.spec import JobSpec

DRA_GROUP = "resource.k8s.io"
COMPUTE_DOMAIN_GROUP = "resource.nvidia.com"
_CLAIM, _CHANNEL = "devices", "channel"
_SAME_ROOT = "resource.kubernetes.io/pcieRoot"
_MEGASCALE_PORT = "8080"


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """What a worker pod gets for its devices; everything but the trainer's own part is the pod's."""

    limits: dict[str, str] = field(default_factory=dict)  # of the trainer
    claims: dict[str, str] = field(default_factory=dict)  # name in the pod -> ResourceClaimTemplate
    objects: tuple[Manifest, ...] = ()
    terms: tuple[tuple[Manifest, ...], ...] = ()  # of node affinity: any of them, all of each
    node_selector: dict[str, str] = field(default_factory=dict)
    tainted: tuple[str, ...] = ()  # keys of taints that nodes with these devices bear
    env: tuple[Manifest, ...] = ()  # of the trainer
    exclusive: str | None = None  # node label: one Job for each of its values


def plan_devices(spec: JobSpec, facts: ClusterFacts) -> DevicePlan:
    """The devices of a worker pod.

    Raises:
        ConfigError: what was asked for needs an API that the cluster surely lacks.
    """
    if spec.tpus is not None:
        return _tpus(spec, spec.tpus)
    fabric = accelerators.parse_fabric(spec.fabric) if spec.fabric is not None else None
    if len(spec.devices) > 1 or (fabric is not None and fabric[0].device_class is not None):
        return _claimed(spec, facts, fabric)
    return _counted(spec, facts, fabric)


def _counted(spec: JobSpec, facts: ClusterFacts, fabric: tuple[Fabric, int] | None) -> DevicePlan:
    """By extended resources, which every cluster has."""
    domain, claims = _compute_domain(spec, facts)
    terms = [
        ({"key": label, "operator": "In", "values": list(values)},)
        for devices in spec.devices
        for label, values in devices.model.labels
    ]
    return DevicePlan(
        limits={**{devices.resource: str(devices.count) for devices in spec.devices}, **_fabric_limits(fabric)},
        claims=claims,
        objects=domain,
        terms=tuple(terms),
        tainted=_tainted(spec),
    )


def _claimed(spec: JobSpec, facts: ClusterFacts, fabric: tuple[Fabric, int] | None) -> DevicePlan:
    """By a claim of devices (DRA), which can name alternatives and hold devices together."""
    if facts.serves(DRA_GROUP, "resourceclaimtemplates") is False:
        what = f"accelerator {spec.accelerator!r}" if len(spec.devices) > 1 else f"fabric {spec.fabric!r}"
        raise ConfigError(
            f"{what}: it takes claims of devices, and the cluster does not serve {DRA_GROUP}; name one model and a "
            "fabric that is an extended resource"
        )
    without = [devices.model.name for devices in spec.devices if devices.model.device_class is None]
    if without:
        raise ConfigError(f"accelerator {spec.accelerator!r}: no driver offers {without[0]} as claims; leave it out")
    requests, constraints = _requests(spec.devices, fabric)
    name = f"{spec.name}-{_CLAIM}"
    template = {
        "apiVersion": f"{DRA_GROUP}/v1",
        "kind": "ResourceClaimTemplate",
        "metadata": metadata(spec, name),
        "spec": {"spec": {"devices": {"requests": requests, **({"constraints": constraints} if constraints else {})}}},
    }
    domain, channel = _compute_domain(spec, facts)
    return DevicePlan(
        limits=_fabric_limits(fabric),
        claims={_CLAIM: name, **channel},
        objects=(template, *domain),
        tainted=_tainted(spec),
    )


def _fabric_limits(fabric: tuple[Fabric, int] | None) -> dict[str, str]:
    return {} if fabric is None or fabric[0].resource is None else {fabric[0].resource: str(fabric[1])}


def _tainted(spec: JobSpec) -> tuple[str, ...]:
    """Nodes are tainted with the name of what they have."""
    return tuple(sorted({devices.model.resource for devices in spec.devices}))


def _requests(
    alternatives: Sequence[Devices], fabric: tuple[Fabric, int] | None
) -> tuple[list[Manifest], list[Manifest]]:
    """Requests and constraints; with as many network devices as accelerators, each pair lies below one PCIe root."""
    nic = None if fabric is None or fabric[0].device_class is None else fabric
    if nic is not None and len(alternatives) == 1 and alternatives[0].count == nic[1]:
        pairs = range(nic[1])
        one = Devices(alternatives[0].model, 1, alternatives[0].partition)
        requests: list[Manifest] = [{"name": f"device-{at}", "exactly": _request(one)} for at in pairs]
        requests += [{"name": f"nic-{at}", "exactly": _of_class(nic[0], 1)} for at in pairs]
        return requests, [{"requests": [f"device-{at}", f"nic-{at}"], "matchAttribute": _SAME_ROOT} for at in pairs]
    requests = []
    if len(alternatives) == 1:
        requests.append({"name": "device", "exactly": _request(alternatives[0])})
    elif alternatives:
        ordered = [{"name": _plain_name(item), **_request(item)} for item in alternatives]
        requests.append({"name": "device", "firstAvailable": ordered})
    if nic is not None:
        requests.append({"name": "nic", "exactly": _of_class(nic[0], nic[1])})
    return requests, []


def _plain_name(devices: Devices) -> str:
    """The name of an alternative: a DNS label."""
    part = "" if devices.partition is None else f"-{devices.partition.replace('.', '-').replace('+', '-')}"
    return f"{devices.model.name}{part}"


def _request(devices: Devices) -> Manifest:
    model = devices.model
    selectors = [] if model.selector is None else [model.selector]
    if devices.partition is not None:
        selectors.append(model.partition_selector.format(partition=devices.partition))
    chosen = {"selectors": [{"cel": {"expression": text}} for text in selectors]} if selectors else {}
    device_class = model.device_class if devices.partition is None else model.partition_class
    return {"deviceClassName": device_class, "allocationMode": "ExactCount", "count": devices.count, **chosen}


def _of_class(fabric: Fabric, count: int) -> Manifest:
    return {"deviceClassName": fabric.device_class, "allocationMode": "ExactCount", "count": count}


def _compute_domain(spec: JobSpec, facts: ClusterFacts) -> tuple[tuple[Manifest, ...], dict[str, str]]:
    """The domain of a model whose fast links reach over nodes, and the pod's claim of a channel in it.

    None where the cluster surely cannot make one: traffic then takes the network, which `explain` says.
    """
    wanted = spec.num_nodes > 1 and any(devices.model.compute_domain for devices in spec.devices)
    if not wanted or facts.serves(COMPUTE_DOMAIN_GROUP, "computedomains") is False:
        return (), {}
    template = f"{spec.name}-{_CHANNEL}"
    domain = {
        "apiVersion": f"{COMPUTE_DOMAIN_GROUP}/v1beta1",
        "kind": "ComputeDomain",
        "metadata": metadata(spec, spec.name),
        # numNodes 0: the driver does not count, ktrain does
        "spec": {"numNodes": 0, "channel": {"resourceClaimTemplate": {"name": template}}},
    }
    return (domain,), {_CHANNEL: template}


def _tpus(spec: JobSpec, slices: Slices) -> DevicePlan:
    """One Job for each slice, on nodes of one slice."""
    model = slices.model
    env: list[Manifest] = [
        {"name": "TPU_WORKER_ID", "value": "$(KTRAIN_POD_INDEX)"},
        {"name": "TPU_WORKER_HOSTNAMES", "value": _hostnames(spec, slices)},
        {"name": "TPU_ACCELERATOR_TYPE", "value": f"{model.type}-{slices.chips * model.type_unit}"},
        {"name": "TPU_TOPOLOGY", "value": slices.topology},
    ]
    if slices.num_slices > 1:
        env += [
            {"name": "MEGASCALE_COORDINATOR_ADDRESS", "value": f"{spec.name}-{WORKER}-0-0.{spec.name}"},
            {"name": "MEGASCALE_PORT", "value": _MEGASCALE_PORT},
            {"name": "MEGASCALE_NUM_SLICES", "value": str(slices.num_slices)},
            {"name": "MEGASCALE_SLICE_ID", "value": "$(KTRAIN_JOB_INDEX)"},
        ]
    return DevicePlan(
        limits={model.resource: str(slices.chips_per_host)},
        node_selector={model.accelerator_label: model.accelerator, model.topology_label: slices.topology},
        tainted=(model.resource,),
        env=tuple(env),
        exclusive=model.slice_label if slices.hosts > 1 else None,
    )


def _hostnames(spec: JobSpec, slices: Slices) -> str:
    """The hosts of the pod's own slice, by their index."""
    return ",".join(f"{spec.name}-{WORKER}-$(KTRAIN_JOB_INDEX)-{at}.{spec.name}" for at in range(slices.hosts))
