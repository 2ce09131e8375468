"""Whether and when a container is started again."""

from __future__ import annotations

from typing import Any

import pytest

from ktrain.launcher.cluster.restarts import After, BackOff, after_exit

RULES: dict[str, Any] = {
    "restartPolicy": "Never",
    "restartPolicyRules": [
        {"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": [88]}},
        {"action": "Restart", "exitCodes": {"operator": "NotIn", "values": [0, 74]}},
    ],
}


@pytest.mark.parametrize(
    ("container", "policy", "code", "after"),
    [
        ({}, "Never", 1, After.STAY),
        ({}, "OnFailure", 1, After.RESTART),
        ({}, "OnFailure", 0, After.STAY),
        ({}, "Always", 0, After.RESTART),
        (RULES, "Never", 1, After.RESTART),
        (RULES, "Never", 74, After.STAY),
        (RULES, "Never", 0, After.STAY),
        (RULES, "Never", 88, After.RESTART_ALL),
        ({"restartPolicy": "Never"}, "Always", 1, After.STAY),
    ],
)
def test_after_exit_rules_then_container_then_pod(
    container: dict[str, Any], policy: str, code: int, after: After
) -> None:
    assert after_exit(container, policy, code, is_init=False) is after


def test_after_exit_init_container_that_succeeded_stays() -> None:
    assert after_exit({}, "Always", 0, is_init=True) is After.STAY


def test_back_off_crashes_in_a_row_first_at_once_then_doubling_to_the_longest() -> None:
    back_off, now, waited = BackOff(10, 60), 1000.0, []
    for _ in range(6):
        waited.append(back_off.due_s(now) - now)
        now = back_off.due_s(now)
        back_off.restarted(now)
    assert waited == [0, 10, 20, 40, 60, 60]


def test_back_off_long_peace_begins_anew() -> None:
    back_off = BackOff(10, 60)
    for now in (0.0, 10.0, 30.0):
        back_off.restarted(now)
    assert back_off.due_s(30 + 121) == 30 + 121
    back_off.restarted(30 + 121)
    assert back_off.delay_s == 10
