"""Label and field selectors: texts to predicates over objects."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ktrain.errors import ConfigError

Selector = str | Mapping[str, str] | None
Matches = Callable[[Mapping[str, Any]], bool]

_TOKEN = re.compile(r"\s*(==|!=|=|,|\(|\)|!|[^\s,=!()]+)")
_END = "end of string"


def labels_match(selector: Selector) -> Matches:
    """Returns whether an object's labels match; nothing selects everything.

    Raises:
        ConfigError: the text is not a label selector; the message is the API server's.
    """
    if not isinstance(selector, str):
        wanted = dict(selector or {})
        return lambda obj: wanted.items() <= _labels(obj).items()
    terms = _Parser(selector).terms()
    return lambda obj: all(term(_labels(obj)) for term in terms)


def fields_match(selector: Selector) -> Matches:
    """Returns whether an object's fields, named by dotted paths, have (`=`, `==`) or have not (`!=`) the values.

    A field that an object lacks is the empty text, so `spec.nodeName=` selects unbound pods.

    Raises:
        ConfigError: the text is not a field selector.
    """
    terms = field_terms(selector)
    return lambda obj: all((field(obj, path) == value) == equal for path, value, equal in terms)


def field_terms(selector: Selector) -> list[tuple[str, str, bool]]:
    """The (path, value, equal) of a field selector's terms."""
    if not isinstance(selector, str):
        return [(path, value, True) for path, value in (selector or {}).items()]
    terms = []
    for term in filter(None, selector.split(",")):
        found = re.fullmatch(r"([^=!]+)(==|!=|=)(.*)", term.strip())
        if found is None:
            raise ConfigError(f"invalid selector: '{selector}'; can't understand '{term}'")
        terms.append((found[1], found[3], found[2] != "!="))
    return terms


def field(obj: Mapping[str, Any], path: str) -> str:
    """The value at a dotted path as text; empty where the object has none."""
    value: Any = obj
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def _labels(obj: Mapping[str, Any]) -> Mapping[str, str]:
    return obj.get("metadata", {}).get("labels") or {}


class _Parser:
    """Reads a label selector from left to right; refusals are in the API server's words."""

    def __init__(self, text: str) -> None:
        self._tokens: list[str] = _TOKEN.findall(text)

    def terms(self) -> list[Callable[[Mapping[str, str]], bool]]:
        terms = []
        while self._tokens:
            terms.append(self._term())
            if self._tokens:
                self._expect(",", f"'{self._tokens[0]}', expected: ',' or '{_END}'")
        return terms

    def _term(self) -> Callable[[Mapping[str, str]], bool]:
        absent = self._tokens[0] == "!"
        if absent:
            self._tokens.pop(0)
        key = self._next("identifier")
        if absent or not self._tokens or self._tokens[0] == ",":
            return (lambda labels: key not in labels) if absent else (lambda labels: key in labels)
        operator = self._tokens.pop(0)
        if operator in ("=", "=="):
            value = self._value()
            return lambda labels: labels.get(key) == value
        if operator == "!=":
            value = self._value()
            return lambda labels: labels.get(key) != value
        if operator not in ("in", "notin"):
            raise ConfigError(
                f"unable to parse requirement: found '{operator}', expected: in, notin, =, ==, !=, gt, lt"
            )
        values = self._values()
        return lambda labels: (labels.get(key) in values) == (operator == "in")

    def _value(self) -> str:
        return self._tokens.pop(0) if self._tokens and self._tokens[0] != "," else ""

    def _values(self) -> set[str]:
        self._expect("(", "expected: '('")
        values = set()
        while self._tokens and self._tokens[0] != ")":
            token = self._tokens.pop(0)
            if token != ",":
                values.add(token)
        self._expect(")", f"'{_END}', expected: ',' or ')'")
        return values

    def _next(self, what: str) -> str:
        if not self._tokens or self._tokens[0] in ("=", "==", "!=", ",", "(", ")", "!"):
            found = self._tokens[0] if self._tokens else _END
            raise ConfigError(f"unable to parse requirement: found '{found}', expected: {what}")
        return self._tokens.pop(0)

    def _expect(self, token: str, otherwise: str) -> None:
        if not self._tokens or self._tokens[0] != token:
            raise ConfigError(f"found {otherwise}")
        self._tokens.pop(0)
