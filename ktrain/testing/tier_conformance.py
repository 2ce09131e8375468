"""What every tier must do, as tests: subclass `TierConformance` and give it a `store` fixture.

    class TestMyTier(TierConformance):
        @pytest.fixture
        def store(self) -> Iterator[TierStore]: ...

Each test asks the fixture for a store whose root holds nothing yet.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import pytest

from ktrain.abc.tier import Stored, Tier
from ktrain.base.clock import Deadline
from ktrain.errors import (
    ConfigError,
    ConflictError,
    CorruptionError,
    DeadlineError,
    KtrainError,
    NotFoundError,
)

_NAME = "checkpoints/step-00000010/commit-000001-0a1b2c.json"
NO_NAMES = ("", "/abs", "a/../b", "..", "a//b", "a/.", "a b", "a\\b", "a\0b", "a/", "x?y", "x" * 1000)


class TierStore(Protocol):
    """An empty place in a store, with a way around the tier to see what really lies there."""

    def open(self) -> Tier:
        """A tier at the place; several may be open at once. The store closes them at its end."""

    def get(self, name: str) -> bytes | None:
        """The object's bytes as the store itself has them; None where there is none."""

    def put(self, name: str, data: bytes) -> None:
        """Puts an object there, around the tier."""


def soon() -> Deadline:
    """A deadline that no healthy store misses."""
    return Deadline.after(30.0)


