from __future__ import annotations

import json
from pathlib import Path

import pytest

from ktrain.base import contract
from ktrain.checkpoint.catalog import RunCatalog, verify_commit
from ktrain.errors import (
    ConfigError,
    ConflictError,
    CorruptionError,
    ForbiddenError,
    KtrainError,
    NotFoundError,
    UnavailableError,
)
from ktrain.format import document
from ktrain.testing.fake_bucket import FakeBucket
from ktrain.testing.fake_clock import FakeClock
from ktrain.testing.faulty_tier import Fault, FaultyTier, TierFault
from tests.unit.checkpoint.builders import (
    TIMEOUTS,
    catalog,
    commit_name,
    flip,
    identity,
    put_checkpoint,
    record_of,
    upload,
)


@pytest.fixture
def bucket() -> FakeBucket:
    return FakeBucket()


# The run


def test_open_missing_run_is_made_once_and_found_again(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    with pytest.raises(NotFoundError, match="ktrain launch"):
        RunCatalog.open(url, timeouts=TIMEOUTS, create=False)
    made = RunCatalog.open(url, timeouts=TIMEOUTS)
    assert RunCatalog.open(url, timeouts=TIMEOUTS).run_id == made.run_id


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"format": 1}', b'{"id": "x", "format": "one"}'])
def test_open_damaged_run_file_is_refused_and_kept(tmp_path: Path, data: bytes) -> None:
    (tmp_path / contract.RUN_FILE).write_bytes(data)
    with pytest.raises(CorruptionError, match="damaged"):
        RunCatalog.open(str(tmp_path), timeouts=TIMEOUTS)
    assert (tmp_path / contract.RUN_FILE).read_bytes() == data


def test_open_run_of_a_newer_format_is_refused_naming_both(tmp_path: Path) -> None:
    (tmp_path / contract.RUN_FILE).write_text(json.dumps({"format": 7, "id": "ab" * 16}))
    with pytest.raises(ConfigError, match=r"written in format 7.*up to 1"):
        RunCatalog.open(str(tmp_path), timeouts=TIMEOUTS)


def test_open_url_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((ConfigError, UnavailableError)):
        RunCatalog.open(str(tmp_path / "file" / "run"), timeouts=TIMEOUTS)


# Attempts


def test_next_epoch_counts_up(bucket: FakeBucket) -> None:
    assert [catalog(bucket).next_epoch({"by": "me"}) for _ in range(3)] == [1, 2, 3]


def test_next_epoch_torn_start_record_still_uses_its_number_up(bucket: FakeBucket) -> None:
    bucket.objects["attempts/attempt-000004-start.json"] = b'{"by"'
    assert catalog(bucket).next_epoch({"by": "me"}) == 5


def test_next_epoch_two_heads_that_saw_the_same_list_get_two_numbers(bucket: FakeBucket) -> None:
    late = FaultyTier(bucket)
    original = late.create

    def create(name: str, data: bytes, **options: object) -> None:
        if bucket.objects.keys() == before:  # between its listing and its create another head was faster
            assert catalog(bucket).next_epoch({"by": "other"}) == 1
        original(name, data, **options)  # type: ignore[arg-type]

    late.create = create  # type: ignore[method-assign]
    before = set(bucket.objects)
    assert catalog(late).next_epoch({"by": "me"}) == 2


def test_next_epoch_create_whose_reply_was_lost_below_is_known_as_its_own(bucket: FakeBucket) -> None:
    class Retrying(FakeBucket):
        def create(self, name: str, data: bytes, **options: object) -> None:  # type: ignore[override]
            super().create(name, data, **options)  # type: ignore[arg-type]
            raise ConflictError("the client below tried again and met its own object")

    assert catalog(Retrying()).next_epoch({"by": "me"}) == 1


