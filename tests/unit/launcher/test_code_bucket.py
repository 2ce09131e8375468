"""Code beside the run: sent once, whole or not there, fetched and proven, removed when nobody asks for it."""

from __future__ import annotations

import hashlib
import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ktrain.base import contract, ids
from ktrain.base.clock import Deadline
from ktrain.base.faults import FaultPoints, parse
from ktrain.errors import ConflictError, CorruptionError, InternalError, NotFoundError
from ktrain.launcher.code import bucket
from ktrain.launcher.code.archive import CodeArchive, pack_code
from ktrain.launcher.spec import Bytes, Code, Way
from ktrain.run import code as delivery
from ktrain.tier.files import FileTier
from tests.unit.launcher.test_spec import job

CALM = FaultPoints([], epoch=1)


class Watched(FileTier):
    """A store that counts the bytes of archives, and may spoil or lose them."""

    sent = 0
    spoil: Callable[[bytes], bytes] = staticmethod(lambda data: data)

    def write(self, name: str, data: bytes, *, deadline: Deadline) -> None:  # type: ignore[override]
        if name.endswith(".zip"):
            self.sent += len(data)
            data = self.spoil(bytes(data))
        super().write(name, data, deadline=deadline)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Watched]:
    found = Watched(tmp_path / "run", kind="bucket")
    yield found
    found.close()


def deadline() -> Deadline:
    return Deadline.after(30.0)


def archive_of(tmp_path: Path, text: str = "print(1)\n") -> CodeArchive:
    folder = tmp_path / "code"
    folder.mkdir(exist_ok=True)
    (folder / "train.py").write_text(text)
    return pack_code(folder)


def send(store: FileTier, archive: CodeArchive, faults: FaultPoints = CALM) -> bool:
    return bucket.send(store, archive, faults=faults, deadline=deadline())


def is_whole(store: FileTier, archive: CodeArchive) -> bool:
    return bucket.look(store, deadline=deadline()).is_whole(archive.sha256, len(archive.data))


def test_second_launch_of_the_same_code_sends_nothing(store: Watched, tmp_path: Path) -> None:
    archive = archive_of(tmp_path)

    assert send(store, archive) and is_whole(store, archive)
    assert not send(store, archive)
    assert store.sent == len(archive.data)
    assert store.read(bucket.archive_name(archive.sha256), deadline=deadline()) == archive.data


@pytest.mark.parametrize("point", ["code.archive", "code.record"])
def test_launch_that_died_leaves_nothing_that_is_taken_for_whole(point: str, store: Watched, tmp_path: Path) -> None:
    archive = archive_of(tmp_path)
    with pytest.raises(InternalError):
        send(store, archive, FaultPoints(parse(f"raise@{point}"), epoch=1))

    assert not is_whole(store, archive)
    assert send(store, archive) and is_whole(store, archive)


def test_launch_killed_between_archive_and_record_leaves_no_whole_archive(store: Watched, tmp_path: Path) -> None:
    archive = archive_of(tmp_path)
    child = (
        "import sys; from pathlib import Path; from tests.unit.launcher import test_code_bucket as t;"
        "from ktrain.base.faults import FaultPoints; from ktrain.tier.files import FileTier;"
        "a = t.pack_code(Path(sys.argv[2]));"
        "t.send(FileTier(Path(sys.argv[1]), kind='bucket'), a, FaultPoints.from_environment(epoch=1))"
    )
    done = subprocess.run(
        [sys.executable, "-c", child, str(tmp_path / "run"), str(tmp_path / "code")],
        env={contract.ENV_FAULTS: "kill@code.record", "PYTHONPATH": str(Path(__file__).parents[3])},
        timeout=60,
        check=False,
    )

    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "run" / bucket.archive_name(archive.sha256)).read_bytes() == archive.data
    assert not is_whole(store, archive)
    assert send(store, archive) and is_whole(store, archive)


def test_half_an_archive_under_its_name_is_sent_again(store: Watched, tmp_path: Path) -> None:
    archive = archive_of(tmp_path)
    send(store, archive)
    store.write(bucket.archive_name(archive.sha256), archive.data[:-7], deadline=deadline())

    assert not is_whole(store, archive)
    assert send(store, archive) and is_whole(store, archive)


def test_store_that_gives_back_other_bytes_is_told_at_once(store: Watched, tmp_path: Path) -> None:
    store.spoil = lambda data: bytes([data[0] ^ 1]) + data[1:]  # type: ignore[method-assign]
    archive = archive_of(tmp_path)

    with pytest.raises(CorruptionError, match="gave back other bytes"):
        send(store, archive)
    assert not is_whole(store, archive)


