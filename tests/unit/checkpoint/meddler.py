"""A tier between whose calls a test may act: what two processes do at the same time, in a chosen order."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from ktrain.abc.tier import Tier


class Meddler:
    """Runs `action` once, right before or after the first call of `operation` on a name like `pattern`."""

    def __init__(self, inner: Tier, operation: str, pattern: str, action: Callable[[], object], *, when: str) -> None:
        assert when in ("before", "after"), when
        self._inner = inner
        self._operation = operation
        self._pattern = pattern
        self._action: Callable[[], object] | None = action
        self._when = when

    @property
    def has_acted(self) -> bool:
        return self._action is None

    def _act(self, when: str, operation: str, name: str) -> None:
        if self._action and (when, operation) == (self._when, self._operation) and fnmatchcase(name, self._pattern):
            action, self._action = self._action, None
            action()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value) or name == "close":
            return value

        def call(target: str, *args: Any, **kwargs: Any) -> Any:
            self._act("before", name, target)
            answer = value(target, *args, **kwargs)
            self._act("after", name, target)
            return answer

        return call
