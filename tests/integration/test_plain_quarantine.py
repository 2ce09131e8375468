"""Plain python: a job that fails from a step again and again is brought to an older one, by what the run remembers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ktrain.base import contract
from ktrain.cli.main import main
from tests.integration.plain import Place, same_losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def ktrain(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


def test_plain_run_that_fails_from_a_step_twice_goes_back_and_then_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path)
    assert "step 7 fails" in place.train(fail_at=7, await_bucket=[2, 4]).err
    for _ in range(2):
        outcome = place.train(fail_at=7)
        assert outcome.code == 1 and outcome.said["restored"] == 6

    outcome = place.train()

    assert outcome.code == 0 and outcome.said["restored"] == 4, outcome.err
    assert [event.fields["step"] for event in place.events("failure")] == [6, 6, 6]
    (said,) = place.events("quarantined")[:1]
    assert (said.fields["step"], said.fields["epoch"], said.fields["attempts"]) == (6, 1, [2, 3])
    whole = Place(tmp_path / "whole")
    whole.folder.mkdir()
    assert whole.train().code == 0
    same_losses(place.losses(), whole.losses())

    assert ktrain("ckpt", "quarantine", str(place.run), "--output", "json") == contract.EXIT_OK
    assert json.loads(capsys.readouterr().out)[0]["step"] == 6
    assert ktrain("status", str(place.run)) == contract.EXIT_OK
    assert "set aside: step 6 of epoch 1: 2 attempts failed from it" in capsys.readouterr().out
