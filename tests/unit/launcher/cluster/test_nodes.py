"""Nodes that are lost, and what becomes of their pods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ktrain.errors import ConfigError
from ktrain.launcher.cluster.nodes import OUT_OF_SERVICE
from tests.unit.launcher.cluster.making import JOB, JOB_SET, NODE, POD, Made, Object, conditions, job_spec, jobset_spec
from tests.unit.launcher.cluster.making import pod_spec as plain_spec

TOLERATIONS = [
    {"key": f"node.kubernetes.io/{state}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 30}
    for state in ("not-ready", "unreachable")
]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def tolerant(**more: Any) -> Object:
    return plain_spec(tolerations=TOLERATIONS, **more)


def lose(made: Made, prefix: str) -> str:
    """Loses the node of a pod; returns its name."""
    name = str(made.pod(prefix)["spec"]["nodeName"])
    made.cluster.nodes.lose(name)
    made.settle()
    return name


def test_node_lost_is_unreachable_after_its_silence_and_its_pod_goes_after_its_toleration(made: Made) -> None:
    made.create(JOB, "a", job_spec(2, pod=tolerant(), backoffLimit=9))
    old = made.pod("a-0")
    name = lose(made, "a-0")
    made.pass_time(39)
    assert conditions(made.get(NODE, name))["Ready"][0] == "True"
    made.pass_time(1)
    unknown = ("Unknown", "NodeStatusUnknown", "Kubelet stopped posting node status.")
    assert conditions(made.get(NODE, name))["Ready"] == unknown
    assert [taint["effect"] for taint in made.get(NODE, name)["spec"]["taints"]] == ["NoSchedule", "NoExecute"]
    assert conditions(made.get(POD, old["metadata"]["name"]))["Ready"] == ("False", "", "")
    made.pass_time(29)
    assert "DisruptionTarget" not in conditions(made.get(POD, old["metadata"]["name"]))
    made.pass_time(1)
    made.pass_time(10)
    ghost = made.get(POD, old["metadata"]["name"])
    words = "Taint manager: deleting due to NoExecute taint"
    assert conditions(ghost)["DisruptionTarget"] == ("True", "DeletionByTaintManager", words)
    assert (ghost["status"]["phase"], "deletionTimestamp" in ghost["metadata"]) == ("Running", True)
    replacement = [pod for pod in made.pods("a-0") if pod["metadata"]["uid"] != old["metadata"]["uid"]]
    assert [pod["status"]["phase"] for pod in replacement] == ["Running"]
    assert replacement[0]["spec"]["nodeName"] != name


def test_node_lost_under_policy_failed_holds_the_job_until_out_of_service(made: Made) -> None:
    spec = jobset_spec(("workers", job_spec(2, pod=tolerant())), failurePolicy={"maxRestarts": 1})
    made.create(JOB_SET, "a", spec)
    name = lose(made, "a-workers-0-0")
    made.pass_time(40)
    made.pass_time(30)
    job = made.get(JOB, "a-workers-0")
    assert set(conditions(job)) == {"FailureTarget"}
    assert job["status"]["terminating"] == 1
    assert made.get(JOB_SET, "a")["status"]["restarts"] == 0
    taint = {"key": OUT_OF_SERVICE, "value": "nodeshutdown", "effect": "NoExecute"}
    made.store.mutate(NODE, None, name, lambda node: node["spec"]["taints"].append(taint))
    made.settle()
    assert made.get(JOB_SET, "a")["status"]["restarts"] == 1
    assert len(made.runtime.running()) == 2


def test_node_that_comes_back_ends_its_ghosts_and_takes_pods_again(made: Made) -> None:
    made.create(JOB, "a", job_spec(1, pod=tolerant(), backoffLimit=9))
    old = made.pod("a-0")["metadata"]["uid"]
    name = lose(made, "a-0")
    made.pass_time(40)
    made.pass_time(30)
    made.pass_time(10)
    assert len(made.pods()) == 2
    made.cluster.nodes.restore(name)
    made.settle()
    assert [pod["metadata"]["uid"] == old for pod in made.pods()] == [False]
    assert conditions(made.get(NODE, name))["Ready"][0] == "True"
    assert not made.get(NODE, name)["spec"]["taints"]


def test_node_back_before_it_was_missed_fails_pods_that_may_not_restart(made: Made) -> None:
    made.create(POD, "never", plain_spec())
    made.create(POD, "again", plain_spec(restartPolicy="OnFailure"))
    for prefix in ("never", "again"):
        made.cluster.nodes.restore(lose(made, prefix))
        made.settle()
    never = made.get(POD, "never")["status"]
    assert never["phase"] == "Failed"
    assert never["containerStatuses"][0]["state"]["terminated"]["reason"] == "ContainerStatusUnknown"
    again = made.get(POD, "again")["status"]
    assert (again["phase"], again["containerStatuses"][0]["restartCount"]) == ("Running", 1)


def test_node_removed_has_its_pods_collected(made: Made) -> None:
    made.create(POD, "p", plain_spec())
    made.store.delete(NODE, None, lose(made, "p"))
    made.settle()
    assert not made.pods()


def test_node_lost_takes_its_folders_along(made: Made) -> None:
    volumes = [{"name": "m", "emptyDir": {"medium": "Memory"}}, {"name": "h", "hostPath": {"path": "/var/x"}}]
    mounts = [{"name": "m", "mountPath": "/m"}, {"name": "h", "mountPath": "/h"}]
    made.create(POD, "p", plain_spec(container={"volumeMounts": mounts}, volumes=volumes))
    root = Path(made.process("p").command.environment["KTRAIN_ROOT"])
    places = [(root / name).resolve() for name in ("m", "h")]
    assert all(place.is_dir() for place in places)
    lose(made, "p")
    assert not any(place.exists() for place in places)


@pytest.mark.parametrize("act", ["lose", "restore"])
def test_node_unknown_is_refused(made: Made, act: str) -> None:
    with pytest.raises(ConfigError, match="node n9: expected one of"):
        getattr(made.cluster.nodes, act)("n9")
