"""What ranks write reaches their run in bounded parts, whatever the store and the agents do meanwhile."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from ktrain.base import contract
from ktrain.base.clock import Deadline
from ktrain.base.settings import Timeouts
from ktrain.errors import InternalError, UnavailableError
from ktrain.run import attempt_logs, log_drain
from ktrain.run.attempt_logs import MOST_ATTEMPTS, MOST_PARTS, PART_BYTES, Part, parts_of, read_from
from ktrain.run.log_drain import LogDrain, announce
from ktrain.testing.fake_bucket import FakeBucket
from ktrain.testing.faulty_tier import Fault, FaultyTier, TierFault

TOKEN = b"0123456789abcdef"


class Node:
    """A node's folders, its store, and its agents one after another."""

    def __init__(self, folder: Path, attempt: int = 1, ranks: tuple[int, ...] = (0,)) -> None:
        self.folder = folder
        self.bucket = FakeBucket()
        self.tier = FaultyTier(self.bucket)
        self.said: list[tuple[str, dict[str, Any]]] = []
        self.attempt = attempt
        self.logs = folder / f"attempt-{attempt}"
        self.logs.mkdir()
        announce(folder, attempt, ranks, self.logs)
        self.drain = self.new_agent()

    def new_agent(self) -> LogDrain:
        self.drain = LogDrain(
            lambda: self.tier,
            self.folder,
            secrets=[TOKEN],
            emit=lambda kind, **fields: self.said.append((kind, fields)),
            timeouts=Timeouts(30.0),
        )
        return self.drain

    def write(self, data: bytes, rank: int = 0) -> None:
        with open(self.logs / f"rank-{rank}.log", "ab") as file:
            file.write(data)

    def settle(self) -> None:
        """Rounds until nothing is new: the second look at a file that does not grow takes its last line too."""
        for _ in range(40):
            before = len(self.tier.calls)
            self.drain.round(self.tier)
            if len(self.tier.calls) == before:
                return
        raise AssertionError("the drain does not settle")

    def stored(self, rank: int = 0, begin: int = 0) -> list[tuple[int, bytes]]:
        deadline = Deadline.after(5.0)
        sizes = parts_of(self.bucket.list(f"{contract.LOGS_DIR}/", deadline=deadline))
        return list(read_from(self.bucket, sizes, self.attempt, rank, begin, deadline=deadline))

    def text(self, rank: int = 0) -> bytes:
        return b"".join(data for _, data in self.stored(rank))


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def lines(count: int, begin: int = 0) -> bytes:
    return b"".join(b"line %09d of what a rank says\n" % number for number in range(begin, begin + count))


def test_drain_brings_whole_lines_and_a_last_one_that_stays_as_it_is(node: Node) -> None:
    node.write(b"one\ntwo\nthr")
    node.drain.round(node.tier)
    assert node.text() == b"one\ntwo\n"

    node.drain.round(node.tier)  # nothing came: it may be the last word

    assert node.text() == b"one\ntwo\nthr"
    node.write(b"ee\n")
    node.settle()
    assert node.text() == b"one\ntwo\nthree\n"


def test_drain_writes_parts_of_one_mebibyte_under_names_that_say_their_place(node: Node) -> None:
    data = lines(80_000)
    node.write(data)

    node.settle()

    assert node.text() == data
    names = [f"logs/attempt-1/rank-0{number}.log" for number in ("", ".00001", ".00002")]
    assert sorted(node.bucket.objects) == sorted(names)
    assert [len(node.bucket.objects[name]) for name in names[:2]] == [PART_BYTES, PART_BYTES]
    assert node.stored(begin=PART_BYTES + 7)[0] == (PART_BYTES + 7, data[PART_BYTES + 7 : 2 * PART_BYTES])


