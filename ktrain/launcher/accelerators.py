"""What a job computes on, from the text that a person types: `h100:8`, `h200:8,h100:8`, `a100/1g.10gb:2`, `v6e:4x4`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ktrain.errors import ConfigError
from ktrain.launcher import catalogue
from ktrain.launcher.catalogue import Fabric, Model, Provider, TpuModel

_SHOWN = 14  # of a list of what would be valid
_DEVICE = re.compile(r"(?P<model>[a-z0-9-]+)(?:/(?P<partition>[0-9a-z.+]+))?(?::(?P<count>\d+))?")


@dataclass(frozen=True, slots=True)
class Devices:
    """Devices of one model that each node has."""

    model: Model
    count: int
    partition: str | None = None  # a part of a device, "1g.10gb"

    @property
    def resource(self) -> str:
        """The extended resource that a container asks for."""
        if self.partition is None:
            return self.model.resource
        return self.model.partition_resource.format(partition=self.partition)

    @property
    def workers(self) -> int:
        """Worker processes that a node runs for them."""
        return self.count * self.model.workers_per_device


@dataclass(frozen=True, slots=True)
class Slices:
    """TPU slices of one topology; a node is a host of a slice."""

    model: TpuModel
    topology: str
    num_slices: int

    @property
    def chips(self) -> int:
        """Chips of one slice."""
        return math.prod(int(axis) for axis in self.topology.split("x"))

    @property
    def chips_per_host(self) -> int:
        return min(self.chips, self.model.chips_per_host)

    @property
    def hosts(self) -> int:
        """Hosts of one slice."""
        return self.chips // self.chips_per_host

    @property
    def num_hosts(self) -> int:
        return self.hosts * self.num_slices


def parse_devices(text: str) -> tuple[Devices, ...]:
    """What each node has; more than one are alternatives, the wanted one first.

    Raises:
        ConfigError: a model, partition or count does not exist; the message lists those that do.
    """
    found = tuple(_parse_one(part.strip(), text) for part in text.split(","))
    if len({item.workers for item in found}) > 1:
        said = ", ".join(f"{item.model.name} {item.workers}" for item in found)
        raise ConfigError(
            f"accelerator {text!r}: alternatives must run the same number of workers on a node, found {said}; "
            "give all of them one count"
        )
    return found


def _parse_one(part: str, text: str) -> Devices:
    match = _DEVICE.fullmatch(part)
    if match is None:
        raise ConfigError(f"accelerator {text!r}: expected MODEL:COUNT such as h100:8, found {part!r}")
    model = catalogue.models().get(match["model"])
    if model is None:
        hint = "; it is a TPU: use tpu, GENERATION:TOPOLOGY" if match["model"] in catalogue.tpus() else ""
        known = ", ".join(sorted(catalogue.models()))
        raise ConfigError(f"accelerator {text!r}: no model {match['model']!r}{hint}; known are {known}")
    partition = match["partition"]
    if partition is not None and partition not in model.partitions:
        parts = f"expected one of {', '.join(model.partitions)}" if model.partitions else "it has none"
        raise ConfigError(f"accelerator {text!r}: {model.name} has no partition {partition!r}; {parts}")
    count = int(match["count"] or 1)
    if partition is None and count not in model.counts:
        raise ConfigError(f"accelerator {text!r}: a node has no {count} {model.name}; expected {_listed(model.counts)}")
    if partition is not None and count < 1:
        raise ConfigError(f"accelerator {text!r}: expected 1 or more partitions, found {count}")
    return Devices(model, count, partition)


def parse_slices(text: str, num_slices: int) -> Slices:
    """The TPU slices that a text names.

    Raises:
        ConfigError: a generation or topology does not exist; the message lists those that do.
    """
    name, _, topology = text.partition(":")
    model = catalogue.tpus().get(name)
    if model is None:
        raise ConfigError(f"tpu {text!r}: no generation {name!r}; known are {', '.join(catalogue.tpus())}")
    if topology not in model.topologies:
        found = f"found {topology!r}" if topology else "found none"
        raise ConfigError(f"tpu {text!r}: {name} slices are {_listed(model.topologies)}; {found}")
    if num_slices < 1:
        raise ConfigError(f"slices: expected 1 or more, found {num_slices}")
    return Slices(model, topology, num_slices)


def parse_fabric(text: str) -> tuple[Fabric, int]:
    """A fabric and how many of its devices each node gets: `efa:32`.

    Raises:
        ConfigError: there is none of that name or count.
    """
    name, _, count = text.partition(":")
    fabric = catalogue.fabrics().get(name)
    if fabric is None:
        raise ConfigError(f"fabric {text!r}: no fabric {name!r}; known are {', '.join(catalogue.fabrics())}")
    if not count.isdecimal() or int(count) not in fabric.counts:
        raise ConfigError(f"fabric {text!r}: expected {name}:COUNT with {_listed(fabric.counts)}, found {count!r}")
    return fabric, int(count)


def find_provider(name: str) -> Provider:
    """The provider of that name.

    Raises:
        ConfigError: there is none.
    """
    provider = catalogue.providers().get(name)
    if provider is None:
        raise ConfigError(f"placement.provider {name!r}: expected one of {', '.join(catalogue.providers())}")
    return provider


def _listed(values: Iterable[object]) -> str:
    texts = [str(value) for value in values]
    more = f" and {len(texts) - _SHOWN} larger" if len(texts) > _SHOWN else ""
    return f"{', '.join(texts[:_SHOWN])}{more}"
