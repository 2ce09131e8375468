"""Whether and when an ended container is started again: pure decisions and the kubelet's back-off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

_RESET_AFTER = 2  # times the longest delay without a crash: then the delays begin anew


class After(Enum):
    """What follows the end of a container."""

    STAY = "stay"
    RESTART = "restart"
    RESTART_ALL = "restart-all"


def after_exit(container: Mapping[str, Any], pod_policy: str, exit_code: int, *, is_init: bool) -> After:
    """What the rules of a container, then its policy, then the pod's say about an exit code.

    An init container that succeeded is never run again, whatever the policy.
    """
    if is_init and exit_code == 0 and container.get("restartPolicy") != "Always":
        return After.STAY
    for rule in container.get("restartPolicyRules") or ():
        codes = rule["exitCodes"]
        if (exit_code in codes["values"]) == (codes["operator"] == "In"):
            return After.RESTART_ALL if rule["action"] == "RestartAllContainers" else After.RESTART
    policy = container.get("restartPolicy") or pod_policy
    if policy == "Always" or (policy == "OnFailure" and exit_code != 0):
        return After.RESTART
    return After.STAY


@dataclass(slots=True)
class BackOff:
    """The delay before a restart, as a kubelet counts it: none for the first, then doubling, begun anew after a
    long time of peace. Times are monotonic seconds.
    """

    first_s: float
    longest_s: float
    delay_s: float = 0.0
    _since_s: float = 0.0  # of the last restart

    def due_s(self, ended_s: float) -> float:
        """When a container that ended then may be started again."""
        return ended_s if self._at_peace(ended_s) else ended_s + self.delay_s

    def restarted(self, now_s: float) -> None:
        """Counts a restart: the next one waits longer."""
        anew = not self.delay_s or self._at_peace(now_s)
        self.delay_s = self.first_s if anew else min(2 * self.delay_s, self.longest_s)
        self._since_s = now_s

    def _at_peace(self, now_s: float) -> bool:
        return now_s - self._since_s > _RESET_AFTER * self.longest_s
