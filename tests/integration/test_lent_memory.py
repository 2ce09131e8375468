"""Memory that a node lends, in pods that run: it outlives the pod, and neither the node nor its borders."""

from __future__ import annotations

from typing import Any

from ktrain.base import contract
from ktrain.launcher.cluster.kubelet import NodeSpec
from ktrain.testing.running_cluster import RunningCluster
from tests.integration.test_running_cluster import JOB, PODS, Client, has, job

NODES = [NodeSpec("n0"), NodeSpec("n1")]


def worker(name: str, node: str, script: str) -> Any:
    """A Job whose pod has the tier's volume as a rendered worker has it."""
    made = job(script, completions=1)
    made["metadata"]["name"] = name
    pod = made["spec"]["template"]["spec"]
    pod["nodeSelector"] = {"kubernetes.io/hostname": node}
    pod["volumes"] = [{"name": "memory", "persistentVolumeClaim": {"claimName": contract.MEMORY_CLAIM}}]
    mount = {"name": "memory", "mountPath": contract.POD_VOLUME, "subPath": "0123456789abcdef"}
    pod["containers"][0]["volumeMounts"] = [mount]
    return made


def test_lent_memory_is_found_by_the_next_pod_of_the_node_and_lost_with_the_node() -> None:
    seen = f"{contract.POD_VOLUME}/seen"
    once = f"echo x >> {seen}; test $(wc -l < {seen}) -ge 2 || sleep 600"
    with RunningCluster(NODES) as running:
        client = Client(running)
        client.send("POST", JOB, worker("first", "n0", once))
        [pod] = client.wait(PODS, lambda found: [p for p in found["items"] if p["status"]["phase"] == "Running"])[
            "items"
        ]
        client.send("DELETE", f"{PODS}/{pod['metadata']['name']}")
        client.wait(f"{JOB}/first", has("Complete"))  # the second pod found what the first had left

        client.send("POST", JOB, worker("elsewhere", "n1", f"test ! -e {seen}"))
        client.wait(f"{JOB}/elsewhere", has("Complete"))

        client.send("POST", JOB, worker("again", "n0", f"test -e {seen}"))
        client.wait(f"{JOB}/again", has("Complete"))
        running.lose("n0")
        running.restore("n0")
        client.send("POST", JOB, worker("after", "n0", f"test ! -e {seen}"))
        client.wait(f"{JOB}/after", has("Complete"))
