"""What happens to an object between the request and the store: defaults, webhooks, gates, validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ktrain.launcher.cluster.defaults import complete
from ktrain.launcher.cluster.resources import JOB_SET, Resource
from ktrain.testing.fake_cluster import gates, rules, webhooks
from ktrain.testing.fake_cluster.offer import Served
from ktrain.testing.fake_cluster.status import invalid
from ktrain.testing.fake_cluster.structural import fill, prune, violations

Object = dict[str, Any]

RESTART_JOB = "RestartJob"  # the gate of JobSet's controller, off by default


class Admission:
    """The store's `admit`. It asks for what is served at each call, because a cluster may change while it runs.

    Controllers that write to the store pass it as clients do: what a gate drops is dropped from their objects too.
    """

    def __init__(self, served: Callable[[], Served]) -> None:
        self._served = served

    def __call__(self, resource: Resource, old: Object | None, new: Object) -> None:
        """Completes an object in place.

        Raises:
            Refusal: it is not valid, or a webhook denies it.
        """
        served = self._served()
        schema = served.schema(resource)
        if resource.is_custom and schema is not None:
            fill(schema, new)
        if resource.storage == JOB_SET.storage:
            webhooks.complete_jobset(new, schema)
        elif old is None:
            complete(resource, new, toleration_s=served.offer.toleration_s)
        if served.offer.kueue:
            webhooks.queue(resource, old, new)
        gates.drop(resource, new, served.gates)
        if resource.is_custom and schema is not None:
            prune(schema, new)  # what a webhook wrote may be more than this version of the CRD knows
            errors = violations(schema, new, old)
            if errors:
                raise invalid(resource, new["metadata"]["name"], errors)
        rules.check(resource, old, new)
        if resource.storage == JOB_SET.storage:
            webhooks.check_jobset(old, new, can_restart_job=RESTART_JOB in served.gates)
