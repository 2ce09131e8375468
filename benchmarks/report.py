"""What is printed and kept of a run: tables for people, JSON for later comparison, facts of the machine."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import ktrain
from benchmarks.bench import Sizes
from benchmarks.harness import Found, Measured, Outcome, from_json, to_json
from benchmarks.targets import ROWS, page, reached, read_notes, verdicts
from ktrain import native

_RECORD_FORMAT = 2
_PACKAGES = ("torch", "ray", "fsspec", "s3fs", "safetensors", "numpy")
_HEAD = ("way", "whose", "median ms", "min - max ms", "p95 ms", "GB/s", "share")


def facts() -> dict[str, Any]:
    """The machine without its name: what somebody else needs to judge the figures."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "isa": native.isa(),
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "ktrain": ktrain.__version__,
        "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
    }


def load() -> float:
    """Processes that wanted a core over the last minute; over the number of cores the machine is shared."""
    return round(os.getloadavg()[0], 1)


def table(outcome: Outcome) -> str:
    """An aligned table that is Markdown too."""
    by_name = {row.name: row for row in outcome.rows}
    lines = [_HEAD, *(_cells(row, by_name) for row in outcome.rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "| " + " | ".join(f"{text:{width}}" for text, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def section(found: Found) -> str:
    """All that is said about one case."""
    head = f"## {found.name}\n\n{found.question}\nFloor: {found.floor}.\n"
    if found.outcome is None:
        return f"{head}Failed, so nothing is reported: {found.failure}\n"
    proven = "; ".join(found.outcome.proofs.said)
    figures = "".join(f"- {figure.name}: {figure}\n" for figure in found.outcome.figures)
    return f"{head}Proven: {proven}.\n\n{table(found.outcome)}\n" + (f"\n{figures}" if figures else "")


def write_record(folder: Path, sizes: Sizes, found: Sequence[Found], about: dict[str, Any]) -> None:
    """Keeps a run as record.json (all of it), record.md (every case) and table.md (the targets)."""
    folder.mkdir(parents=True, exist_ok=True)
    value = {"format": _RECORD_FORMAT, **about, "sizes": asdict(sizes), "cases": [to_json(one) for one in found]}
    (folder / "record.json").write_text(json.dumps(value, indent=1) + "\n")
    head = f"# {folder.name}\n\n{describe(about, sizes)}\n"
    (folder / "record.md").write_text("\n".join([head, *(section(one) for one in found)]))
    write_table(folder)


def write_table(folder: Path) -> None:
    """Makes a record's table.md anew, from its record.json and the notes as they are now."""
    value = json.loads((folder / "record.json").read_text())
    found = [from_json(case) for case in value["cases"]]
    head = f"# {folder.name}: the targets\n\n{describe(value, Sizes(**value['sizes']))}\n"
    (folder / "table.md").write_text(f"{head}\n{page(found, read_notes(), value.get('missing', {}))}")


def targets(found: Sequence[Found]) -> str:
    """One line per row of the table that the run measured."""
    said = [(row, verdicts(row, found)) for row in ROWS]
    return "\n".join(f"{reached(row, of_row):44} {row.figure}" for row, of_row in said if of_row)


def describe(about: dict[str, Any], sizes: Sizes) -> str:
    """The head of a run, for people."""
    machine = about["facts"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    lines = [
        f"{about['date']}, sizes `{sizes.name}`, {sizes.repeats} repetitions after one that is not counted.",
        f"{machine['cores']} cores ({machine['isa']}), {machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']}, "
        f"Python {machine['python']}, {packages}.",
        f"Load of the machine: {about['load_before']} before, {about.get('load_after', '?')} after.",
        "Absolute figures are as of this run; what can be compared is the share, which is taken round by round of a "
        "baseline in the same run (for the same bytes; 100 % is as fast, 200 % twice as fast).",
    ]
    if about.get("note"):
        lines.append(about["note"])
    return "\n".join(lines)


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _cells(row: Measured, by_name: dict[str, Measured]) -> tuple[str, ...]:
    rate = row.bytes_per_s()
    share = "" if row.beside is None else f"{row.share_of(by_name[row.beside]):.0%} of {row.beside}"
    return (
        row.name,
        row.kind.value,
        _ms(row.median_s),
        f"{_ms(min(row.seconds))} - {_ms(max(row.seconds))}",
        "" if row.p95_s is None else _ms(row.p95_s),
        "" if rate is None else f"{rate / 1e9:.2f}",
        share,
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
