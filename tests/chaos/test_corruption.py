"""A bit is flipped between two launches: the next copy, tier or step is used, the bad one named, nothing deleted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ktrain.base import contract
from ktrain.format.record import parse_commit_name
from tests.chaos import harness
from tests.integration.launching import Place, place

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]

OPTIONS = ("--nodes", "2", "--patience", "60")


@pytest.fixture(scope="module")
def stopped() -> Iterator[Place]:
    """A run that was stopped, with its newest step in every tier, and a second copy of all its files beside it."""
    with place() as here:
        harness.put_script(here)
        launch = here.launch(*OPTIONS, args=(str(harness.MANY_STEPS), "0.1"))
        here.await_that("two commits", lambda: len(_in_bucket(here)) >= 2)
        launch.terminate()
        assert here.end(launch) == contract.EXIT_STOPPED, here.output()
        for name, folder in (("run", here.run), ("volume", here.volume)):
            shutil.copytree(folder, here.root / "pristine" / name)
        yield here


@pytest.fixture
def here(stopped: Place) -> Place:
    """The stopped run as it was."""
    for name, folder in (("run", stopped.run), ("volume", stopped.volume)):
        shutil.rmtree(folder)
        shutil.copytree(stopped.root / "pristine" / name, folder)
    harness.release(stopped)  # one step is enough to see that the state is right
    return stopped


def _in_bucket(here: Place) -> list[tuple[int, Path]]:
    """(step, record) of the commits in the bucket, newest first."""
    found = []
    for path in (here.run / contract.CHECKPOINTS_DIR).glob("*/commit-*"):
        named = parse_commit_name(str(path.relative_to(here.run)))
        if named is not None:
            found.append((named[0], path))
    return sorted(found, reverse=True)


def _slots(here: Place, node: int | None = None, rank: int | None = None, what: str = ".safetensors") -> list[Path]:
    """Slots (or their manifests) in memory that hold the newest step that this node has of the rank."""
    newest: dict[tuple[str, str], tuple[int, Path]] = {}
    for manifest in here.volume.glob("*/node-*/rank-*/slot-*.manifest.json"):
        step = json.loads(manifest.read_bytes())["identity"]["step"]
        key = (manifest.parts[-3], manifest.parts[-2])
        newest[key] = max(newest.get(key, (-1, manifest)), (step, manifest))
    chosen = []
    for (node_name, rank_name), (_, manifest) in sorted(newest.items()):
        if node in (None, int(node_name[5:])) and rank in (None, int(rank_name[5:])):
            stem = manifest.name.removesuffix(".manifest.json")
            chosen.append(manifest if what == ".manifest.json" else manifest.with_name(stem + ".safetensors"))
    assert chosen, "there is a slot to spoil"
    return chosen


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 0x10
    path.write_bytes(bytes(data))


def _lose_memory(here: Place) -> None:
    for folder in here.volume.iterdir():
        shutil.rmtree(folder)


def _continue(here: Place) -> dict[str, Any]:
    """Gives the same command again; returns what it restored."""
    number = len(harness.of_kind(here, "restored"))
    assert here.end(here.launch(*OPTIONS, args=(str(harness.MANY_STEPS), "0"))) == contract.EXIT_OK, here.output(
        len(here.launches) - 1
    )
    restored = harness.of_kind(here, "restored")
    assert len(restored) == number + 1
    harness.check(here)
    return restored[-1].fields


def _bad(here: Place) -> list[tuple[str, int | None, int]]:
    return [
        (event.fields["tier"], event.fields["rank"], event.fields["step"])
        for event in harness.of_kind(here, "bad_copy")
    ]


def test_restore_slot_payload_spoilt_takes_the_next_copy_of_the_step(here: Place) -> None:
    newest = _in_bucket(here)[0][0]
    for path in _slots(here, node=0, rank=0):
        _flip(path)

    restored = _continue(here)

    assert restored["step"] == newest
    assert restored["tiers"]["0"] in (contract.TIER_PEER, contract.TIER_BUCKET)
    assert ("memory", 0, newest) in _bad(here)
    assert all(event.fields["end"] > event.fields["begin"] for event in harness.of_kind(here, "bad_copy"))


def test_restore_slot_manifest_spoilt_takes_the_next_copy_of_the_step(here: Place) -> None:
    newest = _in_bucket(here)[0][0]
    for path in _slots(here, node=0, rank=0, what=".manifest.json"):
        _flip(path)

    restored = _continue(here)

    assert restored["step"] == newest
    assert any(
        event.fields["tier"] == "memory" and event.fields["rank"] == 0 for event in harness.of_kind(here, "bad_copy")
    )


def test_restore_own_slot_and_replica_spoilt_takes_the_bucket(here: Place) -> None:
    newest = _in_bucket(here)[0][0]
    for path in _slots(here, rank=0):
        _flip(path)

    restored = _continue(here)

    assert restored["step"] == newest and restored["tiers"]["0"] == contract.TIER_BUCKET
    assert ("memory", 0, newest) in _bad(here)


def _payload(record: Path) -> Path:
    return next(record.parent.glob("data-*/rank-00001.safetensors"))


def _manifest(record: Path) -> Path:
    return next(record.parent.glob("data-*/rank-00001.json"))


@pytest.mark.parametrize("spoilt", [_payload, _manifest, lambda record: record], ids=["payload", "manifest", "record"])
def test_restore_bucket_object_spoilt_takes_an_older_step(here: Place, spoilt: Callable[[Path], Path]) -> None:
    (newest, record), (older, _) = _in_bucket(here)[:2]
    _lose_memory(here)
    _flip(spoilt(record))

    restored = _continue_with_bad_commit(here)

    assert restored["step"] == older and restored["tier"] == contract.TIER_BUCKET
    assert ("bucket", newest) in {(tier, step) for tier, _, step in _bad(here)}


def _continue_with_bad_commit(here: Place) -> dict[str, Any]:
    """Like `_continue`; the commit that was spoilt stays as it is, so the bucket cannot be checked whole."""
    assert here.end(here.launch(*OPTIONS, args=(str(harness.MANY_STEPS), "0"))) == contract.EXIT_OK, here.output(
        len(here.launches) - 1
    )
    return harness.of_kind(here, "restored")[-1].fields


def test_restore_all_copies_spoilt_ends_with_exit_3_and_deletes_nothing(here: Place) -> None:
    payloads = [*here.volume.rglob("*.safetensors"), *here.run.rglob("*.safetensors")]
    for path in payloads:
        _flip(path)
    before = {path: path.read_bytes() for path in _copies(here)}

    code = here.end(here.launch(*OPTIONS, args=(str(harness.MANY_STEPS), "0")))

    assert code == contract.EXIT_CORRUPT, here.output(len(here.launches) - 1)
    assert "no good copy" in here.output(len(here.launches) - 1)
    # A slot whose copy was proven bad is free: a restore that spreads what it read may have begun to fill it.
    kept = [path for path in before if here.volume not in path.parents or _describes(path)]
    assert [path for path in kept if before[path] != path.read_bytes()] == [], "nothing was deleted or changed"
    assert harness.await_nothing_runs(here) == []


def _copies(here: Place) -> list[Path]:
    """All files of checkpoints in the bucket, and the slots that hold a copy."""
    stored = [path for path in (here.run / contract.CHECKPOINTS_DIR).rglob("*") if path.is_file()]
    held = [path for path in here.volume.rglob("*.safetensors") if _describes(path)]
    assert stored and held
    return [*stored, *held]


def _describes(slot: Path) -> bool:
    """Whether a manifest says what the slot holds, be it bad."""
    return any(slot.with_suffix(suffix).exists() for suffix in (".manifest.json", ".bad.json"))