def test_drain_that_finds_nothing_new_asks_the_store_nothing(node: Node) -> None:
    node.write(lines(10))
    node.settle()
    before = list(node.tier.calls)

    for _ in range(5):
        node.drain.round(node.tier)

    assert node.tier.calls == before


def test_new_agent_goes_on_from_the_last_part(node: Node) -> None:
    node.write(lines(60_000))
    node.settle()
    node.tier.calls.clear()
    node.new_agent()
    node.write(lines(10, begin=60_000))

    node.settle()

    assert node.text() == lines(60_010)
    assert {name for call, name in node.tier.calls if call == "write"} == {"logs/attempt-1/rank-0.00002.log"}


def test_each_rank_and_attempt_has_its_own_log(tmp_path: Path) -> None:
    node = Node(tmp_path, attempt=1, ranks=(2, 3))
    node.write(b"two\n", rank=2)
    node.write(b"three\n", rank=3)
    node.settle()
    node.attempt, node.logs = 2, tmp_path / "attempt-2"
    node.logs.mkdir()
    announce(tmp_path, 2, (2, 3), node.logs)
    node.write(b"again\n", rank=3)
    node.settle()

    assert sorted(node.bucket.objects) == [
        "logs/attempt-1/rank-2.log", "logs/attempt-1/rank-3.log", "logs/attempt-2/rank-3.log"
    ]  # fmt: skip


@pytest.mark.parametrize("shift", [0, 5, 12])
def test_secrets_are_masked_byte_for_byte_also_across_parts(node: Node, shift: int) -> None:
    url = b"s3://jo:geheim-4711@host/net?X-Signature=geheim-4712"
    for secret in (TOKEN, url):
        place = PART_BYTES - len(secret) // 2 - shift
        node.write(b"." * place + secret + b" end\n")
        node.settle()
        text = b"".join(data for _, data in node.stored())
        size = (node.logs / "rank-0.log").stat().st_size
        (node.logs / "rank-0.log").unlink()
        node.bucket.objects.clear()
        node.new_agent()

        assert len(text) == size
        assert TOKEN not in text and b"geheim" not in text and text.endswith(b" end\n")
    assert b"s3://" in text and b"@host/net?" in text


def test_store_that_is_away_costs_a_notice_and_the_next_round_brings_it(node: Node) -> None:
    node.write(lines(60_000))
    node.tier.add(TierFault("write", Fault.UNAVAILABLE, nth=2))
    with pytest.raises(UnavailableError):
        node.drain.round(node.tier)
    node.settle()

    assert node.text() == lines(60_000)


def test_thread_says_once_that_the_store_is_away_and_brings_all_at_its_end(node: Node) -> None:
    node.write(b"one\n")
    node.tier.add(TierFault("write", Fault.FORBIDDEN, count=2))
    for _ in range(2):
        node.drain._try_round(node.tier, None)
    assert [kind for kind, _ in node.said] == ["notice"]

    node.write(b"the last words")
    node.drain.start()
    node.drain.close()

    assert node.bucket.objects["logs/attempt-1/rank-0.log"] == b"one\nthe last words"


