"""Where a card that changes is shown: one output of a notebook that is updated, or lines of text elsewhere."""

from __future__ import annotations

import sys
from typing import IO, Any, Protocol

from ktrain.jobs.card import card
from ktrain.jobs.status import JobStatus


class Screen(Protocol):
    """Shows a job's status in place of the one before."""

    def show(self, status: JobStatus) -> None: ...


class CardScreen:
    """A card in the output of the cell, updated by its display id; a notebook that is saved keeps the last one."""

    def __init__(self, display: Any) -> None:
        """`display` is IPython's function of that name."""
        self._display = display
        self._handle: Any = None

    def show(self, status: JobStatus) -> None:
        data = {"text/html": card(status), "text/plain": str(status)}
        if self._handle is None:
            self._handle = self._display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)


class TextScreen:
    """The whole status, whenever more of it has changed than its step."""

    def __init__(self, output: IO[str]) -> None:
        self._output = output
        self._last: tuple[object, ...] = ()

    def show(self, status: JobStatus) -> None:
        key = (status.state, status.reasons, status.attempt, status.num_failures, status.restored)
        if key != self._last:
            self._last = key
            self._output.write(f"{status}\n")
            self._output.flush()


def find_screen() -> Screen:
    """The notebook that this runs in, or standard output."""
    shell = sys.modules.get("IPython")  # it is loaded where there is one
    kernel = None if shell is None else shell.get_ipython()
    if kernel is None or not hasattr(kernel, "kernel"):
        return TextScreen(sys.stdout)
    from IPython.display import display

    return CardScreen(display)
