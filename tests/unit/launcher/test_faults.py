"""Fault plans: parsed strictly, due at the right moment, once."""

from __future__ import annotations

from typing import Any

import pytest

from ktrain.errors import ConfigError
from ktrain.launcher.faults import Fault, due, parse_fault


def parse(text: str) -> Fault:
    return parse_fault(text, nodes=2, world_size=4)


def status(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "state": "running",
        "epoch": 2,
        "step": 60,
        "committed": {},
        "fired": {},
        "pids": {"0": 1, "1": 2, "2": 3, "3": 4},
    }
    return {**base, **changes}


@pytest.mark.parametrize(
    ("text", "action", "step"),
    [
        ("kill-worker@step=30,rank=1", "kill-worker", 30),
        ("stop-worker@rank=3,step=1", "stop-worker", 1),
        ("kill-agent@step=30,node=1", "kill-agent", 30),
        ("kill-head@step=5", "kill-head", 5),
        ("lose-node@step=60,node=1,after=peer", "lose-node", 60),
        ("lose-all@step=90,after=bucket", "lose-all", 90),
    ],
)
def test_parse_fault_well_formed_gives_its_parts(text: str, action: str, step: int) -> None:
    fault = parse(text)
    assert (fault.spec, fault.action, fault.step) == (text, action, step)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("explode@step=1", "kill-worker"),
        ("kill-worker", "step, rank is missing"),
        ("kill-worker@step=1", "rank is missing"),
        ("kill-worker@step=1,rank=4", "ranks 0 to 3"),
        ("kill-agent@step=1,node=2", "nodes 0 to 1"),
        ("kill-worker@step=-1,rank=0", "whole number"),
        ("kill-worker@step=1.5,rank=0", "whole number"),
        ("kill-worker@step=1,rank=0,rank=1", "cannot use 'rank=1'"),
        ("kill-head@step=1,node=0", "cannot use 'node=0'"),
        ("lose-all@step=1,after=moon", "memory, peer, bucket"),
        ("kill-worker@step=1,rank=0,", "cannot use ''"),
    ],
)
def test_parse_fault_malformed_names_the_spec_and_what_is_allowed(text: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert text in str(caught.value) and hint in str(caught.value)


def test_parse_fault_peer_of_one_node_is_refused() -> None:
    with pytest.raises(ConfigError, match="no peers"):
        parse_fault("lose-node@step=1,node=0,after=peer", nodes=1, world_size=1)


def test_due_before_the_step_is_none() -> None:
    assert due([parse("kill-head@step=61")], status()) is None


def test_due_at_the_step_is_the_first_of_the_plan() -> None:
    plan = [parse("kill-head@step=61"), parse("kill-agent@step=60,node=0"), parse("kill-head@step=1")]
    assert due(plan, status()) == plan[1]


def test_due_while_recovering_is_none() -> None:
    assert due([parse("kill-head@step=1")], status(state="joining")) is None


def test_due_fired_already_is_none() -> None:
    plan = [parse("kill-head@step=1")]
    assert due(plan, status(fired={"kill-head@step=1": 1})) is None


def test_due_typed_twice_fires_twice() -> None:
    plan = [parse("kill-head@step=1")] * 2
    assert due(plan, status(fired={"kill-head@step=1": 1})) == plan[1]
    assert due(plan, status(fired={"kill-head@step=1": 2})) is None


def test_due_worker_without_a_process_waits() -> None:
    assert due([parse("kill-worker@step=1,rank=1")], status(pids={"0": 1})) is None


@pytest.mark.parametrize(
    ("committed", "fires"),
    [
        ({}, False),
        ({"memory": [60, 2]}, False),
        ({"memory": [60, 2], "peer": [50, 2]}, False),
        ({"memory": [60, 2], "peer": [60, 2]}, True),
        ({"memory": [60, 2], "peer": [60, 2], "bucket": [50, 2]}, True),
        ({"memory": [60, 1], "peer": [60, 1]}, False),  # of the attempt before: nothing was saved since
    ],
)
def test_due_after_a_tier_waits_until_it_has_the_newest_step(committed: dict[str, list[int]], fires: bool) -> None:
    plan = [parse("lose-node@step=60,node=1,after=peer")]
    assert (due(plan, status(committed=committed)) is not None) == fires
