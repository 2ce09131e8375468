"""Other libraries are measured where they are installed; elsewhere it is said how they get there."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks import rivals


@pytest.mark.parametrize("name", sorted(rivals.RIVALS))
def test_rival_that_is_not_installed_is_refused_with_the_recipe(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec(rivals.RIVALS[name][1]) is not None:
        pytest.skip(f"{name} is installed here")
    assert rivals.main(name) == 2
    assert f"make bench-rival RIVAL={name}" in capsys.readouterr().err
