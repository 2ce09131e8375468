"""The states of a job, wherever it runs."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """Where a job is; the last three are final."""

    SUBMITTED = "submitted"  # suspended, and nobody has released it
    QUEUED = "queued"
    PREEMPTED = "preempted"  # queued again, after others took its place
    STARTING = "starting"
    RUNNING = "running"
    RECOVERING = "recovering"
    STOPPING = "stopping"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL = (State.DONE, State.FAILED, State.CANCELLED)
