"""The verbs on a cluster: a job is launched, looked at, followed, stopped and deleted by commands."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ktrain.base import contract, ids
from ktrain.base.clock import Deadline
from ktrain.cli.main import main
from ktrain.launcher.cluster import resources as known
from ktrain.testing.fake_cluster import FakeCluster, Offer
from ktrain.tier.location import open_tier
from tests.unit.launcher import setups
from tests.unit.launcher.on_cluster.clusters import CRDS

JOB = ("--run", "memory://bucket/net", "--image", "example/train:1", "--state", "1Gi", "--nodes", "2")


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    with FakeCluster(Offer(version="1.36", jobset="0.12.0"), crds=CRDS) as found:
        yield found


@pytest.fixture
def ktrain(cluster: FakeCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command on the cluster; returns its exit code, what it printed and what it said."""
    config = cluster.write_kubeconfig(tmp_path / "kubeconfig")

    def run(verb: str, *arguments: str) -> tuple[int, str, str]:
        backend = ("--backend", "kubernetes") if verb in ("launch", "status", "logs", "cancel") else ()
        with pytest.raises(SystemExit) as caught:
            main((verb, *backend, "--kubeconfig", str(config), *arguments))
        printed = capsys.readouterr()
        return int(caught.value.code or 0), printed.out, printed.err

    return run


def test_job_is_launched_listed_shown_cancelled_and_deleted(cluster: FakeCluster, ktrain: Any) -> None:
    code, out, err = ktrain("launch", *JOB, "train.py")
    assert code == contract.EXIT_OK and "default/net: submitted" in out and "gang none" in err

    code, out, _ = ktrain("list", "--output", "json")
    assert [(item["name"], item["state"], item["run"]) for item in json.loads(out)] == [
        ("net", "starting", "memory://bucket/net")
    ]

    code, out, _ = ktrain("status", "--output", "json", "memory://bucket/net")
    assert json.loads(out)["state"] == "starting" and code == contract.EXIT_OK

    code, out, err = ktrain("launch", *JOB, "train.py")
    assert code == contract.EXIT_CONFLICT and "already exists" in err

    code, out, err = ktrain("wait", "--timeout", "0", "net")
    assert code == contract.EXIT_UNFINISHED and "starting" in err

    code, out, _ = ktrain("cancel", "net")
    assert code == contract.EXIT_OK and "cancelled (exit code 130)" in out

    code, out, _ = ktrain("wait", "net")
    assert code == contract.EXIT_STOPPED

    code, out, _ = ktrain("delete", "net")
    assert code == contract.EXIT_OK and cluster.store.list(known.JOB_SET, "default").items == []

    code, _, err = ktrain("status", "net")
    assert code == contract.EXIT_USAGE and "there is no job 'net'" in err


def code_of(tmp_path: Path, size: int) -> str:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "train.py").write_text("")
    (folder / "data.bin").write_bytes(random.Random(1).randbytes(size))
    return str(folder)


def test_code_lies_beside_the_run_before_its_job_is_created(cluster: FakeCluster, ktrain: Any, tmp_path: Path) -> None:
    run = f"memory://bucket/{ids.random_id()}"
    options = (*JOB[2:], "--run", run, "--name", "net", "--code", code_of(tmp_path, 1000), "--set", "code.way=bucket")
    code, _, err = ktrain("launch", *options, "train.py")
    jobset = cluster.store.get(known.JOB_SET, "default", "net")
    [container, _] = setups.pod_of(jobset, "worker")["initContainers"]
    sha256, size = container["command"][5:7]

    assert code == contract.EXIT_OK and f"code: sent to {run}/code/{sha256}.zip" in err
    stored = open_tier(run).read(f"code/{sha256}.zip", deadline=Deadline.after(10.0))
    assert hashlib.sha256(stored).hexdigest() == sha256 and len(stored) == int(size)
    assert not any(item.get("binaryData") for item in cluster.store.list(known.CONFIG_MAP, "default").items)

    ktrain("delete", "net")
    assert "nothing was sent" in ktrain("launch", *options, "train.py")[2]


