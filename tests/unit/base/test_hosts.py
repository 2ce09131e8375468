"""Names of pods, where a file stands for the name service."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktrain.base import contract
from ktrain.base.hosts import address_of
from ktrain.errors import UnavailableError


def test_address_of_without_a_file_is_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(contract.ENV_HOSTS, raising=False)
    assert address_of("net-head-0-0.net") == "net-head-0-0.net"


def test_address_of_a_name_follows_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = tmp_path / "hosts"
    monkeypatch.setenv(contract.ENV_HOSTS, str(names))
    with pytest.raises(UnavailableError, match="net-head"):
        address_of("net-head-0-0.net")

    names.write_text("# pods\n127.77.0.9 net-head-0-0.net net-head-0-0.net.default.svc\n")
    assert address_of("net-head-0-0.net") == "127.77.0.9"
    names.write_text("127.77.0.12 net-head-0-0.net  # its successor\n\n")
    assert address_of("net-head-0-0.net") == "127.77.0.12"
    assert address_of("10.0.0.7") == "10.0.0.7"
    with pytest.raises(UnavailableError, match="net-head-0"):
        address_of("net-head-0")
