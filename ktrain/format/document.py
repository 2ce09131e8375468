"""Sealed JSON: the outer form of manifests and commit records.

Invariant: a document is one JSON object whose last member is the digest of all bytes before that member, so
that a torn or changed document is never read. Every member is known and has its type.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ktrain.errors import ConfigError, CorruptionError
from ktrain.format.digest import digest_text, is_digest

FORMATS = (1,)  # what this ktrain reads and writes; one is added whenever a reader of today would misread the new form
FORMAT = FORMATS[-1]  # of runs that are made now; a run keeps its own (ADR 0016)

_TAIL_HEAD = b',"digest":"'
_TAIL_NBYTES = len(_TAIL_HEAD) + 16 + len(b'"}\n')
_MAX_INTEGER = 2**63 - 1
_T = TypeVar("_T")


def check_version(what: str, version: int) -> int:
    """The version, when this ktrain knows it.

    Raises:
        ConfigError: a newer ktrain wrote it; names both versions.
    """
    if version not in FORMATS:
        raise ConfigError(
            f"{what}: written in format {version}, this ktrain reads formats up to {FORMAT}; use a newer one"
        )
    return version


@dataclass(frozen=True, slots=True)
class Written:
    """A member that is JSON text already, made by `write`: for what many documents have in common."""

    text: str


def write(value: Any) -> Written:
    """The text of a JSON value; raises as `json.dumps` does."""
    return Written(json.dumps(value, separators=(",", ":"), allow_nan=False))


def seal(kind: str, members: Mapping[str, Any], version: int = FORMAT) -> bytes:
    """The bytes of a document of that kind; equal members give equal bytes.

    Raises:
        ConfigError: a member is no JSON value.
    """
    try:
        whole = {"format": version, "kind": kind, **members}
        texts = {name: value if isinstance(value, Written) else write(value) for name, value in whole.items()}
        text = "{" + ",".join([f"{json.dumps(name)}:{value.text}" for name, value in texts.items()]) + "}"
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{kind}: a member cannot be written as JSON: {error}; give plain JSON values") from error
    body = text[:-1].encode("ascii")
    return body + _TAIL_HEAD + digest_text(body).encode("ascii") + b'"}\n'


def unseal(kind: str, data: bytes | bytearray | memoryview) -> Members:
    """The members of a document of that kind, proven by its digest.

    Raises:
        CorruptionError: the bytes are not whole, were changed, or are another kind of document.
        ConfigError: a newer ktrain wrote the document.
    """
    raw = bytes(data)
    body, tail = raw[:-_TAIL_NBYTES], raw[-_TAIL_NBYTES:]
    digest = tail[len(_TAIL_HEAD) : -3].decode("ascii", "replace")
    if len(raw) <= _TAIL_NBYTES or tail != _TAIL_HEAD + digest.encode() + b'"}\n' or not is_digest(digest):
        raise CorruptionError(
            f"{kind}: expected a document that ends in its digest, found {len(raw)} bytes ending in "
            f"{raw[-40:]!r}; the write was torn or this is another file; take another copy"
        )
    found = digest_text(body)
    if found != digest:
        raise CorruptionError(
            f"{kind}: expected digest {digest}, found {found} over {len(body)} bytes; take another copy"
        )
    members = parse_object(kind, body + b"}")
    version = members.pop("format", None)
    if type(version) is not int or version < 1:
        raise CorruptionError(f"{kind}: expected a format version, found {version!r}; take another copy")
    check_version(kind, version)
    named = members.pop("kind", None)
    if named != kind:
        raise CorruptionError(f"{kind}: expected a document of this kind, found {named!r}; take another copy")
    return Members(kind, members, version)


def parse_object(what: str, data: bytes) -> dict[str, Any]:
    """A JSON object of UTF-8 text, strictly: no NaN, no member twice, no endless nesting.

    Raises:
        CorruptionError: the bytes are no such object.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CorruptionError(f"{what}: expected JSON, found {data[:40]!r}: {error}; take another copy") from error
    if not isinstance(value, dict):
        raise CorruptionError(f"{what}: expected a JSON object, found {data[:40]!r}; take another copy")
    return value


class Members:
    """Takes the members of a parsed object one by one, each with its type; `finish` refuses what is left."""

    def __init__(self, what: str, members: dict[str, Any], version: int = FORMAT) -> None:
        self.what = what
        self.version = version  # of the document that they are from
        self._rest = dict(members)

    def integer(self, name: str, *, least: int = 0) -> int:
        value = self._take(name, int)
        if not least <= value <= _MAX_INTEGER:
            raise self.corrupt(f"{name}: expected an integer of at least {least}, found {value}")
        return value

    def number(self, name: str) -> float:
        number = self._take(name, int if type(self._rest.get(name)) is int else float)
        if not -_MAX_INTEGER <= number <= _MAX_INTEGER:
            raise self.corrupt(f"{name}: expected a finite number, found {str(number)[:40]}")
        return float(number)

    def text(self, name: str) -> str:
        return self._take(name, str)

    def digest(self, name: str) -> str:
        value = self._take(name, str)
        if not is_digest(value):
            raise self.corrupt(f"{name}: expected 16 hexadecimal digits, found {value[:40]!r}")
        return value

    def object(self, name: str) -> dict[str, Any]:
        return self._take(name, dict)

    def array(self, name: str) -> list[Any]:
        return self._take(name, list)

    def integers(self, name: str, *, below: int = _MAX_INTEGER + 1) -> list[int]:
        """An array of integers in `[0, below)`."""
        values = self._take(name, list)
        if not {int}.issuperset(map(type, values)) or (values and not 0 <= min(values) <= max(values) < below):
            raise self.corrupt(f"{name}: expected integers from 0 to {below - 1}")
        return values

    def inner(self, name: str) -> Members:
        return Members(f"{self.what} {name}", self._take(name, dict), self.version)

    def finish(self) -> None:
        """Refuses members that nobody took: a later format may mean something by them."""
        if self._rest:
            raise self.corrupt(f"unknown members {sorted(self._rest)[:10]}")

    def corrupt(self, problem: str) -> CorruptionError:
        """The error for a problem with this object."""
        return CorruptionError(f"{self.what}: {problem}; take another copy")

    def _take(self, name: str, kind: type[_T]) -> _T:
        value = self._rest.pop(name, None)
        if type(value) is not kind:
            raise self.corrupt(f"{name}: expected {kind.__name__}, found {str(value)[:40]!r}")
        return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member stands twice in one object")
    return members


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON value")
