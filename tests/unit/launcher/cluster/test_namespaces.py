"""What a namespace has by itself, the names of its pods and a certificate; and the networks of clusters."""

from __future__ import annotations

from pathlib import Path

from ktrain.launcher.cluster.kubelet import NodeSpec
from ktrain.launcher.cluster.pod_starter import Addresses, Network
from ktrain.launcher.cluster.resources import CONFIG_MAP, NAMESPACE, POD, SERVICE
from tests.unit.launcher.cluster.making import SPACE, Made, pod_spec


def test_names_pod_on_its_way_out_comes_after_its_successor(tmp_path: Path) -> None:
    made = Made(tmp_path, nodes=[NodeSpec("n0"), NodeSpec("n1")], exit_on_terminate=None)
    made.create(SERVICE, "net", {"clusterIP": "None", "selector": {"app": "net"}})
    named = pod_spec(hostname="net-head-0-0", subdomain="net")
    made.create(POD, "old", named, labels={"app": "net"})
    made.store.delete(POD, SPACE, "old")
    made.settle()
    made.create(POD, "new", named, labels={"app": "net"})
    made.settle()

    addresses = [made.get(POD, name)["status"]["podIP"] for name in ("new", "old")]
    lines = (tmp_path / "root" / f"hosts-{SPACE}").read_text().splitlines()
    assert [line.split()[:2] for line in lines] == [[address, "net-head-0-0.net"] for address in addresses]


def test_namespace_is_given_the_certificate_once(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.store.create(NAMESPACE, {"metadata": {"name": SPACE}})
    made.settle()
    first = made.get(CONFIG_MAP, "kube-root-ca.crt")
    assert list(first["data"]) == ["ca.crt"]

    made.create(POD, "p", pod_spec())
    assert made.get(CONFIG_MAP, "kube-root-ca.crt") == first


def test_networks_of_two_clusters_differ_and_are_given_back() -> None:
    first = Network()
    second = Network()
    try:
        assert first.number < second.number
        assert [Addresses(each.number).take()[1] for each in (first, second)] == [
            f"127.{each.number}.0.2" for each in (first, second)
        ]
    finally:
        first.close()
        second.close()
    again = Network()
    again.close()
    assert again.number <= first.number
