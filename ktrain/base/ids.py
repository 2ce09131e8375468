"""Identifiers: unique where they must be, derived where they may be."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
from typing import Any


def random_id(num_bytes: int = 6) -> str:
    """A fresh lower-case hexadecimal id; 6 bytes name a write, 16 bytes name a run or make a token."""
    return secrets.token_hex(num_bytes)


def host_name() -> str:
    """This machine's name, for people."""
    return socket.gethostname()


def process_name() -> str:
    """`host:pid`, for people."""
    return f"{host_name()}:{os.getpid()}"


def text_digest(text: str, num_hex: int = 16) -> str:
    """A short stable name for a text (SHA-256, shortened)."""
    return hashlib.sha256(text.encode()).hexdigest()[:num_hex]


def canonical_json(value: Any) -> bytes:
    """The one byte form of a JSON value: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
