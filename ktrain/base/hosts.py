"""Names of hosts as addresses, where a file stands for the name service: pods that run as processes (ADR 0036)."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from ktrain.base import settings
from ktrain.errors import UnavailableError


def address_of(host: str) -> str:
    """What to connect to for a host: its line in the file of names, else the name itself. Asked anew with every call.

    Raises:
        UnavailableError: the file has no such name, or not yet.
    """
    names = settings.hosts_file()
    if names is None or _is_address(host):
        return host
    found = _find(names, host)
    if found is None:
        raise UnavailableError(f"host {host}: no pod of that name has an address yet")
    return found


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _find(names: Path, host: str) -> str | None:
    """The address in a file that is written as /etc/hosts is, and replaced whole."""
    try:
        lines = names.read_text("utf-8").splitlines()
    except FileNotFoundError:
        return None
    for line in lines:
        address, *aliases = line.partition("#")[0].split() or ("",)
        if host in aliases:
            return address
    return None
