"""Which committed checkpoints stay: policies as values, pure functions over a list, their text and their JSON form.

Each policy answers, for the checkpoints of the line from the oldest to the newest, which of them it wants to keep. It
answers the same again when what it gave up is gone. What is kept beside a policy (the newest, what is pinned or read)
is the collector's matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

from ktrain.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Committed:
    """What a policy knows of a checkpoint. `time`: of its commit, seconds since 1970 by that head's clock."""

    step: int
    epoch: int
    time: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Latest:
    """Keeps the newest `n`."""

    n: int
    kind: ClassVar[str] = "latest"

    def __post_init__(self) -> None:
        _require_count("Latest", self.n)

    def should_preserve(self, found: Sequence[Committed]) -> list[bool]:
        return [index >= len(found) - self.n for index in range(len(found))]


@dataclass(frozen=True, slots=True)
class EverySteps:
    """Keeps the first checkpoint at or after each multiple of `n` steps: not every multiple gets into the bucket."""

    n: int
    kind: ClassVar[str] = "every_steps"

    def __post_init__(self) -> None:
        _require_count("EverySteps", self.n)

    def should_preserve(self, found: Sequence[Committed]) -> list[bool]:
        reached, keeps = 0, []
        for checkpoint in found:
            keeps.append(checkpoint.step // self.n > reached)
            reached = max(reached, checkpoint.step // self.n)
        return keeps


@dataclass(frozen=True, slots=True)
class EverySeconds:
    """Keeps the first checkpoint, then each that was committed `seconds` or more after the last one kept.

    Times are of the heads' wall clocks. Where one goes back, the checkpoint stays and counting begins anew.
    """

    seconds: float
    kind: ClassVar[str] = "every_seconds"

    def __post_init__(self) -> None:
        if isinstance(self.seconds, bool) or not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ConfigError(f"keep: EverySeconds: expected seconds > 0, found {self.seconds!r}")

    def should_preserve(self, found: Sequence[Committed]) -> list[bool]:
        last_s, keeps = None, []
        for checkpoint in found:
            keep = last_s is None or not last_s <= checkpoint.time < last_s + self.seconds
            keeps.append(keep)
            last_s = checkpoint.time if keep else last_s
        return keeps


@dataclass(frozen=True, slots=True)
class Best:
    """Keeps the `n` best by a metric: "loss" of `step(loss=...)`, or a name given to `log` at that step.

    Of equal values the newer is better. Checkpoints without a number under this name come after all others, newest
    first, so that a name nobody logs means `Latest(n)`.
    """

    n: int
    metric: str
    mode: str = "min"
    kind: ClassVar[str] = "best"

    def __post_init__(self) -> None:
        _require_count("Best", self.n)
        if not isinstance(self.metric, str) or not self.metric:
            raise ConfigError(f"keep: Best: expected the name of a metric, found {self.metric!r}")
        if self.mode not in ("min", "max"):
            raise ConfigError(f"keep: Best: expected mode 'min' or 'max', found {self.mode!r}")

    def should_preserve(self, found: Sequence[Committed]) -> list[bool]:
        ranked = sorted(range(len(found)), key=lambda index: (self._rank(found[index]), -index))
        best = set(ranked[: self.n])
        return [index in best for index in range(len(found))]

    def _rank(self, checkpoint: Committed) -> tuple[bool, float]:
        value = checkpoint.metrics.get(self.metric, math.nan)
        return (True, 0.0) if math.isnan(value) else (False, value if self.mode == "min" else -value)


@dataclass(frozen=True, slots=True, init=False)
class AnyOf:
    """Keeps what any of its policies keeps: `AnyOf(Latest(3), Best(1, "val_loss"))`."""

    policies: tuple[Retention, ...]
    kind: ClassVar[str] = "any_of"

    def __init__(self, *policies: Retention) -> None:
        wrong = [policy for policy in policies if not isinstance(policy, _KINDS)]
        if wrong or not policies:
            raise ConfigError(f"keep: AnyOf: expected one policy or more, found {wrong or 'none'}")
        object.__setattr__(self, "policies", policies)

    def should_preserve(self, found: Sequence[Committed]) -> list[bool]:
        answers = [policy.should_preserve(found) for policy in self.policies]
        return [any(each) for each in zip(*answers, strict=True)]


Retention: TypeAlias = Latest | EverySteps | EverySeconds | Best | AnyOf
_KINDS = (Latest, EverySteps, EverySeconds, Best, AnyOf)


def _require_count(what: str, n: int) -> None:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ConfigError(f"keep: {what}: expected a number of 1 or more, found {n!r}")


def as_retention(value: int | str | Retention) -> Retention:
    """A number means the newest so many; a text is read by `parse`.

    Raises:
        ConfigError: it is neither a number of at least 1 nor a policy nor the text of one.
    """
    if isinstance(value, _KINDS):
        return value
    if isinstance(value, str):
        return parse(value)
    _require_count("Latest", value)
    return Latest(value)


def parse(text: str) -> Retention:
    """The policy that a text names: terms with commas between them, any of which keeps (ADR 0023).

    A term is `3` or `latest:3`, `every_steps:1000`, `every_seconds:3600`, `best:2:val_loss` or `best:2:accuracy:max`.

    Raises:
        ConfigError: it names none; shows the term.
    """
    terms = [_parse_term(term.strip()) for term in text.split(",")]
    return terms[0] if len(terms) == 1 else AnyOf(*terms)


def _parse_term(term: str) -> Retention:
    kind, _, rest = term.partition(":")
    try:
        if kind.isdecimal() and not rest:
            return Latest(int(kind))
        if kind == Latest.kind:
            return Latest(int(rest))
        if kind == EverySteps.kind:
            return EverySteps(int(rest))
        if kind == EverySeconds.kind:
            return EverySeconds(float(rest))
        if kind == Best.kind:
            n, _, metric = rest.partition(":")
            name, _, mode = metric.rpartition(":")
            return Best(int(n), name, mode) if name and mode in ("min", "max") else Best(int(n), metric)
    except ConfigError as error:
        raise ConfigError(f"{error}, in {term!r}") from None
    except ValueError:
        pass  # what stands for a number is none
    raise ConfigError(
        f"keep: {term!r}: expected N, latest:N, every_steps:N, every_seconds:S or best:N:METRIC[:min|:max], and commas "
        "between several"
    )


def needs_facts(policy: Retention) -> bool:
    """Whether it judges by times or metrics, beside steps."""
    if isinstance(policy, AnyOf):
        return any(map(needs_facts, policy.policies))
    return isinstance(policy, EverySeconds | Best)


def superseded(found: Sequence[Committed], policy: Retention) -> list[Committed]:
    """What `policy` gives up, oldest first. The newest is never among it, whatever the policy says."""
    ordered = sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.epoch))
    keeps = policy.should_preserve(ordered)
    return [checkpoint for checkpoint, keep in zip(ordered[:-1], keeps, strict=False) if not keep]


def to_json(policy: Retention) -> dict[str, Any]:
    """The policy as plain JSON."""
    if isinstance(policy, AnyOf):
        return {policy.kind: [to_json(each) for each in policy.policies]}
    return {policy.kind: {name: getattr(policy, name) for name in policy.__slots__}}


def from_json(value: Any) -> Retention:
    """The opposite of `to_json`.

    Raises:
        ConfigError: the value is no policy; a newer ktrain may know it.
    """
    if not isinstance(value, dict) or len(value) != 1:
        raise ConfigError(f"keep: expected one policy as JSON, found {str(value)[:200]}")
    ((kind, fields),) = value.items()
    for cls in _KINDS:
        if cls.kind == kind:
            try:
                return AnyOf(*map(from_json, fields)) if cls is AnyOf else cls(**fields)
            except TypeError as error:
                raise ConfigError(f"keep: {kind}: {error}") from None
    raise ConfigError(f"keep: expected one of {[cls.kind for cls in _KINDS]}, found {kind!r}")