def test_archive_that_a_collector_removed_meanwhile_is_no_success(store: Watched, tmp_path: Path) -> None:
    archive = archive_of(tmp_path)

    class Collected(FaultPoints):
        def reached(self, point: str, *, step: int | None = None, rank: int | None = None) -> None:
            if point == "code.record":
                shelf = bucket.look(store, deadline=deadline())
                bucket.remove(store, bucket.plan_removal(shelf, keep=0), deadline=deadline())

    with pytest.raises(ConflictError, match="removed it, or is about to"):
        send(store, archive, Collected([], epoch=1))


class Meeting(Watched):
    """Does something else when a name that ends so is written."""

    ending = ""
    does: Callable[[], object] = staticmethod(lambda: None)

    def write(self, name: str, data: bytes, *, deadline: Deadline) -> None:  # type: ignore[override]
        super().write(name, data, deadline=deadline)
        if self.ending and name.endswith(self.ending):
            self.ending = ""
            self.does()


def two_archives(store: Watched, tmp_path: Path) -> tuple[CodeArchive, bucket.Removal]:
    """The older of two, and the plan to remove it."""
    old, new = archive_of(tmp_path), archive_of(tmp_path, "print(2)\n")
    send(store, old)
    send(store, new)
    return old, bucket.plan_removal(bucket.look(store, deadline=deadline()), keep=1)


def test_collector_spares_what_was_launched_since_it_planned(tmp_path: Path) -> None:
    store = Meeting(tmp_path / "run", kind="bucket")
    old, removal = two_archives(store, tmp_path)
    assert not send(store, old), "the launch is told that it is there"

    assert bucket.remove(store, removal, deadline=deadline()) == [] and is_whole(store, old)
    assert not any(item.name.endswith(".doomed") for item in store.list(contract.CODE_DIR, deadline=deadline()))


def test_launch_that_meets_a_collector_in_its_midst_is_told(tmp_path: Path) -> None:
    store = Meeting(tmp_path / "run", kind="bucket")
    old, removal = two_archives(store, tmp_path)

    def launch() -> None:
        with pytest.raises(ConflictError, match="is about to"):
            send(store, old)

    store.ending, store.does = ".doomed", launch  # type: ignore[method-assign]
    assert bucket.remove(store, removal, deadline=deadline()) == [] and is_whole(store, old)
    assert not send(store, old)


def test_mark_of_a_collector_that_died_goes_with_the_next_one(store: Watched, tmp_path: Path) -> None:
    old, removal = two_archives(store, tmp_path)
    store.write(f"{contract.CODE_DIR}/{old.sha256}.doomed", b"{}", deadline=deadline())
    with pytest.raises(ConflictError):
        send(store, old)

    assert bucket.remove(store, bucket.Removal(), deadline=deadline()) == []
    assert not send(store, old)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2}', '{"format": 1, "size": 0, "number": 1, "whole": true}'])
def test_torn_or_newer_record_is_a_doubt_and_says_nothing(text: str, store: Watched, tmp_path: Path) -> None:
    archive = archive_of(tmp_path)
    send(store, archive)
    store.write(bucket.record_name(archive.sha256), text.encode(), deadline=deadline())
    shelf = bucket.look(store, deadline=deadline())

    assert not is_whole(store, archive) and len(shelf.doubts) == 1
    assert bucket.plan_removal(shelf, keep=0) == bucket.Removal((), shelf.doubts)


# Fetching


