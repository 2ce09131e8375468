"""What a job says of itself: its place's words and its run's events, in one value."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ktrain.base import contract
from ktrain.jobs.look import FINAL, Host, Look, Node, State
from ktrain.jobs.picture import Picture


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """A job at one time. `None` means that it is not known."""

    name: str
    run: str
    where: str
    state: State
    reasons: tuple[str, ...] = ()  # what it waits for
    attempt: int = 0  # 0: none has begun
    step: int | None = None
    losses: tuple[tuple[int, float], ...] = ()  # (step, loss), the newest last
    restored: tuple[str, int] | None = None  # tier and step of the last resume
    committed: dict[str, int] = field(default_factory=dict)  # tier -> newest step
    num_failures: int = 0
    last_failure: str | None = None
    nodes: tuple[Node, ...] | None = None
    exit_code: int | None = None  # where it has ended
    message: str | None = None  # why it ended
    unread: str | None = None  # why nothing newer is known of the run's events
    warnings: tuple[str, ...] = ()  # of how it was launched or resumed

    @property
    def is_final(self) -> bool:
        return self.state in FINAL

    @property
    def loss(self) -> float | None:
        """Of the newest step that had one."""
        return self.losses[-1][1] if self.losses else None

    def to_value(self) -> dict[str, Any]:
        """As a JSON value."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) of all that is known, for people; the state comes first."""
        found = [("state", self._state()), ("run", f"{self.run} ({self.where})")]
        found += [("waits for", reason) for reason in self.reasons]
        if self.step is not None:
            loss = "" if self.loss is None else f", loss {self.loss:.4f}"
            found.append(("step", f"{self.step}{loss} (attempt {self.attempt})"))
        if self.restored is not None:
            found.append(("resumed", f"from step {self.restored[1]}, out of tier {self.restored[0]}"))
        saved = [f"{tier} {self.committed[tier]}" for tier in contract.TIERS if tier in self.committed]
        found += [("saved", ", ".join(saved))] if saved else []
        if self.last_failure is not None:
            found.append(("failures", f"{self.num_failures}, the last: {self.last_failure}"))
        found += [(node.name, _said(node)) for node in self.nodes or ()]
        found += [("ended", self.message)] if self.message else []
        found += [("not known", self.unread)] if self.unread else []
        found += [("warning", text) for text in self.warnings]
        return found

    def __str__(self) -> str:
        rows = [(what, value.splitlines() or [""]) for what, value in self.rows()]
        width = max(len(what) for what, _ in rows)
        lines = [self.name]
        for what, values in rows:
            lines += [f"  {what if at == 0 else '':<{width}}  {value}" for at, value in enumerate(values)]
        return "\n".join(lines)

    def _state(self) -> str:
        return self.state.value if self.exit_code is None else f"{self.state.value} (exit code {self.exit_code})"


def status_of(
    host: Host, look: Look, picture: Picture, unread: str | None, warnings: tuple[str, ...] = ()
) -> JobStatus:
    """The status that a look and a run's events make together."""
    return JobStatus(
        name=host.name,
        run=host.run,
        where=host.where,
        state=look.state,
        reasons=look.reasons,
        attempt=picture.attempt,
        step=picture.step,
        losses=tuple(picture.losses),
        restored=picture.restored,
        committed=dict(picture.committed),
        num_failures=picture.num_failures,
        last_failure=picture.last_failure,
        nodes=look.nodes,
        exit_code=look.exit_code,
        message=look.message,
        unread=unread,
        warnings=warnings,
    )


def _said(node: Node) -> str:
    return node.said if node.machine is None else f"{node.said} on {node.machine}"
