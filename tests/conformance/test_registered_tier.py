"""A tier that another package brings: found by its URL's scheme, and held to the same suite as ours."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ktrain.abc.tier import Tier
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.errors import ConfigError, NotFoundError
from ktrain.testing.tier_conformance import TierConformance, TierStore, soon
from ktrain.tier.location import open_tier

MODULE = """
from ktrain.testing.fake_bucket import FakeBucket

STORES = {}

def open_shelf(url, *, kind, timeouts):
    bucket = FakeBucket(kind=kind, url=url)
    bucket.objects = STORES.setdefault(url, bucket.objects)
    return bucket

def open_broken(url, *, kind, timeouts):
    raise RuntimeError("the shelf at https://user:secret@host/ fell")

def open_nothing(url, *, kind, timeouts):
    return object()
"""


def install(folder: Path, package: str, scheme: str, target: str) -> None:
    """Puts a distribution there as an installer would."""
    about = folder / f"{package}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[ktrain.tiers]\n{scheme} = {target}\n")
    (folder / "shelf_tiers.py").write_text(MODULE)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Path]:
    """A folder on sys.path with a package that brings shelf://."""
    install(tmp_path, "shelf", "shelf", "shelf_tiers:open_shelf")
    sys.path.insert(0, str(tmp_path))
    importlib.invalidate_caches()
    yield tmp_path
    sys.path.remove(str(tmp_path))
    sys.modules.pop("shelf_tiers", None)
    importlib.invalidate_caches()


class _ShelfStore:
    def __init__(self) -> None:
        self._url = "shelf://board/run"
        self._open: list[Tier] = []

    def open(self) -> Tier:
        self._open.append(open_tier(self._url))
        return self._open[-1]

    def _objects(self) -> dict[str, bytes]:
        self.open()
        objects: dict[str, bytes] = sys.modules["shelf_tiers"].STORES[self._url]
        return objects

    def get(self, name: str) -> bytes | None:
        return self._objects().get(name)

    def put(self, name: str, data: bytes) -> None:
        self._objects()[name] = data

    def close(self) -> None:
        for tier in self._open:
            tier.close()


class TestRegisteredTier(TierConformance):
    @pytest.fixture
    def store(self, site: Path) -> Iterator[TierStore]:
        store = _ShelfStore()
        yield store
        store.close()


def test_open_tier_of_a_registered_scheme_gives_kind_and_url(site: Path) -> None:
    tier = open_tier("shelf://board/run", kind="disk", timeouts=Timeouts())

    assert (tier.kind, tier.url) == ("disk", "shelf://board/run")
    assert tier.list("", deadline=soon()) == []


def test_run_lives_in_a_registered_tier(site: Path) -> None:
    made = RunCatalog.open("shelf://board/other", timeouts=Timeouts())

    assert RunCatalog.open("shelf://board/other", timeouts=Timeouts(), create=False).run_id == made.run_id
    with pytest.raises(NotFoundError):
        RunCatalog.open("shelf://board/none", timeouts=Timeouts(), create=False)


def test_scheme_that_is_registered_wins_over_fsspec_and_a_path_never(site: Path, tmp_path: Path) -> None:
    install(site, "rival", "memory", "shelf_tiers:open_shelf")
    install(site, "files", "file", "shelf_tiers:open_shelf")
    importlib.invalidate_caches()

    assert type(open_tier("memory://board/x")).__name__ == "FakeBucket"
    assert type(open_tier(f"file://{tmp_path}")).__name__ == type(open_tier(str(tmp_path))).__name__ == "FileTier"


def test_scheme_of_two_packages_is_refused_with_both_names(site: Path) -> None:
    install(site, "other", "shelf", "shelf_tiers:open_nothing")
    importlib.invalidate_caches()

    with pytest.raises(ConfigError, match=r"one package for shelf://, found \['other 1.0', 'shelf 1.0'\]"):
        open_tier("shelf://board/run")


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("shelf_tiers:open_broken", r"weak 1.0 failed to open it \(RuntimeError: the shelf at https://host/ fell\)"),
        ("shelf_tiers:absent", r"weak 1.0 failed to open it \(AttributeError"),
        ("no_such_module:x", r"weak 1.0 failed to open it \(ModuleNotFoundError"),
        ("shelf_tiers:open_nothing", "what weak 1.0 opened is no tier: it lacks kind, url"),
    ],
)
def test_package_that_does_not_work_is_named(target: str, text: str, site: Path) -> None:
    install(site, "weak", "weak", target)
    importlib.invalidate_caches()

    with pytest.raises(ConfigError, match=text):
        open_tier("weak://board/run")
