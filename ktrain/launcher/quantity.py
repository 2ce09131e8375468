"""Kubernetes quantities <-> numbers: `40Gi` -> 42949672960, `500m` -> 1/2."""

from __future__ import annotations

import re
from fractions import Fraction

from ktrain.errors import ConfigError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_SUFFIXES = {
    "": Fraction(1),
    "n": Fraction(1, 10**9),
    "u": Fraction(1, 10**6),
    "m": Fraction(1, 1000),
    **{suffix: Fraction(1000 ** (power + 1)) for power, suffix in enumerate("kMGTPE")},
    **{f"{suffix}i": Fraction(1024 ** (power + 1)) for power, suffix in enumerate("KMGTPE")},
}
_FORM = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:[eE]([+-]?\d{1,2})|([a-zA-Z]*))", re.ASCII)


def parse(text: str | float) -> Fraction:
    """The exact number that a quantity names.

    Raises:
        ConfigError: it is none.
    """
    match = _FORM.fullmatch(str(text).strip())
    if match is None or (match[3] or "") not in _SUFFIXES:
        raise ConfigError(f"expected a quantity such as 500m, 2 or 4Gi, found {text!r}")
    return Fraction(match[1]) * _SUFFIXES[match[3] or ""] * Fraction(10) ** int(match[2] or 0)


def parse_bytes(text: str, *, name: str) -> int:
    """The bytes that a quantity names, rounded to whole ones.

    Raises:
        ConfigError: it is none, or less than one.
    """
    try:
        size = round(parse(text))
    except ConfigError:
        size = 0
    if size <= 0:
        raise ConfigError(f"{name}: expected bytes such as 512Mi, 40Gi or 1.5Ti, found {text!r}")
    return size


def show(amount: Fraction) -> str:
    """`2`, or `500m` where it is not whole."""
    return str(amount.numerator) if amount.denominator == 1 else f"{-(-amount * 1000 // 1)}m"


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
