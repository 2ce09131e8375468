"""Stores behind fsspec other than S3, and URLs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
from fsspec.asyn import _runner
from fsspec.implementations.memory import MemoryFileSystem

from ktrain.abc.tier import Tier
from ktrain.base.clock import Deadline
from ktrain.errors import ConfigError, DeadlineError, ForbiddenError, UnavailableError
from ktrain.testing.tier_conformance import soon
from ktrain.tier.connection import Connection
from ktrain.tier.location import open_tier


class _TouchyFilesystem(MemoryFileSystem):
    """A store of another kind: a folder that may not be read, a file that cannot be finished, an answer that
    hangs.
    """

    protocol = "touchy"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    cachable = False
    num_made = 0
    gate = threading.Event()

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        type(self).num_made += 1

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("touchy://", "memory://")))

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        if path.endswith("secret"):
            raise PermissionError(path)
        return super().ls(path, detail=detail, **options)

    def cat_file(self, path: str, **options: Any) -> bytes:
        if path.endswith("hang"):
            self.gate.wait(30)
        return bytes(super().cat_file(path, **options))


@pytest.fixture
def tier() -> Iterator[Tier]:
    fsspec.register_implementation("touchy", _TouchyFilesystem, clobber=True)
    _TouchyFilesystem.store.clear()
    _TouchyFilesystem.pseudo_dirs[:] = [""]
    _TouchyFilesystem.gate.clear()
    tier = open_tier("touchy://run")
    yield tier
    _TouchyFilesystem.gate.set()
    tier.close()


def test_list_with_a_folder_that_may_not_be_read_is_forbidden_and_not_shorter(tier: Tier) -> None:
    tier.write("open/a", b"x", deadline=soon())
    tier.write("secret/b", b"x", deadline=soon())
    assert [stored.name for stored in tier.list("open", deadline=soon())] == ["open/a"]
    with pytest.raises(ForbiddenError, match="list all"):
        tier.list("", deadline=soon())


def test_write_large_view_to_any_store_streams_every_byte(tier: Tier) -> None:
    data = bytearray(33 << 20)
    data[-1] = 7
    tier.write("a/payload", memoryview(data), deadline=soon())
    assert tier.read("a/payload", deadline=soon()) == data


def test_read_that_hangs_costs_its_filesystem_object_and_the_next_call_gets_a_fresh_one(tier: Tier) -> None:
    tier.write("a", b"x", deadline=soon())
    tier.write("hang", b"y", deadline=soon())
    tier.read("a", deadline=soon())
    made = _TouchyFilesystem.num_made
    with pytest.raises(DeadlineError, match="read hang"):
        tier.read("hang", deadline=Deadline.after(0.05))
    assert _TouchyFilesystem.num_made == made
    assert tier.read("a", deadline=soon()) == b"x"
    assert tier.read("a", deadline=soon()) == b"x"
    assert _TouchyFilesystem.num_made == made + 1


def test_open_tier_unknown_kind_of_url_is_config_error_without_credentials() -> None:
    with pytest.raises(ConfigError) as caught:
        open_tier("nosuch://me:geheim@host/run?token=abc")
    assert "nosuch://host/run" in str(caught.value)
    assert "geheim" not in str(caught.value)
    assert "abc" not in str(caught.value)


def test_open_tier_chain_of_stores_is_refused() -> None:
    with pytest.raises(ConfigError, match="chain"):
        open_tier("simplecache::s3://bucket/run")


def test_write_over_a_folder_is_unavailable_and_not_not_found(tier: Tier) -> None:
    tier.write("folder/a", b"x", deadline=soon())
    with pytest.raises(UnavailableError, match="write folder"):
        tier.write("folder", b"x", deadline=soon())


def test_call_that_had_not_begun_when_its_loop_was_ended_wakes_its_thread() -> None:
    connection = Connection(lambda loop: None, is_async=True)
    connection.free.clear()
    woken = threading.Event()

    async def end_before_it_begins() -> None:
        call = asyncio.ensure_future(
            _runner(woken, asyncio.sleep(60), [None])
        )  # what a thread in fsspec's sync waits for
        call.add_done_callback(lambda _: connection.free.set())
        await connection._cancel_until_free()

    asyncio.run(end_before_it_begins())
    assert woken.is_set()
