"""Each error that ends a process has its code in the contract."""

from __future__ import annotations

import pytest

from ktrain import errors
from ktrain.base import contract
from ktrain.base.exits import exit_code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("x"), contract.EXIT_USAGE),
        (errors.CorruptionError("x"), contract.EXIT_CORRUPT),
        (errors.ConflictError("x"), contract.EXIT_CONFLICT),
        (errors.UnavailableError("x"), contract.EXIT_UNAVAILABLE),
        (errors.ForbiddenError("x"), contract.EXIT_UNAVAILABLE),
        (errors.DeadlineError("x"), contract.EXIT_UNAVAILABLE),
        (errors.NotFoundError("x"), contract.EXIT_FAILED),
        (errors.CapacityError("x"), contract.EXIT_FAILED),
        (errors.InternalError("x"), contract.EXIT_FAILED),
        (ValueError("x"), contract.EXIT_FAILED),
        (TimeoutError("x"), contract.EXIT_FAILED),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_code_error_maps_to_the_contract(error: Exception, code: int) -> None:
    assert exit_code(error) == code
