"""A snapshot holds the values of its step, whatever changes while it is copied. The cases are those of ADR 0010."""

from __future__ import annotations

import copy
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ktrain.checkpoint.policy import Capture
from ktrain.errors import InternalError
from tests.unit.checkpoint.saving import COPYING, SEALED, STAGED, Rig, same

WIDTH = 64  # a weight of 16 KiB: large enough to be left to the background


class Loop:
    """A network with a buffer that every forward changes, and two optimizers for its two halves."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH))
        self.first = torch.optim.AdamW(self.model[:2].parameters(), 0.01)
        self.second = torch.optim.SGD(self.model[2].parameters(), 0.01, momentum=0.9)
        self.ema = torch.optim.swa_utils.AveragedModel(self.model)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        self.scaler.scale(torch.ones(()))  # makes its tensors

    @property
    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "first": self.first, "second": self.second, "ema": self.ema, "scaler": self.scaler}

    def backward(self) -> float:
        loss = self.model(torch.randn(8, WIDTH)).square().mean()
        loss.backward()
        return loss.item()

    def step(self) -> float:
        loss = self.backward()
        for optimizer in (self.first, self.second):
            optimizer.step()
            optimizer.zero_grad()
        self.ema.update_parameters(self.model)
        return loss

    def values(self) -> dict[str, torch.Tensor]:
        """Clones of the model's, the averages' and the optimizers' tensors under their stored names."""
        found = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        found |= {f"ema/{name}": value for name, value in self.ema.state_dict().items()}
        names = {id(value): name for name, value in self.model.named_parameters()}
        for part, optimizer in (("first", self.first), ("second", self.second)):
            for param, entry in optimizer.state.items():
                found |= {f"{part}/model.{names[id(param)]}/{key}": value for key, value in entry.items()}
        return {name: value.detach().clone() for name, value in found.items() if isinstance(value, torch.Tensor)}


@pytest.fixture
def loop() -> Loop:
    made = Loop()
    made.step()
    return made


@pytest.fixture
def rig(loop: Loop, tmp_path: Path) -> Iterator[Rig]:
    with Rig(tmp_path, loop.parts) as made:
        loop.step()  # so that the hooks are seen to fire
        yield made


