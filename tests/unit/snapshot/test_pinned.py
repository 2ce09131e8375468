"""Slots are registered once for each mapping, and given back before it goes."""

from __future__ import annotations

import mmap

from ktrain.snapshot.pinned import PinnedSlots


class Driver:
    """Knows which mappings are registered."""

    def __init__(self, works: bool = True) -> None:
        self.works = works
        self.held: list[object] = []
        self.num_registered = 0

    def register(self, memory: memoryview) -> bool:
        self.num_registered += 1
        if self.works:
            self.held.append(memory.obj)
        return self.works

    def unregister(self, memory: memoryview) -> None:
        self.held.remove(memory.obj)


def slot() -> mmap.mmap:
    return mmap.mmap(-1, 4096)


def test_pin_of_the_same_mapping_registers_it_once() -> None:
    driver, memory = Driver(), slot()
    pinned = PinnedSlots(driver.register, driver.unregister)
    for _ in range(3):
        with memoryview(memory) as view:
            pinned.pin("slot-0", view)
    assert driver.num_registered == 1 and driver.held == [memory]
    pinned.close()
    assert driver.held == []
    memory.close()  # fails while a view is left


def test_pin_of_a_new_mapping_of_a_slot_gives_the_old_one_back() -> None:
    driver, old, new, other = Driver(), slot(), slot(), slot()
    pinned = PinnedSlots(driver.register, driver.unregister)
    for name, memory in (("slot-0", old), ("slot-1", other), ("slot-0", new)):
        pinned.pin(name, memoryview(memory))
    assert driver.held == [other, new]
    pinned.close()
    assert driver.held == []


def test_pin_that_is_refused_keeps_nothing() -> None:
    driver, memory = Driver(works=False), slot()
    pinned = PinnedSlots(driver.register, driver.unregister)
    with memoryview(memory) as view:
        pinned.pin("slot-0", view)
    memory.close()
    pinned.close()


def test_pin_of_a_mapping_that_was_refused_is_not_tried_again_but_its_next_one_is() -> None:
    driver, memory = Driver(works=False), slot()
    pinned = PinnedSlots(driver.register, driver.unregister)
    for _ in range(3):
        with memoryview(memory) as view:
            pinned.pin("slot-0", view)
    assert driver.num_registered == 1
    driver.works, other = True, slot()
    pinned.pin("slot-0", memoryview(other))
    assert driver.held == [other]
    pinned.close()
