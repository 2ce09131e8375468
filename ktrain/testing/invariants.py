"""What holds for every run, whatever was done to it: checked from its event log, its directory and its processes.

Each function returns what it found wrong, one line each; an empty list means that the invariant holds. Events are taken
in the order of the log. Nothing here imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ktrain.base import contract
from ktrain.base.events import Event
from ktrain.errors import CorruptionError
from ktrain.format.record import CommitRecord


def check_losses(events: Iterable[Event]) -> list[str]:
    """Every occurrence of a step, in whatever attempt, has the same loss bit for bit."""
    first: dict[int, tuple[str, int]] = {}
    wrong = []
    for event in _of_kind(events, "step"):
        step, text = event.fields["step"], _bits(event.fields["loss"])
        expected, attempt = first.setdefault(step, (text, event.attempt))
        if text != expected:
            wrong.append(
                f"step {step}: loss {text} in attempt {event.attempt}, expected {expected} as in attempt {attempt}"
            )
    return wrong


def check_same_losses(events: Iterable[Event], expected: Mapping[int, float]) -> list[str]:
    """Every occurrence of a step has the loss that a run has which nobody touched."""
    wrong = []
    for event in _of_kind(events, "step"):
        step, text = event.fields["step"], _bits(event.fields["loss"])
        if step not in expected or text != _bits(expected[step]):
            untouched = _bits(expected[step]) if step in expected else "no such step"
            wrong.append(f"step {step}: loss {text} in attempt {event.attempt}; the untouched run: {untouched}")
    return wrong


def check_steps(events: Iterable[Event], last: int) -> list[str]:
    """Steps 1 to `last` are all there, and none beyond."""
    found = {event.fields["step"] for event in _of_kind(events, "step")}
    missing, beyond = sorted(set(range(1, last + 1)) - found), sorted(found - set(range(1, last + 1)))
    wrong = [f"steps {missing} are missing from 1 to {last}"] if missing else []
    return wrong + ([f"steps {beyond} are beyond {last}"] if beyond else [])


def check_epochs(events: Iterable[Event]) -> list[str]:
    """Each attempt's epoch is above that of the one before."""
    wrong, before = [], 0
    for event in _of_kind(events, "attempt_started"):
        if event.attempt <= before:
            wrong.append(f"attempt {event.attempt} started after attempt {before}")
        before = event.attempt
    return wrong


def check_order(events: Iterable[Event]) -> list[str]:
    """An attempt restores at most once, before its steps, and these go up one by one from the restored step."""
    wrong = []
    at: dict[int, int] = {}
    for event in events:
        if event.kind in ("restored", "fresh_start"):
            if event.attempt in at:
                wrong.append(f"attempt {event.attempt}: {event.kind} at step {at[event.attempt]}, not before its steps")
            at[event.attempt] = event.fields["step"]
        elif event.kind == "step":
            expected = at.get(event.attempt, -1) + 1
            if event.fields["step"] != expected:
                what = f"expected {expected}" if expected else "before any restore"
                wrong.append(f"attempt {event.attempt}: step {event.fields['step']}, {what}")
            at[event.attempt] = event.fields["step"]
    return wrong


def check_restores(events: Iterable[Event]) -> list[str]:
    """What is restored was there before: committed in the tier, or sealed by every rank where the head died untold.

    A restore from a peer's memory needs the snapshot in memory alone: the peer may be the node that made it.
    """
    committed: set[tuple[int, int, str]] = set()
    sealed: dict[tuple[int, int], set[int]] = {}
    world_size: dict[int, int] = {}
    wrong = []
    for event in events:
        step = event.fields.get("step")
        if event.kind == "attempt_started":
            world_size[event.attempt] = event.fields["world_size"]
        elif event.kind == "committed":
            committed.add((step or 0, event.attempt, event.fields["tier"]))
        elif event.kind == "snapshot":
            sealed.setdefault((step or 0, event.attempt), set()).add(event.fields["rank"])
        elif event.kind == "restored":
            key = (step or 0, event.fields["from_epoch"])
            in_bucket = any((at, tier) == (key[0], contract.TIER_BUCKET) and by >= key[1] for at, by, tier in committed)
            in_memory = any((*key, tier) in committed for tier in (contract.TIER_MEMORY, contract.TIER_PEER))
            in_memory = in_memory or len(sealed.get(key, ())) == world_size.get(key[1], -1)
            if not (in_bucket if event.fields["tier"] == contract.TIER_BUCKET else in_bucket or in_memory):
                wrong.append(
                    f"attempt {event.attempt}: restored step {key[0]} of attempt {key[1]} from {event.fields['tier']}, "
                    "where nothing says that it was committed"
                )
    return wrong


