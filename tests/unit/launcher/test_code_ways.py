"""How code gets to the pods: which way is chosen, and what each one renders."""

from __future__ import annotations

import base64
import json
import random
import re
from typing import Any

import pytest

from ktrain.base import contract
from ktrain.errors import ConfigError
from ktrain.launcher.code.archive import CodeArchive
from ktrain.launcher.code.ways import MOST_CARRIED, MOST_PARTS, choose_way
from ktrain.launcher.facts import ClusterFacts
from ktrain.launcher.render import code
from ktrain.launcher.render.job import render
from ktrain.launcher.spec import Code, Way
from tests.unit.launcher import setups
from tests.unit.launcher.test_spec import job

SHA256, COMMIT = "a" * 64, "b" * 40
BUCKET = "s3://bucket/net"
VOLUME = "/data/net"
BY_BUCKET: dict[str, Any] = {"archive": SHA256, "way": "bucket", "size": 5_000_000}
BY_GIT = {"git": f"git+https://example.com:8443/me/net.git@{COMMIT}"}
SECRETS = [
    {"env": "AWS_SECRET_ACCESS_KEY", "secret": "s3", "key": "key"},
    {"env": "HF_TOKEN", "secret": "hub", "key": "token"},
]
ENV = {"AWS_ENDPOINT_URL": "http://store", "OMP_NUM_THREADS": "4", "https_proxy": "http://proxy"}


def archive(size: int) -> CodeArchive:
    return CodeArchive(bytes(size), SHA256, ("train.py",))


@pytest.mark.parametrize(
    ("size", "run", "wanted", "way", "parts", "why"),
    [
        (1, BUCKET, None, Way.CONFIG_MAP, 1, "by one ConfigMap: 1 bytes fit"),
        (MOST_CARRIED, BUCKET, None, Way.CONFIG_MAP, 1, "by one ConfigMap"),
        (MOST_CARRIED + 1, BUCKET, None, Way.BUCKET, 1, "by the run's bucket: .* too much for one ConfigMap"),
        (MOST_CARRIED + 1, VOLUME, None, Way.CONFIG_MAP, 2, "by 2 ConfigMaps: .* lies in no bucket"),
        (MOST_CARRIED * MOST_PARTS, VOLUME, None, Way.CONFIG_MAP, MOST_PARTS, "by 16 ConfigMaps"),
        (1, BUCKET, Way.BUCKET, Way.BUCKET, 1, "by the run's bucket: as it was asked for"),
        (3 * MOST_CARRIED, BUCKET, Way.CONFIG_MAP, Way.CONFIG_MAP, 3, "by 3 ConfigMaps: .* fit"),
    ],
)
def test_way_is_chosen_by_size_and_by_what_is_there(
    size: int, run: str, wanted: Way | None, way: Way, parts: int, why: str
) -> None:
    chosen = choose_way(archive(size), run, Code(way=wanted, env=("A",)))

    assert chosen.code == Code(archive=SHA256, way=way, size=size, parts=parts, env=("A",))  # type: ignore[arg-type]
    assert re.match(why, chosen.reason)


@pytest.mark.parametrize(
    ("size", "run", "wanted", "hint"),
    [
        (MOST_CARRIED * MOST_PARTS + 1, VOLUME, None, "16 ConfigMaps hold 10.94 MiB; have the run in a bucket"),
        (MOST_CARRIED * MOST_PARTS + 1, BUCKET, Way.CONFIG_MAP, "leave code.way out"),
        (1, VOLUME, Way.BUCKET, "is a path on a volume"),
    ],
)
def test_archive_that_no_way_carries_is_refused_with_what_would(
    size: int, run: str, wanted: Way | None, hint: str
) -> None:
    with pytest.raises(ConfigError, match=hint):
        choose_way(archive(size), run, Code(way=wanted))


# What is rendered


def worker(**changes: Any) -> dict[str, Any]:
    rendered = render(job(**changes), ClusterFacts(restart_rules=True))
    found: dict[str, Any] = setups.pod_of(rendered.jobset, "worker")
    return found


def init_container(pod: dict[str, Any]) -> dict[str, Any]:
    [found, _] = pod["initContainers"]
    assert found["name"] == "code"
    return dict(found)


def volume(pod: dict[str, Any], name: str) -> dict[str, Any]:
    return dict(next(item for item in pod["volumes"] if item["name"] == name))


@pytest.mark.parametrize("given", [{"archive": SHA256, "parts": 3}, BY_BUCKET, BY_GIT])
def test_init_container_of_every_way_fills_what_the_trainer_only_reads(given: dict[str, Any]) -> None:
    pod = worker(code=given)
    mounts = {mount["name"]: mount for mount in init_container(pod)["volumeMounts"]}
    [trainer] = pod["containers"]

    assert trainer["workingDir"] == mounts["code"]["mountPath"] == contract.POD_CODE
    assert {"name": "code", "mountPath": contract.POD_CODE, "readOnly": True} in trainer["volumeMounts"]
    assert "readOnly" not in mounts["code"] and set(mounts) == {"carried", "code"}
    assert volume(pod, "code")["emptyDir"] == {"sizeLimit": "1Gi"}
    assert not any(mount["name"] == "carried" for mount in trainer["volumeMounts"])