def test_next_epoch_overwritten_start_record_is_given_up(bucket: FakeBucket) -> None:
    class Unconditional(FakeBucket):
        """Ignores the condition; another head's record lands on ours."""

        def create(self, name: str, data: bytes, **options: object) -> None:  # type: ignore[override]
            if name.endswith("000001-start.json"):
                data = b'{"write_id": "another"}'
            super().create(name, data, **options)  # type: ignore[arg-type]

    assert catalog(Unconditional()).next_epoch({"by": "me"}) == 2


@pytest.mark.parametrize("data", [b"", b'{"step": 1', b"[1]", b"7", b'{"step": "ten"}', b'{"epoch": 1}'])
def test_attempts_torn_restored_part_counts_as_not_written(bucket: FakeBucket, data: bytes) -> None:
    found = catalog(bucket)
    epoch = found.next_epoch({"by": "me"})
    found.record(epoch, "committed", {"step": 3})
    bucket.objects["attempts/attempt-000001-restored.json"] = data
    (attempt,) = found.attempts()
    assert attempt.restored is None and attempt.restored_step is None
    assert attempt.committed is not None and attempt.start is not None


def test_attempts_foreign_objects_are_left_out(bucket: FakeBucket) -> None:
    for name in ("notes.txt", "attempt-x-start.json", "attempt-000001-lunch.json", "attempt-\u00b2-start.json"):
        bucket.objects[f"attempts/{name}"] = b"{}"
    assert catalog(bucket).attempts() == []


def test_attempts_store_that_refuses_is_no_empty_history(bucket: FakeBucket) -> None:
    faulty = FaultyTier(bucket, TierFault("list", Fault.FORBIDDEN))
    with pytest.raises(ForbiddenError):
        catalog(faulty).attempts()


# Commit records


def test_listing_gives_commits_by_step_and_epoch(bucket: FakeBucket) -> None:
    for step, epoch in ((20, 1), (10, 2), (10, 1)):
        put_checkpoint(bucket, identity(step, epoch))
    found = catalog(bucket).listing()
    assert [(c.identity.step, c.identity.epoch) for c in found.commits] == [(10, 1), (10, 2), (20, 1)]
    assert found.broken == ()


@pytest.mark.parametrize("how", ["torn", "empty", "flipped", "foreign", "renamed", "newer"])
def test_listing_record_that_cannot_be_used_is_named_and_others_stay(bucket: FakeBucket, how: str) -> None:
    good = put_checkpoint(bucket, identity(10))
    name = commit_name(put_checkpoint(bucket, identity(20)))
    data = bucket.objects[name]
    if how == "foreign":
        data = data.replace(b"ab" * 16, b"cd" * 16)
        data = reseal(data)
    elif how == "newer":
        data = reseal(data.replace(b'"format":1', b'"format":9'))
    elif how == "renamed":
        name, data = name.replace("0a1b", "9999"), bucket.objects.pop(name)
    bucket.objects[name] = {"torn": data[:-9], "empty": b"", "flipped": flip(data)}.get(how, data)
    found = catalog(bucket).listing()
    assert found.commits == (good,)
    assert [broken for broken, _ in found.broken] == [name]
    assert found.lost == (() if how in ("torn", "empty") else (name,))
    assert found.newer == ((name,) if how == "newer" else ())


def reseal(data: bytes) -> bytes:
    """A document with its digest made anew."""
    body = data[: data.rindex(b',"digest"')]
    return body + b',"digest":"' + document.digest_text(body).encode() + b'"}\n'


def test_listing_record_collected_meanwhile_is_left_out(bucket: FakeBucket) -> None:
    faulty = FaultyTier(bucket, clock=FakeClock())
    put_checkpoint(bucket, identity(10))
    name = commit_name(put_checkpoint(faulty, identity(20)))
    faulty.add(TierFault("read", Fault.NOT_FOUND, name=name))
    faulty.add(TierFault("list", Fault.LAGGING, nth=2, seconds=60.0))  # when it is looked for again it is gone
    found = catalog(faulty).listing()
    assert [commit.identity.step for commit in found.commits] == [10] and found.broken == ()


