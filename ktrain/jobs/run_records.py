"""What a run keeps of the submissions of its jobs, for what resumes, shows and collects them.

The machine of a user may not reach the run: its bucket may be open to pods alone, its path be a volume of theirs.
"""

from __future__ import annotations

import contextlib

from ktrain.base import settings
from ktrain.base.urls import local_path
from ktrain.errors import KtrainError, NotFoundError
from ktrain.launcher.backends.kubernetes.submission import Submission


def try_keep(submission: Submission) -> str | None:
    """Writes the record; why that was not possible, where it was not. The head of the job writes it then."""
    run = str(submission.spec["run"])
    try:
        _expect_reachable(run)
        from ktrain.run import submissions
        from ktrain.tier.location import open_tier

        timeouts = settings.timeouts()
        with contextlib.closing(open_tier(run, timeouts=timeouts)) as tier:
            submissions.keep(tier, submission.to_value(), timeouts=timeouts)
    except KtrainError as error:
        return f"run {run}: the submission is not recorded there until its head starts: {error}"
    return None


def read_all(run: str) -> list[Submission]:
    """The submissions that a run knows, the oldest first; records that this version cannot read are left out.

    Raises:
        KtrainError: the run could not be asked.
    """
    _expect_reachable(run)
    from ktrain.run import submissions
    from ktrain.tier.location import open_tier

    timeouts = settings.timeouts()
    with contextlib.closing(open_tier(run, timeouts=timeouts)) as tier:
        values = submissions.read_all(tier, timeouts=timeouts)
    found = []
    for value in values:
        with contextlib.suppress(KtrainError):
            found.append(Submission.from_value(value))
    return found


def last(run: str) -> Submission | None:
    """The newest submission that a run knows. Raises KtrainError where it could not be asked."""
    found = read_all(run)
    return found[-1] if found else None


def has(run: str, submission_id: str) -> bool:
    """Whether a run has the record of a submission. Raises KtrainError where it could not be asked."""
    return any(item.id == submission_id for item in read_all(run))


def _expect_reachable(run: str) -> None:
    path = local_path(run)
    if path is not None and not path.is_dir():
        raise NotFoundError(f"run {run}: this machine does not have that path; the pods of a job may")