def test_log_without_end_keeps_its_beginning_and_its_newest(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt_logs, "PART_BYTES", 1024)
    monkeypatch.setattr(log_drain, "PART_BYTES", 1024)
    data = lines(4000)
    for begin in range(0, len(data), 6000):
        node.write(data[begin : begin + 6000])
        node.drain.round(node.tier)
    node.settle()

    assert len(node.bucket.objects) == MOST_PARTS
    pieces = node.stored()
    assert pieces[0] == (0, data[:1024])
    assert pieces[1][0] == (len(data) // 1024 - MOST_PARTS + 2) * 1024
    assert all(data[offset : offset + len(piece)] == piece for offset, piece in pieces)
    assert pieces[-1][1].endswith(data[-100:])


def test_drain_that_is_far_behind_leaves_the_middle_out(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt_logs, "PART_BYTES", 1024)
    monkeypatch.setattr(log_drain, "PART_BYTES", 1024)
    node.write(lines(10))
    node.settle()
    data = lines(10) + lines(20_000, begin=10)
    node.write(data[len(lines(10)) :])

    node.settle()

    assert len(node.bucket.objects) <= MOST_PARTS
    assert all(data[offset : offset + len(piece)] == piece for offset, piece in node.stored())
    assert node.stored()[-1][1].endswith(data[-100:])
    assert len([name for call, name in node.tier.calls if call == "delete"]) < 2 * MOST_PARTS, (
        "what never was is not asked"
    )


def test_attempt_that_is_too_old_goes_when_a_new_one_writes(tmp_path: Path) -> None:
    node = Node(tmp_path, attempt=MOST_ATTEMPTS + 3)
    for attempt in (2, 3, 4):
        node.bucket.objects[Part(attempt, 0, 0).name] = b"old\n"
    node.write(b"new\n")

    node.settle()

    left = {part.attempt for part in parts_of(node.bucket.list("logs/", deadline=Deadline.after(5.0)))}
    assert left == {2, 4, MOST_ATTEMPTS + 3}, "each attempt takes one away"


def test_listing_with_other_names_is_no_log() -> None:
    bucket = FakeBucket()
    for name in ("logs/attempt-1/rank-0.log", "logs/attempt-1/rank-0.error.json", "logs/launcher.log"):
        bucket.write(name, b"x", deadline=Deadline.after(5.0))

    assert list(parts_of(bucket.list("logs/", deadline=Deadline.after(5.0)))) == [Part(1, 0, 0)]


def test_agent_after_one_that_died_at_the_fault_point_gets_past_it(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(contract.ENV_FAULTS, "raise@log.part,rank=0")
    node.write(b"one\n")

    with pytest.raises(InternalError, match="log.part"):
        node.drain.round(node.tier)
    node.write(b"two\n")
    node.new_agent()
    node.settle()

    assert node.text() == b"one\ntwo\n"


class LeavingTier:
    """The store, through which the drain is told to leave while it writes."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def __getattr__(self, name: str) -> object:
        return getattr(self._node.tier, name)

    def write(self, *args: object, **options: object) -> object:
        if not self._node.drain._leaving.is_set():
            self._node.drain.leave()
            self._node.write(b"last words\n")
        return self._node.tier.write(*args, **options)  # type: ignore[arg-type]

    def close(self) -> None:
        """The node's store stays open, to be looked at."""


def test_last_round_comes_after_one_in_which_the_drain_was_told_to_leave(node: Node) -> None:
    node.write(b"one\n")
    node.drain._open_store = lambda: LeavingTier(node)  # type: ignore[assignment,return-value]
    node.drain._run()

    assert node.text() == b"one\nlast words\n"


def test_any_order_of_writing_draining_failing_and_dying_ends_with_what_was_written(node: Node) -> None:
    for seed in range(20):
        chance = random.Random(seed)
        for _ in range(30):
            what = chance.choice(["write", "write", "round", "fail", "die"])
            if what == "write":
                node.write(chance.randbytes(chance.randrange(1, 3000)).replace(b"://", b"---") + b"\n")
            elif what == "die":
                node.new_agent()
            elif what == "fail":
                node.tier.add(TierFault("write", chance.choice([Fault.LOST_REPLY, Fault.UNAVAILABLE])))
            else:
                node.drain._try_round(node.tier, None)
        node.drain._try_round(node.tier, None)  # takes what is left of the faults
        node.settle()
        assert node.text() == (node.logs / "rank-0.log").read_bytes(), f"seed {seed}"


def test_announcement_is_what_the_agent_finds(tmp_path: Path) -> None:
    announce(tmp_path, 3, (4, 5), tmp_path / "logs")

    assert json.loads((tmp_path / "writes-3.json").read_text()) == {"ranks": [4, 5], "folder": str(tmp_path / "logs")}
