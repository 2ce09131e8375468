"""launch/cluster: every folder resolves, is valid with unknown fields forbidden, and says what it is to say."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from ktrain.base import contract
from ktrain.launcher.quantity import parse_bytes
from ktrain.run import node_agent
from ktrain.testing import structural
from tests.unit.launcher import setups
from tests.unit.launcher.shipped.kustomize import CLUSTER, FOLDERS, is_wide, resolve
from tests.unit.launcher.test_render_golden import KUBERNETES, definition, needs_definitions
from tests.unit.launcher.test_render_rules import restricted_problems

NO_DEFINITION = {"WorkloadPriorityClass"}  # of Kueue, of which no definition is at hand: its two fields are looked at


def objects(folder: str, kind: str | None = None) -> list[dict[str, Any]]:
    return [item for item in resolve(CLUSTER / folder) if kind in (None, item["kind"])]


def one(folder: str, kind: str) -> dict[str, Any]:
    [item] = objects(folder, kind)
    return item


def is_core(item: dict[str, Any]) -> bool:
    group = item["apiVersion"].rpartition("/")[0]
    return "." not in group or (group.endswith(".k8s.io") and not group.endswith(".x-k8s.io"))


def name_of(item: dict[str, Any]) -> str:
    return f"{item['apiVersion']} {item['kind']} {item['metadata'].get('namespace')} {item['metadata']['name']}"


def test_folders_are_the_named_ones() -> None:
    assert FOLDERS == ["access", "memory", "memory-claim", "priorities", "queues", "team"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_of_a_folder_is_used(folder: str) -> None:
    about = yaml.safe_load((CLUSTER / folder / "kustomization.yaml").read_text())

    assert {path.name for path in (CLUSTER / folder).iterdir()} - {"kustomization.yaml"} == {
        name for name in about["resources"] if not name.startswith("..")
    }


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_has_every_object_once_and_nothing_without_a_namespace_but_its_own(folder: str) -> None:
    found = objects(folder)
    names = [name_of(item) for item in found]

    assert sorted(set(names)) == sorted(names)
    assert all(is_wide(item) or folder == "access" or "namespace" in item["metadata"] for item in found)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_is_what_kustomize_makes_of_it(folder: str) -> None:
    said = subprocess.run(
        ["kubectl", "kustomize", str(CLUSTER / folder)], capture_output=True, check=True, timeout=60
    ).stdout

    assert sorted(yaml.safe_load_all(said), key=name_of) == sorted(objects(folder), key=name_of)


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("folder", FOLDERS)
def test_core_objects_are_valid_for_every_kubernetes(folder: str, version: str) -> None:
    for item in filter(is_core, objects(folder)):
        kubernetes_validate.validate(item, version, strict=True)


@needs_definitions
def test_objects_of_kueue_are_valid_for_its_definitions() -> None:
    plurals = {
        "Topology": "topologies", "ResourceFlavor": "resourceflavors", "ClusterQueue": "clusterqueues",
        "LocalQueue": "localqueues",
    }  # fmt: skip
    found = [item for folder in FOLDERS for item in objects(folder) if not is_core(item)]
    checked = [item for item in found if item["kind"] not in NO_DEFINITION]
    for item in checked:
        group, _, version = item["apiVersion"].partition("/")
        schema = structural.schema_of(definition(f"{group}_{plurals[item['kind']]}"), version)
        assert structural.problems(item, schema) == [] and structural.prune(item, schema)[1] == []
    assert {item["kind"] for item in checked} == set(plurals)


def test_priority_classes_of_kueue_have_a_value_and_words() -> None:
    found = objects("queues", "WorkloadPriorityClass")
    same = {item["metadata"]["name"]: item["value"] for item in objects("priorities", "PriorityClass")}

    assert len(found) == 2
    for item in found:
        assert set(item) == {"apiVersion", "kind", "metadata", "value", "description"}
        assert item["value"] == same[item["metadata"]["name"]]


# Who is let in


def test_namespace_of_jobs_enforces_restricted() -> None:
    labels = one("team", "Namespace")["metadata"]["labels"]

    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert objects("team", "DaemonSet") == []


def test_only_the_namespace_of_the_node_agent_is_privileged_and_only_its_pod_sees_the_node() -> None:
    privileged = [
        item["metadata"]["name"]
        for folder in FOLDERS
        for item in objects(folder, "Namespace")
        if item["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] != "restricted"
    ]
    pod = one("memory", "DaemonSet")["spec"]["template"]["spec"]
    [container] = pod["containers"]

    assert privileged == [one("memory", "DaemonSet")["metadata"]["namespace"]]
    # All that the level would refuse, and nothing else; its user is root, which `restricted` asks of the pod.
    assert sorted(restricted_problems(pod)) == ["node-agent: capabilities", "root", "volume hostPath"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["DAC_OVERRIDE"]}
    assert pod["automountServiceAccountToken"] is False and "serviceAccountToken" not in json.dumps(pod)


def test_pods_of_a_team_and_the_node_agent_are_reached_by_nobody_by_default() -> None:
    for folder, ways in (("team", ["Ingress", "Egress"]), ("memory", ["Ingress", "Egress"])):
        policy = one(folder, "NetworkPolicy")["spec"]
        assert policy["podSelector"] == {} and policy["policyTypes"] == ways and "ingress" not in policy
    assert "egress" not in one("memory", "NetworkPolicy")["spec"]


def test_queue_admits_the_namespaces_of_teams() -> None:
    wanted = one("queues", "ClusterQueue")["spec"]["namespaceSelector"]["matchLabels"]

    assert wanted.items() <= one("team", "Namespace")["metadata"]["labels"].items()
    assert one("team", "LocalQueue")["spec"]["clusterQueue"] == one("queues", "ClusterQueue")["metadata"]["name"]


def test_nothing_shipped_holds_a_secret() -> None:
    assert [item for folder in FOLDERS for item in objects(folder) if item["kind"] == "Secret"] == []


# What is lent


def test_lent_memory_is_the_same_in_agent_volume_and_claim() -> None:
    pod = one("memory", "DaemonSet")["spec"]["template"]["spec"]
    [container] = pod["containers"]
    loan, _ = node_agent.parse(container["args"])
    volume, claim = one("memory-claim", "PersistentVolume"), one("memory-claim", "PersistentVolumeClaim")
    team = one("team", "Namespace")["metadata"]["name"]
    [host] = [item["hostPath"]["path"] for item in pod["volumes"] if "hostPath" in item]

    assert container["command"][-1] == node_agent.__name__
    sizes = (
        container["resources"]["requests"]["memory"], volume["spec"]["capacity"]["storage"],
        claim["spec"]["resources"]["requests"]["storage"],
    )  # fmt: skip
    assert {parse_bytes(size, name="") for size in sizes} == {loan.nbytes}
    assert loan.namespaces == (team,) and volume["spec"]["local"]["path"] == f"{host}/{team}"
    assert (claim["metadata"]["name"], claim["metadata"]["namespace"]) == (contract.MEMORY_CLAIM, team)
    assert volume["spec"]["claimRef"] == {
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "namespace": team, "name": contract.MEMORY_CLAIM,
    }  # fmt: skip
    [term] = volume["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"]
    [selector] = pod["nodeSelector"].items()
    assert term == {"matchExpressions": [{"key": selector[0], "operator": "In", "values": [selector[1]]}]}


def test_readme_names_every_folder_and_image() -> None:
    text = (setups.ROOT / "launch" / "README.md").read_text()
    images = [path.name for path in (setups.ROOT / "launch" / "images").iterdir()]

    assert [name for name in (*FOLDERS, *images) if f"{name}" not in text] == []


def test_resolver_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    """Otherwise a patch could be shipped that no test has looked at."""
    head = "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
    (tmp_path / "kustomization.yaml").write_text(head + "resources: []\npatches: []\n")
    with pytest.raises(ValueError, match="patches"):
        resolve(tmp_path)
