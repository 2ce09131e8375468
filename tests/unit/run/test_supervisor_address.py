"""Which network interface the ranks of a node are given."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ktrain.errors import ConfigError
from ktrain.run import supervisor


@pytest.fixture(autouse=True)
def _interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "lo": [SimpleNamespace(address="127.0.0.1")],
        "eth0": [SimpleNamespace(address="0a:58:0a:00:00:07"), SimpleNamespace(address="10.0.0.7")],
    }
    monkeypatch.setattr(supervisor.psutil, "net_if_addrs", lambda: found)


@pytest.mark.parametrize(("address", "name"), [("127.0.0.1", "lo"), ("127.3.2.1", "lo"), ("10.0.0.7", "eth0")])
def test_interface_of_address_is_found(address: str, name: str) -> None:
    assert supervisor.interface_of(address) == name


def test_interface_of_address_of_another_node_is_refused() -> None:
    with pytest.raises(ConfigError, match="GLOO_SOCKET_IFNAME"):
        supervisor.interface_of("10.0.0.8")
