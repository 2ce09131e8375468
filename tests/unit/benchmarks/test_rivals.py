"""Other libraries are measured where they are installed; elsewhere it is said how they get there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from benchmarks import rivals
from benchmarks.__main__ import main


@pytest.mark.parametrize("name", sorted(rivals.RIVALS))
def test_rival_that_is_not_installed_is_refused_with_the_recipe(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec(rivals.RIVALS[name].package) is not None:
        pytest.skip(f"{name} is installed here")
    assert main(["--rival", name]) == 2
    assert f"make bench-rival RIVAL={name}" in capsys.readouterr().err


def test_rival_without_an_environment_is_named_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "_ROOT", tmp_path)
    assert "make rivals" in str(rivals.run_apart("dlrover", quick=True))


@pytest.mark.parametrize("ends", [0, 3])
def test_rival_whose_process_writes_nothing_is_named_with_its_exit_code(
    ends: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / ".venv-dlrover" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\nexit {ends}\n")
    python.chmod(0o700)
    monkeypatch.setattr(rivals, "_ROOT", tmp_path)
    assert rivals.run_apart("dlrover", quick=True) == f"ended with exit code {ends} and no outcome"


def test_every_rival_has_its_requirements() -> None:
    needs = Path(rivals.__file__).parent / "needs"
    assert {path.stem for path in needs.glob("*.txt")} == set(rivals.RIVALS)