def test_config_maps_of_parts_join_to_the_archive_that_the_container_is_told() -> None:
    data = random.Random(1).randbytes(2 * MOST_CARRIED + 5)
    spec = job(code={"archive": SHA256, "size": len(data), "parts": 3})
    maps = code.config_maps(spec, data)
    pod = setups.pod_of(render(spec, ClusterFacts()).jobset, "worker")
    keys = [key for item in maps for key in item["binaryData"]]

    assert [item["metadata"]["name"] for item in maps] == [f"net-a-code-{SHA256[:10]}-{at}" for at in range(3)]
    assert all(item["immutable"] and len(json.dumps(item)) < 1 << 20 for item in maps)
    assert b"".join(base64.b64decode(text) for item in maps for text in item["binaryData"].values()) == data
    paths = [f"/ktrain/carried/{key}" for key in keys]
    command = init_container(pod)["command"]
    assert command[3:] == ["ktrain.launcher.code.unpack", *paths, SHA256, contract.POD_CODE]
    sources = volume(pod, "carried")["projected"]["sources"]
    assert sources == [{"configMap": {"name": item["metadata"]["name"]}} for item in maps]


def test_config_maps_are_none_where_code_goes_another_way() -> None:
    assert code.config_maps(job(code=BY_BUCKET), bytes(BY_BUCKET["size"])) == ()
    assert code.config_maps(job(code=BY_GIT), None) == ()
    with pytest.raises(ConfigError, match="code.size: expected 4"):
        code.config_maps(job(code={"archive": SHA256, "size": 5}), b"1234")
    with pytest.raises(ConfigError, match="code.archive: its bytes are missing"):
        code.config_maps(job(code={"archive": SHA256}), None)


def test_container_of_the_bucket_is_told_the_size_and_has_the_stores_credentials_alone() -> None:
    container = init_container(worker(code=BY_BUCKET, env=ENV, secrets=SECRETS))
    env = {item["name"]: item for item in container["env"]}

    assert container["command"][3:] == [
        "ktrain.run.code", "s3://bucket/net-a", SHA256, "5000000", contract.POD_CARRIED, contract.POD_CODE,
    ]  # fmt: skip
    assert set(env) == {"HOME", "KTRAIN_PATIENCE_S", "AWS_ENDPOINT_URL", "AWS_SECRET_ACCESS_KEY", "https_proxy"}
    assert env["AWS_SECRET_ACCESS_KEY"]["valueFrom"] == {"secretKeyRef": {"name": "s3", "key": "key"}}


def test_container_gets_what_code_env_names_besides() -> None:
    container = init_container(worker(code={**BY_BUCKET, "env": ["HF_TOKEN"]}, env=ENV, secrets=SECRETS))

    assert "HF_TOKEN" in {item["name"] for item in container["env"]}


def test_container_of_git_has_the_secret_by_reference_and_no_other() -> None:
    container = init_container(worker(code={**BY_GIT, "git_secret": "deploy"}, env=ENV, secrets=SECRETS))
    env = {item["name"]: item for item in container["env"]}

    assert container["command"][3:] == [
        "ktrain.launcher.code.git", "https://example.com:8443/me/net.git", COMMIT,
        contract.POD_CARRIED, contract.POD_CODE,
    ]  # fmt: skip
    assert set(env) == {"HOME", "https_proxy", contract.ENV_GIT_USERNAME, contract.ENV_GIT_PASSWORD}
    assert env[contract.ENV_GIT_PASSWORD]["valueFrom"]["secretKeyRef"] == {
        "name": "deploy", "key": "password", "optional": False,
    }  # fmt: skip
    names = {item["name"] for item in init_container(worker(code=BY_GIT, secrets=SECRETS))["env"]}
    assert names == {"HOME"}


def test_secret_of_git_is_seen_by_no_container_but_its_own() -> None:
    pod = worker(code={**BY_GIT, "git_secret": "deploy"})
    [_, agent] = pod["initContainers"]

    assert "deploy" not in json.dumps([agent, *pod["containers"], pod["volumes"]])


@pytest.mark.parametrize("given", [{"archive": SHA256}, BY_BUCKET, BY_GIT])
def test_container_of_code_has_no_token_and_nothing_of_the_memory_tier(given: dict[str, Any]) -> None:
    mounted = {mount["name"] for mount in init_container(worker(code=given))["volumeMounts"]}

    assert not mounted & {"cluster", "token", "memory", "work"}
