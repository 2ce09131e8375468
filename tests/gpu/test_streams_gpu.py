"""Which work of the device a snapshot, and a restore, comes behind: streams of the program's own, compiled steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ktrain import device
from ktrain.base.clock import Deadline
from ktrain.checkpoint.policy import Capture
from ktrain.format.manifest import Manifest
from ktrain.state.apply import apply, plan_restore
from ktrain.state.landing import land
from ktrain.state.train_state import TrainState
from ktrain.testing.memory_source import MemorySource
from tests.gpu.loops import A_WHILE, Loop, MixedLoop, rig_of, taken
from tests.unit.checkpoint.saving import COPYING, same
from tests.unit.state.worlds import ALONE, restore, snapshot

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(device.name() != "cuda", reason="needs streams of CUDA"),
]


@pytest.fixture
def own() -> torch.cuda.Stream:
    """A stream of the program."""
    return torch.cuda.Stream()


# Streams of the program's own


def test_loop_on_a_stream_of_its_own_is_saved_behind_the_work_of_that_stream(
    own: torch.cuda.Stream, tmp_path: Path
) -> None:
    loop = Loop()
    with rig_of(loop, tmp_path) as rig:
        own.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(own):
            for step in range(1, 4):
                torch.cuda._sleep(A_WHILE)
                loop.step()
                assert rig.saver.save(step)  # the stream that no one named stands idle
                assert rig.saver.finish()
                assert same(rig.snapshot(step), loop.values())
        assert rig.saver.capture is Capture.HIDDEN


def test_step_of_the_next_iteration_on_a_stream_of_its_own_waits_for_the_copy(
    own: torch.cuda.Stream, tmp_path: Path
) -> None:
    loop = Loop()
    with rig_of(loop, tmp_path) as rig:
        own.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(own):
            loop.step()
            expected = loop.values()
            torch.cuda._sleep(A_WHILE)
            assert rig.saver.save(1)  # the copies wait on the device
            loop.step()
            assert rig.saver.finish()
        assert same(rig.snapshot(1), expected)


def test_save_on_a_stream_that_waits_for_the_one_that_computed_holds_its_values(
    own: torch.cuda.Stream, tmp_path: Path
) -> None:
    loop = Loop()
    current = torch.cuda.current_stream()
    with rig_of(loop, tmp_path) as rig:
        own.wait_stream(current)
        with torch.cuda.stream(own):
            torch.cuda._sleep(A_WHILE)
            loop.step()
        current.wait_stream(own)
        assert rig.saver.save(1)
        own.wait_stream(current)  # what is copied at once lies in the order of the stream that saves
        with torch.cuda.stream(own):
            loop.backward()
        current.wait_stream(own)
        assert rig.saver.finish()
        buffers = {f"model/{name}" for name, _ in loop.model.named_buffers()}
        assert same(rig.snapshot(1), {name: value for name, value in loop.values().items() if name not in buffers})


# Restores


@pytest.fixture
def pinned() -> Iterator[tuple[Manifest, bytearray]]:
    """A snapshot of a loop after three steps, in memory that is registered with the device."""
    loop = Loop()
    for _ in range(3):
        loop.step()
    manifest, payload = snapshot(TrainState(loop.parts))
    memory = bytearray(payload)
    assert device.register_host_memory(memoryview(memory))
    yield manifest, memory
    device.synchronize()
    device.unregister_host_memory(memoryview(memory))


def expected_of(pinned: tuple[Manifest, bytearray]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The restored values, and those one step later, as a device that does nothing else gives them."""
    loop = Loop(seed=5)
    restore(TrainState(loop.parts), {0: pinned})
    device.synchronize()
    before = loop.values()
    torch.manual_seed(7)
    loop.step()
    return before, loop.values()


def test_restore_from_registered_memory_comes_behind_what_the_stream_was_given_before(
    pinned: tuple[Manifest, bytearray],
) -> None:
    before, after = expected_of(pinned)
    loop = Loop(seed=6)
    loop.step()
    torch.cuda._sleep(A_WHILE)
    with torch.no_grad():
        for value in loop.model.parameters():
            value.fill_(9.0)  # the device comes to it after the restore has begun
    restore(TrainState(loop.parts), {0: pinned})
    assert same(loop.values(), before)
    torch.manual_seed(7)
    loop.step()
    assert same(loop.values(), after)


