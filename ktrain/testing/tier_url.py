"""A URL for a tier of this process, so that code which takes a URL (a node keeper, a command) meets it, faults and all.

store = FaultyTier(FakeBucket())
url = publish(store)        # tier://8f3a.../run
RunCatalog.open(url, ...)   # each of its calls reaches `store`
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem

from ktrain.abc.tier import Tier
from ktrain.base import ids
from ktrain.base.clock import SYSTEM_CLOCK, Clock, Deadline
from ktrain.errors import NotFoundError

PROTOCOL = "tier"
_CALL_S = 5.0  # the patience of this "client": what a tier that hangs takes before it answers with an error
_published: dict[str, tuple[Tier, Clock]] = {}


def publish(tier: Tier, *, clock: Clock = SYSTEM_CLOCK) -> str:
    """The URL under which fsspec reaches the tier in this process, until `withdraw`."""
    fsspec.register_implementation(PROTOCOL, TierFileSystem, clobber=True)
    name = ids.random_id()
    _published[name] = (tier, clock)
    return f"{PROTOCOL}://{name}/run"


def withdraw(url: str) -> None:
    """Forgets the tier behind a URL of `publish`."""
    _published.pop(url.removeprefix(f"{PROTOCOL}://").partition("/")[0], None)


class TierFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """The part of fsspec's interface that a store of whole objects needs. Other errors of the tier pass as they are."""

    protocol = PROTOCOL
    cachable = False
    shows_whole = True  # as S3 does; another client of fsspec says nothing on it

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        root, tier, folder, deadline = _find(path)
        below = f"{folder}/" if folder else ""
        found: dict[str, dict[str, Any]] = {}
        with _as_client():
            listed = tier.list(folder, deadline=deadline)
        for stored in listed:
            head, _, rest = stored.name.removeprefix(below).partition("/")
            name = f"{root}/{below}{head}"
            entry = {"name": name, "size": None, "type": "directory"} if rest else None
            found[name] = entry or {"name": name, "size": stored.nbytes, "type": "file"}
        return list(found.values()) if detail else list(found)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        _, tier, name, deadline = _find(path)
        with _as_client():
            if start is None or end is None:
                return tier.read(name, deadline=deadline)[start:end]
            return tier.read_range(name, start, end, deadline=deadline)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        _, tier, name, deadline = _find(path)
        with _as_client():
            tier.write(name, value, deadline=deadline)

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> _Upload:
        """For writing alone: what is written is there once the file is closed, and not before."""
        if mode != "wb":
            raise NotImplementedError(f"open {path} for {mode}: only 'wb' is there; use cat_file")
        return _Upload(lambda data: self.pipe_file(path, data))

    def rm_file(self, path: str) -> None:
        _, tier, name, deadline = _find(path)
        with _as_client():
            tier.delete(name, deadline=deadline)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """There are no folders in a store of objects."""


class _Upload:
    """A file that is being written; one that is never closed never was."""

    def __init__(self, put: Callable[[bytes], None]) -> None:
        self._put = put
        self._pieces: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._pieces.append(data)
        return len(data)

    def close(self) -> None:
        self._put(b"".join(self._pieces))


@contextlib.contextmanager
def _as_client() -> Iterator[None]:
    """Says "not found" as the clients of stores do; what that means is for the tier above to tell."""
    try:
        yield
    except NotFoundError as error:
        raise FileNotFoundError(str(error)) from error


def _find(path: str) -> tuple[str, Tier, str, Deadline]:
    """Root, tier, name below the root, and a deadline for one path."""
    first, _, rest = path.strip("/").partition("/")
    root, _, name = rest.partition("/")
    tier, clock = _published[first]
    return f"{first}/{root}", tier, name, Deadline.after(_CALL_S, clock)
