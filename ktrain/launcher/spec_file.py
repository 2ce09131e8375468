"""A JobSpec as a TOML file or a JSON value, and back: one codec, driven by the fields of the dataclasses."""

from __future__ import annotations

import json
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from ktrain.errors import ConfigError
from ktrain.launcher.quantity import parse_bytes
from ktrain.launcher.spec import Bytes, JobSpec


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a job file.

    Raises:
        ConfigError: there is none, or it is not TOML.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"job file {path}: cannot be read: {error}; give the path of a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"job file {path}: not TOML: {error}") from error


def from_value(value: Mapping[str, Any]) -> JobSpec:
    """The job that a value of TOML or JSON says.

    Raises:
        ConfigError: a field is unknown, missing, of another type, or cannot be.
    """
    made = _build(JobSpec, value, "")
    assert isinstance(made, JobSpec)
    return made


def put(value: dict[str, Any], path: str, item: object) -> None:
    """Sets the field of a job file that has this path, such as `placement.queue`.

    Raises:
        ConfigError: a part of the path is there and no table.
    """
    *tables, last = path.split(".")
    for name in tables:
        value = value.setdefault(name, {})
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: {name} is no table; give it whole")
    value[last] = item


def to_value(spec: JobSpec) -> dict[str, Any]:
    """The job as a JSON value that `from_value` reads; what has its default is left out."""
    value = _plain(spec)
    assert isinstance(value, dict)
    return value


def _settable(cls: type) -> list[Field[Any]]:
    return [item for item in fields(cls) if item.init]


def _default(item: Field[Any]) -> object:
    """The value of a field that is not given; MISSING where it must be."""
    return item.default if item.default_factory is MISSING else item.default_factory()


def _build(cls: type, value: object, path: str) -> object:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: expected a table, found {value!r}")
    known = {item.name: item for item in _settable(cls)}
    prefix = f"{path}." if path else ""
    odd = sorted(set(value) - set(known))
    if odd:
        raise ConfigError(f"{prefix}{odd[0]}: there is no such field; expected some of {', '.join(known)}")
    missing = [name for name, item in known.items() if name not in value and _default(item) is MISSING]
    if missing:
        raise ConfigError(f"{prefix}{missing[0]}: it is missing; expected {_SAID.get(prefix + missing[0], 'a value')}")
    types_of = typing.get_type_hints(cls)
    return cls(**{name: _read(types_of[name], item, prefix + name) for name, item in value.items()})


_SAID = {
    "memory": "a table with the bytes of state that one node holds: memory = { state = '40Gi' }, --state 40Gi",
    "memory.state": "the bytes of state that one node holds, such as 40Gi (--state)",
    "name": "the name of the job (--name)",
    "run": "where the run lives, such as s3://bucket/net-a (--run)",
    "image": "the image that has Python, torch and ktrain (--image)",
    "command": "the script and its arguments",
}


def _read(kind: Any, value: object, path: str) -> object:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        wanted = [item for item in args if item is not type(None)]
        return None if value is None else _read(wanted[0], value, path)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path}: expected a list, found {value!r}")
        return tuple(_read(args[0], item, f"{path}[{at}]") for at, item in enumerate(value))
    if origin is not None:  # a mapping
        return _read_mapping(args[1], value, path)
    if kind is Bytes:
        is_number = isinstance(value, int) and not isinstance(value, bool)
        return value if is_number else parse_bytes(str(value), name=path)
    if isinstance(kind, type) and is_dataclass(kind):
        return _build(kind, value, path)
    return _read_plain(kind, value, path)


def _read_mapping(kind: Any, value: object, path: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: expected a table, found {value!r}")
    if kind is not Any and (odd := [key for key, item in value.items() if not isinstance(item, kind)]):
        raise ConfigError(f"{path}.{odd[0]}: expected a text, found {value[odd[0]]!r}")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: expected what JSON can say, found something else: {error}") from error
    return dict(value)


def _read_plain(kind: Any, value: object, path: str) -> object:
    if issubclass(kind, StrEnum):
        try:
            return kind(value)
        except ValueError:
            raise ConfigError(f"{path}: expected one of {', '.join(kind)}, found {value!r}") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ConfigError(f"{path}: expected {_KINDS[kind]}, found {value!r}")
    return value


_KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return {
            item.name: _plain(getattr(value, item.name))
            for item in _settable(type(value))
            if getattr(value, item.name) != _default(item)
        }
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, StrEnum) else value
