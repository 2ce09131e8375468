"""The slots of a volume that this process may write: each is had by one thread at a time."""

from __future__ import annotations

import threading
from pathlib import Path

from ktrain.snapshot.inventory import Inventory
from ktrain.snapshot.slots import Slot, SlotCalls, SlotFiles


class OwnSlots:
    """Slots with their locks and mappings, kept between snapshots. Safe from any thread."""

    def __init__(self, inventory: Inventory, calls: SlotCalls) -> None:
        self._inventory = inventory
        self._calls = calls
        self._lock = threading.Lock()  # guards the fields below
        self._slots: dict[Path, Slot] = {}  # by payload file
        self._busy: set[Path] = set()  # those of them that one thread has for itself

    def lock(self, rank: int) -> tuple[list[Slot], int]:
        """The rank's slots that this thread has for itself from now on, and how many other threads of ours have."""
        mine: list[Slot] = []
        num_busy = 0
        for files in self._inventory.slots(rank):
            slot = self._try_busy(files)
            if slot is None:
                num_busy += 1
            elif slot.try_lock():
                mine.append(slot)
            else:
                self.give_back([slot])
        return mine, num_busy

    def make(self, rank: int, count: int) -> list[Slot]:
        """So many new ones, for this thread; their files are still to come."""
        made: list[Slot] = []
        folder = self._inventory.folder(rank)
        if count > 0:
            folder.mkdir(mode=0o700, exist_ok=True)
        there = {files.index for files in self._inventory.slots(rank)}
        index = 0
        while len(made) < count:
            slot = None if index in there else self._try_busy(SlotFiles(folder, index))
            if slot is not None and slot.try_lock():
                made.append(slot)
            elif slot is not None:
                self.give_back([slot])  # another process made it in this moment
            index += 1
        return made

    def _try_busy(self, files: SlotFiles) -> Slot | None:
        """The slot for this thread alone; None while another thread of this process has it."""
        with self._lock:
            if files.payload in self._busy:
                return None
            self._busy.add(files.payload)
            return self._slots.setdefault(files.payload, Slot(files, self._calls))

    def give_back(self, slots: list[Slot]) -> None:
        """Ends this thread's use. What is not mapped is closed: the lock says that somebody maps the slot."""
        for slot in slots:
            slot.unlease()
            unused = slot.mapped_nbytes == 0
            if unused:
                slot.close()
            with self._lock:
                if unused:
                    del self._slots[slot.files.payload]
                self._busy.discard(slot.files.payload)

    def ready(self) -> set[Path]:
        """The payload files of those that no thread has for itself."""
        with self._lock:
            return self._slots.keys() - self._busy

    def close(self, folder: Path | None = None) -> None:
        """Gives up all that no thread has, or those in one folder."""
        with self._lock:
            paths = [path for path in self._slots if path not in self._busy and folder in (None, path.parent)]
            slots = [self._slots.pop(path) for path in paths]
        for slot in slots:
            slot.close()
