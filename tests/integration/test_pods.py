"""The processes of a rendered job, as its manifests start them: trained to the end, through deaths of pods."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ktrain.base import contract
from tests.integration import launch_worker
from tests.integration.launching import place
from tests.integration.pods import Cluster, cluster

pytestmark = pytest.mark.timeout(400)


@contextmanager
def job(*command: str, **fields: Any) -> Iterator[Cluster]:
    """The small training on two nodes, all its pods running."""
    with place() as here:
        code = here.root / "code"
        code.mkdir()
        text = Path(launch_worker.__file__).read_text()
        (code / "train.py").write_text(f'{text}    print("trained to the end")\n')
        with cluster(here, command, code, nodes=2, limits={"patience_s": 20.0}, **fields) as made:
            for pod in (made.head, *made.workers):
                made.create(pod)
            yield made


def await_event(pods: Cluster, kind: str, **fields: Any) -> None:
    """Waits, while the pods are tended, for an event with these fields."""

    def there() -> bool:
        assert pods.tend() is None, pods.logs()
        return any(fields.items() <= event.items() for event in pods.here.events(kind))

    pods.here.await_that(f"{kind} {fields}", there)


def assert_trained(pods: Cluster, steps: int) -> None:
    """To the end, with the losses of a run that nobody touched; every process ended as it should."""
    assert pods.run() == contract.EXIT_OK, pods.logs()
    expected = launch_worker.reference(steps)
    found = [(event["step"], event["loss"]) for event in pods.here.events("step")]
    assert {step for step, _ in found} == set(expected)
    assert [pair for pair in found if pair[1] != expected[pair[0]]] == []
    for pod in pods.workers:
        assert pod.processes["trainer"].wait(30) == contract.EXIT_OK
        assert pods.end(pod, signal.SIGTERM)["agent"] == contract.EXIT_OK
    pods.here.await_nothing_left()


@pytest.mark.slow
def test_pods_lose_a_trainer_and_an_agent_resume_from_memory() -> None:
    with job("train.py", "80", "0.15") as pods:
        await_event(pods, "step", step=10)
        pods.workers[1].processes["trainer"].send_signal(signal.SIGKILL)
        await_event(pods, "restored")
        await_event(pods, "step", attempt=2, step=20)
        pods.workers[0].processes["agent"].send_signal(signal.SIGKILL)

        assert_trained(pods, 80)

        assert [event["tier"] for event in pods.here.events("restored")] == [contract.TIER_MEMORY]
        (failure,) = pods.here.events("failure")
        assert (failure["cause"], failure["node"]) == (contract.CAUSE_CRASH, "node-1")


@pytest.mark.slow
def test_pods_of_head_and_worker_are_made_anew_another_head_adopts_and_ranks_read_from_peers() -> None:
    with job("train.py", "200", "0.15") as pods:
        await_event(pods, "step", step=10)
        assert pods.end(pods.head, signal.SIGTERM)["head"] == contract.EXIT_ENDED
        pods.create(pods.head)
        await_event(pods, "head_adopted")
        assert pods.here.events("restored") == [], "nobody was stopped"
        assert json.loads((pods.here.run / contract.HEAD_FILE).read_text())["heads"] == 2
        await_event(pods, "committed", tier=contract.TIER_PEER)
        pods.replace(pods.workers[1])

        assert_trained(pods, 200)

        assert [event["tier"] for event in pods.here.events("restored")] == [contract.TIER_PEER]
        assert [event["cause"] for event in pods.here.events("failure")] == [contract.CAUSE_NODE_LOST]


@pytest.mark.slow
def test_pods_with_a_script_that_is_not_there_end_at_once_as_bad_input() -> None:
    with job("absent.py") as pods:
        assert pods.run() == contract.EXIT_USAGE, pods.logs()

        (ended,) = pods.here.events("run_ended")
        assert "absent.py" in ended["reason"]


@pytest.mark.slow
def test_pods_of_a_node_told_to_end_cost_no_budget_and_the_spare_goes_on_from_peers() -> None:
    with job("train.py", "120", "0.15", spares=1) as pods:
        await_event(pods, "committed", tier=contract.TIER_PEER)
        at = {node: int(node[-1]) for node in pods.here.events("attempt_started")[0]["nodes"]}
        taken = sorted(at)[-1]
        pods.replace(pods.workers[at[taken]], signal.SIGTERM)

        assert_trained(pods, 120)

        (failure,) = pods.here.events("failure")
        assert (failure["cause"], failure["node"]) == (contract.CAUSE_NODE_LOST, taken)
        assert "told to end" in failure["reason"]
        assert json.loads((pods.here.run / contract.HEAD_FILE).read_text())["budgets"]["spent"] == {}
        assert taken not in pods.here.events("attempt_started")[1]["nodes"]
        assert [event["tier"] for event in pods.here.events("restored")] == [contract.TIER_PEER]
        shown = "".join(pods.log(pod, "trainer") for pod in pods.workers)
        assert "[0] trained to the end\n" in shown and "[1] trained to the end\n" in shown
