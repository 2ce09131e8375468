"""Every error that ktrain raises on purpose, by what the caller would do about it.

    KtrainError                 kind "error"
    +-- ConfigError             kind "config"       fix the call or the setting (also a ValueError)
    +-- NotFoundError           kind "not-found"    the thing is surely absent
    +-- ConflictError           kind "conflict"     somebody else holds it, or wrote it first
    +-- CorruptionError         kind "corruption"   bytes do not match their proof; try another copy
    +-- UnavailableError        kind "unavailable"  could not tell; retry later (retryable)
    |   +-- ForbiddenError      kind "forbidden"    refused by the other side; retrying will not help
    +-- DeadlineError           kind "deadline"     a bounded wait ended (also a TimeoutError)
    +-- CapacityError           kind "capacity"     no space left where the bytes should go
    +-- InternalError           kind "internal"     a mistake of ours

`kind` is stable and append-only: it is written to events and crosses the control channel. All errors survive pickling.
"""

from __future__ import annotations


class KtrainError(Exception):
    """Base of all errors raised on purpose."""

    kind = "error"


class ConfigError(KtrainError, ValueError):
    """The caller asked for something that cannot be; nothing was changed."""

    kind = "config"


class NotFoundError(KtrainError):
    """The thing is surely absent (not merely unreachable)."""

    kind = "not-found"


class ConflictError(KtrainError):
    """Somebody else holds the thing or wrote it first."""

    kind = "conflict"


class CorruptionError(KtrainError):
    """Bytes do not match the digest or shape that was promised for them."""

    kind = "corruption"


class UnavailableError(KtrainError):
    """The other side could not be asked; the answer is unknown. Retryable."""

    kind = "unavailable"


class ForbiddenError(UnavailableError):
    """The other side refused; a retry without a change of permission will not help."""

    kind = "forbidden"


class DeadlineError(KtrainError, TimeoutError):
    """A bounded wait ended before what it waited for happened."""

    kind = "deadline"


class CapacityError(KtrainError):
    """There is no space left where the bytes should go."""

    kind = "capacity"


class InternalError(KtrainError):
    """A state that ktrain's own code should have made impossible."""

    kind = "internal"


def _tree(root: type[KtrainError]) -> list[type[KtrainError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _tree(child))]


def from_kind(kind: str, message: str) -> KtrainError:
    """Returns the error of the given kind, so that an error keeps its class across the control channel."""
    for cls in _tree(KtrainError):
        if cls.kind == kind:
            return cls(message)
    return InternalError(f"{kind}: {message}")
