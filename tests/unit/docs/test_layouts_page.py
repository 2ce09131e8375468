"""The page of layouts names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "reference" / "layouts.md"
# `file`, `file::part` or, after another of the same row, `::part`
_NAMED = re.compile(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`")


def named() -> list[tuple[str, str]]:
    """Every file that a line of the page names, with the part of a test's name or nothing."""
    found = []
    for line in PAGE.read_text().splitlines():
        file = ""
        for match in _NAMED.finditer(line):
            file = match[1] or file
            if match[1] or match[2]:
                found.append((file, match[2] or ""))
    return found


def test_layouts_page_names_tests_that_are_there() -> None:
    missing = [
        f"{file}::{part}"
        for file, part in named()
        if not re.search(rf"^def test_\w*{part}", (ROOT / file).read_text(), re.MULTILINE)
    ]
    assert len(named()) > 30
    assert missing == []


def test_layouts_page_names_every_layout_of_the_ranks_test() -> None:
    worker = (ROOT / "tests" / "integration" / "layout_worker.py").read_text()
    table = re.search(r"^LAYOUTS.*?^\}", worker, re.MULTILINE | re.DOTALL)
    assert table is not None
    layouts = re.findall(r'^    "([\w-]+)":', table[0], re.MULTILINE)
    assert [layout for layout in layouts if f"(`{layout}`)" not in PAGE.read_text()] == []
