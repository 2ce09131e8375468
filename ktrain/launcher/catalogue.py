"""The accelerators, fabrics and providers that the profiles describe (ADR 0031)."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

_TPU, _FABRICS, _PROVIDERS = "tpu.toml", "fabrics.toml", "providers.toml"


@dataclass(frozen=True, slots=True)
class Model:
    """One model of a device that a pod asks for by count."""

    name: str
    resource: str
    counts: tuple[int, ...]  # devices that one node may be asked for
    labels: tuple[tuple[str, tuple[str, ...]], ...] = ()  # any of these node labels tells the model
    workers_per_device: int = 1
    compute_domain: bool = False  # its fast links reach over nodes
    device_class: str | None = None  # DRA
    selector: str | None = None  # CEL that tells the model among devices of the class
    partitions: tuple[str, ...] = ()
    partition_resource: str = ""
    partition_class: str = ""
    partition_selector: str = ""


@dataclass(frozen=True, slots=True)
class TpuModel:
    """One generation of TPUs, with the slices that exist."""

    name: str
    type: str  # as its runtime names it ...
    type_unit: int  # ... with so many for each chip
    accelerator: str
    chips_per_host: int
    topologies: tuple[str, ...]
    resource: str
    accelerator_label: str
    topology_label: str
    slice_label: str


@dataclass(frozen=True, slots=True)
class Fabric:
    """A fast network between nodes: an extended resource, or a class of DRA devices."""

    name: str
    counts: tuple[int, ...]
    resource: str | None = None
    device_class: str | None = None
    pod_security: str | None = None  # strictest level that allows for what it needs of a pod; None: nothing
    needs: str = ""  # that, in words
    remedy: str = ""  # how it goes without


@dataclass(frozen=True, slots=True)
class Provider:
    """How spot nodes are marked, and the notice (seconds) that they give."""

    name: str
    label: str
    value: str
    notice_s: int
    taint: str | None = None


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((resources.files("ktrain.launcher.profiles") / name).read_text("utf-8"))


@cache
def models() -> Mapping[str, Model]:
    """Name -> model, of every vendor."""
    folder = resources.files("ktrain.launcher.profiles")
    names = sorted(item.name for item in folder.iterdir() if item.name.endswith(".toml"))
    found: dict[str, Model] = {}
    for name in names:
        if name not in (_TPU, _FABRICS, _PROVIDERS):
            found.update(_models_of(_read(name)))
    return MappingProxyType(found)


def _models_of(profile: dict[str, Any]) -> dict[str, Model]:
    """The models of one vendor's profile; what a model does not say holds for all of the vendor."""
    common = {key: value for key, value in profile.items() if key != "models"}
    found = {}
    for name, own in profile["models"].items():
        fields = {**common, **own}
        fields["labels"] = tuple((label, tuple(values)) for label, values in fields.get("labels", {}).items())
        for listed in ("counts", "partitions"):
            fields[listed] = tuple(fields.get(listed, ()))
        found[name] = Model(name=name, **fields)
    return found


@cache
def tpus() -> Mapping[str, TpuModel]:
    """Name -> generation of TPUs."""
    profile = _read(_TPU)
    common = {key: value for key, value in profile.items() if key != "models"}
    found = {}
    for name, own in profile["models"].items():
        listed, cube, most = tuple(own.pop("topologies")), own.pop("cube", 0), own.pop("most_chips", 0)
        found[name] = TpuModel(name=name, topologies=(*listed, *_cubes(cube, most)), **common, **own)
    return MappingProxyType(found)


def _cubes(step: int, most_chips: int) -> list[str]:
    """`4x4x4`, `4x4x8`, ...: A <= B <= C, multiples of the step, by their number of chips."""
    if step == 0:
        return []
    axis = range(step, most_chips // (step * step) + 1, step)
    boxes = []
    for a, b in itertools.combinations_with_replacement(axis, 2):
        if a * b * b > most_chips:
            continue
        boxes += [(a, b, c) for c in range(b, most_chips // (a * b) + 1, step)]
    return ["x".join(map(str, box)) for box in sorted(boxes, key=lambda box: (box[0] * box[1] * box[2], box))]


@cache
def fabrics() -> Mapping[str, Fabric]:
    """Name -> fabric."""
    found = {}
    for name, own in _read(_FABRICS)["fabrics"].items():
        found[name] = Fabric(name=name, counts=tuple(own.pop("counts")), **own)
    return MappingProxyType(found)


@cache
def providers() -> Mapping[str, Provider]:
    """Name -> provider."""
    return MappingProxyType({name: Provider(name=name, **own) for name, own in _read(_PROVIDERS)["providers"].items()})
