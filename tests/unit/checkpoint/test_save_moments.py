"""Any edits at any moments of a capture: what is sealed is the state of its step, what might not be is not sealed."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ktrain.checkpoint.policy import Capture
from tests.unit.checkpoint.saving import COPYING, STAGED, Rig, same
from tests.unit.checkpoint.test_save_background import Loop, edit_by_data, edit_by_numpy, edit_in_place


def put_other(tensor: torch.Tensor) -> None:
    tensor.data = tensor.detach() + 1.0


def leave(tensor: torch.Tensor) -> None:
    del tensor


HOW = {"in place": edit_in_place, "data": edit_by_data, "numpy": edit_by_numpy, "other": put_other, "not": leave}
TEARS = {"in place", "data", "numpy"}
GUARDED = {"weight", "last weight", "moment", "momentum"}
WHAT = sorted({*GUARDED, "bias", "mean", "average", "count"})


def tensors(loop: Loop) -> dict[str, torch.Tensor]:
    weight, last = loop.model[0].weight, loop.model[2].weight
    return {
        "weight": weight,
        "last weight": last,
        "moment": loop.first.state[weight]["exp_avg_sq"],
        "momentum": loop.second.state[last]["momentum_buffer"],
        "bias": loop.model[0].bias,  # small: copied at once
        "mean": loop.model[1].running_mean,
        "average": loop.ema.module[0].weight,
        "count": loop.first.state[weight]["step"],
    }


@dataclass(frozen=True)
class Round:
    """A step, a save, and edits (of what, and how) while it is copied and before it is sealed."""

    while_copied: list[tuple[str, str]]
    before_sealed: list[tuple[str, str]]
    train_before_sealed: bool


edits = st.lists(st.tuples(st.sampled_from(WHAT), st.sampled_from(sorted(HOW))), max_size=3)
rounds = st.lists(st.builds(Round, edits, edits, st.booleans()), min_size=1, max_size=3)


@settings(max_examples=12, deadline=None)
@given(rounds)
def test_capture_with_edits_at_any_moment_seals_the_values_of_its_step_or_nothing(plan: list[Round]) -> None:
    loop = Loop()
    loop.step()
    with tempfile.TemporaryDirectory() as folder, Rig(Path(folder), loop.parts) as rig:
        for step, turn in enumerate(plan, start=1):
            loop.step()
            expected = loop.values()
            rig.gate.hold(COPYING, STAGED)
            was_hidden = rig.saver.capture is Capture.HIDDEN
            assert rig.saver.save(step)
            rig.gate.await_reached(COPYING)
            for what, how in turn.while_copied:
                HOW[how](tensors(loop)[what])
            rig.gate.open(COPYING)
            rig.saver.wait_copied()
            for what, how in turn.before_sealed:
                HOW[how](tensors(loop)[what])
            if turn.train_before_sealed:
                loop.step()
            rig.gate.open(STAGED)
            is_sealed = rig.saver.finish()
            if is_sealed:
                assert same(rig.snapshot(step), expected)
            else:
                assert step not in rig.steps_held()
            torn = was_hidden and tears(turn.while_copied)
            assert is_sealed != torn
            assert (rig.saver.capture is Capture.AT_ONCE) >= (torn or not was_hidden)


def tears(edits: list[tuple[str, str]]) -> bool:
    """Whether bytes that are being copied change. A tensor with another's memory is no longer what is copied."""
    moved: set[str] = set()
    for what, how in edits:
        if how == "other":
            moved.add(what)
        elif how in TEARS and what in GUARDED and (what not in moved or how == "in place"):
            return True  # an edit in place of moved memory is told by the version, and taken for one
    return False