def test_fetched_code_is_what_was_sent(store: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = archive_of(tmp_path)
    monkeypatch.setattr(bucket, "_PIECE", 50)  # several requests
    send(store, archive)
    target = tmp_path / "target"
    command = [str(tmp_path / "run"), archive.sha256, str(len(archive.data)), str(tmp_path), str(target)]

    assert delivery.main(command) == contract.EXIT_OK
    assert (target / "train.py").read_text() == "print(1)\n"
    assert delivery.main(command) == contract.EXIT_OK, "an init container is started again with its volume as it was"


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (lambda data: None, contract.EXIT_USAGE, "launch again with --code"),
        (lambda data: data[:-1], contract.EXIT_CORRUPT, "bytes"),
        (lambda data: data[:-1] + b"?", contract.EXIT_CORRUPT, "expected SHA-256"),
    ],
)
def test_code_that_is_not_what_was_sent_is_never_unpacked(
    spoil: Callable[[bytes], bytes | None],
    code: int,
    words: str,
    store: Watched,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    archive = archive_of(tmp_path)
    send(store, archive)
    name, found = bucket.archive_name(archive.sha256), spoil(archive.data)
    store.delete(name, deadline=deadline())
    if found is not None:
        store.write(name, found, deadline=deadline())
    target = tmp_path / "target"
    command = [str(tmp_path / "run"), archive.sha256, str(len(archive.data)), str(tmp_path), str(target)]

    assert delivery.main(command) == code
    said = capsys.readouterr().err
    assert said.startswith("ktrain: ") and words in said and said.count("\n") == 1
    assert not target.exists()


def test_pod_killed_with_the_archive_there_unpacks_it_the_next_time(
    store: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = archive_of(tmp_path)
    send(store, archive)
    target = tmp_path / "target"
    command = [str(tmp_path / "run"), archive.sha256, str(len(archive.data)), str(tmp_path), str(target)]
    monkeypatch.setenv(contract.ENV_FAULTS, "raise@code.fetched")

    assert delivery.main(command) != contract.EXIT_OK and not target.exists()
    monkeypatch.delenv(contract.ENV_FAULTS)
    assert delivery.main(command) == contract.EXIT_OK and (target / "train.py").is_file()


def test_missing_archive_is_surely_not_there(store: Watched) -> None:
    with pytest.raises(NotFoundError):
        bucket.fetch(store, "a" * 64, 10, io.BytesIO(), deadline=deadline())


def test_send_code_uses_the_store_of_the_run(tmp_path: Path) -> None:
    archive = archive_of(tmp_path)
    code = Code(archive=archive.sha256, way=Way.BUCKET, size=Bytes(len(archive.data)))
    spec = replace(job(run=f"memory://bucket/{ids.random_id()}"), code=code)

    with pytest.raises(NotFoundError, match="launch with --code"):
        delivery.send_code(spec, None)
    assert re.search(r"sent to memory://bucket/\w+/code/[0-9a-f]{64}\.zip", delivery.send_code(spec, archive))
    assert "nothing was sent" in delivery.send_code(spec, archive)
    assert "is there already" in delivery.send_code(spec, None)


# Removing


def shelf_of(*numbers: int, doubts: tuple[str, ...] = ()) -> bucket.Shelf:
    records = {}
    for at, number in enumerate(numbers):
        digest = hashlib.sha256(str(at).encode()).hexdigest()
        records[digest] = bucket.Record(digest, 1, number, is_whole=True)
    return bucket.Shelf(records, dict.fromkeys(records, 1), doubts=doubts)


def test_removal_takes_the_oldest_launches_by_their_numbers() -> None:
    shelf = shelf_of(3, 1, 2, 2, 7)
    gone = bucket.plan_removal(shelf, keep=2).digests

    assert [shelf.records[digest].number for digest in gone] == [1, 2, 2]
    assert bucket.plan_removal(shelf, keep=4).digests == ()
    assert bucket.plan_removal(shelf_of(1, 2, 3, doubts=("x",)), keep=1) == bucket.Removal((), ("x",))


def test_archive_without_a_record_stays(store: Watched, tmp_path: Path) -> None:
    archive = archive_of(tmp_path)
    store.write(bucket.archive_name(archive.sha256), archive.data, deadline=deadline())

    assert bucket.plan_removal(bucket.look(store, deadline=deadline()), keep=0) == bucket.Removal()


def test_old_code_that_is_launched_again_is_the_newest(store: Watched, tmp_path: Path) -> None:
    old, new = archive_of(tmp_path), archive_of(tmp_path, "print(2)\n")
    for archive in (old, new, old):
        send(store, archive)
    shelf = bucket.look(store, deadline=deadline())

    assert bucket.plan_removal(shelf, keep=1).digests == (new.sha256,)
    assert store.sent == len(old.data) + len(new.data)


def test_upload_that_was_cut_off_goes_with_launches_of_its_time(store: Watched, tmp_path: Path) -> None:
    lost = archive_of(tmp_path)
    with pytest.raises(InternalError):
        send(store, lost, FaultPoints(parse("raise@code.record"), epoch=1))
    send(store, new := archive_of(tmp_path, "print(2)\n"))
    removal = bucket.plan_removal(bucket.look(store, deadline=deadline()), keep=1)
    bucket.remove(store, removal, deadline=deadline())

    assert removal.digests == (lost.sha256,) and is_whole(store, new)
    assert sorted(item.name for item in store.list(contract.CODE_DIR, deadline=deadline())) == sorted(
        (bucket.archive_name(new.sha256), bucket.record_name(new.sha256))
    )


def test_record_is_text_that_others_can_read(store: Watched, tmp_path: Path) -> None:
    archive = archive_of(tmp_path)
    send(store, archive)

    assert json.loads(store.read(bucket.record_name(archive.sha256), deadline=deadline())) == {
        "format": 1, "size": len(archive.data), "number": 1, "whole": True,
    }  # fmt: skip
