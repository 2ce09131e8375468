"""This machine and the bucket, as they are seen from here."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktrain.base.clock import Deadline
from ktrain.errors import ForbiddenError, UnavailableError
from ktrain.launcher.doctor.bucket import Probe, look_at_bucket, try_bucket
from ktrain.launcher.doctor.finding import Finding, Outcome
from ktrain.launcher.doctor.machine import Places, look_at_machine
from ktrain.launcher.quantity import GIB
from ktrain.testing.fake_clock import FakeClock
from tests.unit.launcher.doctor.looking import by_check


def make_root(
    folder: Path, *, shmem: str = "always within_size advise [never] deny force", kernel: str = "6.18.0"
) -> Path:
    """What is read of a system, in a folder."""
    files = {
        "proc/meminfo": "MemTotal:       8388608 kB\nMemAvailable:   4194304 kB\nHugePages_Total:       0\n",
        "proc/mounts": f"/dev/root / ext4 rw 0 0\ntmpfs {folder} tmpfs rw 0 0\n",
        "proc/sys/kernel/osrelease": f"{kernel}\n",
        "sys/fs/cgroup/memory.max": "2147483648\n",
        "sys/kernel/mm/transparent_hugepage/shmem_enabled": f"{shmem}\n",
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "dev").mkdir(exist_ok=True)
    return folder


def looked(folder: Path, **places: object) -> dict[str, Finding]:
    return by_check(look_at_machine(Places(volume=folder / "shm", run=folder, root=folder, **places)))  # type: ignore[arg-type]


def test_machine_as_it_is_is_looked_at_and_nothing_is_left(tmp_path: Path) -> None:
    found = looked(make_root(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    looked(tmp_path)

    assert {"python", "torch", "ray", "memory", "tmpfs", "huge pages", "disk", "locks", "open files"} <= set(found)
    assert found["python"].outcome == "ok" and found["torch"].outcome == "ok"
    assert found["locks"].outcome in ("ok", "unknown")  # unknown where the disk takes no files without a name
    assert "this process may have 2 GiB" in found["memory"].evidence
    assert sorted(tmp_path.rglob("*")) == before


def test_memory_tier_that_does_not_fit_fails_with_the_numbers(tmp_path: Path) -> None:
    found = looked(make_root(tmp_path), needs_bytes=3 * GIB)["memory"]

    assert found.outcome == "failed" and "the memory tier takes 3 GiB" in found.evidence


@pytest.mark.parametrize(
    ("shmem", "kernel", "outcome"),
    [
        ("always advise [never] deny", "6.18.0-x", "ok"),
        ("always advise [never] deny", "5.15.0", "warning"),
        ("always [advise] never deny", "5.15.0", "ok"),
        ("always advise never [deny]", "6.18.0", "warning"),
    ],
)
def test_huge_pages_are_there_unless_they_are_denied_or_the_kernel_is_old(
    tmp_path: Path, shmem: str, kernel: str, outcome: str
) -> None:
    assert looked(make_root(tmp_path, shmem=shmem, kernel=kernel))["huge pages"].outcome == outcome


def test_volume_that_is_no_tmpfs_warns(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    (root / "proc" / "mounts").write_text("/dev/root / ext4 rw 0 0\n")

    assert looked(root)["tmpfs"].outcome == "warning"


def test_system_that_tells_nothing_leaves_unknown(tmp_path: Path) -> None:
    found = looked(tmp_path)  # a root without /proc and /sys

    assert found["huge pages"].outcome == "unknown" and found["accelerators"].outcome == "ok"
    assert found["memory"].outcome == "unknown"


def test_devices_are_counted_by_their_files(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (root / "dev" / name).touch()

    assert "2 of NVIDIA" in looked(root)["accelerators"].evidence


# The bucket


class Bucket:
    """A store in memory that takes time, and may refuse, break or lie."""

    def __init__(self, clock: FakeClock, *, put_s: float = 1.0, fail: dict[str, Exception] | None = None) -> None:
        self.objects: dict[str, bytes] = {}
        self.changes = b""  # what is read comes with it
        self._clock, self._put_s, self._fail = clock, put_s, fail or {}

    def _call(self, verb: str) -> None:
        if verb in self._fail:
            raise self._fail[verb]

    def list(self, prefix: str, *, deadline: Deadline) -> list[str]:
        self._call("list")
        return [name for name in self.objects if name.startswith(prefix)]

    def write(self, name: str, data: bytes, *, deadline: Deadline) -> None:
        self.objects[name] = data
        self._clock.advance(self._put_s)
        self._call("write")

    def read(self, name: str, *, deadline: Deadline) -> bytes:
        self._call("read")
        self._clock.advance(1.0)
        return self.objects[name] + self.changes

    def delete(self, name: str, *, deadline: Deadline) -> None:
        self._call("delete")
        self.objects.pop(name, None)


def probe(refused: Outcome = Outcome.FAILED, **bucket: object) -> tuple[Probe, Bucket]:
    clock = FakeClock()
    store = Bucket(clock, **bucket)  # type: ignore[arg-type]
    return Probe(store, "s3://b/net", clock, refused), store


def test_bucket_is_only_listed_unless_it_is_to_be_tried() -> None:
    at, store = probe()
    [found] = look_at_bucket(at)

    assert found.outcome == "ok" and store.objects == {}


@pytest.mark.parametrize(
    ("error", "refused", "outcome"),
    [
        (ForbiddenError("no"), Outcome.FAILED, "failed"),
        (ForbiddenError("no"), Outcome.UNKNOWN, "unknown"),  # the pods are somebody else
        (UnavailableError("away"), Outcome.FAILED, "unknown"),
    ],
)
def test_bucket_that_does_not_answer(error: Exception, refused: Outcome, outcome: str) -> None:
    at, _ = probe(refused, fail={"list": error})
    [found] = look_at_bucket(at)

    assert found.outcome == outcome


@pytest.mark.parametrize(("put_s", "outcome"), [(0.01, "ok"), (1.0, "warning")])
def test_bucket_rate_is_held_against_what_the_plan_assumes(put_s: float, outcome: str) -> None:
    at, store = probe(put_s=put_s)
    [found] = try_bucket(at, 200.0 * 2**20)

    assert found.outcome == outcome and "MiB/s up and 8 MiB/s down" in found.evidence and store.objects == {}


def test_probe_that_fails_is_removed_and_one_that_stays_is_named() -> None:
    at, store = probe(fail={"write": UnavailableError("the answer was lost")})
    [found] = try_bucket(at, 0.0)
    assert found.outcome == "unknown" and store.objects == {}

    at, store = probe(fail={"delete": UnavailableError("away")})
    rate, left = try_bucket(at, 0.0)
    [name] = store.objects
    assert rate.outcome == "ok" and left.outcome == "warning" and name in left.evidence


def test_bucket_that_gives_back_other_bytes_fails() -> None:
    at, store = probe()
    store.changes = b"x"
    [found] = try_bucket(at, 0.0)

    assert found.outcome == "failed" and "other ones came back" in found.evidence
