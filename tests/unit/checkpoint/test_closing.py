from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ktrain
from ktrain.checkpoint.save import Saver


def test_close_that_fails_half_way_lets_the_run_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTRAIN_VOLUME", str(tmp_path / "volume"))
    run, state = tmp_path / "run", {"model": torch.nn.Linear(2, 2)}
    first = ktrain.Checkpointer(run, state=state, every=1)
    first.restore()
    first.step(1)
    whole = Saver.close

    def fail(saver: Saver) -> None:
        whole(saver)
        raise OSError("the volume is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "close", fail)
        with pytest.raises(OSError, match="the volume is gone"):
            first.close(success=False)
    first.close()  # has nothing left to do
    with ktrain.Checkpointer(run, state=state, every=1) as second:
        assert second.restore() == 1