def test_listing_record_that_is_listed_and_not_found_is_no_older_run(bucket: FakeBucket) -> None:
    """Else one wrong answer of the store would cost the steps since the checkpoint before."""
    put_checkpoint(bucket, identity(10))
    name = commit_name(put_checkpoint(bucket, identity(20)))
    with pytest.raises(UnavailableError, match="listed, and not found"):
        catalog(FaultyTier(bucket, TierFault("read", Fault.NOT_FOUND, name=name))).listing()


@pytest.mark.parametrize("fault", [Fault.UNAVAILABLE, Fault.FORBIDDEN, Fault.HANG])
def test_listing_store_that_cannot_be_asked_is_no_empty_listing(bucket: FakeBucket, fault: Fault) -> None:
    put_checkpoint(bucket, identity(10))
    for operation in ("list", "read"):
        with pytest.raises(KtrainError) as caught:
            catalog(FaultyTier(bucket, TierFault(operation, fault), clock=FakeClock())).listing()
        assert caught.value.kind in ("unavailable", "forbidden", "deadline")


@pytest.mark.parametrize("fault", [Fault.LOST_REPLY, Fault.LATE_REPLY])
def test_write_commit_lost_reply_is_settled_by_reading_back(bucket: FakeBucket, fault: Fault) -> None:
    commit = record_of(upload(bucket, identity(10)))
    catalog(FaultyTier(bucket, TierFault("write", fault), clock=FakeClock())).write_commit(commit)
    assert catalog(bucket).listing().commits == (commit,)


@pytest.mark.parametrize("fault", [Fault.UNAVAILABLE, Fault.TORN, Fault.NO_SPACE, Fault.HANG, Fault.FLIP_BIT])
def test_write_commit_that_did_not_land_whole_is_an_error(bucket: FakeBucket, fault: Fault) -> None:
    commit = record_of(upload(bucket, identity(10)))
    with pytest.raises(KtrainError):
        catalog(FaultyTier(bucket, TierFault("write", fault), clock=FakeClock())).write_commit(commit)
    assert catalog(bucket).listing().commits == ()


def test_write_commit_that_cannot_be_read_back_does_not_count(bucket: FakeBucket) -> None:
    commit = record_of(upload(bucket, identity(10)))
    with pytest.raises(UnavailableError):
        catalog(FaultyTier(bucket, TierFault("read", Fault.UNAVAILABLE))).write_commit(commit)


def test_read_manifest_of_another_rank_is_refused(bucket: FakeBucket) -> None:
    commit = put_checkpoint(bucket, identity(10))
    first, second = commit.ranks
    bucket.objects[first.manifest] = bucket.objects[second.manifest]
    with pytest.raises(CorruptionError, match="expected the manifest of rank 0.*found rank 1"):
        catalog(bucket).read_manifest(commit, first)


# Verification


def test_verify_good_checkpoint_has_no_findings(bucket: FakeBucket) -> None:
    commit = put_checkpoint(bucket, identity(10))
    assert list(verify_commit(catalog(bucket), commit)) == []


@pytest.mark.parametrize("how", ["flipped", "short", "gone", "manifest flipped", "manifest gone"])
def test_verify_names_the_file_the_rank_and_the_bytes(bucket: FakeBucket, how: str) -> None:
    commit = put_checkpoint(bucket, identity(10))
    files = commit.ranks[1]
    name = files.manifest if "manifest" in how else files.payload
    data = bucket.objects.pop(name)
    if "gone" not in how:
        bucket.objects[name] = data[:-4] if how == "short" else flip(data)
    (finding,) = verify_commit(catalog(bucket), commit)
    assert (finding.step, finding.epoch, finding.rank, finding.name) == (10, 1, 1, name)
    if how in ("flipped", "short"):
        assert (finding.begin, finding.end) == (0, files.nbytes)
