"""The two lines in a loop that exists: restore where the run was, and a commit point after each step.

    ckpt = ktrain.Checkpointer("runs/net-a", state={"model": model, "optimizer": opt}, every=10)
    for i in range(ckpt.restore(), n):
        train_one(i)
        ckpt.step(i + 1)
    ckpt.close()

Start reading ktrain here. What happens behind: `state` plans what this rank stores, `snapshot` brings it into a slot of
the node's volume (memory tier), the node keeper (`checkpoint.node`) carries it to peers and bucket, and the head
(`checkpoint.coordinate`) says what is committed.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Any

import torch

from ktrain.base import contract, settings
from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.base.faults import FaultPoints
from ktrain.checkpoint.gate import Gate, as_gate
from ktrain.checkpoint.last_drain import LastDrain
from ktrain.checkpoint.line import connect
from ktrain.checkpoint.policy import Capture, Every, Keep, Policies, as_capture, as_every, as_keep
from ktrain.checkpoint.pulse import Pulse
from ktrain.checkpoint.restore import Restorer
from ktrain.checkpoint.retention import Retention
from ktrain.checkpoint.save import Saver
from ktrain.errors import ConfigError, DeadlineError
from ktrain.state.rng import RNG_PART, rng_part
from ktrain.state.topology import Topology
from ktrain.state.train_state import TrainState


class Checkpointer:
    """Saves and restores the state of a run. Use from the training thread.

    Every rank makes one, with the same run, parts and policies; under torchrun after `init_process_group`.

    Args:
        run: path or URL of the run; None takes the one of `ktrain launch`.
        state: named parts with `state_dict` and `load_state_dict`. The generators of every rank are added as "rng".
        every: cadence; a number counts steps between snapshots in memory, "auto" has it measured and chosen.
        keep: retention; a number, a policy or its text ("latest:3,every_steps:1000") says which checkpoints stay in the
            bucket, a `Keep` which stay in each tier.
        gate: what follows when the first losses after a restore are not those of before: "report" says so, "step-back"
            sets the restored step aside and continues from an older one.
        capture: "hidden" copies what only optimizer steps change beside forward and backward; "at_once" copies all
            before `step` returns, for a program that edits parameters through `.data` or raw pointers.

    Raises:
        ConfigError: the arguments cannot work, or the run cannot be written.
        ConflictError: the run is live elsewhere; names the holder.
    """

    def __init__(
        self,
        run: str | os.PathLike[str] | None = None,
        *,
        state: Mapping[str, Any],
        every: int | str | Every = 10,
        keep: int | str | Retention | Keep = 3,
        gate: str | Gate = "report",
        capture: str | Capture = "hidden",
    ) -> None:
        self._capture = as_capture(capture)
        self._policies = Policies(as_every(every), as_keep(keep), as_gate(gate))
        self._topology = Topology.current()
        self._state = TrainState({RNG_PART: rng_part(self._topology), **state})
        self._timeouts = settings.timeouts()
        self._clock = SYSTEM_CLOCK
        name = None if run is None else os.fspath(run)
        self.run, self._line = connect(name, self._topology, self._timeouts)
        self._faults = FaultPoints.from_environment(self._line.epoch)
        self._pulse = Pulse(
            self._line.caller,
            rank=self._topology.rank,
            epoch=self._line.epoch,
            policies=self._policies,
            timeouts=self._timeouts,
            clock=self._clock,
        )
        self._pulse.start()
        self._saver: Saver | None = None  # made by restore()
        self._step: int | None = None  # None until restore()
        self._closed = False
        self._line.watch(lambda: self._step)
        self._signals: dict[int, Any] = {} if self._line.has_launcher else self._catch_signals()

    @property
    def epoch(self) -> int:
        """The attempt's epoch."""
        return self._line.epoch

    @property
    def committed(self) -> dict[str, int]:
        """Tier -> newest committed step, as last heard from the head."""
        return {tier: int(at[0]) for tier, at in self._pulse.answer.get("committed", {}).items()}

    # Restore

    def restore(self) -> int:
        """Loads the newest proven checkpoint into the state; returns the step to continue from.

        Returns 0 only where there never was a durable commit, or where weights were imported as step 0
        (`ktrain ckpt import`). All ranks get the same step. An error while it reads may leave values in the state:
        end the process then, or give the whole state its values anew.

        Raises:
            ConfigError: the checkpoint is of other shapes.
            CorruptionError: there are checkpoints, but no good copy of any; nothing was deleted.
            UnavailableError: it cannot be told whether there is a checkpoint.
            DeadlineError: names the ranks that are late.
        """
        if self._step is not None:
            raise ConfigError("Checkpointer.restore: it was called before; call it once, before the first step")
        try:
            self._step = self._restore()
        except BaseException:
            self._end(False, "failed")  # so that the events say why, and nothing is held any more
            raise
        self._pulse.note_step(self._step)
        self._pulse.note_phase("train")
        return self._step

    def _restore(self) -> int:
        self._pulse.note_phase("restore")
        run_id, format = self._join()
        saver = self._saver = Saver(
            self._state, self._topology, self._policies.keep, line=self._line, pulse=self._pulse, faults=self._faults
        )
        saver.capture = self._capture
        saver.open_volume(self.run, run_id, format)
        restorer = Restorer(self._state, self._topology, saver.volume, self._pulse, self._line.caller, self.run)
        saver.saved_step = restorer.restore(self._faults)
        return saver.saved_step

    def _join(self) -> tuple[str, int]:
        """Waits, bounded, until the head knows this rank; returns the run's id and its format version."""
        deadline = Deadline.after(self._timeouts.start_s, self._clock)
        answer = self._pulse.wait_answer(deadline, "join the head")
        while not answer["ready"]:
            answer = self._pulse.wait_answer(deadline, "join the head")
        if answer["world_size"] != self._topology.world_size:
            raise ConfigError(
                f"Checkpointer: this process sees {self._topology.world_size} ranks, the head {answer['world_size']}"
            )
        self._topology = self._topology.with_nodes(answer["node_sizes"])
        return str(answer["run"]), int(answer["format"])

    # Step

    def step(self, step: int, *, loss: float | torch.Tensor | None = None, samples: int | None = None) -> None:
        """The commit point after optimizer step number `step` (the first is 1): saves when it is due.

        The next optimizer step, or call of this, waits until what it may change is copied.

        Args:
            step: greater than at the last call.
            loss: goes into the run's events with full precision.
            samples: used by this step on all ranks, for the rate in the progress line.

        Raises:
            SystemExit: the run was asked to stop; this step is saved (exit code 130).
            ConflictError: a newer attempt of the run has begun; this process must end.
            KtrainError: the losses are not those of before (`gate="step-back"`); the next attempt goes on further back.
        """
        if self._step is None or self._saver is None:
            raise ConfigError("Checkpointer.step: call restore() first, so that the run continues where it was")
        if step <= self._step:
            raise ConfigError(f"Checkpointer.step: expected a step over {self._step}, found {step}")
        self._pulse.check_fence()
        self._saver.wait_copied()
        self._step = step
        self._faults.reached("step", step=step, rank=self._topology.rank)
        if self._topology.rank == 0:
            self._pulse.emit("step", step=step, loss=None if loss is None else float(_plain(loss)), samples=samples)
        stop = self._pulse.note_step(step)
        stopping = stop is not None and self._await_stop(step)
        if stopping or self._pulse.schedule.due(step):
            self._saver.save(step)
        else:
            self._saver.prepare()
        if stopping:
            self._leave(step)

    def log(self, **values: Any) -> None:
        """Puts values of this step into the run's events (rank 0's alone)."""
        if self._topology.rank == 0:
            self._pulse.emit("log", step=self._step, **{name: _plain(value) for name, value in values.items()})

    # Stop and close

    def _await_stop(self, step: int) -> bool:
        """True once every rank has promised to stop at this step; false when another step was announced instead."""
        deadline = Deadline.after(self._timeouts.stop_s, self._clock)
        while True:
            stop = self._pulse.stop
            if stop is None or stop["step"] != step:
                return False
            if stop["confirmed"]:
                return True
            try:
                self._pulse.wait_answer(deadline, f"agree to stop at step {step}")
            except DeadlineError:
                self._pulse.refuse_stop(step)
                self._pulse.emit(
                    "notice", message=f"rank {self._topology.rank}: no agreement to stop at step {step}; going on"
                )
                return False

    def _leave(self, step: int) -> None:
        """Brings the saved step into the bucket, bounded, and leaves with the exit code of a stopped run."""
        self._pulse.note_phase("close")
        try:
            if self._saver is not None:
                self._saver.finish()
            deadline = Deadline.after(self._timeouts.stop_s, self._clock)
            while self.committed.get(contract.TIER_BUCKET, -1) < step:
                self._pulse.wait_answer(deadline, f"drain step {step} to the bucket")
        except DeadlineError as error:
            self._pulse.emit("notice", message=str(error))
        self._end(False, "stopped")
        raise SystemExit(contract.EXIT_STOPPED)

    def close(self, success: bool = True) -> None:
        """Ends the run's use of this Checkpointer. Closing twice is fine.

        With success: the last step is saved where it was not, its drain to the bucket is awaited, and then the
        memory that the run took on this node is freed. Without: everything stays for the next attempt.

        Raises:
            DeadlineError: nothing moved on the way to the bucket for long, and the last step is not there; says how
                far it had come. Nothing is freed.
            CapacityError, UnavailableError: there is no memory tier to save the last step in.
        """
        if self._closed:
            return
        try:
            if success and self._step and self._saver is not None:
                self._pulse.note_phase("close")
                self._save_last(self._saver, self._step)
        except BaseException:
            self._end(False, "failed")
            raise
        self._end(success, "succeeded" if success else "failed")

    def _save_last(self, saver: Saver, step: int) -> None:
        """Has the last step saved and waits until it is in the bucket, as long as something moves there."""
        says = self._topology.rank == 0
        drain = LastDrain(self._pulse, says=says, timeouts=self._timeouts, clock=self._clock)
        saver.finish()
        while saver.saved_step != step and not (saver.save(step) and saver.finish()):
            saver.check_volume()
            drain.wait(f"find a slot for the last step {step}")
        while self.committed.get(contract.TIER_BUCKET, -1) < step:
            drain.wait(f"bring the last step {step} into the bucket")

    def _end(self, success: bool, reason: str) -> None:
        self._closed = True
        for signum, handler in self._signals.items():
            signal.signal(signum, handler)
        with ExitStack() as rest:  # whatever fails in between, the run is let go
            rest.callback(self._line.close, success, reason)
            rest.callback(self._pulse.end)
            if self._saver is not None:
                self._saver.close()
            if success:
                self._pulse.note_closed()
            self._pulse.flush(Deadline.after(self._timeouts.call_s, self._clock))

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(success=error is None)

    def _catch_signals(self) -> dict[int, Any]:
        """Without a launcher the first SIGINT or SIGTERM means: finish the step, save, leave; a second ends at once."""
        if threading.current_thread() is not threading.main_thread():
            return {}
        caught: dict[int, Any] = {}
        for signum in (signal.SIGINT, signal.SIGTERM):
            caught[signum] = signal.signal(signum, self._on_signal)
        return caught

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        for number, handler in self._signals.items():
            signal.signal(number, handler)
        self._pulse.request_stop(signal.Signals(signum).name)


def _plain(value: Any) -> Any:
    return float(value.detach()) if isinstance(value, torch.Tensor) else value
