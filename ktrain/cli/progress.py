"""What a person sees while a job runs: a live line on a terminal, a few plain lines elsewhere; all from events."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from typing import Any

import click

from ktrain.base import contract
from ktrain.base.clock import SYSTEM_CLOCK, Clock
from ktrain.base.events import Event
from ktrain.base.job import LaunchSpec
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.log import LogReader
from ktrain.errors import KtrainError
from ktrain.launcher.backends.local import Outcome

_LIVE_S = 0.2
_PLAIN_S = 10.0
_RATE_STEPS = 20  # samples/s over this many steps


class Progress:
    """Follows a run's events and shows them. Use from one thread."""

    def __init__(self, spec: LaunchSpec, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._reader = LogReader(spec.run, timeouts=Timeouts(spec.patience_s))
        self._clock = clock
        self._live = sys.stdout.isatty()
        self._events: list[Event] = []
        self._picture = Picture()
        self._shown_s = -_PLAIN_S
        self._width = 0
        self._last_line = ""
        self._take(self._read())  # what earlier launches did is told by the table at the end, not line by line
        self._picture.restart()
        self._say(f"{spec.run}: {spec.nodes} x {spec.workers_per_node} workers of {spec.script}")

    def update(self) -> None:
        """Shows what is new."""
        fresh = self._read()
        for line in self._take(fresh):
            self._say(line)
        now = self._clock.monotonic()
        if self._live and now - self._shown_s >= _LIVE_S:
            self._shown_s = now
            self._draw(self._picture.line())
        elif not self._live and self._picture.step is not None and now - self._shown_s >= _PLAIN_S:
            self._shown_s = now
            if self._picture.line() != self._last_line:
                self._last_line = self._picture.line()
                click.echo(self._last_line)

    def finish(self, outcome: Outcome) -> None:
        """Shows the end: the table of attempts, and the verdict."""
        from ktrain.train.report import Report

        self.update()
        self._draw("")
        if any(event.attempt for event in self._events):
            click.echo("\n" + Report.from_events(self._events).to_text() + "\n")
        click.echo(verdict_line(outcome), err=outcome.exit_code not in (contract.EXIT_OK, contract.EXIT_STOPPED))

    def _read(self) -> list[Event]:
        try:
            return self._reader.read_new()
        except KtrainError:
            return []  # the store is away: shown later

    def _take(self, fresh: list[Event]) -> list[str]:
        self._events += fresh
        return [line for event in fresh if (line := self._picture.take(event)) is not None]

    def _say(self, line: str) -> None:
        self._draw("")
        click.echo(line)

    def _draw(self, line: str) -> None:
        if self._live:
            text = line[: shutil.get_terminal_size().columns - 1]
            click.echo("\r" + text.ljust(self._width) + ("\r" if not text else ""), nl=False)
            self._width = len(text)


def verdict_line(outcome: Outcome) -> str:
    """One line, and where there is more to say the lines that follow."""
    if outcome.exit_code == contract.EXIT_OK:
        return "done"
    if outcome.exit_code == contract.EXIT_STOPPED:
        at = f" at step {outcome.step}" if outcome.step else ""
        return f"stopped{at} ({outcome.reason}); the same command continues"
    return f"ktrain: failed: {outcome.reason}"


class Picture:
    """Where a run is, as its events tell; and the few events that deserve a line of their own."""

    def __init__(self) -> None:
        self.step: int | None = None
        self._loss: float | None = None
        self._tiers: dict[str, int] = {}
        self._phase = "starting"
        self._attempt = 0
        self._recent: list[tuple[float, int, int]] = []  # time, step, samples

    def restart(self) -> None:
        """A new launch of the run begins: what was saved stays, nothing trains yet."""
        self._phase, self._recent = "starting", []

    def line(self) -> str:
        """The live line: step, loss, samples/s, where the last snapshots are, phase."""
        parts = [f"attempt {self._attempt}", self._phase]
        if self.step is not None:
            parts.append(f"step {self.step}")
        if self._loss is not None:
            parts.append(f"loss {self._loss:.4f}")
        rate = self._rate()
        if rate is not None:
            parts.append(rate)
        parts += [f"{tier} {self._tiers[tier]}" for tier in contract.TIERS if tier in self._tiers]
        return " | ".join(parts)

    def _rate(self) -> str | None:
        if len(self._recent) < 2:
            return None
        (begin, first, _), (end, last, _) = self._recent[0], self._recent[-1]
        if end <= begin:
            return None
        samples = sum(item[2] for item in self._recent[1:])
        return (
            f"{samples / (end - begin):.1f} samples/s" if samples else f"{(last - first) / (end - begin):.2f} steps/s"
        )

    def take(self, event: Event) -> str | None:
        """Takes an event in; returns a line for people where it is worth one."""
        handler = _HANDLERS.get(event.kind)
        return handler(self, event.fields, event) if handler is not None else None

    def _on_step(self, fields: dict[str, Any], event: Event) -> str | None:
        if event.attempt < self._attempt:
            return None  # logged late
        self.step, self._loss, self._phase = int(fields["step"]), fields.get("loss"), "training"
        self._recent = [*self._recent[-_RATE_STEPS:], (event.time, self.step, int(fields.get("samples") or 0))]
        return None

    def _on_committed(self, fields: dict[str, Any], event: Event) -> str | None:
        self._tiers[fields["tier"]] = int(fields["step"])
        return None

    def _on_attempt(self, fields: dict[str, Any], event: Event) -> str | None:
        self._attempt, self._phase, self._recent = event.attempt, "starting", []
        return f"attempt {event.attempt}: started on {len(fields.get('nodes') or ())} nodes"

    def _on_restored(self, fields: dict[str, Any], event: Event) -> str | None:
        self._phase, self.step = "training", int(fields["step"])
        return f"attempt {event.attempt}: continues from step {fields['step']}, restored from {fields['tier']}"

    def _on_quarantined(self, fields: dict[str, Any], event: Event) -> str | None:
        if fields["step"] is None:
            return None  # what was made on the way: the step that it was made from has a line
        return f"set aside: step {fields['step']} of epoch {fields['epoch']}: {fields['reason']}"

    def _on_failure(self, fields: dict[str, Any], event: Event) -> str | None:
        self._phase = "recovering"
        where = f" (rank {fields['rank']})" if "rank" in fields else f" ({fields['node']})" if "node" in fields else ""
        at = f" at step {fields['step']}" if fields.get("step") is not None else ""
        return f"attempt {event.attempt}: {fields['cause']}{where}{at}: {str(fields['reason']).splitlines()[0]}"


def _line(form: str) -> Callable[[Picture, dict[str, Any], Event], str | None]:
    def render(picture: Picture, fields: dict[str, Any], event: Event) -> str | None:
        del picture
        known = {key: value for key, value in fields.items() if value is not None}
        return form.format_map(_Blank({**known, "attempt": event.attempt}))

    return render


class _Blank(dict[str, Any]):
    def __missing__(self, key: str) -> str:
        return "?"


_HANDLERS: dict[str, Callable[[Picture, dict[str, Any], Event], str | None]] = {
    "step": Picture._on_step,
    "committed": Picture._on_committed,
    "attempt_started": Picture._on_attempt,
    "restored": Picture._on_restored,
    "failure": Picture._on_failure,
    "fault_injected": _line("fault injected at step {step}: {spec}"),
    "quarantined": Picture._on_quarantined,
    "cadence": _line("cadence: memory every {memory} steps: {reason}"),
    "loss_mismatch": _line("restored from step {restored}: step {step} had loss {expected}, now it has {found}"),
    "bad_copy": _line("bad copy: step {step} rank {rank} in {tier} ({where}): {reason}"),
    "tier_failed": _line("{tier} tier failed: {reason}"),
    "tier_recovered": _line("{tier} tier is back"),
    "head_adopted": _line("attempt {attempt}: a new head took over, training went on"),
    "agent_lost": _line("agent of {node} is gone, training goes on"),
    "stop_requested": _line("stopping: {reason}"),
    "notice": _line("note: {message}"),
}
