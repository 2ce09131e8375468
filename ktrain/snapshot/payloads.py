"""Both payloads of a plan on their way into one slot: the share, and behind it the copies where there are any."""

from __future__ import annotations

from collections.abc import Sequence

from ktrain.errors import ConfigError
from ktrain.format.payload import copies_begin
from ktrain.snapshot.staging import Later, Stager, Staging
from ktrain.state.plan import SavePlan


def slot_nbytes(plan: SavePlan) -> int:
    """Bytes of a slot for the plan."""
    nbytes = plan.layout.nbytes
    return nbytes if plan.copies is None else copies_begin(nbytes) + plan.copies.layout.nbytes


class SlotStager:
    """Brings plans into slots, as `Stager` does each of their payloads. Use from the training thread."""

    def __init__(self, num_threads: int) -> None:
        self._share = Stager(num_threads)
        self._copies = Stager(num_threads)

    def begin(self, plan: SavePlan, memory: memoryview, later: Later | None) -> SlotStaging:
        """Copies what may not wait, and returns the rest as work for any one thread; see `Stager.begin`.

        Raises:
            ConfigError: the slot has not the size of the payloads.
        """
        if memory.nbytes != slot_nbytes(plan):
            raise ConfigError(f"stage: the payloads need {slot_nbytes(plan)} bytes, the slot has {memory.nbytes}")
        nbytes = plan.layout.nbytes
        parts = [self._share.begin(plan, memory[:nbytes], later)]
        if plan.copies is not None:
            parts.append(self._copies.begin(plan.copies, memory[copies_begin(nbytes) :], later))
        return SlotStaging(parts)


class SlotStaging:
    """The rest of a slot's payloads, the share's first; see `Staging`. From one thread at a time."""

    def __init__(self, parts: Sequence[Staging]) -> None:
        self._parts = parts
        self.waits = any(part.waits for part in parts)
        """Whether training must leave tensors alone until `copy` has returned."""

    def copy(self) -> None:
        """Brings the rest into the slot. Afterwards no tensor is read any more, except by `problem_of_tensors`."""
        for part in self._parts:
            part.copy()

    def problem_of_copies(self) -> str | None:
        """Why what was copied must not be used: a tensor was changed since `begin`; None where nothing shows it."""
        return next((problem for part in self._parts if (problem := part.problem_of_copies()) is not None), None)

    def problem_of_tensors(self) -> str | None:
        """How it is known that a tensor on the host was changed since `begin`, also after it was copied."""
        return next((problem for part in self._parts if (problem := part.problem_of_tensors()) is not None), None)

    def digest(self) -> list[tuple[int, ...]]:
        """The digests of each payload's chunks, after `copy`."""
        return [part.digest() for part in self._parts]

    def release(self) -> None:
        """Lets go of all tensors; nothing is known of changes any more."""
        for part in self._parts:
            part.release()
