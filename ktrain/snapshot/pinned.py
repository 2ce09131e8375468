"""Slots that an accelerator may write into directly: registered once each, and given back before they are unmapped."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from ktrain import device


class PinnedSlots:
    """Keeps a view of each registered mapping, so that it lasts as long as it is registered. One thread at a time.

    Where there is nothing to register with, nothing is kept.
    """

    def __init__(
        self,
        register: Callable[[memoryview], bool] = device.register_host_memory,
        unregister: Callable[[memoryview], None] = device.unregister_host_memory,
    ) -> None:
        self._register = register
        self._unregister = unregister
        self._views: dict[str, memoryview] = {}  # by slot
        self._refused: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()  # mappings by slot

    def pin(self, slot: str, memory: memoryview) -> None:
        """Registers a slot's memory, unless it is; a mapping that the slot had before is given back.

        One that was refused is not asked for again: it would cost the time of a try in every save.
        """
        known = self._views.get(slot)
        if known is not None and known.obj is memory.obj or self._refused.get(slot) is memory.obj:
            return
        self._unpin(slot)
        view = memoryview(memory)
        if self._register(view):
            self._views[slot] = view
        else:
            self._refused[slot] = memory.obj

    def close(self) -> None:
        """Gives all memory back. Nothing may be written into it by a device any more."""
        for slot in list(self._views):
            self._unpin(slot)

    def _unpin(self, slot: str) -> None:
        view = self._views.pop(slot, None)
        if view is not None:
            self._unregister(view)
            view.release()
