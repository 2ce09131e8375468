"""What the chaos cases share: a launch of the small training, the losses of an untouched one, and the final checks."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path

from ktrain.base import contract, events
from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.base.events import Event
from ktrain.testing import invariants
from tests.chaos import chaos_worker
from tests.integration.launching import Place, place

MANY_STEPS = 5000  # more than any case takes: it lets the training end
_ENDS_S = 30.0  # from the end of a launch to the end of its last process


def put_script(here: Place) -> None:
    shutil.copy(Path(chaos_worker.__file__), here.script)


def read_events(here: Place) -> list[Event]:
    path = here.run / contract.EVENTS_FILE
    return events.parse_lines(path.read_bytes().splitlines()) if path.exists() else []


def of_kind(here: Place, kind: str) -> list[Event]:
    return [event for event in read_events(here) if event.kind == kind]


@functools.cache
def untouched_losses(steps: int, num_ranks: int, mesh: str) -> dict[int, float]:
    """Step -> loss of a launch that nobody touched. (One node: where the ranks run changes nothing.)"""
    with place() as here:
        put_script(here)
        launch = here.launch("--workers-per-node", str(num_ranks), "--patience", "60", args=(str(steps), "0", mesh))
        assert here.end(launch) == contract.EXIT_OK, here.output()
        return {event.fields["step"]: event.fields["loss"] for event in of_kind(here, "step")}


def check_as_untouched(found: Sequence[Event], mesh: str = "shards") -> list[str]:
    """Every step has the loss of an untouched run of as many ranks."""
    newest = max((event.fields["step"] for event in found if event.kind == "step"), default=1)
    (num_ranks,) = {event.fields["world_size"] for event in found if event.kind == "attempt_started"}
    return invariants.check_same_losses(found, untouched_losses(-(-newest // 100) * 100, num_ranks, mesh))


def release(here: Place) -> None:
    """Lets the training end after its next step."""
    (here.root / "release").touch()


def newest_step(here: Place) -> int:
    return max((event.fields["step"] for event in of_kind(here, "step")), default=0)


def newest_committed(here: Place, tier: str, attempt: int | None = None) -> int:
    return max(
        (
            event.fields["step"]
            for event in of_kind(here, "committed")
            if event.fields["tier"] == tier and attempt in (None, event.attempt)
        ),
        default=0,
    )


def await_nothing_runs(here: Place) -> list[str]:
    """What still runs of the place's launches after a bounded wait."""
    deadline = Deadline.after(_ENDS_S)
    while (left := invariants.check_nothing_runs(str(here.root))) and not deadline.expired():
        SYSTEM_CLOCK.sleep(0.1)
    return left


def check(here: Place, *, finished: bool = True, last: int | None = None, mesh: str = "shards") -> None:
    """Every invariant of a run that nobody disturbs any more."""
    found = read_events(here)
    wrong = [
        *invariants.check_run(found, here.run),
        *check_as_untouched(found, mesh),
        *invariants.check_steps(found, newest_step(here) if last is None else last),
        *await_nothing_runs(here),
    ]
    if finished:
        wrong += invariants.check_volume_freed(here.volume)
        wrong += [f"{file}: left by the launch" for file in here.launch_files()]
    assert wrong == [], "\n".join(wrong)
