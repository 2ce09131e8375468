"""Kubernetes quantities as numbers, and numbers as quantities."""

from __future__ import annotations

from fractions import Fraction

import pytest

from ktrain.errors import ConfigError
from ktrain.launcher import quantity


@pytest.mark.parametrize(
    ("text", "number"),
    [("2", 2), ("500m", Fraction(1, 2)), ("4Gi", 4 << 30), ("1.5k", 1500), ("1e3", 1000), (3, 3), ("5E", 5 * 10**18)],
)
def test_parse_quantity_gives_exact_number(text: str | int, number: Fraction) -> None:
    assert quantity.parse(text) == number


@pytest.mark.parametrize("text", ["", "x", "1Q", "Gi", "1 Gi", "1e999", "\u0661"])
def test_parse_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="quantity"):
        quantity.parse(text)


@pytest.mark.parametrize(
    ("text", "size"), [("40Gi", 40 << 30), ("1.5Ti", 3 << 39), (" 512Mi ", 512 << 20), ("1e3", 1000), ("1500m", 2)]
)
def test_parse_bytes_gives_whole_bytes(text: str, size: int) -> None:
    assert quantity.parse_bytes(text, name="memory.state") == size


@pytest.mark.parametrize("text", ["0", "-1Gi", "400m", "40 GB", "lots", ""])
def test_parse_bytes_of_none_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"memory\.state: expected bytes such as 512Mi"):
        quantity.parse_bytes(text, name="memory.state")


@pytest.mark.parametrize(("amount", "text"), [(Fraction(2), "2"), (Fraction(1, 2), "500m"), (Fraction(1, 3), "334m")])
def test_show_is_whole_or_in_thousandths_rounded_up(amount: Fraction, text: str) -> None:
    assert quantity.show(amount) == text
