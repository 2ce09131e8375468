"""What holds for every job that is rendered: who may do what, who restarts what, where pods lie."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest

from ktrain.base import contract
from ktrain.errors import ConfigError
from ktrain.launcher import budget
from ktrain.launcher.code.ways import MOST_CARRIED
from ktrain.launcher.facts import ClusterFacts
from ktrain.launcher.quantity import parse_bytes
from ktrain.launcher.render import code as carrying
from ktrain.launcher.render import overlay
from ktrain.launcher.render.access import shown, token_secret
from ktrain.launcher.render.job import render
from tests.unit.launcher import setups
from tests.unit.launcher.test_spec import job

ROLES = ("head", "worker")
KEPT = ClusterFacts(restart_rules=True, message_patterns=True)
# https://kubernetes.io/docs/concepts/security/pod-security-standards, level restricted
_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def restricted_problems(pod: dict[str, Any]) -> Iterator[str]:
    """What the pod security level `restricted` would refuse, control by control."""
    yield from (name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name))
    for volume in pod["volumes"]:
        yield from (f"volume {kind}" for kind in set(volume) - {"name"} - _VOLUMES)
    security = pod["securityContext"]
    if security.get("runAsNonRoot") is not True or security.get("runAsUser") == 0:
        yield "root"
    if security.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "seccomp"
    for container in containers(pod):
        own = container["securityContext"]
        if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
            yield f"{container['name']}: privileges"
        if own["capabilities"]["drop"] != ["ALL"] or own["capabilities"].get("add"):
            yield f"{container['name']}: capabilities"
        yield from (f"{container['name']}: host port" for port in container.get("ports", []) if "hostPort" in port)


@pytest.mark.parametrize(("name", "role"), list(itertools.product(setups.NAMES, ROLES)))
def test_pod_passes_the_level_restricted(name: str, role: str) -> None:
    assert list(restricted_problems(setups.pod_of(setups.rendered(name).jobset, role))) == []


@pytest.mark.parametrize("name", setups.NAMES)
def test_token_of_the_cluster_is_mounted_by_the_agent_alone(name: str) -> None:
    jobset = setups.rendered(name).jobset
    holders = set()
    for role in ROLES:
        pod = setups.pod_of(jobset, role)
        assert pod["automountServiceAccountToken"] is False
        tokens = {
            volume["name"]
            for volume in pod["volumes"]
            if any("serviceAccountToken" in source for source in volume.get("projected", {}).get("sources", []))
        }
        holders |= {c["name"] for c in containers(pod) if tokens & {mount["name"] for mount in c["volumeMounts"]}}
    assert holders == {"agent"}


@pytest.mark.parametrize("name", setups.NAMES)
def test_devices_are_asked_for_by_the_trainer_alone(name: str) -> None:
    jobset = setups.rendered(name).jobset
    for role in ROLES:
        for container in containers(setups.pod_of(jobset, role)):
            limits = {key for key in container["resources"]["limits"] if "/" in key}
            assert container["name"] == "trainer" or not (limits or container["resources"].get("claims"))


@pytest.mark.parametrize("name", setups.NAMES)
def test_role_may_get_pods_and_nothing_else(name: str) -> None:
    roles = [item for item in setups.rendered(name).owned if item["kind"] == "Role"]

    assert [item["rules"] for item in roles] == [[{"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}]]


@pytest.mark.parametrize("name", setups.NAMES)
def test_names_and_labels_fit_what_they_name(name: str) -> None:
    longest = "n" * 40
    done = render(setups.read_spec(name, name=longest), setups.read_facts(name))
    for item in done.objects:
        assert len(item["metadata"]["name"]) <= 63
    for job_template in done.jobset["spec"]["replicatedJobs"]:
        pods = job_template["template"]["spec"]["completions"]
        host = f"{longest}-{job_template['name']}-{job_template['replicas'] - 1}-{pods - 1}"
        assert len(host) <= 63


def test_secret_values_stand_in_no_object_that_is_shown() -> None:
    spec = job(secrets=[{"env": "HF_TOKEN", "secret": "hub", "key": "token"}])
    secret = token_secret(spec, "hunter2")
    shown_all = json.dumps([shown(item) for item in (*render(spec, KEPT).objects, secret)])

    assert "hunter2" in json.dumps(secret) and "hunter2" not in shown_all
    assert '{"secretKeyRef": {"name": "hub", "key": "token"}}' in shown_all


def test_token_of_the_run_is_read_by_the_name_under_which_it_is_made() -> None:
    spec = job()
    secret = token_secret(spec, "t")
    for role in ROLES:
        pod = setups.pod_of(render(spec, KEPT).jobset, role)
        volume = next(volume for volume in pod["volumes"] if volume["name"] == "token")
        mount = next(m for m in containers(pod)[-1]["volumeMounts"] if m["name"] == "token")
        assert volume["secret"]["secretName"] == secret["metadata"]["name"]
        assert [f"{mount['mountPath']}/{key}" for key in secret["stringData"]] == [contract.POD_TOKEN_FILE]


# Who restarts what


def head_exits(action: str) -> set[int]:
    spec = setups.job_of(render(job(), KEPT).jobset, "head")["spec"]
    return {
        code
        for rule in spec["podFailurePolicy"]["rules"]
        if rule["action"] == action
        for code in rule.get("onExitCodes", {}).get("values", [])
    }


def test_head_every_final_code_fails_the_index_and_the_two_others_the_job() -> None:
    known = {value for name, value in vars(contract).items() if name.startswith("EXIT_")}
    known.remove(contract.EXIT_UNFINISHED)  # of a command that waits for a job

    others = {contract.EXIT_OK, contract.EXIT_BAD_NODE, contract.EXIT_ENDED}  # done; of a trainer; another head follows
    assert head_exits("FailIndex") | head_exits("FailJob") | others == known
    assert head_exits("FailJob") == {contract.EXIT_AGAIN, contract.EXIT_AGAIN_FREE}
    assert not head_exits("FailIndex") & head_exits("FailJob")


def test_job_set_fails_on_a_verdict_and_makes_pods_anew_otherwise() -> None:
    policy = render(job(limits={"max_restarts": 7}), KEPT).jobset["spec"]["failurePolicy"]
    actions = [(rule["action"], tuple(rule["onJobFailureReasons"])) for rule in policy["rules"]]

    assert policy["maxRestarts"] == 7
    assert actions[0] == ("RestartJobSetAndIgnoreMaxRestarts", ("PodFailurePolicy",))
    assert actions[1] == ("RestartJobSet", ("PodFailurePolicy",))
    assert actions[2][0] == "FailJobSet" and "PodFailurePolicy" not in actions[2][1]
    assert all(rule["targetReplicatedJobs"] == ["head"] for rule in policy["rules"])


@pytest.mark.parametrize("known", [ClusterFacts(), ClusterFacts(message_patterns=False)])
def test_job_set_leaves_no_restart_uncounted_where_patterns_are_pruned(known: ClusterFacts) -> None:
    """A rule whose pattern was pruned matches every failure of its reason."""
    rules = render(job(), known).jobset["spec"]["failurePolicy"]["rules"]

    assert [rule["name"] for rule in rules] == ["again", "verdict"]


def transcripts_messages() -> set[str]:
    path = setups.TRANSCRIPTS / "jobset-failure-rules.json"
    if not path.is_file():
        pytest.skip(f"the recorded answers of a real server are not at {setups.TRANSCRIPTS}")

    def strings(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from strings(item)

    return {text for text in strings(json.loads(path.read_text())) if "failed with exit code" in text}


def test_job_set_pattern_matches_the_message_of_a_real_server_for_its_code_alone() -> None:
    import re

    rule = render(job(), KEPT).jobset["spec"]["failurePolicy"]["rules"][0]
    [pattern] = rule["onJobFailureMessagePatterns"]
    messages = transcripts_messages()
    ours = {re.sub(r"exit code \d+", f"exit code {code}", text) for text in messages for code in (75, 76, 176, 760)}

    assert messages
    assert {re.search(r"exit code (\d+)", text)[1] for text in ours if re.search(pattern, text)} == {"76"}


@pytest.mark.parametrize("name", setups.NAMES)
def test_workers_never_end_the_job_and_never_wait_for_a_silent_node(name: str) -> None:
    worker = setups.job_of(setups.rendered(name).jobset, "worker")["spec"]
    pod = worker["template"]["spec"]
    gone = {
        item["key"]: item.get("tolerationSeconds") for item in pod["tolerations"] if item["key"].startswith("node.")
    }

    assert worker["backoffLimit"] == 2**31 - 1 and "podFailurePolicy" not in worker
    assert worker["podReplacementPolicy"] == "TerminatingOrFailed"
    assert gone == {"node.kubernetes.io/not-ready": 30, "node.kubernetes.io/unreachable": 30}


def test_trainer_restarts_in_place_except_for_a_bad_node_where_rules_are_kept() -> None:
    pod = setups.pod_of(render(job(), KEPT).jobset, "worker")
    [rule] = pod["containers"][0]["restartPolicyRules"]

    assert pod["restartPolicy"] == "Never"
    assert rule["exitCodes"] == {"operator": "NotIn", "values": [contract.EXIT_OK, contract.EXIT_BAD_NODE]}


def test_trainer_restarts_in_place_always_where_rules_are_not_kept() -> None:
    pod = setups.pod_of(render(job(), ClusterFacts()).jobset, "worker")

    assert pod["restartPolicy"] == "OnFailure" and "restartPolicyRules" not in pod["containers"][0]


def test_trainer_starts_only_after_its_agent_made_the_ready_file() -> None:
    pod = setups.pod_of(render(job(limits={"gang_wait_s": 900}), KEPT).jobset, "worker")
    [agent] = [c for c in pod["initContainers"] if c["name"] == "agent"]

    assert agent["restartPolicy"] == "Always"
    assert agent["startupProbe"]["exec"]["command"][-1] == contract.POD_READY_FILE
    assert agent["startupProbe"]["periodSeconds"] * agent["startupProbe"]["failureThreshold"] >= 900


# Memory


@pytest.mark.parametrize("name", setups.NAMES)
def test_memory_limits_hold_what_each_container_writes(name: str) -> None:
    spec = setups.read_spec(name)
    pod = setups.pod_of(setups.rendered(name).jobset, "worker")
    size = budget.memory_budget(spec)
    limits = {c["name"]: parse_bytes(c["resources"]["limits"]["memory"], name="") for c in containers(pod)}
    volumes = {
        volume["name"]: parse_bytes(volume["emptyDir"]["sizeLimit"], name="")
        for volume in pod["volumes"]
        if volume.get("emptyDir", {}).get("medium") == "Memory"
    }

    assert limits["trainer"] >= size.trainer + size.own + volumes["shm"]
    assert limits["agent"] >= size.kept + volumes["wire"]
    assert volumes.get("memory", size.volume) >= size.own + size.kept
    assert size.own >= 4 * spec.memory.state


def test_memory_keeps_no_copies_where_there_is_no_peer() -> None:
    assert budget.num_replicas(job(nodes=1)) == 0
    assert budget.num_replicas(job(nodes=2, memory={"state": "1Gi", "replicas": 3})) == 1
    assert budget.num_replicas(job(tpu="v6e:4x4")) == 0  # four hosts, one slice: lost together
    assert budget.num_replicas(job(tpu="v6e:4x4", slices=2)) == 1


def test_grace_is_a_flush_and_a_half_within_the_notice_of_spot_nodes() -> None:
    saving = {"bucket_bytes_per_s": "1Gi"}
    assert budget.grace_s(job(memory={"state": "100Gi"}, saving=saving)) == 150
    assert budget.grace_s(job(memory={"state": "1Gi"}, saving=saving)) == 30
    spot = {"spot": "workers", "provider": "gke"}
    assert budget.grace_s(job(memory={"state": "100Gi"}, saving=saving, placement=spot)) == 25


# Places


def test_workers_lie_on_different_machines_unless_they_may_share() -> None:
    def apart(**changes: Any) -> bool:
        pod = setups.pod_of(render(job(**changes), KEPT).jobset, "worker")
        return "podAntiAffinity" in pod.get("affinity", {})

    assert apart(nodes=2) and apart(nodes=1, spares=1)
    assert not apart(nodes=1) and not apart(nodes=2, placement={"share_nodes": True})


def test_suspected_nodes_are_avoided_on_every_way_to_a_device() -> None:
    spec = job(accelerator="h100:8", placement={"avoid_nodes": ["bad-1"]})
    jobset = render(spec, KEPT).jobset
    avoided = {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": ["bad-1"]}
    for role in ROLES:
        affinity = setups.pod_of(jobset, role)["affinity"]["nodeAffinity"]
        terms = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        assert terms and all(avoided in term["matchExpressions"] for term in terms)


def test_spot_workers_leave_the_head_on_demand() -> None:
    jobset = render(job(placement={"spot": "workers", "provider": "karpenter"}), KEPT).jobset
    [term] = setups.pod_of(jobset, "head")["affinity"]["nodeAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"
    ]["nodeSelectorTerms"]

    assert term["matchExpressions"] == [{"key": "karpenter.sh/capacity-type", "operator": "NotIn", "values": ["spot"]}]
    assert setups.pod_of(jobset, "worker")["nodeSelector"] == {"karpenter.sh/capacity-type": "spot"}


def test_topology_that_the_queue_lacks_is_not_asked_for() -> None:
    spec = setups.read_spec("02-kueue-4x8-h100")
    known = setups.read_facts("02-kueue-4x8-h100").to_value()

    def annotations(**changes: Any) -> dict[str, str]:
        jobset = render(spec, ClusterFacts.from_value({**known, **changes})).jobset
        found: dict[str, str] = setups.job_of(jobset, "worker")["spec"]["template"]["metadata"].get("annotations", {})
        return found

    assert list(annotations()) == ["kueue.x-k8s.io/podset-required-topology"]
    assert annotations(queue_levels=["kubernetes.io/hostname"]) == {}


# What the cluster cannot do


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"accelerator": "h200:8,h100:8"}, "does not serve resource.k8s.io"),
        ({"accelerator": "h100:8", "fabric": "mrdma:8"}, "fabric 'mrdma:8'"),
        ({"memory": {"state": "1Gi", "scope": "mtc"}}, "memory.scope 'mtc'"),
        ({"code": {"image": "a:1"}}, "code.image"),
    ],
)
def test_render_refuses_what_the_cluster_surely_lacks(changes: dict[str, Any], hint: str) -> None:
    lacks = ClusterFacts(served=frozenset(), csi_drivers=(), image_volumes=False)
    with pytest.raises(ConfigError, match=hint):
        render(job(**changes), lacks)
    render(job(**changes), ClusterFacts())  # not known is not absent


def test_claim_pairs_each_accelerator_with_the_network_device_of_its_root() -> None:
    [claim] = [
        item
        for item in render(job(accelerator="h100:2", fabric="mrdma:2"), ClusterFacts()).owned
        if item["kind"] == "ResourceClaimTemplate"
    ]
    devices = claim["spec"]["spec"]["devices"]

    assert [request["name"] for request in devices["requests"]] == ["device-0", "device-1", "nic-0", "nic-1"]
    assert all(request["exactly"]["count"] == 1 for request in devices["requests"])
    assert [item["requests"] for item in devices["constraints"]] == [["device-0", "nic-0"], ["device-1", "nic-1"]]


def test_render_is_the_same_for_the_same_input() -> None:
    for name in setups.NAMES:
        assert json.dumps(setups.rendered(name).objects) == json.dumps(setups.rendered(name).objects)


# Overlays and code


def test_overlay_is_merged_by_key_and_by_name() -> None:
    over = {
        "terminationGracePeriodSeconds": 5,
        "containers": [{"name": "trainer", "resources": {"limits": {"example.com/nic": "1"}}}],
        "tolerations": [],
    }
    pod = setups.pod_of(render(job(overlay={"worker": over}), KEPT).jobset, "worker")
    plain = setups.pod_of(render(job(), KEPT).jobset, "worker")
    limits = pod["containers"][0]["resources"]["limits"]

    assert pod["terminationGracePeriodSeconds"] == 5 and pod["tolerations"] == []
    assert limits == {**plain["containers"][0]["resources"]["limits"], "example.com/nic": "1"}
    assert pod["containers"][0]["command"] == plain["containers"][0]["command"]


@pytest.mark.parametrize(
    ("over", "hint"),
    [
        ({"hostNetwork": True}, "hostNetwork"),
        ({"hostPID": True}, "hostPID"),
        ({"automountServiceAccountToken": True}, "every container a token"),
        ({"securityContext": {"runAsNonRoot": False}}, "root"),
        ({"securityContext": {"runAsUser": 0}}, "root"),
        ({"volumes": [{"name": "x", "hostPath": {"path": "/"}}]}, "hostPath"),
        ({"containers": [{"name": "trainer", "securityContext": {"privileged": True}}]}, "privileges"),
        ({"containers": [{"name": "trainer", "securityContext": {"runAsUser": 0}}]}, "root"),
        ({"containers": [{"name": "trainer", "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}}}]}, "capab"),
        ({"containers": [{"name": "side", "image": "a"}]}, "container side may gain privileges"),
        (
            {"containers": [{"name": "trainer", "volumeMounts": [{"name": "cluster", "mountPath": "/t"}]}]},
            "mounts the agent's token",
        ),
    ],
)
def test_overlay_that_takes_protection_away_is_refused(over: dict[str, Any], hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        render(job(overlay={"worker": over}), KEPT)


def test_overlay_of_nothing_is_the_pod_itself() -> None:
    pod = {"a": 1}
    assert overlay.merged(pod, {}, where="") is pod


def test_code_that_does_not_fit_a_config_map_is_refused_with_its_size() -> None:
    spec = job(code={"archive": "a" * 64})
    [carried] = carrying.config_maps(spec, b"x" * MOST_CARRIED)

    assert len(json.dumps(carried)) < 1 << 20
    pod = setups.pod_of(render(spec, KEPT).jobset, "worker")
    assert {"name": "carried", "configMap": {"name": carried["metadata"]["name"]}} in pod["volumes"]
    with pytest.raises(ConfigError, match="716,801 bytes, and 716,800 fit"):
        carrying.config_maps(spec, b"x" * (MOST_CARRIED + 1))
