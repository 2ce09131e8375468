"""`ktrain ckpt upgrade`: what it says of a run at the newest version, at a newer one, and of no run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ktrain.base import contract
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.cli.main import main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    RunCatalog.open(str(tmp_path / "run"), timeouts=Timeouts())
    return tmp_path / "run"


def upgrade(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["ckpt", "upgrade", *arguments])
    return int(caught.value.code or 0)


@pytest.mark.parametrize("confirm", [[], ["--confirm"], ["--confirm", "--dry-run"]])
def test_upgrade_of_a_run_at_the_newest_version_says_so_and_changes_nothing(
    run: Path, confirm: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(run.iterdir())
    assert upgrade(str(run), *confirm) == contract.EXIT_OK
    assert "format 1, the newest of this ktrain" in capsys.readouterr().out
    assert sorted(run.iterdir()) == before


def test_upgrade_of_a_run_of_a_newer_version_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / contract.RUN_FILE).write_text(json.dumps({"format": 7, "id": "ab" * 16}))
    assert upgrade(str(run), "--confirm") == contract.EXIT_USAGE
    assert "format 7, this ktrain reads formats up to 1" in capsys.readouterr().err


def test_upgrade_of_no_run_makes_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert upgrade(str(tmp_path / "none"), "--confirm") == contract.EXIT_USAGE
    assert "there is no run here" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_upgrade_as_json_names_both_versions(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert upgrade(str(run), "--confirm", "--dry-run", "--output", "json") == contract.EXIT_OK
    assert json.loads(capsys.readouterr().out) == {"dry_run": True, "format": 1, "newest": 1}
