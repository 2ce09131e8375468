"""What a store has to offer to hold snapshots: six calls, and four answers where others say "error".

Names are relative to the run's root, "/" separated, of the characters that every store takes, so that one
name means the same object everywhere. A tier never looks into the bytes and never transforms them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ktrain.base.clock import Deadline
from ktrain.errors import ConfigError

# collections.abc.Buffer is there from Python 3.12 on; until then these are the buffers that we hand around.
Buffer = bytes | bytearray | memoryview

_SEGMENT = re.compile(r"[A-Za-z0-9._+=@-]+")
_MAX_NAME_CHARS = 900  # S3 takes 1024 bytes for the whole key; the rest is for the run's root


@dataclass(frozen=True, slots=True)
class Stored:
    """One object of a listing."""

    name: str
    nbytes: int


class Tier(Protocol):
    """A place for whole objects. Safe from any thread; calls from several threads run side by side.

    Every call returns or raises soon after its deadline, whatever the store does. Besides the errors that
    a method names, each raises:
        ForbiddenError: the store refused; nothing is known about the object.
        UnavailableError: the store could not be asked, or the answer was lost; a change may have happened.
        DeadlineError: no answer in time; a change may have happened, or may still.
        ConfigError: the name is not one, or the store cannot be opened at all.
    """

    @property
    def kind(self) -> str:
        """The tier's name in events and settings: "disk" or "bucket"."""

    @property
    def url(self) -> str:
        """Where it is, for people; never with credentials."""

    @property
    def supports_create(self) -> bool:
        """True once it is proven that the store itself refuses a second `create`; asks nothing."""

    def write(self, name: str, data: Buffer, *, deadline: Deadline) -> None:
        """Puts a whole object there, in place of an older one.

        Readers see it whole or not at all where the store can. `data` must stay unchanged until the call returns.
        After an error whose outcome is unknown, write again under another name, or read back: a late request may
        still land.

        Raises:
            CapacityError: no space is left there.
        """

    def create(self, name: str, data: Buffer, *, deadline: Deadline) -> None:
        """Like `write`, for a small object that must not be there yet.

        Where the store has no such call (`supports_create` is false) it is looked for, written and
        read back: two writers at the same moment may then both believe that they were first. A request that
        is repeated after a lost reply finds its own object: on ConflictError look whose it is.

        Raises:
            ConflictError: it was there, or another writer's bytes are there now.
            CapacityError: no space is left there.
        """

    def read(self, name: str, *, deadline: Deadline) -> bytes:
        """The object's bytes.

        Raises:
            NotFoundError: there is surely no such object.
        """

    def read_range(self, name: str, begin: int, end: int, *, deadline: Deadline) -> bytes:
        """Exactly the bytes [begin, end) of the object; an empty range asks nothing.

        Raises:
            NotFoundError: there is surely no such object.
            CorruptionError: the object ends before `end`.
        """

    def list(self, prefix: str, *, deadline: Deadline) -> list[Stored]:
        """All objects below the folder `prefix` ("" for the whole run), by name; asked anew each time.

        A folder that is not there holds nothing: the answer is empty. A store that could not be asked raises.
        """

    def delete(self, name: str, *, deadline: Deadline) -> None:
        """Removes the object; one that is not there is fine."""

    def close(self) -> None:
        """Gives connections and threads back. Idempotent; refuses further calls."""


@runtime_checkable
class ReadsInPieces(Protocol):
    """A tier that reads a range piece by piece into memory that it uses again and again. Optional."""

    @property
    def range_nbytes(self) -> int:
        """The most that one read should ask for, where many run side by side."""

    def read_pieces(
        self,
        name: str,
        bounds: tuple[int, int],
        take: Callable[[int, memoryview], None],
        *,
        piece_nbytes: int,
        deadline: Deadline,
    ) -> None:
        """Gives the bytes [begin, end) to `take`: where a piece begins, and its bytes; the last may be short.

        Pieces begin at multiples of `piece_nbytes` from `begin`, come in any order, one at a time, and perhaps twice.
        `take` is called on a thread of the tier, and never once this call has returned or raised. It must wait for
        nothing, and the memory is its own only while it runs. Errors are those of `Tier.read_range`, and what `take`
        raises.
        """


def check_name(name: str) -> str:
    """The name, when it can name an object in every tier.

    Raises:
        ConfigError: it is empty, absolute, climbs ("..") or holds characters that some stores do not take.
    """
    segments = name.split("/")
    good = all(_SEGMENT.fullmatch(segment) and segment not in (".", "..") for segment in segments)
    if not good or len(name) > _MAX_NAME_CHARS:
        raise ConfigError(
            f"object name {name[:200]!r}: expected segments of A-Z a-z 0-9 . _ + = @ - joined by '/',"
            f" without '.' and '..', at most {_MAX_NAME_CHARS} characters in all, found {len(name)} characters;"
            " choose another name"
        )
    return name


def check_prefix(prefix: str) -> str:
    """The folder's name without a last "/"; "" is the run's root.

    Raises:
        ConfigError: as `check_name`.
    """
    prefix = prefix.removesuffix("/")
    return prefix and check_name(prefix)
