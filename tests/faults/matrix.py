"""All cells of the fault matrix."""

from __future__ import annotations

from tests.faults import damage, deaths, own, parts, places, races, store
from tests.faults.model import Case

CASES: tuple[Case, ...] = (
    *damage.cases(),
    *deaths.cases(),
    *own.cases(),
    *parts.cases(),
    *places.cases(),
    *races.cases(),
    *store.cases(),
)
