"""One case per kind of fault: the cause that the events name, the tier that the run continues from, the same losses."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from ktrain.base import contract, events
from ktrain.base.clock import SYSTEM_CLOCK
from ktrain.base.events import Event
from ktrain.testing import invariants
from ktrain.testing.s3_servers import RcloneServer, find_program
from tests.chaos import harness
from tests.integration.launching import Place, place

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

STEPS = "60"
NODES = {"node-0", "node-1"}
_HERE, _RENAME_EXCHANGE = -100, 2  # AT_FDCWD and the flag of renameat2, see its manual


@pytest.fixture
def here() -> Iterator[Place]:
    with place() as made:
        harness.put_script(made)
        yield made


@pytest.mark.parametrize(
    ("spec", "cause", "tier"),
    [
        ("kill-worker@step=20,rank=1,after=memory", contract.CAUSE_CRASH, contract.TIER_MEMORY),
        ("stop-worker@step=20,rank=1,after=memory", contract.CAUSE_HANG, contract.TIER_MEMORY),
        ("lose-node@step=20,node=1,after=peer", contract.CAUSE_NODE_LOST, contract.TIER_PEER),
        ("lose-node@step=20,node=0,after=peer", contract.CAUSE_NODE_LOST, contract.TIER_PEER),
        ("lose-all@step=20,after=bucket", contract.CAUSE_ALL_LOST, contract.TIER_BUCKET),
    ],
)
def test_launch_fault_that_ends_an_attempt_names_cause_and_tier(here: Place, spec: str, cause: str, tier: str) -> None:
    patience = "8" if spec.startswith("stop") else "60"

    code = here.end(here.launch("--nodes", "2", "--patience", patience, "--fault", spec, args=(STEPS, "0.2")))

    assert code == contract.EXIT_OK, here.output()
    assert [event.fields["cause"] for event in harness.of_kind(here, "failure")] == [cause]
    assert [event.fields["tier"] for event in harness.of_kind(here, "restored")] == [tier]
    assert invariants.check_faults_once(harness.read_events(here), [spec]) == []
    harness.check(here, last=int(STEPS))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("kill-agent@step=20,node=0", "agent_lost"),
        ("kill-agent@step=20,node=1", "agent_lost"),
        ("kill-head@step=20", "head_adopted"),
    ],
)
def test_launch_fault_beside_training_does_not_end_the_attempt(here: Place, spec: str, said: str) -> None:
    code = here.end(here.launch("--nodes", "2", "--patience", "60", "--fault", spec, args=(STEPS, "0.2")))

    assert code == contract.EXIT_OK, here.output()
    assert harness.of_kind(here, "failure") == [] and len(harness.of_kind(here, "attempt_started")) == 1
    assert harness.of_kind(here, said)
    assert invariants.check_faults_once(harness.read_events(here), [spec]) == []
    harness.check(here, last=int(STEPS))


@pytest.mark.parametrize(
    ("fault", "said"),
    [("kill@events.taken,step=18,rank=0", "agent_lost"), ("kill@events.logged,step=18", "head_adopted")],
)
def test_launch_killed_with_events_on_their_way_has_each_in_its_log_once(here: Place, fault: str, said: str) -> None:
    """The agent of rank 0, which says the losses, dies before it passes one on; the head, before it confirms one."""
    options = ("--nodes", "2", "--patience", "60")
    code = here.end(here.launch(*options, args=(STEPS, "0.3"), KTRAIN_FAULTS=fault))

    assert code == contract.EXIT_OK, here.output()
    assert len(harness.of_kind(here, said)) == 1
    assert harness.of_kind(here, "failure") == [] and len(harness.of_kind(here, "attempt_started")) == 1
    harness.check(here, last=int(STEPS))


@pytest.mark.parametrize("point", ["disk.doomed", "disk.manifest"])
def test_launch_agents_killed_while_they_remove_from_disks_train_on_and_finish_it(here: Place, point: str) -> None:
    """Each new agent of the first attempt dies at its next removal too; those of the second finish all of them."""
    disk = here.root / "disk"
    faults = {"KTRAIN_DISK": str(disk), "KTRAIN_FAULTS": f"kill@{point}"}
    args = (str(harness.MANY_STEPS), "0.1")
    launch = here.launch("--nodes", "2", "--patience", "60", args=args, **faults)

    here.await_that(
        "both agents' deaths", lambda: {said.fields["node"] for said in harness.of_kind(here, "agent_lost")} >= NODES
    )
    # What a worker said while no agent was there dies with the worker, and a snapshot waits for it two seconds at most.
    heard = harness.newest_step(here)
    here.await_that("steps that new agents told the head", lambda: harness.newest_step(here) > heard)
    assert _kill(here.processes("ktrain.run.worker ")[0].pid), "which ends the attempt, and with it the plan"
    here.await_that("a second attempt", lambda: len(harness.of_kind(here, "restored")) == 1)
    begun_at = harness.newest_step(here)
    here.await_that("steps that go on", lambda: harness.newest_step(here) > begun_at + 20)

    def halves() -> list[Path]:
        """Marks of removals, and payloads without a manifest."""
        payloads = [path for path in disk.rglob("*.safetensors") if not path.with_suffix(".json").exists()]
        return [*disk.rglob("doomed-*"), *payloads]

    here.await_that("removals that are finished", lambda: not halves() and len(_steps_on(disk)) <= 4)
    harness.release(here)
    assert here.end(launch) == contract.EXIT_OK, here.output()
    assert [event.fields["cause"] for event in harness.of_kind(here, "failure")] == [contract.CAUSE_CRASH]
    assert _steps_on(disk) == set(), "after its success the run's directory goes"
    harness.check(here)


def _steps_on(disk: Path) -> set[str]:
    return {path.name for path in disk.rglob("step-*")}


def test_launch_agent_killed_before_it_brings_a_replica_trains_on_and_brings_it_in_the_next_attempt(
    here: Place,
) -> None:
    """Each new agent of node 0 dies in the first attempt too, as soon as it is on the wire."""
    args = (str(harness.MANY_STEPS), "0.1")
    launch = here.launch("--nodes", "2", "--patience", "60", args=args, KTRAIN_FAULTS="kill@replica.pull,rank=1")

    here.await_that("the agent's death", lambda: harness.of_kind(here, "agent_lost"))
    at = harness.newest_step(here)
    here.await_that("steps that go on", lambda: harness.newest_step(here) > at + 20)
    assert harness.of_kind(here, "failure") == []
    assert harness.newest_committed(here, contract.TIER_PEER) == 0, "one of the two replicas is missing"
    assert _kill(here.processes("ktrain.run.worker ")[0].pid), "which ends the attempt, and with it the plan"
    here.await_that("replicas", lambda: harness.newest_committed(here, contract.TIER_PEER, attempt=2))

    harness.release(here)
    assert here.end(launch) == contract.EXIT_OK, here.output()
    assert {said.fields["node"] for said in harness.of_kind(here, "agent_lost")} == {"node-0"}
    assert [event.fields["cause"] for event in harness.of_kind(here, "failure")] == [contract.CAUSE_CRASH]
    assert [event.fields["tier"] for event in harness.of_kind(here, "restored")] == [contract.TIER_MEMORY]
    harness.check(here)


def test_launch_agent_killed_as_it_reads_parts_for_a_restore_fails_no_rank_which_reads_the_bucket(here: Place) -> None:
    """The rank on the new node wants the shares of all ranks; foreign ones take no slot there, so parts are read."""
    spec = "lose-node@step=20,node=1,after=peer"
    options = ("--nodes", "3", "--patience", "60", "--fault", spec)
    args = (str(harness.MANY_STEPS), "0.1", "copies")
    launch = here.launch(*options, args=args, KTRAIN_FAULTS="kill@read.parts,epoch=2")

    here.await_that("the restore", lambda: harness.of_kind(here, "restored"))
    begun_at = harness.newest_step(here)
    here.await_that("steps that go on", lambda: harness.newest_step(here) > begun_at + 20)
    harness.release(here)

    assert here.end(launch) == contract.EXIT_OK, here.output()
    assert {said.fields["node"] for said in harness.of_kind(here, "agent_lost")} == {"node-1"}
    assert [event.fields["cause"] for event in harness.of_kind(here, "failure")] == [contract.CAUSE_NODE_LOST]
    (restored,) = harness.of_kind(here, "restored")
    assert restored.fields["tiers"] == {"0": "memory", "1": "bucket", "2": "memory"}
    harness.check(here, mesh="copies")


def test_launch_ray_killed_on_all_nodes_trains_on_and_replicates_in_a_new_cluster(here: Place) -> None:
    launch = here.launch("--nodes", "2", args=(str(harness.MANY_STEPS), "0.1"))
    here.await_that("replicas", lambda: harness.newest_committed(here, contract.TIER_PEER))

    killed = 0
    for found in invariants.find_processes(str(here.root)):
        if "raylet" in found.command or "gcs_server" in found.command:
            killed += _kill(found.pid)
    assert killed >= 3, "two raylets or more, and the cluster's own store"

    here.await_that("word of it", lambda: _tier_events(here, contract.TIER_PEER) == ["tier_failed", "tier_recovered"])
    before = harness.newest_step(here)
    here.await_that("new replicas", lambda: harness.newest_committed(here, contract.TIER_PEER) > before)
    harness.release(here)
    assert here.end(launch) == contract.EXIT_OK, here.output()
    assert harness.of_kind(here, "failure") == []
    assert _tier_events(here, contract.TIER_PEER) == ["tier_failed", "tier_recovered"]
    harness.check(here)


def test_launch_bucket_folder_gone_for_a_while_trains_on_and_drains_again(here: Place) -> None:
    launch = here.launch("--nodes", "2", args=(str(harness.MANY_STEPS), "0.1"))
    here.await_that("a commit", lambda: harness.newest_committed(here, contract.TIER_BUCKET))

    checkpoints, aside = here.run / contract.CHECKPOINTS_DIR, here.run / "aside"
    aside.touch()
    _exchange(checkpoints, aside)  # where a file lies no folder can be made
    here.await_that("word of it", lambda: _tier_events(here, contract.TIER_BUCKET) == ["tier_failed"])
    at = harness.newest_step(here)
    here.await_that("steps that go on", lambda: harness.newest_step(here) > at + 20)
    _exchange(checkpoints, aside)
    aside.unlink()
    here.await_that("word of it", lambda: _tier_events(here, contract.TIER_BUCKET) == ["tier_failed", "tier_recovered"])

    harness.release(here)
    assert here.end(launch) == contract.EXIT_OK, here.output()
    assert harness.of_kind(here, "failure") == [] and len(harness.of_kind(here, "attempt_started")) == 1
    assert harness.newest_committed(here, contract.TIER_BUCKET) == harness.newest_step(here)
    harness.check(here)


@pytest.mark.skipif(find_program("rclone") is None, reason="rclone is not installed")
def test_launch_s3_server_stopped_for_a_while_trains_on_and_drains_again(here: Place) -> None:
    with RcloneServer() as server:
        server.make_bucket("runs")
        run = "s3://runs/stopped"
        command = ("--nodes", "2", "--run", run, "--patience", "12")
        launch = here.launch(*command, args=(str(harness.MANY_STEPS), "0.1"), **server.environment())

        def said() -> list[Event]:
            folder = server.folder / "buckets" / "runs" / "stopped" / contract.EVENTS_DIR
            lines = [
                line
                for path in sorted(folder.glob("*.jsonl"), key=_sequence)
                for line in path.read_bytes().splitlines()
            ]
            return events.parse_lines(lines)

        def steps() -> int:
            return max((event.fields["step"] for event in said() if event.kind == "step"), default=0)

        def bucket() -> list[str]:
            kinds = ("tier_failed", "tier_recovered")
            return [event.kind for event in said() if event.kind in kinds and event.fields["tier"] == "bucket"]

        here.await_that("a commit", lambda: any(event.fields.get("tier") == "bucket" for event in said()))
        at = steps()
        server.pause()
        SYSTEM_CLOCK.sleep(25.0)  # its calls must run into their deadlines meanwhile
        server.resume()
        here.await_that("recovery", lambda: bucket() == ["tier_failed", "tier_recovered"])
        harness.release(here)
        assert here.end(launch) == contract.EXIT_OK, here.output()

        found = said()
        assert [event for event in found if event.kind == "failure"] == []
        assert steps() > at + 50, "training went on while the server was stopped"
        wrong = [
            *invariants.check_losses(found),
            *invariants.check_order(found),
            *invariants.check_said_once(found),
            *invariants.check_steps(found, steps()),
            *harness.check_as_untouched(found),
            *harness.await_nothing_runs(here),
            *invariants.check_volume_freed(here.volume),
        ]
        assert wrong == []


def _sequence(path: os.PathLike[str]) -> str:
    return os.fspath(path).rpartition("/")[2].split("-")[1]


def _exchange(first: Path, second: Path) -> None:
    """Swaps two names at once: between two renames the drain would make its folder anew."""
    swap = ctypes.CDLL(None, use_errno=True).renameat2
    if swap(_HERE, bytes(first), _HERE, bytes(second), _RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), f"exchange {first} and {second}")


def _kill(pid: int) -> int:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return 0
    return 1


def _tier_events(here: Place, tier: str) -> list[str]:
    kinds = ("tier_failed", "tier_recovered")
    return [event.kind for event in harness.read_events(here) if event.kind in kinds and event.fields["tier"] == tier]
