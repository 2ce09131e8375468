"""Manifests as YAML, without a YAML library.

Block style; a text stands as a JSON string where YAML could read it as something else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# A letter, then what cannot be a comment, a key, a number, or one of YAML's words.
_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./@-]*(?: [A-Za-z0-9_./@-]+)*")
_EXPONENT = re.compile(r"^(-?\d+)e")  # which YAML 1.1 takes for a number only with a point
_WORDS = re.compile(r"true|false|yes|no|on|off|y|n|null|nan|inf", re.IGNORECASE)


def to_yaml(objects: Iterable[Mapping[str, Any]]) -> str:
    """The objects as a stream of YAML documents."""
    return "".join("---\n" + "".join(f"{line}\n" for line in _lines(item)) for item in objects)


def _lines(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _entry(f"{_scalar(key)}:", item, indent="  ")
    elif isinstance(value, list | tuple) and value:
        for item in value:
            yield from _item(item)
    else:
        yield _scalar(value)


def _entry(head: str, item: Any, *, indent: str) -> Iterator[str]:
    if isinstance(item, Mapping | list | tuple) and item:
        yield head
        deeper = indent if isinstance(item, Mapping) else ""
        yield from (f"{deeper}{line}" for line in _lines(item))
    elif isinstance(item, str) and _is_block(item):
        yield f"{head} |"
        yield from (f"  {line}" for line in item[:-1].split("\n"))
    else:
        yield f"{head} {_scalar(item)}"


def _item(item: Any) -> Iterator[str]:
    for at, line in enumerate(_lines(item)):
        yield f"{'- ' if at == 0 else '  '}{line}"


def _is_block(text: str) -> bool:
    """Whether a literal block gives back the same text: lines of visible ASCII, the first not indented, one end."""
    lines = text[:-1].split("\n")
    seen = all(32 <= ord(character) < 127 for line in lines for character in line)
    return text.endswith("\n") and len(lines) > 1 and seen and bool(lines[0]) and lines[0][0] != " " and lines[-1] != ""


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) and not _WORDS.fullmatch(value) else _quoted(value)
    if isinstance(value, float):
        return _EXPONENT.sub(r"\1.0e", repr(value))
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _quoted(text: str) -> str:
    """A JSON string; beyond 16 bits YAML has one escape where JSON has a pair, and it takes no DEL as it is."""
    return f'"{"".join(_escaped(character) for character in text)}"'


def _escaped(character: str) -> str:
    code = ord(character)
    if code > 0xFFFF:
        return f"\\U{code:08x}"
    return r"\x7f" if code == 0x7F else json.dumps(character)[1:-1]
