"""A run keeps the submissions of its jobs: once each, in the order in which it was told, through torn writes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from ktrain.base import contract
from ktrain.base.clock import Deadline
from ktrain.base.settings import Timeouts
from ktrain.run import submissions
from ktrain.tier.files import FileTier

TIMEOUTS = Timeouts(20.0)


@pytest.fixture
def tier(tmp_path: Path) -> FileTier:
    return FileTier(tmp_path / "run", kind="bucket")


def said(submission_id: str, **more: Any) -> dict[str, Any]:
    return {"id": submission_id, **more}


def test_submissions_are_kept_once_in_the_order_of_telling(tier: FileTier) -> None:
    for value in (said("b", number=1), said("a", number=2), said("b", number=1)):
        submissions.keep(tier, value, timeouts=TIMEOUTS)

    assert submissions.read_all(tier, timeouts=TIMEOUTS) == [said("b", number=1), said("a", number=2)]
    names = [item.name for item in tier.list(f"{contract.SUBMISSIONS_DIR}/", deadline=Deadline.after(5))]
    assert sorted(names) == ["submissions/000001-b.json", "submissions/000002-a.json"]


def test_submission_that_is_torn_is_written_again_beside_it(tier: FileTier) -> None:
    tier.write("submissions/000001-a.json", b'{"id": "a", "num', deadline=Deadline.after(5))
    assert submissions.read_all(tier, timeouts=TIMEOUTS) == []
    submissions.keep(tier, said("a"), timeouts=TIMEOUTS)

    assert submissions.read_all(tier, timeouts=TIMEOUTS) == [said("a")]


def test_two_that_tell_at_once_are_both_kept(tier: FileTier) -> None:
    for name in ("a", "b"):
        tier.write(f"submissions/000001-{name}.json", json.dumps(said(name)).encode(), deadline=Deadline.after(5))
    submissions.keep(tier, said("c"), timeouts=TIMEOUTS)

    assert [item["id"] for item in submissions.read_all(tier, timeouts=TIMEOUTS)] == ["a", "b", "c"]


def test_object_of_another_name_or_form_is_no_submission(tier: FileTier) -> None:
    for name, data in (("x-a.json", b'{"id": "a"}'), ("000001-b.json", b"[]"), ("000002-c.json", b"{}")):
        tier.write(f"submissions/{name}", data, deadline=Deadline.after(5))

    assert submissions.read_all(tier, timeouts=TIMEOUTS) == []


def test_head_keeps_the_submission_that_made_its_pod(tmp_path: Path, tier: FileTier) -> None:
    (tmp_path / contract.SUBMISSION_FILE).write_text(json.dumps(said("a")))
    for _ in range(2):  # a second head of the same pod's job finds it kept
        submissions.keep_own(tmp_path, str(tmp_path / "run"), timeouts=TIMEOUTS)

    assert submissions.read_all(tier, timeouts=TIMEOUTS) == [said("a")]


@pytest.mark.parametrize("text", [None, "{torn"])
def test_head_without_a_record_goes_on(tmp_path: Path, tier: FileTier, text: str | None) -> None:
    if text is not None:
        (tmp_path / contract.SUBMISSION_FILE).write_text(text)
    submissions.keep_own(tmp_path, str(tmp_path / "run"), timeouts=TIMEOUTS)

    assert submissions.read_all(tier, timeouts=TIMEOUTS) == []


def test_head_whose_run_cannot_be_written_goes_on_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / contract.SUBMISSION_FILE).write_text(json.dumps(said("a")))
    (tmp_path / "file").write_text("no directory")
    with caplog.at_level(logging.WARNING):
        submissions.keep_own(tmp_path, str(tmp_path / "file" / "run"), timeouts=TIMEOUTS)

    assert "the run has no record of this submission" in caplog.text
