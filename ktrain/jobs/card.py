"""A job as a card of HTML: no script, no style sheet, no colour of a background, so that it is read on light and dark.

Everything that comes from a job is text of others, and is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from ktrain.jobs.look import State
from ktrain.jobs.status import JobStatus

_WIDTH, _HEIGHT, _PAD = 240.0, 48.0, 2.0
# Middle tones: at least 3:1 against white and against the darkest notebook themes.
_COLOURS = {
    State.RUNNING: "#1a7fd4",
    State.DONE: "#2e9a4b",
    State.FAILED: "#d5493a",
    State.RECOVERING: "#b9770e",
    State.PREEMPTED: "#b9770e",
}
_OTHER = "#7a7f87"
_BOX = "border:1px solid rgba(128,128,128,.5);border-radius:6px;padding:8px 12px;max-width:60em;font-family:sans-serif"
# A table does not inherit a theme's colour and font everywhere by itself.
_OWN = "color:inherit;font:inherit;background:transparent;border:0"
_CELL = f"{_OWN};text-align:left;vertical-align:top;padding:1px 12px 1px 0"
_TEXT = "white-space:pre-wrap;overflow-wrap:anywhere"


def card(status: JobStatus) -> str:
    """The card of a status."""
    colour = _COLOURS.get(status.state, _OTHER)
    (_, state), *others = status.rows()
    badge = (
        f'<span style="border:1px solid {colour};color:{colour};border-radius:10px;padding:0 8px">'
        f"{html.escape(state)}</span>"
    )
    rows = "".join(
        f'<tr style="{_OWN}"><th scope="row" style="{_CELL};opacity:.75;white-space:nowrap">'
        f'{html.escape(what)}</th><td style="{_CELL};{_TEXT}">{html.escape(value)}</td></tr>'
        for what, value in others
    )
    return (
        f'<div style="{_BOX}"><div><strong>{html.escape(status.name)}</strong> {badge}</div>{curve(status.losses)}'
        f'<table style="{_OWN};border-collapse:collapse;margin:4px 0 0">{rows}</table></div>'
    )


def curve(losses: Sequence[tuple[int, float]]) -> str:
    """The losses as a line; nothing where there are none to draw."""
    finite = [(step, loss) for step, loss in losses if abs(loss) < float("inf")]  # NaN compares false
    if len(finite) < 2:
        return ""
    steps, values = [step for step, _ in finite], [loss for _, loss in finite]
    across = [_scaled(step, min(steps), max(steps), _WIDTH) for step in steps]
    down = [_HEIGHT - _scaled(loss, min(values), max(values), _HEIGHT) for loss in values]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))
    said = f"loss from step {steps[0]} ({values[0]:.4f}) to step {steps[-1]} ({values[-1]:.4f})"
    return (
        f'<svg role="img" aria-label="{html.escape(said)}" width="{_WIDTH:g}" height="{_HEIGHT:g}" '
        f'viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" style="display:block;margin:4px 0">'
        f'<polyline points="{points}" fill="none" stroke="{_COLOURS[State.RUNNING]}" stroke-width="1.5"/></svg>'
    )


def _scaled(value: float, least: float, most: float, length: float) -> float:
    """Where a value lies on a line of that length, with a margin on both sides."""
    share = (value - least) / (most - least) if most > least else 0.5
    return _PAD + share * (length - 2 * _PAD)
