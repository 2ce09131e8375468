"""Every tier that ktrain ships, against the one conformance suite."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from ktrain import native
from ktrain.abc.proven import BadBytes, Chunks, ProvesWrites, Terms
from ktrain.abc.tier import Tier
from ktrain.base import ids
from ktrain.base.pace import Pace
from ktrain.errors import CorruptionError
from ktrain.testing.fake_bucket import FakeBucket
from ktrain.testing.faulty_tier import FaultyTier
from ktrain.testing.s3_servers import MotoServer, RcloneServer, S3Server, find_program
from ktrain.testing.tier_conformance import TierConformance, TierStore, soon
from ktrain.testing.tier_url import publish, withdraw
from ktrain.tier.location import open_tier
from tests.conformance.fsspec_stores import Blocks, blocks_url, folder_url


class _Store:
    """Opens tiers at a URL and closes them."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._open: list[Tier] = []

    def open(self) -> Tier:
        self._open.append(open_tier(self.url))
        return self._open[-1]

    def close(self) -> None:
        for tier in self._open:
            tier.close()


class _FileStore(_Store):
    def __init__(self, folder: Path) -> None:
        super().__init__(f"file://{folder}")
        self._folder = folder

    def get(self, name: str) -> bytes | None:
        path = self._folder / name
        return path.read_bytes() if path.exists() else None

    def put(self, name: str, data: bytes) -> None:
        (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self._folder / name).write_bytes(data)


class _MemoryStore(_Store):
    def __init__(self) -> None:
        self._root = f"/{ids.random_id()}"
        super().__init__(f"memory:/{self._root}")
        self._filesystem = fsspec.filesystem("memory")

    def get(self, name: str) -> bytes | None:
        path = f"{self._root}/{name}"
        return self._filesystem.cat_file(path) if self._filesystem.exists(path) else None

    def put(self, name: str, data: bytes) -> None:
        self._filesystem.pipe_file(f"{self._root}/{name}", data)


class _BlocksStore(_Store):
    def __init__(self) -> None:
        self._name = ids.random_id()
        super().__init__(blocks_url(self._name))

    def path(self, name: str) -> str:
        return f"{self._name}/run/{name}"

    def get(self, name: str) -> bytes | None:
        return Blocks.objects.get(self.path(name))

    def put(self, name: str, data: bytes) -> None:
        Blocks.objects[self.path(name)] = data


class _FakeStore:
    def __init__(self) -> None:
        self._truth = FakeBucket()

    def open(self) -> Tier:
        bucket = FakeBucket()
        bucket.objects = self._truth.objects
        return FaultyTier(bucket)

    def get(self, name: str) -> bytes | None:
        return self._truth.objects.get(name)

    def put(self, name: str, data: bytes) -> None:
        self._truth.objects[name] = data


class _PublishedStore(_Store):
    """A tier of this process, reached by a URL: what stands between is the tier for every store of fsspec."""

    def __init__(self) -> None:
        self._truth = FakeBucket()
        super().__init__(publish(self._truth))

    def get(self, name: str) -> bytes | None:
        return self._truth.objects.get(name)

    def put(self, name: str, data: bytes) -> None:
        self._truth.objects[name] = data

    def close(self) -> None:
        super().close()
        withdraw(self.url)


class _S3Store(_Store):
    def __init__(self, server: S3Server) -> None:
        self._server = server
        self._bucket = f"bucket-{ids.random_id()}"
        server.make_bucket(self._bucket)
        super().__init__(f"s3://{self._bucket}/runs/net-a")

    def get(self, name: str) -> bytes | None:
        return self._server.get(self._bucket, f"runs/net-a/{name}")

    def put(self, name: str, data: bytes) -> None:
        self._server.put(self._bucket, f"runs/net-a/{name}", data)


