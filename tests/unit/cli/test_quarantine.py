"""`ktrain ckpt quarantine` on a run with a few checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ktrain.base import contract
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.cli.main import main
from ktrain.format.manifest import Identity
from tests.unit.checkpoint.builders import TIMEOUTS, put_checkpoint


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Steps 10 and 20 of epoch 1, and step 20 again of epoch 2."""
    monkeypatch.setenv(contract.ENV_VOLUME, str(tmp_path / "volume"))
    catalog = RunCatalog.open(str(tmp_path / "run"), timeouts=TIMEOUTS)
    for step, epoch in ((10, 1), (20, 1), (20, 2)):
        put_checkpoint(catalog.tier, Identity(catalog.run_id, step, epoch, 2), f"0{epoch}")
    return catalog.tier.url


def ktrain(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert ktrain(*arguments, "--output", "json") == contract.EXIT_OK
    return json.loads(capsys.readouterr().out)


def test_quarantine_step_is_set_aside_in_every_epoch_and_listed(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = shown(capsys, "ckpt", "quarantine", run, "--step", "20", "--reason", "loss jumps")
    assert [(item["step"], item["epoch"], item["reason"]) for item in found] == [
        (20, 1, "loss jumps"),
        (20, 2, "loss jumps"),
    ]
    listed = shown(capsys, "ckpt", "ls", run)
    assert [row.get("quarantined") for row in listed] == [None, "loss jumps", "loss jumps"]


def test_quarantine_dry_run_shows_what_would_be_and_sets_nothing_aside(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(shown(capsys, "ckpt", "quarantine", run, "--step", "20", "--dry-run")) == 2
    assert shown(capsys, "ckpt", "quarantine", run) == []
    assert ktrain("ckpt", "quarantine", run, "--step", "10", "--dry-run") == contract.EXIT_OK
    assert capsys.readouterr().out == "after that set aside: step 10 of epoch 1: asked for by hand\n"


def test_quarantine_off_trusts_the_step_of_one_epoch_again(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown(capsys, "ckpt", "quarantine", run, "--step", "20")
    found = shown(capsys, "ckpt", "quarantine", run, "--step", "20", "--epoch", "1", "--off")
    assert [(item["step"], item["epoch"]) for item in found] == [(20, 2)]
    assert shown(capsys, "ckpt", "quarantine", run) == found


def test_quarantine_step_that_is_not_there_is_refused(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ktrain("ckpt", "quarantine", run, "--step", "30") == contract.EXIT_USAGE
    assert "no step 30 is there to be set aside" in capsys.readouterr().err
    assert ktrain("ckpt", "quarantine", run, "--step", "20", "--off") == contract.EXIT_USAGE
    assert "no step 20 is set aside" in capsys.readouterr().err
    assert ktrain("ckpt", "quarantine", run, "--off") == contract.EXIT_USAGE


def test_quarantine_nothing_set_aside_says_so(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ktrain("ckpt", "quarantine", run) == contract.EXIT_OK
    assert capsys.readouterr().out == "nothing is set aside\n"
