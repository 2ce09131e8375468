"""What a cluster dropped of what was sent to it, found by comparing (ADR 0033). Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

_INDEX = re.compile(r"\[[^]]*\]")
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|[KMGT]i?|)")
_UNITS = {"m": Decimal("0.001"), "": Decimal(1), "k": Decimal(10**3), "M": Decimal(10**6), "G": Decimal(10**9)}
_UNITS |= {"T": Decimal(10**12), "Ki": Decimal(2**10), "Mi": Decimal(2**20), "Gi": Decimal(2**30), "Ti": Decimal(2**40)}
_SUBSTITUTED = ("stringData",)  # a Secret's; it comes back as data
_COSTS = (
    ("restartPolicyRules", "restart rules are dropped: a suspected node is not replaced alone"),
    ("schedulingGroup", "the native gang is dropped: pods are scheduled one by one"),
    ("onJobFailureMessagePatterns", "the rule then matches every failure of its reason: no restart would be counted"),
    ("resourceClaims", "claims of devices are dropped: the trainer sees none"),
    ("podReplacementPolicy", "a lost node's pod is replaced only when the node answers again"),
    ("startupProbe", "the trainer does not wait for its agent"),
    ("backoffLimitPerIndex", "a head that ends without a verdict ends the job"),
    ("restartStrategy", "pods of the next attempt start beside those of the last"),
    ("image", "an image volume is dropped: there is no code"),
)


@dataclass(frozen=True, slots=True)
class Lost:
    """A field that was sent and is not there, or is there otherwise."""

    path: str
    sent: Any
    returned: Any  # None: not there
    cost: str | None = None  # in words, where the recovery plan rests on it

    def describe(self) -> str:
        """One line for people."""
        came = "dropped" if self.returned is None else f"came back as {self.returned!r}"
        return f"{self.path}: {came}{f'; {self.cost}' if self.cost is not None else ''}"


def lost_fields(sent: Mapping[str, Any], returned: Mapping[str, Any]) -> list[Lost]:
    """Every field of an object that did not come back as it was sent, outermost alone. What was added is no loss."""
    return list(_compare(sent, returned, ""))


def keeps(sent: Mapping[str, Any], returned: Mapping[str, Any], field: str) -> bool:
    """Whether every field of that name that was sent came back.

    Raises:
        ValueError: nothing of that name was sent, so that its absence says nothing.
    """
    if not has_field(sent, field):
        raise ValueError(f"{field} was not sent")
    return not any(_last(lost.path) == field for lost in lost_fields(sent, returned))


def has_field(manifest: Mapping[str, Any], field: str) -> bool:
    """Whether a field of that name stands anywhere in the object."""
    return any(name == field for name in _names(manifest))


def _compare(sent: Any, returned: Any, path: str) -> Iterator[Lost]:
    if isinstance(sent, Mapping):
        yield from _compare_tables(sent, returned, path)
    elif isinstance(sent, Sequence) and not isinstance(sent, str):
        yield from _compare_lists(sent, returned, path)
    elif sent != returned and not _same_quantity(sent, returned):
        yield _lost(path, sent, returned)


def _compare_tables(sent: Mapping[str, Any], returned: Any, path: str) -> Iterator[Lost]:
    if not isinstance(returned, Mapping):
        if sent or returned is not None:  # an empty table may be left out
            yield _lost(path, sent, returned)
        return
    for key, value in sent.items():
        where = f"{path}.{key}" if path else key
        if key in returned:
            yield from _compare(value, returned[key], where)
        elif where not in _SUBSTITUTED and value not in (
            {},
            [],
            "",
            0,
            False,
            None,
        ):  # the zero of a type may be left out
            yield _lost(where, value, None)


def _compare_lists(sent: Sequence[Any], returned: Any, path: str) -> Iterator[Lost]:
    if not isinstance(returned, Sequence) or isinstance(returned, str):
        yield _lost(path, sent, returned)
        return
    if all(isinstance(item, Mapping) and "name" in item for item in (*sent, *returned)):
        known = {item["name"]: item for item in returned}
        for item in sent:
            yield from _compare(item, known.get(item["name"]), f"{path}[{item['name']}]")
        return
    for at, item in enumerate(sent):
        yield from _compare(item, returned[at] if at < len(returned) else None, f"{path}[{at}]")


def _lost(path: str, sent: Any, returned: Any) -> Lost:
    cost = next((cost for name, cost in _COSTS if _last(path) == name), None)
    return Lost(path, sent, returned, cost)


def _last(path: str) -> str:
    return _INDEX.sub("", path).rpartition(".")[2]


def _names(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _names(item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _names(item)


def _same_quantity(one: Any, other: Any) -> bool:
    """Whether two texts are one amount: a server writes `1024Mi` as `1Gi`, `0.5` as `500m`."""
    first, second = _amount(one), _amount(other)
    return first is not None and first == second


def _amount(value: Any) -> Decimal | None:
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    return None if match is None or match[2] not in _UNITS else Decimal(match[1]) * _UNITS[match[2]]
