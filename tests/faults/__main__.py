"""Writes the page of the fault matrix: `python -m tests.faults`."""

from __future__ import annotations

from tests.faults.page import PAGE, page

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="ascii")
