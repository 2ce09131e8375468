"""How far a run is, from its events alone: what a status and a card show of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ktrain.base.events import Event

_MOST_LOSSES = 120  # the newest: enough for a curve as wide as a card


@dataclass(slots=True)
class Picture:
    """Takes events in the order in which they are read."""

    attempt: int = 0
    step: int | None = None
    restored: tuple[str, int] | None = None  # tier and step of the last resume
    committed: dict[str, int] = field(default_factory=dict)  # tier -> newest step
    num_failures: int = 0
    last_failure: str | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)  # (step, loss), the newest; a repeated step once

    def take(self, events: Iterable[Event]) -> None:
        for event in events:
            self._take(event)

    def _take(self, event: Event) -> None:
        fields = event.fields
        self.attempt = max(self.attempt, event.attempt)
        if event.kind == "step":
            self.step = int(fields["step"])
            self._add_loss(self.step, fields.get("loss"))
        elif event.kind == "restored":
            self.step = int(fields["step"])
            self.restored = (str(fields["tier"]), self.step)
        elif event.kind == "committed":
            self.committed[str(fields["tier"])] = int(fields["step"])
        elif event.kind == "failure":
            self.num_failures += 1
            where = next((f" of {name} {fields[name]}" for name in ("rank", "node") if name in fields), "")
            self.last_failure = f"{fields['cause']}{where}: {str(fields['reason']).partition(chr(10))[0]}"

    def _add_loss(self, step: int, loss: float | None) -> None:
        """A step that was lost and is done again takes its place; what came after it is not there yet."""
        while self.losses and self.losses[-1][0] >= step:
            self.losses.pop()
        if loss is not None:
            self.losses = [*self.losses[-_MOST_LOSSES + 1 :], (step, float(loss))]