def check_commits(events: Sequence[Event], run: Path) -> list[str]:
    """What is said to be in the bucket is there: a record, and every file that it needs; or it was collected."""
    collected = {
        event.fields["step"] for event in _of_kind(events, "collected") if event.fields["tier"] == contract.TIER_BUCKET
    }
    there: dict[int, list[int]] = {}
    wrong = []
    for path in sorted((run / contract.CHECKPOINTS_DIR).glob("*/commit-*")):
        try:
            record = CommitRecord.from_bytes(path.read_bytes())
        except CorruptionError as error:
            wrong.append(f"{path}: {error}")
            continue
        there.setdefault(record.identity.step, []).append(record.identity.epoch)
        sizes = [
            size
            for files in record.ranks
            for size in ((files.payload, files.nbytes), (files.manifest, files.manifest_nbytes))
        ]
        wrong += [
            f"{path.name}: needs {name} of {nbytes} bytes, which is not there"
            for name, nbytes in sizes
            if not (run / name).exists() or (run / name).stat().st_size != nbytes
        ]
    for event in _of_kind(events, "committed"):
        step = event.fields["step"]
        if event.fields["tier"] != contract.TIER_BUCKET or step in collected:
            continue
        # An attempt may bring the step that it restored into the bucket, under the epoch that made it.
        if not any(epoch <= event.attempt for epoch in there.get(step, ())):
            wrong.append(f"step {step} of attempt {event.attempt}: said to be committed in the bucket, no record of it")
    return wrong


def check_faults_once(events: Iterable[Event], specs: Sequence[str]) -> list[str]:
    """The faults that were injected are those of the plan, in its order, each once."""
    found = [event.fields["spec"] for event in _of_kind(events, "fault_injected")]
    return [] if found == list(specs) else [f"faults injected: {found}, expected {list(specs)}"]


def check_said_once(events: Iterable[Event]) -> list[str]:
    """A tier that fails is reported once until it recovers."""
    down: set[str] = set()
    wrong = []
    for event in events:
        tier = event.fields.get("tier")
        if event.kind == "tier_failed" and tier in (contract.TIER_PEER, contract.TIER_BUCKET):
            if tier in down:
                wrong.append(f"{tier}: said twice to have failed")
            down.add(tier)
        elif event.kind == "tier_recovered" and tier is not None:
            if tier not in down:
                wrong.append(f"{tier}: said to have recovered, it had not failed")
            down.discard(tier)
        elif event.kind == "run_started":
            down.clear()  # another launch knows nothing of what the last one saw
    return wrong


def check_origins(events: Iterable[Event]) -> list[str]:
    """What a worker or a keeper said is there once, in the order in which it was said, and without a gap."""
    counts: dict[str, int] = {}
    wrong = []
    for event in events:
        if event.origin is None:
            continue
        name, number = event.origin
        expected = counts.get(name, 0)
        if number != expected:
            wrong.append(f"{event.kind} of attempt {event.attempt}: number {number} of {name}, expected {expected}")
        counts[name] = max(expected, number + 1)
    return wrong


def check_volume_freed(volume_root: Path) -> list[str]:
    """A run that ended with success leaves no memory behind."""
    return [f"{path}: left in the volume" for path in sorted(volume_root.rglob("*")) if not path.is_dir()]


@dataclass(frozen=True, slots=True)
class FoundProcess:
    """A living process, with its command line as one text."""

    pid: int
    parent: int
    command: str


def find_processes(marker: str) -> list[FoundProcess]:
    """Living processes that have `marker` in their command line or in the environment they were started with.

    Processes whose environment cannot be read are those of others, or have ended.
    """
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdecimal() or int(entry) == os.getpid():
            continue
        folder = Path("/proc", entry)
        try:
            stat = (folder / "stat").read_text()
            state, parent = stat[stat.rindex(")") + 2 :].split()[:2]
            command = (folder / "cmdline").read_bytes()
            place = command + (folder / "environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if state not in "ZX" and marker.encode() in place:
            found.append(
                FoundProcess(int(entry), int(parent), command.replace(b"\0", b" ").decode(errors="replace").strip())
            )
    return found


def check_nothing_runs(marker: str) -> list[str]:
    """No process of the run lives."""
    return [f"process {found.pid} lives: {found.command[:200]}" for found in find_processes(marker)]


def check_run(events: Sequence[Event], run: Path) -> list[str]:
    """Everything that holds at any moment of any run in a local directory."""
    return [
        *check_losses(events),
        *check_epochs(events),
        *check_order(events),
        *check_restores(events),
        *check_commits(events, run),
        *check_said_once(events),
        *check_origins(events),
    ]


def _of_kind(events: Iterable[Event], kind: str) -> list[Event]:
    return [event for event in events if event.kind == kind]


def _bits(loss: float | None) -> str:
    return "none" if loss is None else float(loss).hex()