class TestFiles(TierConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[TierStore]:
        store = _FileStore(tmp_path / "runs" / "net-a")
        yield store
        store.close()


class TestMemory(TierConformance):
    @pytest.fixture
    def store(self) -> Iterator[TierStore]:
        store = _MemoryStore()
        yield store
        store.close()


class TestFsspecFolder(TierConformance):
    """fsspec's own local files: what stands between is the tier for every store of fsspec."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[TierStore]:
        store = _FileStore(tmp_path / "runs" / "net-a")
        store.url = folder_url(tmp_path / "runs" / "net-a")
        yield store
        store.close()


class TestFsspecBlocks(TierConformance):
    @pytest.fixture
    def store(self) -> Iterator[TierStore]:
        store = _BlocksStore()
        yield store
        store.close()
        Blocks.objects.clear()

    def test_write_proven_sends_block_by_block_and_is_whole(self, store: _BlocksStore) -> None:
        data, terms = _large()
        _proving(store).write_proven("payload", data, terms, deadline=soon())
        assert store.get("payload") == data
        assert Blocks.num_blocks[store.path("payload")] > 2, "never the whole in memory"

    def test_write_proven_of_bytes_that_changed_shows_nothing_once_the_file_is_forgotten(
        self, store: _BlocksStore
    ) -> None:
        data, terms = _large()
        data[-1] ^= 1
        with pytest.raises(BadBytes):
            _proving(store).write_proven("payload", data, terms, deadline=soon())
        gc.collect()  # fsspec's files close themselves at the end of their life
        assert store.get("payload") is None

    def test_write_proven_is_read_back_now_and_then(self, store: _BlocksStore, monkeypatch: pytest.MonkeyPatch) -> None:
        data, terms = _large()
        tier = _proving(store)
        monkeypatch.setattr(Blocks, "cat_file", lambda self, path, start=None, end=None, **kwargs: bytes(end - start))
        with pytest.raises(CorruptionError, match="as read back"):
            tier.write_proven("payload", data, terms, deadline=soon())


def _large() -> tuple[bytearray, Terms]:
    data = bytearray(b"".join(index.to_bytes(2, "big") * (1 << 19) for index in range(40)))
    return data, Terms(Chunks(1 << 20, native.digest_chunks(data, chunk_nbytes=1 << 20)), Pace(None))


def _proving(store: _Store) -> ProvesWrites:
    tier = store.open()
    assert isinstance(tier, ProvesWrites)
    return tier


class TestFakeBucket(TierConformance):
    @pytest.fixture
    def store(self) -> TierStore:
        return _FakeStore()


class TestPublished(TierConformance):
    @pytest.fixture
    def store(self) -> Iterator[TierStore]:
        store = _PublishedStore()
        yield store
        store.close()


@pytest.fixture(scope="module")
def moto() -> Iterator[S3Server]:
    with MotoServer() as server:
        yield server


@pytest.fixture(scope="module")
def rclone() -> Iterator[S3Server]:
    with RcloneServer() as server:
        yield server


@pytest.mark.skipif(find_program("moto_server") is None, reason="moto_server is not installed")
class TestMoto(TierConformance):
    @pytest.fixture
    def store(self, moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[TierStore]:
        yield from _s3_store(moto, monkeypatch)

    def test_create_store_honours_the_condition_and_this_is_noticed(self, store: TierStore) -> None:
        tier = store.open()
        assert not tier.supports_create
        tier.create("run.json", b"{}", deadline=soon())
        assert tier.supports_create


@pytest.mark.skipif(find_program("rclone") is None, reason="rclone is not installed")
class TestRclone(TierConformance):
    @pytest.fixture
    def store(self, rclone: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[TierStore]:
        yield from _s3_store(rclone, monkeypatch)

    def test_create_store_overwrites_in_silence_and_this_is_noticed(self, store: TierStore) -> None:
        tier = store.open()
        tier.create("run.json", b"{}", deadline=soon())
        assert not tier.supports_create


def _s3_store(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[TierStore]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    store = _S3Store(server)
    yield store
    store.close()
