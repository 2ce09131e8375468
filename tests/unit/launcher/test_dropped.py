"""What a cluster dropped: found by comparing, against answers of a real server where they are there."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from ktrain.launcher.dropped import keeps, lost_fields
from ktrain.launcher.facts import ClusterFacts
from ktrain.launcher.probe import answered, asking
from ktrain.launcher.render.job import render
from ktrain.testing import structural
from tests.unit.launcher import setups
from tests.unit.launcher.test_render_golden import jobset_schema, needs_definitions
from tests.unit.launcher.test_spec import job


def paths(sent: dict[str, Any], returned: dict[str, Any]) -> list[str]:
    return [lost.path for lost in lost_fields(sent, returned)]


@pytest.mark.parametrize(
    ("sent", "returned", "expected"),
    [
        ({"a": 1}, {"a": 1, "b": 2}, []),  # added by the server
        ({"a": 1}, {}, ["a"]),
        ({"a": 1}, {"a": 2}, ["a"]),
        ({"a": {"b": {"c": 1}}}, {"a": {}}, ["a.b"]),  # the outermost alone
        ({"a": [{"name": "x", "v": 1}]}, {"a": [{"name": "w"}, {"name": "x", "v": 1}]}, []),
        ({"a": [{"name": "x", "v": 1}]}, {"a": [{"name": "w"}]}, ["a[x]"]),
        ({"a": [{"name": "x", "v": 1}]}, {"a": [{"name": "x"}]}, ["a[x].v"]),
        ({"a": [1, 2]}, {"a": [1]}, ["a[1]"]),
        ({"a": [1]}, {"a": None}, ["a"]),
        ({"a": {}}, {}, []),  # an empty one may be left out
        ({"a": False}, {}, []),
        ({"a": "1024Mi"}, {"a": "1Gi"}, []),
        ({"a": "0.5"}, {"a": "500m"}, []),
        ({"a": "1Gi"}, {"a": "1G"}, ["a"]),
        ({"stringData": {"t": "x"}}, {"data": {"t": "eA=="}}, []),
    ],
)
def test_lost_fields_are_those_that_did_not_come_back(
    sent: dict[str, Any], returned: dict[str, Any], expected: list[str]
) -> None:
    assert paths(sent, returned) == expected


@pytest.mark.parametrize("name", setups.NAMES)
def test_lost_fields_of_what_came_back_whole_are_none(name: str) -> None:
    for item in setups.rendered(name).objects:
        assert paths(item, copy.deepcopy(item)) == []


def leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with each of its keys."""
    if isinstance(value, dict | list):
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from leaves(item)


def test_lost_fields_find_every_single_field_that_is_taken_away() -> None:
    sent = json.loads(json.dumps(setups.rendered("03-native-gang").jobset))
    num = len(list(leaves(sent)))
    for at in range(num):
        returned = copy.deepcopy(sent)
        holder, key = list(leaves(returned))[at]
        if holder[key] in ({}, [], False, 0, ""):
            continue
        del holder[key]
        assert paths(sent, returned), key


@needs_definitions
@pytest.mark.parametrize(
    ("release", "costs"),
    [
        ("0.8", {"restart rules are dropped", "the rule then matches every failure", "the native gang is dropped"}),
        ("0.11", {"the native gang is dropped"}),
        ("0.13", set()),
    ],
)
def test_lost_fields_of_an_older_jobset_are_named_with_what_they_cost(release: str, costs: set[str]) -> None:
    sent = json.loads(json.dumps(setups.rendered("03-native-gang").jobset))
    returned, pruned = structural.prune(sent, jobset_schema(release))
    lost = lost_fields(sent, returned)

    assert [item.path.count(".") for item in lost] == [path.count(".") for path in pruned]
    assert {cost for cost in costs if any(cost in item.describe() for item in lost)} == costs
    assert all(item.cost is not None for item in lost)


def test_keeps_answers_only_for_what_was_sent() -> None:
    sent = render(job(), ClusterFacts(restart_rules=True)).jobset
    without = render(job(), ClusterFacts()).jobset

    assert keeps(sent, sent, "restartPolicyRules") and not keeps(sent, without, "restartPolicyRules")
    with pytest.raises(ValueError, match="schedulingGroup was not sent"):
        keeps(sent, sent, "schedulingGroup")


@needs_definitions
@pytest.mark.parametrize(
    ("release", "kubelet", "expected"),
    [
        ("0.13", (1, 36), (True, True, True)),
        ("0.13", (1, 34), (False, True, True)),  # the server keeps what its nodes ignore
        ("0.13", None, (None, True, True)),
        ("0.11", (1, 36), (True, False, True)),
        ("0.8", (1, 36), (False, False, False)),
    ],
)
def test_probe_learns_from_the_answer_what_the_next_rendering_may_use(
    release: str, kubelet: tuple[int, int] | None, expected: tuple[bool | None, ...]
) -> None:
    spec = setups.read_spec("03-native-gang")
    unknown = ClusterFacts(served=setups.read_facts("03-native-gang").served)
    sent = json.loads(json.dumps(render(spec, asking(unknown)).jobset))
    returned, _ = structural.prune(sent, jobset_schema(release))
    known = answered(unknown, sent, returned, oldest_kubelet=kubelet)

    assert (known.restart_rules, known.scheduling_group, known.message_patterns) == expected
    second = json.loads(json.dumps(render(spec, known).jobset))
    assert paths(second, structural.prune(second, jobset_schema(release))[0]) == []  # the second one comes back whole


def test_probe_says_nothing_of_what_was_not_sent() -> None:
    unknown = ClusterFacts(served=frozenset())
    sent = render(job(), asking(unknown)).jobset  # without the API there is no group to name

    assert answered(unknown, sent, sent, oldest_kubelet=(1, 36)).scheduling_group is None


def recorded(name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What was sent to be made and what came back, of every request that was accepted."""
    path = setups.TRANSCRIPTS / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"the recorded answers of a real server are not at {setups.TRANSCRIPTS}")
    found = []
    for step in json.loads(path.read_text())["steps"]:
        request, answer = step.get("request", {}), step.get("response", {})
        if request.get("method") == "POST" and answer.get("status") == 201 and isinstance(request["body"], dict):
            found.append((request["body"], answer["body"]))
    assert found
    return found


def test_keeps_tells_the_gate_of_a_real_server() -> None:
    for sent, returned in recorded("dry-run-pod-scheduling-group-gate-off"):
        assert not keeps(sent, returned, "schedulingGroup")
    for sent, returned in recorded("dry-run-pod-scheduling-group")[:1]:
        assert keeps(sent, returned, "schedulingGroup")


@pytest.mark.parametrize(
    "name", ["dry-run-jobset", "kueue-admission", "native-pod-group", "volcano-pod-group", "resource-claim-template"]
)
def test_lost_fields_of_real_answers_are_none_where_nothing_was_dropped(name: str) -> None:
    for sent, returned in recorded(name):
        assert paths(sent, returned) == []
