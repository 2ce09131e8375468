"""Sets of completion indexes as text: `0-2,5` <-> {0, 1, 2, 5}."""

from __future__ import annotations

from collections.abc import Iterable


def parse(text: str | None) -> set[int]:
    """The indexes that a list of intervals names."""
    found: set[int] = set()
    for interval in (text or "").split(","):
        if interval:
            first, _, last = interval.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return found


def show(indexes: Iterable[int]) -> str:
    """The shortest list of intervals; two neighbours are `0,1`, more are `0-2`."""
    runs: list[list[int]] = []
    for index in sorted(indexes):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ",".join(_interval(run) for run in runs)


def _interval(run: list[int]) -> str:
    return f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run))
