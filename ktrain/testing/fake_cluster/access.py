"""Who may do what: tokens, users and the rules that a test gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ktrain.launcher.cluster.resources import Resource
from ktrain.testing.fake_cluster.status import Refusal, named

ADMIN = "admin"
ANYONE = "*"


@dataclass(frozen=True, slots=True)
class Rule:
    """What somebody may do. `*` stands for everything; `namespaces` are all where it is None.

    Subresources are named `pods/log`. A rule for one namespace says nothing of cluster-scoped resources.
    """

    verbs: tuple[str, ...]
    groups: tuple[str, ...]
    resources: tuple[str, ...]
    namespaces: tuple[str, ...] | None = None

    def allows(self, ask: Ask) -> bool:
        inside = self.namespaces is None or ask.namespace in self.namespaces
        return (
            inside
            and bool({ANYONE, ask.verb} & set(self.verbs))
            and bool({ANYONE, ask.group} & set(self.groups))
            and bool({ANYONE, ask.resource} & set(self.resources))
        )


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request would do."""

    verb: str
    group: str
    resource: str
    namespace: str | None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Access:
    """Users by their tokens, and their rules. The user `admin`, whose token is `admin`, may do everything.

    A user whom `rules` does not name may look at discovery and ask what it may do, nothing more.
    """

    rules: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)
    tokens: Mapping[str, str] = field(default_factory=lambda: {ADMIN: ADMIN})

    def user(self, headers: Mapping[str, str]) -> str:
        """Returns who sends a request; an administrator may speak for somebody else (`Impersonate-User`).

        Raises:
            Refusal: 401, the token is nobody's.
        """
        scheme, _, token = (headers.get("Authorization") or "").partition(" ")
        user = {**self.tokens, ADMIN: ADMIN}.get(token) if scheme == "Bearer" else None
        if user is None:
            raise Refusal(401, "Unauthorized", "Unauthorized")
        return headers.get("Impersonate-User") or user if user == ADMIN else user

    def token(self, user: str) -> str:
        """A token of the user; its name where it has none, so that a kubeconfig can be made for a stranger."""
        return next((token for token, name in self.tokens.items() if name == user), user)

    def allows(self, user: str, ask: Ask) -> bool:
        return user == ADMIN or any(rule.allows(ask) for rule in self.rules.get(user, ()))

    def check(self, user: str, ask: Ask, resource: Resource) -> None:
        """Raises:
        Refusal: 403 in the server's words.
        """
        if self.allows(user, ask):
            return
        where = f'in the namespace "{ask.namespace}"' if ask.namespace else "at the cluster scope"
        what = f'{resource.qualified} "{ask.name}"' if ask.name else resource.qualified
        message = f'{what} is forbidden: User "{user}" cannot {ask.verb} resource "{ask.resource}" in API group'
        message += f' "{ask.group}" {where}'
        raise Refusal(403, message, "Forbidden", named(resource, ask.name))

    def rules_of(self, user: str, namespace: str) -> list[dict[str, Any]]:
        """The rules that hold for a user in a namespace, as a SelfSubjectRulesReview lists them."""
        rules = (Rule((ANYONE,), (ANYONE,), (ANYONE,)),) if user == ADMIN else self.rules.get(user, ())
        holding = [rule for rule in rules if rule.namespaces is None or namespace in rule.namespaces]
        return [
            {"verbs": list(rule.verbs), "apiGroups": list(rule.groups), "resources": list(rule.resources)}
            for rule in holding
        ]
