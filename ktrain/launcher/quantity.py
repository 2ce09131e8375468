"""Kubernetes quantities of bytes: `40Gi` <-> a number."""

from __future__ import annotations

import re

from ktrain.errors import ConfigError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": KIB, "Mi": MIB, "Gi": GIB, "Ti": 1 << 40}
_FORM = re.compile(r"(\d+(?:\.\d+)?)([kMGT]i?|Ki|)")


def parse_bytes(text: str, *, name: str) -> int:
    """The bytes that a quantity names.

    Raises:
        ConfigError: it is none, or not more than 0.
    """
    match = _FORM.fullmatch(text.strip())
    size = round(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size <= 0:
        raise ConfigError(f"{name}: expected bytes such as 512Mi, 40Gi or 1.5Ti, found {text!r}")
    return size


def format_bytes(size: int) -> str:
    """The size in whole MiB or GiB, rounded up: what Kubernetes is asked for."""
    mebibytes = -(-size // MIB)
    return f"{mebibytes // 1024}Gi" if mebibytes % 1024 == 0 else f"{mebibytes}Mi"


def show_bytes(size: float) -> str:
    """The size for people: `12.5 GiB`."""
    for unit, name in ((1 << 40, "TiB"), (GIB, "GiB"), (MIB, "MiB")):
        if size >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{size:.0f} bytes"
