"""Files on a local file system that are either whole or absent."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ktrain.base import ids
from ktrain.errors import CorruptionError


def write_bytes(path: Path, data: bytes) -> None:
    """Puts a whole file at `path`: readers see the old bytes or the new ones, never a part.

    Local file systems only: object stores have no rename that could be relied on.
    """
    temporary = path.with_name(f".{path.name}.{ids.random_id(4)}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, json.dumps(value, indent=1, sort_keys=True).encode() + b"\n")


def try_read_json(path: Path) -> Any | None:
    """The value, or None where there is no such file.

    Raises:
        CorruptionError: the file is there but is not JSON.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return json.loads(data)
    except ValueError as error:
        raise CorruptionError(f"{path}: expected JSON, found {data[:40]!r}; remove the file or restore it") from error