def test_code_that_cannot_be_sent_leaves_no_job(
    cluster: FakeCluster, ktrain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(contract.ENV_FAULTS, "raise@code.archive")
    run = ("--run", f"memory://bucket/{ids.random_id()}", "--name", "net", "--set", "code.way=bucket")
    code, _, err = ktrain("launch", *JOB[2:], *run, "--code", code_of(tmp_path, 10), "train.py")

    assert code != contract.EXIT_OK and "raise@code.archive" in err
    assert cluster.store.list(known.JOB_SET, "default").items == []


def test_code_in_several_config_maps_goes_with_its_job(cluster: FakeCluster, ktrain: Any, tmp_path: Path) -> None:
    folder = code_of(tmp_path, 1_500_000)
    code, _, _ = ktrain("launch", *JOB, "--code", folder, "--set", "code.way=config-map", "train.py")
    carried = [item for item in cluster.store.list(known.CONFIG_MAP, "default").items if "binaryData" in item]

    assert code == contract.EXIT_OK and len(carried) == 3
    ktrain("delete", "net")
    assert not any("binaryData" in item for item in cluster.store.list(known.CONFIG_MAP, "default").items)


@pytest.mark.parametrize("more", [(), ("code.way=bucket", "code.size=5")])
def test_archive_that_is_only_named_is_refused_where_it_is_not_there(
    more: tuple[str, ...], cluster: FakeCluster, ktrain: Any
) -> None:
    given = [item for text in (f'code.archive="{"a" * 64}"', *more) for item in ("--set", text)]
    run = ("--run", f"memory://bucket/{ids.random_id()}", "--name", "net")
    code, _, err = ktrain("launch", *JOB[2:], *run, *given, "train.py")

    assert code == contract.EXIT_USAGE and "--code DIR" in err
    assert cluster.store.list(known.JOB_SET, "default").items == []


def test_dry_run_on_the_server_prints_what_would_be_created_and_creates_nothing(
    cluster: FakeCluster, ktrain: Any
) -> None:
    code, out, _ = ktrain("launch", *JOB, "--dry-run=server", "--output", "json", "train.py")

    assert code == contract.EXIT_OK and json.loads(out)["objects"][0]["kind"] == "JobSet"
    assert cluster.store.list(known.JOB_SET, "default").items == []


def test_dry_run_that_stands_alone_asks_nobody(cluster: FakeCluster, ktrain: Any) -> None:
    code, _, _ = ktrain("launch", *JOB, "--dry-run", "train.py")

    assert code == contract.EXIT_OK and cluster.requests() == []


def make_worker(cluster: FakeCluster, index: int, text: str, *, ended: bool = False) -> None:
    labels = {contract.LABEL_RUN: "net", contract.LABEL_ROLE: "worker"}
    labels["batch.kubernetes.io/job-completion-index"] = str(index)
    state = {"terminated": {"exitCode": 0}} if ended else {"running": {}}
    status = {"phase": "Running", "containerStatuses": [{"name": "trainer", "restartCount": 0, "state": state}]}
    spec = {"nodeName": "n1", "containers": [{"name": "trainer", "image": "x"}]}
    about = {"name": f"net-worker-0-{index}-abcde", "namespace": "default", "labels": labels}
    pod = cluster.store.create(known.POD, {"metadata": about, "spec": spec, "status": status})
    cluster.logs.write(pod, "trainer", text)


def test_logs_are_those_of_the_rank_or_of_all_by_pod(cluster: FakeCluster, ktrain: Any) -> None:
    ktrain("launch", *JOB, "train.py")
    make_worker(cluster, 0, "one\ntwo\n")
    make_worker(cluster, 1, "three\n")

    assert ktrain("logs", "net")[1] == (
        "[net-worker-0-0-abcde] one\n[net-worker-0-0-abcde] two\n[net-worker-0-1-abcde] three\n"
    )
    assert ktrain("logs", "--rank", "1", "net")[1] == "three\n"
    assert ktrain("logs", "--rank", "2", "net")[0] == contract.EXIT_USAGE
    code, _, err = ktrain("logs", "--previous", "--rank", "0", "net")
    assert code == contract.EXIT_USAGE and "previous terminated container" in err


def test_logs_are_followed_until_the_job_has_ended(cluster: FakeCluster, ktrain: Any) -> None:
    ktrain("launch", *JOB, "train.py")
    make_worker(cluster, 0, "one\ntwo\n", ended=True)
    make_worker(cluster, 1, "three\n", ended=True)
    done = {"type": "Completed", "status": "True", "reason": "AllJobsCompleted", "message": ""}
    done["lastTransitionTime"] = "2026-01-01T00:00:00Z"

    def end(jobset: dict[str, Any]) -> None:
        jobset["status"] = {"conditions": [done]}

    cluster.store.mutate(known.JOB_SET, "default", "net", end, status=True)
    code, out, _ = ktrain("logs", "--follow", "net")

    assert code == contract.EXIT_OK
    assert sorted(out.splitlines()) == [
        "[net-worker-0-0-abcde] one", "[net-worker-0-0-abcde] two", "[net-worker-0-1-abcde] three",
    ]  # fmt: skip


def test_events_are_those_of_the_job_alone_in_their_order(cluster: FakeCluster, ktrain: Any) -> None:
    for name, about, time in (("b", "net-worker-0-1-abcde", "2"), ("a", "net", "1"), ("c", "other", "3")):
        cluster.store.create(
            known.EVENT,
            {
                "metadata": {"name": name, "namespace": "default"},
                "involvedObject": {"kind": "Pod", "name": about},
                "eventTime": f"2026-01-01T00:00:0{time}.000000Z",
                "type": "Normal",
                "reason": f"Reason{time}",
            },
        )
    _, out, _ = ktrain("events", "--output", "json", "net")

    assert [event["reason"] for event in json.loads(out)] == ["Reason1", "Reason2"]


def test_json_of_a_job_has_the_documented_fields(cluster: FakeCluster, ktrain: Any) -> None:
    ktrain("launch", *JOB, "train.py")
    make_worker(cluster, 0, "")
    page = (Path(__file__).parents[3] / "docs" / "reference" / "cli.md").read_text()
    rows = dict(re.findall(r"^\| `ktrain (\w+)` \| (.+) \|$", page, re.MULTILINE))
    status = json.loads(ktrain("status", "--output", "json", "net")[1])
    [listed] = json.loads(ktrain("list", "--output", "json")[1])

    assert {*status, *status["pods"][0]} <= set(re.findall(r"`(\w+)`", rows["wait"]))
    assert set(listed) == set(re.findall(r"`(\w+)`", rows["list"]))