def test_restore_beside_another_stream_that_is_busy_is_seen_by_the_next_step(
    own: torch.cuda.Stream, pinned: tuple[Manifest, bytearray]
) -> None:
    before, after = expected_of(pinned)
    loop = Loop(seed=6)
    loop.step()
    device.synchronize()
    with torch.cuda.stream(own):
        torch.cuda._sleep(A_WHILE)
        weights = torch.randn(2048, 2048, device=loop.device)
        for _ in range(20):
            weights = weights @ weights.T / 2048
    restore(TrainState(loop.parts), {0: pinned})
    torch.manual_seed(7)
    loop.step()
    assert same(loop.values(), after)
    assert not same(before, after)


def test_restore_is_done_when_it_returns_whatever_stream_the_next_step_is_on(
    own: torch.cuda.Stream, pinned: tuple[Manifest, bytearray]
) -> None:
    _, after = expected_of(pinned)
    loop = Loop(seed=6)
    loop.step()
    device.synchronize()
    state = TrainState(loop.parts)
    needs = plan_restore(state, {0: pinned[0]}, ALONE)
    landing = land(needs.targets)
    source = MemorySource({0: pinned})
    source.fetch(landing.views, into=landing.runs, deadline=Deadline.after(30))
    with torch.cuda.stream(own):
        torch.cuda._sleep(A_WHILE)
        apply(state, needs, source, landing)
    source.close()
    torch.manual_seed(7)
    loop.step()  # on a stream that waits for nothing
    assert same(loop.values(), after)


# Steps that are compiled, and steps that a scaler may skip


def compiled_loop() -> tuple[Loop, Callable[[], Any]]:
    """A loop and its compiled optimizer step; with momentum alone the compiler is quick."""
    loop = Loop()
    loop.optimizer = torch.optim.SGD(loop.model.parameters(), 0.01, momentum=0.9)
    return loop, torch.compile(loop.optimizer.step)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_step_beside_a_capture_does_not_reach_the_snapshot(tmp_path: Path) -> None:
    loop, compiled = compiled_loop()
    with rig_of(loop, tmp_path) as rig:
        assert rig.saver.save(1) and rig.saver.finish()  # up to here the hook was seen to fire
        for step in range(2, 5):
            loop.backward()
            compiled()
            expected = loop.values()
            rig.gate.hold(COPYING)
            assert rig.saver.save(step)
            compiled()  # nobody is told of it
            rig.gate.open(COPYING)
            assert rig.saver.finish()
            assert same(rig.snapshot(step), expected) and not same(loop.values(), expected)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_first_compiled_step_while_the_copy_is_held_is_never_sealed(tmp_path: Path) -> None:
    loop, compiled = compiled_loop()
    with rig_of(loop, tmp_path) as rig:
        loop.backward()
        loop.optimizer.step()
        rig.gate.hold(COPYING)
        assert rig.saver.save(1)
        compiled()  # traced here: the hook stays silent
        rig.gate.open(COPYING)
        assert not rig.saver.finish() and rig.steps_held() == []
        assert rig.saver.capture is Capture.AT_ONCE
        expected = loop.values()
        assert rig.saver.save(2)
        compiled()
        assert rig.saver.finish() and same(rig.snapshot(2), expected)


def test_mixed_precision_with_a_scaler_saved_beside_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    loop = MixedLoop()
    with rig_of(loop, tmp_path) as rig:
        for _ in range(3):
            loop.step()
        scale = loop.scaler.get_scale()
        rig.gate.hold(COPYING)
        assert rig.saver.save(4)
        expected = [loop.backward()]
        rig.gate.open(COPYING)
        loop.update()
        assert rig.saver.finish()
        expected += [loop.step() for _ in range(12)]
        scales = loop.scaler.get_scale()

        fresh = MixedLoop(seed=8)
        restore(TrainState(fresh.parts), {0: taken(rig, 4)})
        assert fresh.scaler.get_scale() == scale
        assert [fresh.step() for _ in range(13)] == expected
        assert fresh.scaler.get_scale() == scales
        assert same(fresh.values(), loop.values())


def test_optimizer_that_a_scaler_steps_is_left_to_the_background(tmp_path: Path) -> None:
    loop = MixedLoop()
    with rig_of(loop, tmp_path) as rig:
        for _ in range(3):
            loop.step()
        rig.gate.hold(COPYING)
        assert rig.saver.save(4)
        loop.model[0].weight.data.add_(1)
        rig.gate.open(COPYING)
        assert not rig.saver.finish()  # what is copied at once would not have met it
