"""A pod on its node: order of containers, probes, restarts, grace, status and refusals."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

import pytest

from ktrain.errors import NotFoundError
from ktrain.launcher.cluster.nodes import evict
from ktrain.launcher.cluster.pod_run import Delays
from ktrain.launcher.cluster.resources import CONFIG_MAP, SECRET
from tests.unit.launcher.cluster.making import POD, SPACE, Made, Object, conditions, pod_spec

AGENT: dict[str, Any] = {"name": "agent", "command": ["agent"], "restartPolicy": "Always"}
CODE: dict[str, Any] = {"name": "code", "command": ["unpack"]}
PROBE: dict[str, Any] = {"exec": {"command": ["test"]}, "periodSeconds": 2, "failureThreshold": 2}


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def running(made: Made) -> list[str]:
    return [item.container for item in made.runtime.running()]


def status(made: Made, container: str = "main") -> Object:
    found = made.get(POD, "p")["status"]
    entries = (*found.get("initContainerStatuses", ()), *found["containerStatuses"])
    return next(entry for entry in entries if entry["name"] == container)


def test_pod_starts_init_then_sidecar_then_main_and_ends_in_reverse(tmp_path: Path) -> None:
    ready = False
    made = Made(tmp_path, on_probe=lambda _: ready, exit_on_terminate=None)
    spec = pod_spec(initContainers=[CODE, {**AGENT, "startupProbe": {**PROBE, "failureThreshold": 99}}])
    made.create(POD, "p", spec)
    assert running(made) == ["code"]
    waits = conditions(made.get(POD, "p"))["Initialized"]
    assert waits == ("False", "ContainersNotInitialized", "containers with incomplete status: [code agent]")
    made.exit("p", 0, "code")
    made.pass_time(10)
    assert running(made) == ["agent"]
    assert made.get(POD, "p")["status"]["phase"] == "Pending"
    ready = True
    made.pass_time(2)
    made.pass_time(1)
    assert running(made) == ["agent", "main"]
    assert made.get(POD, "p")["status"]["phase"] == "Running"
    assert conditions(made.get(POD, "p"))["Ready"][0] == "True"
    made.store.delete(POD, SPACE, "p")
    made.settle()
    agent, main = made.runtime.running()
    assert (agent.asked_to_end, main.asked_to_end) == (False, True)
    made.exit("p", 143)
    assert agent.asked_to_end
    made.pass_time(5)
    assert not running(made)
    with pytest.raises(NotFoundError):
        made.get(POD, "p")


def test_pod_main_ends_stops_sidecar_and_tells_the_exit_code(made: Made) -> None:
    made.create(POD, "p", pod_spec(initContainers=[AGENT]))
    made.exit("p", 3)
    assert not running(made)
    pod = made.get(POD, "p")
    assert pod["status"]["phase"] == "Failed"
    assert status(made)["state"]["terminated"]["exitCode"] == 3
    assert conditions(pod)["Ready"] == ("False", "PodFailed", "")
    assert conditions(pod)["PodReadyToStartContainers"][0] == "False"


def test_pod_main_succeeds_is_succeeded_whatever_the_sidecar_says(made: Made) -> None:
    made.create(POD, "p", pod_spec(initContainers=[AGENT]))
    made.exit("p", 0)
    assert made.get(POD, "p")["status"]["phase"] == "Succeeded"
    assert conditions(made.get(POD, "p"))["Initialized"] == ("True", "PodCompleted", "")


def test_pod_init_container_fails_ends_the_pod(made: Made) -> None:
    made.create(POD, "p", pod_spec(initContainers=[CODE]))
    made.exit("p", 1, "code")
    assert made.get(POD, "p")["status"]["phase"] == "Failed"
    assert [item.container for item in made.runtime.started] == ["code"]


def test_pod_container_restarts_at_once_then_waits_in_back_off(made: Made) -> None:
    made.create(POD, "p", pod_spec(restartPolicy="OnFailure"))
    made.exit("p", 1)
    assert (status(made)["restartCount"], running(made)) == (1, ["main"])
    assert status(made)["lastState"]["terminated"]["exitCode"] == 1
    made.exit("p", 1)
    waiting = status(made)["state"]["waiting"]
    uid = made.get(POD, "p")["metadata"]["uid"]
    assert waiting["reason"] == "CrashLoopBackOff"
    assert waiting["message"] == f"back-off 10s restarting failed container=main pod=p_{SPACE}({uid})"
    made.pass_time(9)
    assert not running(made)
    made.pass_time(1)
    assert (status(made)["restartCount"], running(made)) == (2, ["main"])
    made.exit("p", 0)
    assert made.get(POD, "p")["status"]["phase"] == "Succeeded"


def test_pod_restart_rules_restart_all_but_one_code(made: Made) -> None:
    rules = [{"action": "Restart", "exitCodes": {"operator": "NotIn", "values": [0, 74]}}]
    spec = pod_spec(container={"restartPolicy": "Never", "restartPolicyRules": rules}, initContainers=[AGENT])
    made.create(POD, "p", spec)
    agent = made.process("p", "agent")
    made.exit("p", 1)
    assert made.process("p", "agent") is agent
    assert status(made)["restartCount"] == 1
    made.exit("p", 74)
    assert made.get(POD, "p")["status"]["phase"] == "Failed"


def test_pod_restart_all_containers_begins_anew(made: Made) -> None:
    rules = [{"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": [88]}}]
    spec = pod_spec(container={"restartPolicyRules": rules}, initContainers=[CODE, AGENT])
    made.create(POD, "p", spec)
    made.exit("p", 0, "code")
    made.pass_time(0)
    made.exit("p", 88)
    assert running(made) == ["code"]
    made.exit("p", 0, "code")
    assert running(made) == ["agent", "main"]
    assert [status(made, name)["restartCount"] for name in ("code", "agent", "main")] == [1, 1, 1]


def test_pod_sidecar_dies_is_restarted_and_main_goes_on(made: Made) -> None:
    made.create(POD, "p", pod_spec(initContainers=[AGENT]))
    main = made.process("p")
    made.exit("p", 137, "agent")
    assert made.process("p") is main
    assert status(made, "agent")["restartCount"] == 1


def test_pod_startup_probe_fails_too_often_kills_the_container(tmp_path: Path) -> None:
    made = Made(tmp_path, on_probe=lambda _: False)
    made.create(POD, "p", pod_spec(container={"startupProbe": PROBE}))
    for _ in range(4):
        made.pass_time(2)
    assert status(made)["state"]["terminated"]["exitCode"] == 137
    assert made.get(POD, "p")["status"]["phase"] == "Failed"


@pytest.mark.parametrize(("probe_s", "asked"), [(math.inf, 1), (3.0, 1), (0.5, 4)])
def test_pod_probe_is_asked_as_often_as_the_cluster_is_quick_and_fails_no_sooner(
    tmp_path: Path, probe_s: float, asked: int
) -> None:
    answers: list[str] = []

    def refuse(container: str) -> bool:
        answers.append(container)
        return False

    made = Made(tmp_path, on_probe=refuse, delays=Delays(probe_s=probe_s))
    made.create(POD, "p", pod_spec(container={"startupProbe": {**PROBE, "failureThreshold": 3}}))
    for _ in range(4):
        made.pass_time(0.5)
    assert len(answers) == 1 + asked
    assert running(made) == ["main"], "two seconds in, of four and more"
    for _ in range(8):
        made.pass_time(0.5)
    assert status(made)["state"]["terminated"]["exitCode"] == 137


def test_pod_that_ignores_sigterm_is_killed_after_its_grace(tmp_path: Path) -> None:
    made = Made(tmp_path, exit_on_terminate=None)
    made.create(POD, "p", pod_spec())
    evict(made.store, made.get(POD, "p"))
    made.settle()
    disrupted = ("True", "EvictionByEvictionAPI", "Eviction API: evicting")
    assert conditions(made.get(POD, "p"))["DisruptionTarget"] == disrupted
    made.pass_time(4)
    assert running(made) == ["main"]
    made.pass_time(1)
    assert not made.pods()


def test_pod_deleted_by_force_is_killed(tmp_path: Path) -> None:
    made = Made(tmp_path, exit_on_terminate=None)
    made.create(POD, "p", pod_spec(terminationGracePeriodSeconds=60))
    places = made.cluster.run_of(SPACE, "p").places
    made.store.delete(POD, SPACE, "p", grace_s=0)
    made.settle()
    assert not running(made)
    assert not places.pod.exists()


def test_pod_past_its_deadline_fails(made: Made) -> None:
    made.create(POD, "p", pod_spec(activeDeadlineSeconds=30))
    made.pass_time(30)
    assert made.get(POD, "p")["status"]["reason"] == "DeadlineExceeded"
    assert made.get(POD, "p")["status"]["phase"] == "Failed"


def test_pod_waits_for_its_config_map_and_secret(made: Made) -> None:
    env = [{"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "token"}}}]
    mounts = [{"name": "job", "mountPath": "/ktrain/job"}]
    container = {"env": env, "volumeMounts": mounts, "args": ["/ktrain/job/job.json", "/ktrain/jobs"]}
    made.create(POD, "p", pod_spec(container=container, volumes=[{"name": "job", "configMap": {"name": "c"}}]))
    assert status(made)["state"]["waiting"] == {"reason": "ContainerCreating", "message": 'configmap "c" not found'}
    made.store.create(CONFIG_MAP, {"metadata": {"name": "c", "namespace": SPACE}, "data": {"job.json": "{}"}})
    made.settle()
    assert status(made)["state"]["waiting"] == {
        "reason": "CreateContainerConfigError",
        "message": 'secret "s" not found',
    }
    encoded = base64.b64encode(b"secret").decode()
    made.store.create(SECRET, {"metadata": {"name": "s", "namespace": SPACE}, "data": {"token": encoded}})
    made.settle()
    command = made.process("p").command
    assert command.environment["TOKEN"] == "secret"
    assert Path(command.argv[1]).read_text() == "{}"
    assert command.argv[2] == "/ktrain/jobs"


def test_pod_that_is_not_honoured_fails_by_name(made: Made) -> None:
    made.create(POD, "p", pod_spec(hostNetwork=True))
    found = made.get(POD, "p")["status"]
    assert (found["phase"], found["reason"]) == ("Failed", "NotHonoured")
    assert "spec.hostNetwork" in found["message"]
    assert not made.runtime.started


def test_pods_have_addresses_of_their_own(made: Made) -> None:
    for name in ("p", "q"):
        made.create(POD, name, pod_spec())
    addresses = {pod["status"]["podIP"] for pod in made.pods()}
    assert len(addresses) == 2
    assert all(address.startswith("127.77.") for address in addresses)


def test_pod_that_has_ended_keeps_its_log_and_frees_its_memory(made: Made) -> None:
    mounts = [{"name": "m", "mountPath": "/m"}]
    volumes = [{"name": "m", "emptyDir": {"medium": "Memory"}}]
    made.create(POD, "p", pod_spec(container={"volumeMounts": mounts}, volumes=volumes))
    command = made.process("p").command
    command.log.parent.mkdir(parents=True, exist_ok=True)
    command.log.write_text("words\n")
    memory = (Path(command.environment["KTRAIN_ROOT"]) / "m").resolve()
    assert memory.is_dir()
    made.exit("p", 0)
    assert not memory.exists()
    assert made.cluster.log(SPACE, "p", "main").read_text() == "words\n"
    with pytest.raises(NotFoundError, match="previous terminated container"):
        made.cluster.log(SPACE, "p", "main", previous=True)
