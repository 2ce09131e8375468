"""Tagged JSON: what is no tensor, with identical types back.

Invariant: `decode(encode(x))` equals x in value and type at every level, or `encode` refuses with the path
named. None, bool, text, lists, finite floats, integers up to 2**53 and objects with text keys are plain JSON;
all else is an object with exactly the members "$" (the tag) and "v". Two references to one object come
back as two objects.
"""

from __future__ import annotations

import base64
import json
import math
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, TypeAlias

from ktrain.errors import ConfigError, CorruptionError

TensorKey: TypeAlias = Callable[[Any, str], "str | None"]
"""Gives a tensor at a path its key (writing it down for the payload); None for what is no tensor."""

_TAG = "$"
_VALUE = "v"
_MAX_PLAIN_INTEGER = 2**53  # beyond it, readers in other languages lose digits
_MAX_DEPTH = 64  # readers recurse, about six Python frames a level
_PLAIN = frozenset({type(None), bool, str})


def encode(value: Any, *, tensor: TensorKey, path: str) -> Any:
    """The JSON form of a value.

    Args:
        tensor: called for every leaf of a type that is not known here, with the leaf and its path; returns
            the key to write in its place, or None if it is no tensor.
        path: the value's own path; parts below are joined by `/`, with `~` and `/` in a key written `~0` and
            `~1` and a key that is no text as `[json]`. Different places have different paths.

    Raises:
        ConfigError: a value cannot be written so that it comes back the same; names its path and type.
    """
    return _Encoder(tensor).encode(value, path, 0)


def decode(value: Any, *, tensor: Callable[[str], Any]) -> Any:
    """The value that `encode` was given; `tensor` gives the leaf for a key.

    Raises:
        CorruptionError: the JSON is nothing that `encode` makes.
    """
    return _decode(value, tensor, 0)


def child_path(path: str, key: Any) -> str:
    """The path of a dictionary's member."""
    if type(key) is str:
        text = key.replace("~", "~0").replace("/", "~1")
        return f"{path}/~2{text[1:]}" if text.startswith("[") else f"{path}/{text}"
    text = json.dumps(encode(key, tensor=_no_tensor, path=path), separators=(",", ":"))
    return f"{path}/[{text.replace('~', '~0').replace('/', '~1')}]"


def _no_tensor(value: Any, path: str) -> None:
    del value, path


class _Encoder:
    def __init__(self, tensor: TensorKey) -> None:
        self._tensor = tensor

    def encode(self, value: Any, path: str, depth: int) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is int:
            return value if -_MAX_PLAIN_INTEGER <= value <= _MAX_PLAIN_INTEGER else _tag("int", hex(value))
        if kind is float:
            return value if math.isfinite(value) else _tag("float", struct.pack(">d", value).hex())
        write = _CONTAINERS.get(kind)
        if write is not None:
            return self._container(write, value, path, depth)
        if kind is bytes or kind is bytearray:
            return _tag(kind.__name__, base64.b64encode(value).decode("ascii"))
        if kind is complex:
            return _tag("complex", struct.pack(">dd", value.real, value.imag).hex())
        key = self._tensor(value, path)
        if key is None:
            raise ConfigError(
                f"{path}: cannot store a value of type {kind.__module__}.{kind.__qualname__} so that it "
                "comes back the same; return tensors, numbers, texts and plain containers from state_dict()"
            )
        return _tag("tensor", key)

    def _container(self, write: _Writer, value: Any, path: str, depth: int) -> Any:
        if depth >= _MAX_DEPTH:
            raise ConfigError(
                f"{path[:200]}: expected containers nested at most {_MAX_DEPTH} deep, found more or a "
                "container that holds itself; flatten it in state_dict()"
            )
        return write(self, value, path, depth + 1)

    def items(self, values: Any, path: str, depth: int) -> list[Any]:
        return [self.encode(value, f"{path}/{index}", depth) for index, value in enumerate(values)]

    def pairs(self, value: dict[Any, Any], path: str, depth: int) -> list[Any]:
        return [
            [_key(key, path, depth), self.encode(member, child_path(path, key), depth)] for key, member in value.items()
        ]

    def mapping(self, value: dict[Any, Any], path: str, depth: int) -> Any:
        if all(type(key) is str for key in value) and _TAG not in value:
            return {key: self.encode(member, child_path(path, key), depth) for key, member in value.items()}
        return _tag("dict", self.pairs(value, path, depth))


