"""Plain python: a state that is not what it was is seen by its losses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.plain import Place

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_plain_run_steps_back_from_a_state_that_has_other_losses(tmp_path: Path) -> None:
    place = Place(tmp_path)
    assert "step 9 fails" in place.train(every=3, fail_at=9, await_bucket=[3]).err

    spoilt = place.train(every=3, steps=400, linger_s=0.05, gate="step-back", spoil=True)

    assert spoilt.said["restored"] == 6 and spoilt.code == 1
    assert "the state of step 6 (epoch 1) is not what it was" in spoilt.err
    first = place.events("loss_mismatch")[0].fields
    assert (first["step"], first["exact"], first["restored"]) == (7, True, 6)
    assert [event.fields["step"] for event in place.events("quarantined")] == [6, None]

    mended = place.train(every=3, gate="step-back")

    assert mended.code == 0 and mended.said["restored"] == 3, mended.err
    assert {event.attempt for event in place.events("loss_mismatch")} == {2}
    losses = place.losses()
    assert all(losses[step][0] == losses[step][-1] for step in range(4, 9)), "bit for bit, and so no mismatch"


def test_plain_run_reports_other_losses_and_goes_on(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.train(every=3, fail_at=9, await_bucket=[3])
    outcome = place.train(every=3, steps=60, linger_s=0.02, spoil=True)
    assert outcome.code == 0 and outcome.said["restored"] == 6, outcome.err
    assert [event.fields["step"] for event in place.events("loss_mismatch")] == [7, 8]
    assert place.events("quarantined") == []