def edit_in_place(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.add_(1.0)


def edit_by_data(tensor: torch.Tensor) -> None:
    tensor.data.add_(1.0)


def edit_by_numpy(tensor: torch.Tensor) -> None:
    tensor.detach().numpy()[...] += 1.0


EDITS = [edit_in_place, edit_by_data, edit_by_numpy]


def is_left_to_background(rig: Rig, tensor: torch.Tensor, step: int) -> bool:
    """Saves a step; while the copy is held, edits the tensor: what was left to the background is then given up."""
    rig.gate.hold(COPYING)
    assert rig.saver.save(step)
    rig.gate.await_reached(COPYING)
    edit_by_data(tensor)
    rig.gate.open(COPYING)
    return not rig.saver.finish()


# What training does by itself


def test_save_while_forward_and_backward_run_holds_the_values_of_its_step(loop: Loop, rig: Rig) -> None:
    expected = loop.values()
    rig.gate.hold(COPYING)
    assert rig.saver.save(2)
    rig.gate.await_reached(COPYING)
    for _ in range(3):
        loop.backward()  # batch norm changes its buffers each time
    loop.ema.update_parameters(loop.model)
    loop.scaler.update(4.0)
    rig.gate.open(COPYING)
    assert rig.saver.finish()
    assert same(rig.snapshot(2), expected)
    assert rig.manifest(2).objects["scaler"]["value"]["scale"] == 2.0
    assert rig.saver.capture is Capture.HIDDEN


@pytest.mark.parametrize("first", ["first", "second"])
def test_optimizer_step_while_a_copy_runs_waits_for_it(loop: Loop, rig: Rig, first: str) -> None:
    expected = loop.values()
    rig.gate.hold(COPYING)
    assert rig.saver.save(2)
    rig.gate.await_reached(COPYING)
    loop.backward()
    stepped = threading.Event()

    def step() -> None:
        getattr(loop, first).step()
        stepped.set()

    thread = threading.Thread(target=step)
    thread.start()
    assert not stepped.is_set()
    rig.gate.open(COPYING)
    thread.join(60)
    assert stepped.is_set() and rig.saver.finish()
    assert same(rig.snapshot(2), expected) and not same(loop.values(), expected)


def test_untracked_optimizer_that_has_a_tracked_parameter_waits_too(loop: Loop, rig: Rig) -> None:
    expected = loop.values()
    other = torch.optim.SGD([loop.model[0].weight], 0.1)
    rig.gate.hold(COPYING)
    assert rig.saver.save(2)
    loop.backward()
    thread = threading.Thread(target=other.step)
    thread.start()
    rig.gate.open(COPYING)
    thread.join(60)
    assert rig.saver.finish() and same(rig.snapshot(2), expected)


def test_changes_after_the_copy_and_before_the_seal_do_no_harm(loop: Loop, rig: Rig) -> None:
    expected = loop.values()
    rig.gate.hold(STAGED)
    assert rig.saver.save(2)
    rig.gate.await_reached(STAGED)
    loop.step()
    edit_by_data(loop.model[0].weight)
    rig.gate.open(STAGED)
    assert rig.saver.finish()
    assert same(rig.snapshot(2), expected)


def test_losses_with_snapshots_at_every_step_are_those_without(tmp_path: Path) -> None:
    plain, watched = Loop(), Loop()
    expected = [plain.step() for _ in range(6)]
    torch.manual_seed(3)
    Loop()  # the same position of the generator
    with Rig(tmp_path, watched.parts) as rig:
        found = []
        for step in range(1, 7):
            found.append(watched.step())
            rig.saver.wait_copied()
            assert rig.saver.save(step)
        assert rig.saver.finish()
    assert found == expected


# What a hook does not guard is copied before save returns


def is_copied_at_once(loop: Loop, rig: Rig, tensors: list[torch.Tensor], step: int) -> bool:
    """Whether edits that no hook announces reach neither the snapshot nor its seal."""
    expected = loop.values()
    rig.gate.hold(COPYING)
    assert rig.saver.save(step)
    for tensor in tensors:
        edit_by_data(tensor)
    rig.gate.open(COPYING)
    return rig.saver.finish() and same(rig.snapshot(step), expected)


def test_buffers_averages_and_small_tensors_are_copied_at_once(loop: Loop, rig: Rig) -> None:
    tensors = [*loop.ema.parameters(), *loop.model.buffers(), *(e["step"] for e in loop.first.state.values())]
    assert is_copied_at_once(loop, rig, [t for t in tensors if t.is_floating_point()], step=2)


def test_save_before_any_hook_has_fired_copies_all_at_once(loop: Loop, tmp_path: Path) -> None:
    with Rig(tmp_path, loop.parts) as rig:
        assert is_copied_at_once(loop, rig, list(loop.model.parameters()), step=1)
        assert is_copied_at_once(loop, rig, list(loop.model.parameters()), step=2)


def test_parameters_of_an_optimizer_that_did_not_step_are_copied_at_once(loop: Loop, tmp_path: Path) -> None:
    with Rig(tmp_path, loop.parts) as rig:
        loop.backward()
        loop.first.step()
        assert is_copied_at_once(loop, rig, list(loop.model[2].parameters()), step=2)
        loop.first.step()
        assert is_left_to_background(rig, loop.model[0].weight, 3)


def test_parameters_without_a_tracked_optimizer_are_copied_at_once(loop: Loop, tmp_path: Path) -> None:
    with Rig(tmp_path, {"model": loop.model, "ema": loop.ema}) as rig:
        loop.step()
        rig.gate.hold(COPYING)
        expected = {f"model/{name}": value.clone() for name, value in loop.model.state_dict().items()}
        assert rig.saver.save(2)
        for parameter in loop.model.parameters():
            edit_in_place(parameter)  # an update by hand
        rig.gate.open(COPYING)
        assert rig.saver.finish() and same(rig.snapshot(2), expected)


def replace_step(optimizer: Any) -> None:
    step = optimizer.step
    optimizer.step = functools.wraps(step)(lambda *args: step(*args))


def mark_capturable(optimizer: Any) -> None:
    optimizer.param_groups[0]["capturable"] = True


def replace_class_step(optimizer: Any) -> None:
    """A class whose step was put in place after torch had wrapped it."""
    kind = type(optimizer)
    optimizer.__class__ = type("Own", (kind,), {"step": lambda self, closure=None: None})


@pytest.mark.parametrize("go_around", [replace_step, mark_capturable, replace_class_step])
def test_parameters_of_an_optimizer_that_may_go_around_its_hook_are_copied_at_once(
    loop: Loop, rig: Rig, go_around: Callable[[Any], None]
) -> None:
    go_around(loop.first)
    assert is_copied_at_once(loop, rig, list(loop.model[0].parameters()), step=2)


def test_parameters_whose_optimizer_step_is_compiled_are_copied_at_once(loop: Loop, tmp_path: Path) -> None:
    def update() -> None:
        loop.first.step()

    compiled = torch.compile(update, backend="eager")
    with warnings.catch_warnings(), Rig(tmp_path, loop.parts) as rig:
        warnings.simplefilter("ignore")
        loop.backward()
        compiled()
        assert is_copied_at_once(loop, rig, list(loop.model[0].parameters()), step=2)


def test_scheduler_that_counts_steps_hides_no_hook(loop: Loop, rig: Rig) -> None:
    torch.optim.lr_scheduler.StepLR(loop.first, 10)
    loop.step()
    assert is_left_to_background(rig, loop.model[0].weight, 2)


def test_module_with_a_state_dict_hook_is_copied_at_once(loop: Loop, rig: Rig) -> None:
    loop.model.register_state_dict_post_hook(lambda *_: None)
    assert is_copied_at_once(loop, rig, list(loop.model.parameters()), step=2)


def test_capture_at_once_leaves_nothing_to_the_background(loop: Loop, rig: Rig) -> None:
    rig.saver.capture = Capture.AT_ONCE
    assert is_copied_at_once(loop, rig, list(loop.model.parameters()), step=2)


# Changes that come around the hook


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("what", ["parameter", "moment"])
def test_edit_while_the_copy_runs_is_never_sealed(
    loop: Loop, rig: Rig, edit: Callable[[torch.Tensor], None], what: str
) -> None:
    weight = loop.model[0].weight
    tensor = weight if what == "parameter" else loop.first.state[weight]["exp_avg"]
    rig.gate.hold(COPYING)
    assert rig.saver.save(2)
    rig.gate.await_reached(COPYING)
    edit(tensor)
    rig.gate.open(COPYING)
    assert not rig.saver.finish()
    assert rig.steps_held() == [] and rig.saver.saved_step is None
    assert [event["step"] for event in rig.events("save_skipped")] == [2]
    assert 'capture="at_once"' in rig.events("notice")[0]["message"]
    # From then on such edits do no harm.
    assert is_copied_at_once(loop, rig, [tensor], step=3)
    assert len(rig.events("notice")) == 1


def test_edit_of_one_element_after_the_copy_in_the_first_window_is_noticed(tmp_path: Path) -> None:
    model = nn.Linear(2048, 2048, bias=False)  # 16 MiB: more than is digested in later windows
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Rig(tmp_path, {"model": model, "optimizer": optimizer}) as rig:
        optimizer.step()
        rig.gate.hold(STAGED)
        expected = {"model/weight": model.weight.detach().clone()}
        assert rig.saver.save(1)
        rig.gate.await_reached(STAGED)
        model.weight.data[1000, 1000] += 1
        optimizer.step()
        rig.gate.open(STAGED)
        assert rig.saver.finish() and same(rig.snapshot(1), expected)
        assert rig.saver.capture is Capture.AT_ONCE


def test_tensor_put_in_place_of_another_leaves_the_copy_with_the_values_of_its_step(loop: Loop, rig: Rig) -> None:
    expected = loop.values()
    rig.gate.hold(COPYING)
    assert rig.saver.save(2)
    rig.gate.await_reached(COPYING)
    loop.model[0].weight.data = torch.zeros(WIDTH, WIDTH)
    loop.first.state[loop.model[0].weight]["exp_avg"] = torch.zeros(WIDTH, WIDTH)
    rig.gate.open(COPYING)
    assert rig.saver.finish() and same(rig.snapshot(2), expected)
    rig.saver.save(3)
    assert rig.saver.finish() and same(rig.snapshot(3), loop.values())


# Waits and failures


def test_copy_that_is_late_is_given_up_and_training_goes_on(loop: Loop, rig: Rig) -> None:
    rig.gate.hold(COPYING)
    assert rig.saver.save(2)
    rig.gate.await_reached(COPYING)
    rig.saver.wait_s = 0.0
    before = copy.deepcopy(loop.model.state_dict())
    loop.step()  # does not wait, and changes what is being copied
    assert not same(loop.model.state_dict(), before)
    assert not rig.saver.save(3)  # the one before still has its slot
    rig.saver.wait_s = 60.0
    rig.gate.open(COPYING)
    assert not rig.saver.finish()
    assert rig.steps_held() == []
    skipped = {event["step"]: event["reason"] for event in rig.events("save_skipped")}
    assert "not made within 0 s" in skipped[2] and "not sealed yet" in skipped[3]
    assert rig.saver.capture is Capture.HIDDEN  # the loop did nothing wrong


@pytest.mark.parametrize("point", [COPYING, STAGED])
@pytest.mark.parametrize("error", [InternalError("planned"), ValueError("unplanned"), OSError(28, "full")])
def test_failure_in_the_background_is_a_failed_tier_and_the_next_save_recovers(
    loop: Loop, rig: Rig, point: str, error: Exception
) -> None:
    rig.gate.fails[point] = error
    assert rig.saver.save(2)
    loop.step()
    assert not rig.saver.finish() and rig.steps_held() == []
    assert type(error).__name__ in rig.events("tier_failed")[0]["reason"]
    expected = loop.values()
    assert rig.saver.save(3) and rig.saver.finish()
    assert same(rig.snapshot(3), expected)
    assert len(rig.events("tier_recovered")) == 1


def test_stall_in_the_event_has_the_wait_of_the_optimizer_step(loop: Loop, rig: Rig) -> None:
    rig.gate.hold(COPYING)
    assert rig.saver.save(2)
    rig.gate.await_reached(COPYING)
    loop.backward()
    thread = threading.Thread(target=loop.first.step)
    thread.start()
    rig.gate.open(COPYING)
    thread.join(60)
    assert rig.saver.finish()
    event = rig.events("snapshot")[0]
    assert event["step"] == 2 and event["stall_s"] > 0


def test_close_while_a_copy_runs_seals_it(loop: Loop, tmp_path: Path) -> None:
    with Rig(tmp_path, loop.parts) as rig:
        loop.step()
        expected = loop.values()
        rig.gate.hold(COPYING)
        assert rig.saver.save(2)
        rig.gate.await_reached(COPYING)
        closing = threading.Thread(target=rig.saver.close)
        closing.start()
        rig.gate.open(COPYING)
        closing.join(60)
        assert rig.saver.saved_step == 2
        with Rig(tmp_path, loop.parts) as other:
            assert same(other.snapshot(2), expected)


def test_seal_waits_for_the_log_of_what_was_said_before_it(rig: Rig) -> None:
    rig.keeper.logs = False
    rig.gate.hold(STAGED, SEALED)
    rig.pulse.emit("step", step=10, loss=0.5)
    assert rig.saver.save(10)
    rig.gate.await_reached(STAGED)
    rig.gate.open(STAGED)
    rig.saver.wait_copied()
    assert rig.pulse.log.num_heard == 0
    rig.keeper.logs = True
    rig.gate.await_reached(SEALED)
    assert rig.pulse.log.num_heard >= 1
    rig.gate.open(SEALED)
    assert rig.saver.finish()
    assert rig.events("notice") == []


def test_seal_goes_on_without_a_log_and_says_so_once(rig: Rig) -> None:
    rig.keeper.logs = False
    for step in (10, 20):
        rig.gate.hold(SEALED)
        rig.pulse.emit("step", step=step, loss=0.5)
        assert rig.saver.save(step)
        rig.gate.await_reached(SEALED)
        rig.gate.open(SEALED)
        assert rig.saver.finish()
    (said,) = rig.events("notice")
    assert "step 10 is sealed before the run's log" in said["message"]


def test_save_does_not_wait_for_the_log_of_the_one_before_it(rig: Rig) -> None:
    rig.keeper.logs = False
    for step in (10, 20, 30):
        rig.pulse.emit("step", step=step, loss=0.5)
        assert rig.saver.save(step)
        rig.saver.wait_copied()
    assert rig.saver.finish()
    assert rig.events("notice") == [] and rig.events("save_skipped") == []
    assert rig.steps_held() == [10, 20, 30]
