"""JSON read as an API server reads it: the fields that come twice are found, the last one wins."""

from __future__ import annotations

import json
from typing import Any

from ktrain.errors import ConfigError


class _Pairs(list[tuple[str, Any]]):
    """The fields of one object as they were written."""


def parse(text: str) -> tuple[Any, list[str]]:
    """Returns the value, and the paths of the fields that come twice.

    Raises:
        ConfigError: it is not JSON; the message is the server's for an early end.
    """
    try:
        raw = json.loads(text, object_pairs_hook=_Pairs)
    except ValueError as error:
        raise ConfigError(_go_error(error, text)) from error
    twice: list[str] = []
    return _plain(raw, "", twice), twice


def _plain(value: Any, path: str, twice: list[str]) -> Any:
    if isinstance(value, _Pairs):
        found: dict[str, Any] = {}
        for key, entry in value:
            name = f"{path}.{key}" if path else key
            if key in found and name not in twice:
                twice.append(name)
            found[key] = _plain(entry, name, twice)
        return found
    if isinstance(value, list):
        return [_plain(entry, f"{path}[{i}]", twice) for i, entry in enumerate(value)]
    return value


def _go_error(error: ValueError, text: str) -> str:
    position = getattr(error, "pos", len(text))
    rest = text[position:].strip()
    if not rest:
        return "unexpected end of JSON input"
    return f"invalid character {rest[0]!r} looking for beginning of value"
