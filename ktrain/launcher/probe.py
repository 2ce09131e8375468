"""How the facts that only a dry run can tell are asked for: a job with all of these fields in it is sent to be tried.

`render(spec, asking(facts))` gives what is sent; `answered` reads what came back. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ktrain.launcher.dropped import has_field, keeps
from ktrain.launcher.facts import ClusterFacts

_FIELDS = {
    "restart_rules": "restartPolicyRules",
    "scheduling_group": "schedulingGroup",
    "message_patterns": "onJobFailureMessagePatterns",
}
_RULES_SINCE = (1, 35)  # kubelets before ignore restartPolicyRules, and nothing says so


def asking(facts: ClusterFacts) -> ClusterFacts:
    """The facts as if everything were kept, so that everything is rendered and can be compared."""
    return replace(facts, restart_rules=True, scheduling_group=True, message_patterns=True)


def answered(
    facts: ClusterFacts,
    sent: Mapping[str, Any],
    returned: Mapping[str, Any],
    *,
    oldest_kubelet: tuple[int, int] | None,
) -> ClusterFacts:
    """The facts with what the answer tells; a field that was not sent stays as it was.

    The server may keep a restart rule that an old node ignores, so the rules count only where all nodes are known.
    """
    told: dict[str, Any] = {
        name: keeps(sent, returned, field) for name, field in _FIELDS.items() if has_field(sent, field)
    }
    if told.get("restart_rules"):
        told["restart_rules"] = None if oldest_kubelet is None else oldest_kubelet >= _RULES_SINCE
    return replace(facts, **told)
