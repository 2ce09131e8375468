"""With which code of the contract a process ends after an error: one table for workers, head and command line."""

from __future__ import annotations

from ktrain.base import contract
from ktrain.errors import (
    ConfigError,
    ConflictError,
    CorruptionError,
    DeadlineError,
    KtrainError,
    UnavailableError,
)

_EXIT_CODES: tuple[tuple[type[KtrainError], int], ...] = (
    (ConfigError, contract.EXIT_USAGE),
    (CorruptionError, contract.EXIT_CORRUPT),
    (ConflictError, contract.EXIT_CONFLICT),
    (UnavailableError, contract.EXIT_UNAVAILABLE),
    (DeadlineError, contract.EXIT_UNAVAILABLE),
)


def exit_code(error: BaseException) -> int:
    """The contract's exit code for an error that ends a process."""
    return next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), contract.EXIT_FAILED)