class TierConformance:
    """The promises of `ktrain.abc.tier.Tier`."""

    def test_write_small_object_stores_the_bytes_unchanged(self, store: TierStore) -> None:
        store.open().write(_NAME, b"\x00\r\n\xff", deadline=soon())
        assert store.get(_NAME) == b"\x00\r\n\xff"

    def test_write_large_view_stores_every_byte_in_order(self, store: TierStore) -> None:
        data = bytearray(33 * (1 << 20) + 7)  # two parts of a multipart upload and a rest
        data[:: 1 << 20] = bytes(range(34))
        view = memoryview(data)
        tier = store.open()
        tier.write("payload.safetensors", view, deadline=soon())
        view.release()
        assert store.get("payload.safetensors") == bytes(data)
        assert tier.list("", deadline=soon()) == [Stored("payload.safetensors", len(data))]

    def test_write_twice_replaces_the_whole_object(self, store: TierStore) -> None:
        tier = store.open()
        tier.write(_NAME, b"a long first value", deadline=soon())
        tier.write(_NAME, b"second", deadline=soon())
        assert tier.read(_NAME, deadline=soon()) == b"second"

    def test_write_empty_object_is_there_and_empty(self, store: TierStore) -> None:
        tier = store.open()
        tier.write("empty", b"", deadline=soon())
        assert tier.read("empty", deadline=soon()) == b""
        assert tier.list("", deadline=soon()) == [Stored("empty", 0)]

    def test_read_object_of_another_writer_sees_its_newest_bytes(self, store: TierStore) -> None:
        tier = store.open()
        store.put(_NAME, b"old")
        assert tier.read(_NAME, deadline=soon()) == b"old"
        store.put(_NAME, b"newer")
        assert tier.read(_NAME, deadline=soon()) == b"newer"

    def test_read_absent_object_is_not_found(self, store: TierStore) -> None:
        tier = store.open()
        for _ in range(2):
            with pytest.raises(NotFoundError, match=_NAME):
                tier.read(_NAME, deadline=soon())

    def test_read_folder_is_not_found(self, store: TierStore) -> None:
        tier = store.open()
        tier.write(_NAME, b"x", deadline=soon())
        with pytest.raises(NotFoundError):
            tier.read("checkpoints", deadline=soon())

    def test_read_range_inside_returns_exactly_the_range(self, store: TierStore) -> None:
        tier = store.open()
        store.put("data", bytes(range(100)))
        assert tier.read_range("data", 10, 20, deadline=soon()) == bytes(range(10, 20))
        assert tier.read_range("data", 0, 100, deadline=soon()) == bytes(range(100))
        assert tier.read_range("data", 99, 100, deadline=soon()) == b"\x63"
        assert tier.read_range("data", 50, 50, deadline=soon()) == b""

    @pytest.mark.parametrize(("begin", "end"), [(90, 101), (100, 101), (500, 600)])
    def test_read_range_past_the_end_is_corruption(self, store: TierStore, begin: int, end: int) -> None:
        tier = store.open()
        store.put("data", bytes(100))
        with pytest.raises(CorruptionError, match="data"):
            tier.read_range("data", begin, end, deadline=soon())

    def test_read_range_of_absent_object_is_not_found(self, store: TierStore) -> None:
        with pytest.raises(NotFoundError):
            store.open().read_range("data", 0, 1, deadline=soon())

    def test_list_absent_folder_is_empty(self, store: TierStore) -> None:
        tier = store.open()
        assert tier.list("", deadline=soon()) == []
        assert tier.list("checkpoints/step-00000010", deadline=soon()) == []

    def test_list_folder_names_all_objects_below_it_and_no_sibling(self, store: TierStore) -> None:
        tier = store.open()
        for name in ("a/b/c/deep", "a/b/x", "a/b-sibling/y", "a/bc", "z"):
            tier.write(name, name.encode(), deadline=soon())
        assert tier.list("a/b", deadline=soon()) == [Stored("a/b/c/deep", 10), Stored("a/b/x", 5)]
        assert tier.list("a/b/", deadline=soon()) == tier.list("a/b", deadline=soon())
        assert [stored.name for stored in tier.list("", deadline=soon())] == [
            "a/b-sibling/y",
            "a/b/c/deep",
            "a/b/x",
            "a/bc",
            "z",
        ]

    def test_list_of_an_object_is_empty(self, store: TierStore) -> None:
        tier = store.open()
        tier.write("a/b", b"x", deadline=soon())
        assert tier.list("a/b", deadline=soon()) == []

    def test_list_after_changes_of_another_writer_is_fresh(self, store: TierStore) -> None:
        tier, other = store.open(), store.open()
        tier.write("a/one", b"1", deadline=soon())
        assert tier.list("a", deadline=soon()) == [Stored("a/one", 1)]
        other.write("a/two", b"22", deadline=soon())
        other.delete("a/one", deadline=soon())
        assert tier.list("a", deadline=soon()) == [Stored("a/two", 2)]
        store.put("a/three", b"333")
        assert tier.list("a", deadline=soon()) == [Stored("a/three", 3), Stored("a/two", 2)]

    def test_delete_present_object_removes_it_alone(self, store: TierStore) -> None:
        tier = store.open()
        tier.write("a/b", b"x", deadline=soon())
        tier.write("a/c", b"y", deadline=soon())
        tier.delete("a/b", deadline=soon())
        assert store.get("a/b") is None
        assert store.get("a/c") == b"y"

    def test_delete_absent_object_is_fine(self, store: TierStore) -> None:
        tier = store.open()
        tier.delete(_NAME, deadline=soon())
        tier.write(_NAME, b"x", deadline=soon())
        tier.delete(_NAME, deadline=soon())
        tier.delete(_NAME, deadline=soon())
        with pytest.raises(NotFoundError):
            tier.read(_NAME, deadline=soon())

    def test_write_after_a_folder_was_emptied_makes_it_again(self, store: TierStore) -> None:
        tier = store.open()
        for _ in range(2):
            tier.write("a/b/c", b"x", deadline=soon())
            assert tier.read("a/b/c", deadline=soon()) == b"x"
            tier.delete("a/b/c", deadline=soon())

    def test_create_absent_object_stores_it(self, store: TierStore) -> None:
        tier = store.open()
        tier.create("run.json", b"{}", deadline=soon())
        assert store.get("run.json") == b"{}"
        assert tier.list("", deadline=soon()) == [Stored("run.json", 2)]  # and nothing else is left behind

    def test_create_present_object_is_a_conflict_and_changes_nothing(self, store: TierStore) -> None:
        store.put("run.json", b"first")
        tier = store.open()
        for _ in range(2):
            with pytest.raises(ConflictError, match="run.json"):
                tier.create("run.json", b"second", deadline=soon())
        assert store.get("run.json") == b"first"

    def test_create_by_many_at_once_has_one_winner_where_the_store_can(self, store: TierStore) -> None:
        tiers = [store.open() for _ in range(4)]
        tiers[0].create("warm-up", b"", deadline=soon())
        if not tiers[0].supports_create:
            pytest.skip("this store has no conditional write")

        def try_create(index: int) -> bool:
            try:
                tiers[index].create("run.json", str(index).encode(), deadline=soon())
            except ConflictError:
                return False
            return True

        with ThreadPoolExecutor(4) as pool:
            won = [index for index, first in enumerate(pool.map(try_create, range(4))) if first]
        assert len(won) == 1
        assert store.get("run.json") == str(won[0]).encode()

    def test_calls_from_several_threads_do_not_mix_their_bytes(self, store: TierStore) -> None:
        tier = store.open()

        def round_trip(index: int) -> bool:
            data = bytes([index]) * (1000 + index)
            tier.write(f"a/{index}", data, deadline=soon())
            return tier.read(f"a/{index}", deadline=soon()) == data

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(round_trip, range(12)))
        assert len(tier.list("a", deadline=soon())) == 12

    def test_name_that_is_none_is_refused_by_every_call(self, store: TierStore) -> None:
        tier = store.open()
        for name in NO_NAMES:
            for call in (
                lambda name: tier.write(name, b"x", deadline=soon()),
                lambda name: tier.create(name, b"x", deadline=soon()),
                lambda name: tier.read(name, deadline=soon()),
                lambda name: tier.read_range(name, 0, 1, deadline=soon()),
                lambda name: tier.delete(name, deadline=soon()),
            ):
                with pytest.raises(ConfigError):
                    call(name)
        assert tier.list("", deadline=soon()) == []

    def test_call_after_its_deadline_is_late_and_changes_nothing(self, store: TierStore) -> None:
        tier = store.open()
        over = Deadline.after(0.0)
        with pytest.raises(DeadlineError, match=_NAME):
            tier.write(_NAME, b"x", deadline=over)
        with pytest.raises(DeadlineError):
            tier.list("", deadline=over)
        assert store.get(_NAME) is None

    def test_call_after_close_raises_and_close_again_is_fine(self, store: TierStore) -> None:
        tier = store.open()
        tier.write(_NAME, b"x", deadline=soon())
        tier.close()
        tier.close()
        with pytest.raises(KtrainError):
            tier.read(_NAME, deadline=soon())
