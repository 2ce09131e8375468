"""Which processors a slot's pages are made on, so that they lie near to the device or the threads that fill them.

The system takes a page from the node of the processor that touches it first (ADR 0021).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

_NODES = Path("/sys/devices/system/node")


def read_nodes(root: Path = _NODES) -> dict[int, frozenset[int]]:
    """The processors of each node of this machine; nothing where the system does not tell."""
    nodes: dict[int, frozenset[int]] = {}
    with contextlib.suppress(OSError, ValueError):
        for folder in root.glob("node[0-9]*"):
            nodes[int(folder.name.removeprefix("node"))] = _parse((folder / "cpulist").read_text())
    return nodes


def choose_processors(nodes: Mapping[int, Set[int]], allowed: Set[int], device_node: int | None) -> frozenset[int]:
    """Those of the `allowed` processors that are to touch a slot's pages first; nothing where any will do.

    A rank that may run on one node alone has its pages there without help. One that may run on several, and has a
    device, gets them on the device's node. Without a device its threads go anywhere, and so may the pages.
    """
    own = [node for node, processors in nodes.items() if processors & allowed]
    if len(own) < 2 or device_node not in own:
        return frozenset()
    return frozenset(nodes[device_node] & allowed)


@contextlib.contextmanager
def running_on(processors: Set[int]) -> Iterator[None]:
    """Keeps this thread, and those that it starts, on the processors; nothing happens for none, or where it may not."""
    before = os.sched_getaffinity(0) if processors else set()
    try:
        if processors:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, processors)
        yield
    finally:
        if before:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, before)


def _parse(text: str) -> frozenset[int]:
    """The kernel's list of numbers: `0-3,8`."""
    found: set[int] = set()
    for span in filter(None, text.strip().split(",")):
        first, _, last = span.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)