_Writer: TypeAlias = Callable[[_Encoder, Any, str, int], Any]


def _write_set(encoder: _Encoder, value: Any, path: str, depth: int) -> Any:
    del encoder
    # A set has no order: sorted by their text, equal sets give equal bytes.
    return _tag(type(value).__name__, sorted((_key(item, path, depth) for item in value), key=json.dumps))


_CONTAINERS: dict[type, _Writer] = {
    list: _Encoder.items,
    dict: _Encoder.mapping,
    tuple: lambda encoder, value, path, depth: _tag("tuple", encoder.items(value, path, depth)),
    OrderedDict: lambda encoder, value, path, depth: _tag("OrderedDict", encoder.pairs(value, path, depth)),
    Counter: lambda encoder, value, path, depth: _tag("Counter", encoder.pairs(value, path, depth)),
    set: _write_set,
    frozenset: _write_set,
}


def _tag(name: str, value: Any) -> dict[str, Any]:
    return {_TAG: name, _VALUE: value}


def _key(key: Any, path: str, depth: int) -> Any:
    """A member of a set or a key of a dictionary: never a tensor, which is equal to nothing but itself."""
    return _Encoder(_no_tensor).encode(key, path, depth)


def _decode(value: Any, tensor: Callable[[str], Any], depth: int) -> Any:
    if depth > 3 * _MAX_DEPTH + 3:  # a tagged dictionary is three levels of JSON
        raise CorruptionError(f"tagged JSON: nested deeper than {_MAX_DEPTH} containers; take another copy")
    if isinstance(value, list):
        return [_decode(item, tensor, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: _decode(member, tensor, depth + 1) for key, member in value.items()}
    tag, inner = value[_TAG], value.get(_VALUE)
    if len(value) != 2 or not isinstance(tag, str):
        raise _corrupt(value)
    if tag == "tensor" and isinstance(inner, str):
        return tensor(inner)
    make = _MAKERS.get((tag, type(inner)))
    if make is None:
        raise _corrupt(value)
    items = _decode(inner, tensor, depth + 1)
    try:
        return make(items)
    except (ValueError, TypeError, struct.error) as error:
        raise _corrupt(value) from error


def _pairs(items: list[Any]) -> dict[Any, Any]:
    if not all(isinstance(item, list) for item in items):
        raise ValueError("expected pairs")
    return {key: member for key, member in items}


def _integer(text: str) -> int:
    value = int(text, 16)
    if hex(value) != text:
        raise ValueError("expected what hex() gives")
    return value


_MAKERS: dict[tuple[str, type], Callable[[Any], Any]] = {
    ("int", str): _integer,
    ("float", str): lambda text: struct.unpack(">d", bytes.fromhex(text))[0],
    ("complex", str): lambda text: complex(*struct.unpack(">dd", bytes.fromhex(text))),
    ("bytes", str): lambda text: base64.b64decode(text, validate=True),
    ("bytearray", str): lambda text: bytearray(base64.b64decode(text, validate=True)),
    ("tuple", list): tuple,
    ("set", list): set,
    ("frozenset", list): frozenset,
    ("dict", list): _pairs,
    ("OrderedDict", list): lambda items: OrderedDict(_pairs(items)),
    ("Counter", list): lambda items: Counter(_pairs(items)),
}


def _corrupt(value: Any) -> CorruptionError:
    return CorruptionError(
        f"tagged JSON: expected a known tag with its value, found {str(value)[:80]}; take another copy"
    )
