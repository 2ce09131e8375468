"""What a refusal of an API server means to ktrain. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping

from ktrain.base.retry import BusyError
from ktrain.errors import ConfigError, ConflictError, ForbiddenError, KtrainError, NotFoundError, UnavailableError

_BUSY = (429, 500, 502, 503, 504)


class RejectedError(ConfigError):
    """The cluster refused the object itself: it is not valid there."""


class AlreadyExistsError(ConflictError):
    """An object of that name is there."""


class ExpiredError(UnavailableError):
    """What was asked for is older than the server remembers: list again."""


def refusal(status: int, headers: Mapping[str, str], body: bytes, *, what: str, secret: bool = False) -> KtrainError:
    """The error of an answer that is no success. `secret` keeps the server's words, which may quote the object, out."""
    reason, message = _words(body)
    said = f"{what}: {status} {reason if secret or not message else message}".rstrip()
    if status == 404:
        return NotFoundError(said)
    if status == 409:
        return AlreadyExistsError(said) if reason == "AlreadyExists" else ConflictError(said)
    if status == 410:
        return ExpiredError(said)
    if status in (401, 403):
        return ForbiddenError(said)
    if status in _BUSY:
        return BusyError(said, _seconds(headers.get("Retry-After")), answered=True)
    return RejectedError(said)


def _words(body: bytes) -> tuple[str, str]:
    """Reason and message of a Status; a proxy's answer is none, and its beginning is shown."""
    try:
        value = json.loads(body)
    except ValueError:
        return "", body[:200].decode(errors="replace").strip()
    if not isinstance(value, dict):
        return "", ""
    return str(value.get("reason") or ""), str(value.get("message") or "").strip()


def _seconds(text: str | None) -> float:
    return float(text) if text is not None and text.isascii() and text.isdigit() else 0.0
