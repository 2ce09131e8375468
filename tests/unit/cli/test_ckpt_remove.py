"""`ktrain ckpt pin | rm | gc`: what is removed, and what is refused with which code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ktrain.base import contract, ids
from ktrain.base.job import local_path
from ktrain.checkpoint.holder import Holder
from ktrain.checkpoint.marks import doomed_name, pin_name
from ktrain.launcher.code import bucket
from tests.unit.checkpoint.builders import TIMEOUTS, identity, put_checkpoint, upload
from tests.unit.cli.runs import StoredRun


@pytest.fixture(params=["directory", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> StoredRun:
    """Steps 10, 20 and 30 in the bucket, in a directory and in a store behind fsspec."""
    url = str(tmp_path / "run") if request.param == "directory" else f"memory://{ids.random_id()}"
    made = StoredRun.make(url, capsys)
    for step in (10, 20, 30):
        put_checkpoint(made.tier, identity(step))
    return made


# pin


def test_pin_step_is_listed_and_unpinned_again(run: StoredRun) -> None:
    assert run.ckpt("pin", "--step", "10", "--output", "json").json == {"dry_run": False, "step": 10, "pinned": True}
    pinned = {row["step"]: row["pinned"] for row in run.ckpt("ls", "--output", "json").json}
    assert pinned == {10: True, 20: False, 30: False}
    assert run.ckpt("pin", "--step", "10", "--off").code == contract.EXIT_OK
    assert run.names("marks") == []


def test_pin_step_that_is_not_there_is_refused(run: StoredRun) -> None:
    answer = run.ckpt("pin", "--step", "40")
    assert answer.code == contract.EXIT_USAGE and "no checkpoint of step 40" in answer.err
    assert run.names("marks") == []
    assert run.ckpt("pin", "--step", "10", "--off").code == contract.EXIT_USAGE


def test_pin_dry_run_says_what_would_be_and_changes_nothing(run: StoredRun) -> None:
    said = run.ckpt("pin", "--step", "10", "--dry-run", "--output", "json").json
    assert said == {"dry_run": True, "step": 10, "pinned": True} and run.names("marks") == []
    assert run.ckpt("pin", "--step", "40", "--dry-run").code == contract.EXIT_USAGE
    run.ckpt("pin", "--step", "10")
    answer = run.ckpt("pin", "--step", "10", "--off", "--dry-run")
    assert answer.out == "step 10 would not be pinned any more\n" and len(run.names("marks")) == 1


# rm --step


def test_rm_dry_run_names_what_would_go_and_changes_nothing(run: StoredRun) -> None:
    before = run.names()
    (removal,) = run.ckpt("rm", "--step", "10", "--dry-run", "--output", "json").json["removed"]
    assert (removal["step"], removal["why"]) == (10, "asked for") and removal["nbytes"] > 0
    assert run.names() == before


def test_rm_without_anybody_to_ask_is_refused(run: StoredRun) -> None:
    answer = run.ckpt("rm", "--step", "10")
    assert answer.code == contract.EXIT_USAGE and "--yes" in answer.err and run.steps() == [10, 20, 30]


@pytest.mark.parametrize("step", [10, 30])
def test_rm_step_removes_its_record_and_files(run: StoredRun, step: int) -> None:
    assert run.ckpt("rm", "--step", str(step), "--yes").code == contract.EXIT_OK
    assert step not in run.steps() and len(run.steps()) == 2
    assert run.names(f"checkpoints/step-{step:08d}") == [] and run.names("marks") == []


def test_rm_step_that_is_not_there_is_refused(run: StoredRun) -> None:
    assert run.ckpt("rm", "--step", "15", "--yes").code == contract.EXIT_USAGE


def test_rm_pinned_step_needs_the_word(run: StoredRun) -> None:
    run.ckpt("pin", "--step", "10")
    answer = run.ckpt("rm", "--step", "10", "--yes")
    assert answer.code == contract.EXIT_USAGE and "pinned" in answer.err and 10 in run.steps()
    assert run.ckpt("rm", "--step", "10", "--yes", "--force", "pinned").code == contract.EXIT_OK
    assert run.steps() == [20, 30] and run.names("marks") == []


def test_rm_last_step_that_can_be_proven_needs_the_word(run: StoredRun) -> None:
    for name in run.names("checkpoints"):
        if name.endswith("rank-00001.json") and "step-00000010" not in name:
            run.write(name, b"damaged")
    answer = run.ckpt("rm", "--step", "10", "--yes")
    assert answer.code == contract.EXIT_CORRUPT and "--force last" in answer.err and 10 in run.steps()
    assert run.ckpt("rm", "--step", "10", "--yes", "--force", "pinned").code == contract.EXIT_CORRUPT
    assert run.ckpt("rm", "--step", "10", "--yes", "--force", "last").code == contract.EXIT_OK
    assert run.steps() == [20, 30]


@pytest.mark.parametrize(
    "arguments", [(), ("--step", "10", "--volume"), ("--step", "10", "--all"), ("--volume", "--all")]
)
def test_rm_unclear_request_is_refused(run: StoredRun, arguments: tuple[str, ...]) -> None:
    assert run.ckpt("rm", "--yes", *arguments).code == contract.EXIT_USAGE
    assert run.steps() == [10, 20, 30]


@pytest.mark.parametrize("verb", [("rm", "--step", "10", "--yes"), ("gc", "--keep", "1")])
def test_removal_from_a_live_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: tuple[str]
) -> None:
    run = StoredRun.make(str(tmp_path / "run"), capsys)
    for step in (10, 20):
        put_checkpoint(run.tier, identity(step))
    holder = Holder(run.tier, local_path=local_path(run.url), timeouts=TIMEOUTS)
    try:
        assert run.ckpt(*verb).code == contract.EXIT_CONFLICT
    finally:
        holder.close()
    assert run.steps() == [10, 20]


# gc


def test_gc_keep_spares_pinned_steps_and_says_so_in_json(run: StoredRun) -> None:
    run.ckpt("pin", "--step", "10")
    planned = run.ckpt("gc", "--keep", "1", "--dry-run", "--output", "json").json
    assert [removal["step"] for removal in planned["removed"]] == [20] and run.steps() == [10, 20, 30]
    done = run.ckpt("gc", "--keep", "1", "--output", "json")
    assert done.code == contract.EXIT_OK and done.json["removed"] == planned["removed"]
    assert run.steps() == [10, 30]


def test_gc_keep_takes_the_text_of_any_policy(run: StoredRun) -> None:
    planned = run.ckpt("gc", "--keep", "latest:1,every_steps:20", "--dry-run", "--output", "json").json
    assert [removal["step"] for removal in planned["removed"]] == [10] and run.steps() == [10, 20, 30]
    assert run.ckpt("gc", "--keep", "best:1:loss").code == contract.EXIT_OK
    assert run.steps() == [30], "of steps without the metric the newest are the best"


@pytest.mark.parametrize("keep", ["0", "newest", "latest:3;"])
def test_gc_keep_that_is_no_policy_is_refused(run: StoredRun, keep: str) -> None:
    answer = run.ckpt("gc", "--keep", keep)
    assert answer.code == contract.EXIT_USAGE and answer.err.startswith("ktrain: keep: ") and repr(keep) in answer.err


def test_gc_with_nothing_to_do_says_so(run: StoredRun) -> None:
    assert "nothing to remove" in run.ckpt("gc").out


def test_gc_finishes_what_was_half_removed(run: StoredRun) -> None:
    commit = run.catalog.listing().commits[0]
    run.tier.delete("checkpoints/step-00000010/commit-000001-0a1b.json", deadline=run.catalog.transfer_deadline(0))
    run.write(doomed_name((10, 1, commit.write_id)), b"{}")
    assert run.ckpt("gc").code == contract.EXIT_OK
    assert run.names("checkpoints/step-00000010") == [] and run.names("marks") == []


def spoil_newest(run: StoredRun) -> None:
    run.write("checkpoints/step-00000030/data-000001-0a1b/rank-00000.json", b"damaged")


def leave_unknown_mark(run: StoredRun) -> None:
    run.write("marks/something.json", b"{}")


@pytest.mark.parametrize("spoil", [spoil_newest, leave_unknown_mark])
def test_gc_in_doubt_removes_nothing_and_names_it(run: StoredRun, spoil: Callable[[StoredRun], None]) -> None:
    spoil(run)
    answer = run.ckpt("gc", "--keep", "1")
    assert answer.code == contract.EXIT_CORRUPT and "nothing is removed" in answer.err
    assert run.steps() == [10, 20, 30]


def test_gc_upload_of_an_ended_attempt_waits_to_be_watched(run: StoredRun) -> None:
    upload(run.tier, identity(40), "dead")
    run.catalog.record(1, "end", {"outcome": "failed"})
    planned = run.ckpt("gc", "--dry-run", "--output", "json").json
    assert planned["waiting"] == [{"step": 40, "epoch": 1, "write_id": "dead"}] and planned["removed"] == []


# Code beside the run


def put_code(run: StoredRun, number: int) -> str:
    digest = f"{number:064x}"
    record = bucket.Record(digest, 3, number, is_whole=True)
    run.write(bucket.archive_name(digest), b"zip")
    run.write(bucket.record_name(digest), record.to_bytes())
    return digest


def test_gc_removes_code_that_the_last_launches_did_not_use(run: StoredRun) -> None:
    digests = [put_code(run, number) for number in range(1, bucket.KEEP + 3)]
    planned = run.ckpt("gc", "--dry-run", "--output", "json").json
    assert planned["code"] == digests[:2] and len(run.names("code")) == 2 * len(digests)
    assert f"removed: code {digests[0]}" in run.ckpt("gc").out
    assert len(run.names("code")) == 2 * bucket.KEEP and not any(digests[1] in name for name in run.names("code"))
    assert run.steps() == [10, 20, 30]


@pytest.mark.parametrize("name", ["code/mine.txt", f"code/{'0' * 63}9.json", "marks/something.json"])
def test_gc_in_doubt_removes_no_code(run: StoredRun, name: str) -> None:
    for number in range(1, bucket.KEEP + 3):
        put_code(run, number)
    run.write(name, b"{}")
    before = run.names("code")
    answer = run.ckpt("gc", "--keep", "1")
    assert answer.code == contract.EXIT_CORRUPT and name in answer.err and run.names("code") == before


def test_pin_name_is_the_mark_of_the_step(run: StoredRun) -> None:
    run.ckpt("pin", "--step", "20")
    assert run.names("marks") == [pin_name(20)]
