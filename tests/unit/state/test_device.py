"""The CPU as null object, and where a rank stands."""

from __future__ import annotations

import pytest
import torch

from ktrain import device
from ktrain.errors import ConfigError
from ktrain.state.topology import Topology

without_accelerator = pytest.mark.skipif(device.is_available(), reason="describes a machine without accelerator")


@without_accelerator
def test_device_without_accelerator_is_the_cpu() -> None:
    assert (device.name(), device.count()) == ("cpu", 0)
    assert device.for_rank(5) == torch.device("cpu")
    assert device.generators() == []
    assert not device.register_host_memory(memoryview(bytearray(8)))
    device.use(torch.device("cpu"))
    device.synchronize()
    device.synchronize(torch.device("cpu"))


def test_process_group_backend_of_the_cpu_is_gloo() -> None:
    assert device.process_group_backend(torch.device("cpu")) == "gloo"


def test_topology_node_ranks_are_consecutive() -> None:
    assert list(Topology(5, 8, 1, 4).node_ranks) == [4, 5, 6, 7]


@pytest.mark.parametrize("numbers", [(2, 2, 0, 1), (-1, 2, 0, 1), (0, 2, 2, 2)])
def test_topology_of_impossible_numbers_is_refused(numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises(ConfigError, match="topology"):
        Topology(*numbers)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Topology(0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Topology(3, 4, 1, 2)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, Topology(3, 4)),  # the node is not known: alone
    ],
)
def test_topology_current_reads_the_environment(
    environment: dict[str, str], expected: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Topology.current() == expected
