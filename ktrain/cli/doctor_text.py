"""How the findings of `ktrain doctor` are shown: the worst first, so that who is in a hurry reads few lines."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator

import click

from ktrain.launcher.doctor.finding import Finding, Outcome, Report, Shows, Standing

_WIDTH = 110
_COLOURS = {Outcome.OK: "green", Outcome.WARNING: "yellow", Outcome.FAILED: "red", Outcome.UNKNOWN: "cyan"}
_STANDINGS = (Shows.NOT_MET, Shows.UNKNOWN, Shows.NOT_SHOWN, Shows.MET)
_ORDER = (Outcome.FAILED, Outcome.WARNING, Outcome.UNKNOWN, Outcome.OK)


def show(found: Report, output: str) -> None:
    """Prints a report as `text`, `json` or `yaml`."""
    if output == "json":
        click.echo(json.dumps(found.to_value(), indent=1))
    elif output == "yaml":
        from ktrain.launcher.render.text import to_yaml

        click.echo(to_yaml([found.to_value()]), nl=False)
    else:
        for line in _lines(found):
            click.echo(line)


def _lines(found: Report) -> Iterator[str]:
    job = "" if found.job is None else f", job {found.job}"
    yield f"{found.target}{job}"
    yield ""
    ordered = sorted(found.findings, key=lambda item: _ORDER.index(item.outcome))
    width = max((len(item.check) for item in ordered), default=0)
    for item in ordered:
        yield from _finding(item, width)
    if found.conformance:
        yield ""
        yield f"AI conformance, {found.conformance_source}:"
        for standing in sorted(found.conformance, key=lambda item: _STANDINGS.index(item.status)):
            yield from _standing(standing)
    for note in found.notes:
        yield f"note: {note}"
    yield ""
    yield _verdict(found)


def _finding(item: Finding, width: int) -> Iterator[str]:
    head = f"{item.outcome.value:8} {item.check:{width}}  "
    coloured = click.style(f"{item.outcome.value:8}", fg=_COLOURS[item.outcome], bold=item.outcome is Outcome.FAILED)
    first, *rest = _wrapped(item.evidence, len(head))
    yield f"{coloured} {item.check:{width}}  {first}"
    pad = " " * len(head)
    yield from (f"{pad}{line}" for line in rest)
    for word, text in (("so", item.cost), ("do", item.remedy)):
        for at, line in enumerate(_wrapped(text, len(head) + 4) if text else ()):
            yield f"{pad}{f'{word}: ' if at == 0 else '    '}{line}"


def _standing(item: Standing) -> Iterator[str]:
    head = f"{item.status.value:9} {item.level:6} {item.id:27}  "
    for at, text in enumerate(item.evidence):
        for number, line in enumerate(_wrapped(text, len(head))):
            yield f"{head if at == number == 0 else ' ' * len(head)}{line}"


def _wrapped(text: str, indent: int) -> list[str]:
    lines = [
        line
        for part in text.splitlines()
        for line in textwrap.wrap(part, max(40, _WIDTH - indent), break_on_hyphens=False)
    ]
    return lines or [""]


def _verdict(found: Report) -> str:
    counts = [f"{found.count(item)} {item.value}" for item in _ORDER if found.count(item)]
    names = ", ".join(dict.fromkeys(item.check for item in found.failed))
    what = "The job cannot run here" if found.job is not None else "No job can run here as it is"
    said = f"{what}: {names}" if names else "Nothing was found that keeps a job from running here"
    return f"{said} ({', '.join(counts)})."
