"""Code by every way, with the commands that are rendered, as processes of this machine."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ktrain.base import contract
from ktrain.launcher.code.archive import CodeArchive, pack_code
from ktrain.launcher.code.ways import choose_way
from ktrain.launcher.facts import ClusterFacts
from ktrain.launcher.render import code as carrying
from ktrain.launcher.render.job import render
from ktrain.launcher.spec import Code, JobSpec, Way
from ktrain.run.code import send_code
from ktrain.testing.faulty_s3 import FaultyS3
from ktrain.testing.s3_servers import MotoServer, find_program
from tests.unit.launcher import setups
from tests.unit.launcher.test_spec import job


def packed(tmp_path: Path) -> CodeArchive:
    folder = tmp_path / "project"
    (folder / "lib").mkdir(parents=True)
    (folder / "train.py").write_text("print(1)\n")
    (folder / "lib" / "weights.bin").write_bytes(random.Random(1).randbytes(800_000))
    return pack_code(folder)


def run_container(spec: JobSpec, pod: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The init container of the rendered job, in which `pod` stands for `/ktrain`; it knows what it is told alone."""
    rendered = render(spec, ClusterFacts())
    [container, _] = setups.pod_of(rendered.jobset, "worker")["initContainers"]
    told: dict[str, Any] = {item["name"]: item for item in container.get("env", ())}
    env = {name: environment[name] if "valueFrom" in item else item["value"] for name, item in told.items()}
    mapped = [part.replace(contract.POD_DIR, str(pod), 1) for part in container["command"]]
    return subprocess.run(
        [sys.executable, *mapped[1:]],
        env={**env, "HOME": str(pod), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def expect_code(pod: Path, archive: CodeArchive, tmp_path: Path) -> None:
    target = pod / "code"
    for name in archive.names:
        assert (target / name).read_bytes() == (tmp_path / "project" / name).read_bytes()


def test_code_in_parts_is_joined_proven_and_unpacked(tmp_path: Path) -> None:
    archive = packed(tmp_path)
    spec = job()
    spec = replace(spec, code=choose_way(archive, spec.run, Code(way=Way.CONFIG_MAP)).code)
    pod = tmp_path / "pod"
    (pod / "carried").mkdir(parents=True)
    for item in carrying.config_maps(spec, archive.data):
        for key, text in item["binaryData"].items():
            (pod / "carried" / key).write_bytes(carrying.base64.b64decode(text))

    done = run_container(spec, pod, {})
    assert done.returncode == contract.EXIT_OK, done.stderr
    assert spec.code.parts == 2
    expect_code(pod, archive, tmp_path)


def test_code_goes_by_an_s3_bucket_once_and_is_fetched_with_the_stores_keys_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_program("moto_server") is None:
        pytest.skip("moto_server is not installed")
    archive = packed(tmp_path)
    with MotoServer() as server, FaultyS3(server) as proxy:
        server.make_bucket("bucket")
        keys = proxy.environment()
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in keys.items():
            monkeypatch.setenv(name, value)
        spec = job(run="s3://bucket/net-a", secrets=[{"env": name, "secret": "s3", "key": name} for name in keys])
        spec = replace(spec, code=choose_way(archive, spec.run, Code()).code)
        pod = tmp_path / "pod"
        (pod / "carried").mkdir(parents=True)

        early = run_container(spec, pod, keys)
        assert early.returncode == contract.EXIT_USAGE and "launch again with --code" in early.stderr
        assert "sent to" in send_code(spec, archive)
        assert proxy.count("put_object", 200) == 3, "that it begins, the archive, and that it is whole"
        assert "nothing was sent" in send_code(spec, archive) and proxy.count("put_object") == 3

        done = run_container(spec, pod, keys)
        assert done.returncode == contract.EXIT_OK, done.stderr
        expect_code(pod, archive, tmp_path)
