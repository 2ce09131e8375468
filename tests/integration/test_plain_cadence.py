"""Plain python with `every="auto"`: the cadence is measured, shown, and kept by the next process."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktrain.base import contract
from ktrain.cli.main import main
from tests.integration.plain import Place

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_plain_run_chooses_its_cadence_and_the_next_process_goes_on_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path)
    outcome = place.train(every="auto", steps=200, linger_s=0.01)
    assert outcome.code == 0, outcome.err

    said = place.events("cadence")[-1].fields
    assert said["memory"] > 10, "saves of a tiny network every 0.1 s are too many for a failure in six hours"
    assert said["measured"]["stall_s"] > 0 and said["measured"]["step_s"] >= 0.01
    before = [event.fields["step"] for event in place.events("snapshot")]
    first = place.events("cadence")[0].fields["from_step"]
    assert [step for step in before if step < first] == list(range(10, first, 10))

    outcome = place.train(every="auto", steps=220)

    assert outcome.code == 0 and outcome.said["restored"] == 200, outcome.err
    after = [event.fields["step"] for event in place.events("snapshot")][len(before) :]
    assert after == [step for step in range(201, 220) if step % said["memory"] == 0] + [220]

    with pytest.raises(SystemExit) as caught:
        main(["status", str(place.run)])
    assert caught.value.code == contract.EXIT_OK
    assert f"cadence: memory every {said['memory']} steps" in capsys.readouterr().out
