"""Policies as pure functions: what each keeps, and what holds for all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrain.checkpoint import retention
from ktrain.checkpoint.retention import (
    AnyOf,
    Best,
    Committed,
    EverySeconds,
    EverySteps,
    Latest,
    Retention,
    as_retention,
    superseded,
)
from ktrain.errors import ConfigError

COUNTS = st.integers(1, 6)
SINGLE: st.SearchStrategy[Any] = st.one_of(
    COUNTS.map(Latest),
    st.integers(1, 40).map(EverySteps),
    st.floats(0.5, 50).map(EverySeconds),
    st.builds(Best, COUNTS, st.sampled_from(["loss", "val"]), st.sampled_from(["min", "max"])),
)
POLICIES: st.SearchStrategy[Any] = st.recursive(
    SINGLE, lambda inner: st.lists(inner, min_size=1, max_size=3).map(lambda found: AnyOf(*found)), max_leaves=5
)
METRICS = st.dictionaries(st.sampled_from(["loss", "val"]), st.floats(allow_infinity=False), max_size=2)


def in_order(found: list[Committed]) -> list[Committed]:
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.epoch))


LINES = st.lists(
    st.builds(Committed, st.integers(1, 100), st.integers(1, 3), st.floats(0, 200), METRICS),
    unique_by=lambda checkpoint: (checkpoint.step, checkpoint.epoch),
    max_size=12,
).map(in_order)


def kept(policy: Retention, found: list[Committed]) -> list[Committed]:
    gone = superseded(found, policy)
    return [checkpoint for checkpoint in found if checkpoint not in gone]


def steps(policy: Retention, found: list[Committed]) -> list[int]:
    return [checkpoint.step for checkpoint in kept(policy, found)]


def line(*entries: int | tuple[int, float]) -> list[Committed]:
    """Checkpoints by step, or by step and time."""
    return [Committed(*entry) if isinstance(entry, tuple) else Committed(entry, 1) for entry in entries]


@given(POLICIES, LINES)
def test_superseded_newest_always_stays(policy: Retention, found: list[Committed]) -> None:
    assert kept(policy, found)[-1:] == found[-1:]


@given(POLICIES, LINES)
def test_superseded_applied_again_gives_up_nothing_more(policy: Retention, found: list[Committed]) -> None:
    once = kept(policy, found)
    assert kept(policy, once) == once


@given(POLICIES, LINES, st.randoms())
def test_superseded_order_of_the_list_does_not_matter(policy: Retention, found: list[Committed], random: Any) -> None:
    shuffled = list(found)
    random.shuffle(shuffled)
    assert superseded(shuffled, policy) == superseded(found, policy)


@given(st.lists(SINGLE, min_size=1, max_size=4), LINES)
def test_any_of_keeps_the_union(policies: list[Any], found: list[Committed]) -> None:
    answers = [policy.should_preserve(found) for policy in policies]
    assert AnyOf(*policies).should_preserve(found) == [any(each) for each in zip(*answers, strict=True)]


@given(POLICIES)
def test_policy_crosses_as_json_unchanged(policy: Retention) -> None:
    assert retention.from_json(retention.to_json(policy)) == policy


@given(COUNTS, LINES)
def test_latest_keeps_the_newest_n(n: int, found: list[Committed]) -> None:
    assert kept(Latest(n), found) == found[-n:]


@given(COUNTS, LINES, st.sampled_from(["min", "max"]))
def test_best_no_other_checkpoint_is_better_than_one_it_keeps(n: int, found: list[Committed], mode: str) -> None:
    keeps = Best(n, "loss", mode).should_preserve(found)
    sign = 1 if mode == "min" else -1
    worth = [sign * checkpoint.metrics.get("loss", math.nan) for checkpoint in found]
    worth = [math.inf if math.isnan(value) else value for value in worth]
    best = [value for value, keep in zip(worth, keeps, strict=True) if keep]
    assert len(best) == min(n, len(found))
    assert all(value >= max(best) for value, keep in zip(worth, keeps, strict=True) if not keep)


def test_best_metric_that_nobody_logs_keeps_the_latest() -> None:
    assert steps(Best(2, "val_los"), line(10, 20, 30, 40)) == [30, 40]


def test_best_mode_max_keeps_the_greatest() -> None:
    found = [Committed(step, 1, 0.0, {"accuracy": value}) for step, value in ((10, 0.9), (20, 0.5), (30, 0.7))]
    assert steps(AnyOf(Latest(1), Best(1, "accuracy", "max")), found) == [10, 30]


def test_every_steps_first_at_or_after_each_multiple_stays() -> None:
    assert steps(EverySteps(100), line(90, 110, 150, 220, 290, 405, 410)) == [110, 220, 405, 410]


def test_every_seconds_counts_from_the_last_kept() -> None:
    found = [Committed(step, 1, float(at)) for step, at in ((1, 0), (2, 40), (3, 70), (4, 125), (5, 135), (6, 140))]
    assert steps(EverySeconds(60), found) == [1, 3, 5, 6]


def test_every_seconds_clock_that_went_back_keeps_one_more() -> None:
    found = [Committed(step, 1, float(at)) for step, at in ((1, 1000), (2, 5), (3, 20), (4, 70), (5, 71))]
    assert steps(EverySeconds(60), found) == [1, 2, 4, 5]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Latest(0),
        lambda: Latest(True),
        lambda: Latest(2.5),  # type: ignore[arg-type]
        lambda: EverySteps(-1),
        lambda: EverySeconds(0),
        lambda: EverySeconds(math.inf),
        lambda: Best(0, "loss"),
        lambda: Best(1, ""),
        lambda: Best(1, "loss", "smallest"),
        lambda: AnyOf(),
        lambda: AnyOf(3),  # type: ignore[arg-type]
        lambda: as_retention(None),  # type: ignore[arg-type]
        lambda: retention.from_json({"newest": {"n": 3}}),
        lambda: retention.from_json({"latest": {"count": 3}}),
        lambda: retention.from_json([]),
    ],
)
def test_policy_that_cannot_be_is_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"^keep: "):
        make()


TEXTS = [
    ("3", Latest(3)),
    ("latest:3", Latest(3)),
    ("every_steps:1000", EverySteps(1000)),
    ("every_seconds:0.5", EverySeconds(0.5)),
    ("best:2:val_loss", Best(2, "val_loss")),
    ("best:2:eval:loss", Best(2, "eval:loss")),
    ("best:1:accuracy:max", Best(1, "accuracy", "max")),
    ("best:1:max", Best(1, "max")),
    ("latest:3, every_steps:10,best:1:loss:min", AnyOf(Latest(3), EverySteps(10), Best(1, "loss"))),
]


@pytest.mark.parametrize(("text", "policy"), TEXTS)
def test_parse_text_names_the_policy(text: str, policy: Retention) -> None:
    assert retention.parse(text) == policy == as_retention(text)


@pytest.mark.parametrize(
    "text",
    ["", "all", "0", "latest", "latest:", "latest:0", "latest:2.5", "every_seconds:soon", "every_seconds:-1", "3:4"]
    + ["best:2", "best:loss:2", "best:1:", "latest:3,", "latest:3;every_steps:2", "-1", "every_steps:1e3"],
)
def test_parse_text_that_names_none_is_refused_with_its_term(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^keep: .*(expected|found)") as caught:
        retention.parse(text)
    assert repr(text.split(",")[-1].strip()) in str(caught.value)


@given(st.lists(SINGLE, min_size=1, max_size=4))
def test_parse_of_what_a_policy_says_of_itself_is_the_policy(policies: list[Any]) -> None:
    terms = [":".join([p.kind, *(str(getattr(p, name)) for name in p.__slots__)]) for p in policies]
    found = retention.parse(",".join(terms))
    assert (list(found.policies) if isinstance(found, AnyOf) else [found]) == policies
