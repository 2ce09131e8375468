"""`ktrain resume`, `history` and `gc` on a cluster: what is sent, said, shown and removed by commands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ktrain.base import contract, events, ids
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.log import open_log
from ktrain.cli.main import main
from ktrain.launcher.backends.kubernetes.submission import Submission
from ktrain.launcher.cluster import resources as known
from ktrain.run import submissions
from ktrain.testing.fake_cluster import Access, FakeCluster, Offer, Rule
from tests.unit.launcher.on_cluster.clusters import CRDS
from tests.unit.launcher.on_cluster.resumes import config_maps, end, strays

TIMEOUTS = Timeouts(20.0)
Said = tuple[int, str, str]


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    with FakeCluster(Offer(version="1.36", jobset="0.12.0"), crds=CRDS) as found:
        yield found


@pytest.fixture
def run() -> str:
    """The URL of a run that nobody had before."""
    return f"memory://bucket-{ids.random_id()}/net"


@pytest.fixture
def ktrain(cluster: FakeCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command on the cluster; returns its exit code, what it printed and what it said."""
    config = cluster.write_kubeconfig(tmp_path / "kubeconfig")

    def call(verb: str, *arguments: str) -> Said:
        backend = ("--backend", "kubernetes") if verb in ("launch", "cancel", "history") else ()
        with pytest.raises(SystemExit) as caught:
            main((verb, *backend, "--kubeconfig", str(config), *arguments))
        printed = capsys.readouterr()
        return int(caught.value.code or 0), printed.out, printed.err

    return call


def launch(ktrain: Any, run: str, *more: str) -> None:
    job = ("--run", run, "--image", "example/train:1", "--state", "1Gi", "--nodes", "2")
    assert ktrain("launch", *job, *more, "train.py")[0] == contract.EXIT_OK


def records(run: str) -> list[dict[str, Any]]:
    catalog = RunCatalog.open(run, timeouts=TIMEOUTS)
    return submissions.read_all(catalog.tier, timeouts=TIMEOUTS)


# resume


def test_job_is_resumed_on_an_upgraded_cluster_and_what_changed_is_said(
    cluster: FakeCluster, ktrain: Any, run: str
) -> None:
    launch(ktrain, run)
    code, _, err = ktrain("resume", "net")
    assert code == contract.EXIT_CONFLICT and "a job that lives is not replaced" in err

    assert ktrain("cancel", "net")[0] == contract.EXIT_OK
    cluster.offer = Offer(version="1.37", jobset="0.13.0-devel")
    code, out, err = ktrain("resume", "--nodes", "4", "--set", "placement.avoid_nodes=['n3']", "net")

    assert code == contract.EXIT_OK and out == "default/net: resumed as submission 2\n"
    assert "the cluster answers as Kubernetes 1.37, it was 1.36" in err
    assert "nodes: 2 -> 4" in err and "placement.avoid_nodes: the default -> ['n3']" in err
    [record] = records(run)
    assert record["number"] == 2 and record["before"]["state"] == "cancelled"


def test_deleted_job_is_resumed_by_the_url_of_its_run_whatever_its_name_was(
    cluster: FakeCluster, ktrain: Any, run: str
) -> None:
    launch(ktrain, run, "--name", "odd", "--namespace", "default")
    end(cluster, "odd")
    assert ktrain("resume", run)[0] == contract.EXIT_OK
    end(cluster, "odd")
    assert ktrain("delete", "odd")[0] == contract.EXIT_OK
    code, out, err = ktrain("resume", run)

    assert code == contract.EXIT_OK and out == "default/odd: resumed as submission 3\n"
    assert "nothing has changed since the last submission" in err
    assert ktrain("resume", "nope")[0] == contract.EXIT_USAGE


@pytest.mark.parametrize("way", ["--dry-run", "--dry-run=server"])
def test_dry_run_prints_what_would_be_sent_and_changes_nothing(
    cluster: FakeCluster, ktrain: Any, run: str, way: str
) -> None:
    launch(ktrain, run)
    end(cluster, "net")
    before = len(cluster.requests())
    code, out, _ = ktrain("resume", way, "--nodes", "3", "--output", "json", "net")
    found = json.loads(out)
    writes = cluster.requests(lambda item: item.method != "GET" and "dryRun" not in item.query)

    assert code == contract.EXIT_OK and found["changes"] == ["nodes: 2 -> 3"]
    assert found["objects"][0]["metadata"]["name"] == "net" and found["objects"][1]["stringData"] == {
        "token": "<redacted>"
    }
    assert all(item in cluster.requests()[:before] for item in writes)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("--set", "name=other"), "name: a resumed job keeps it"),
        (("--set", "run=s3://b/c"), "run: a resumed job keeps it"),
        (("--gang", "slurm"), "placement.gang: expected one of"),
        (("--nodes", "0"), "nodes: expected 1 to"),
        (("--set", "code.archive=" + "0" * 64), "--code DIR"),
    ],
)
def test_bad_override_is_one_line_and_changes_nothing(
    cluster: FakeCluster, ktrain: Any, run: str, arguments: tuple[str, ...], hint: str
) -> None:
    launch(ktrain, run)
    end(cluster, "net")
    uid = cluster.store.get(known.JOB_SET, "default", "net")["metadata"]["uid"]
    code, _, err = ktrain("resume", *arguments, "net")

    assert code == contract.EXIT_USAGE and hint in err and err.count("\n") == 1
    assert cluster.store.get(known.JOB_SET, "default", "net")["metadata"]["uid"] == uid


def test_code_that_was_sent_goes_on_with_the_job_and_can_be_replaced(
    cluster: FakeCluster, ktrain: Any, run: str, tmp_path: Path
) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "train.py").write_text("1\n")
    launch(ktrain, run, "--code", str(folder))
    before = config_maps(cluster, "net-code")
    end(cluster, "net")
    assert ktrain("resume", "net")[0] == contract.EXIT_OK and config_maps(cluster, "net-code") == before

    end(cluster, "net")
    (folder / "train.py").write_text("2\n")
    code, _, err = ktrain("resume", "--code", str(folder), "net")
    assert code == contract.EXIT_OK and "code.archive:" in err
    assert len(config_maps(cluster, "net-code")) == 1 and config_maps(cluster, "net-code") != before


def test_run_that_this_machine_does_not_reach_costs_its_record_alone(
    cluster: FakeCluster, ktrain: Any, tmp_path: Path
) -> None:
    launch(ktrain, "/data/net", "--volume", "shared:/data")
    end(cluster, "net")
    code, _, err = ktrain("resume", "net")

    assert code == contract.EXIT_OK and "not recorded there until its head starts" in err


# history


def attempt(run: str, launch_id: str | None, *, step: int, ended: str) -> None:
    """An attempt, as its head records it."""
    catalog = RunCatalog.open(run, timeouts=TIMEOUTS)
    epoch = catalog.next_epoch({"launch": launch_id, "nodes": {"node-0": [0], "node-1": [1]}})
    log = open_log(run, catalog.tier, timeouts=TIMEOUTS)
    log.emit(events.make("attempt_started", epoch, world_size=2, nodes={}))
    if epoch > 1:
        log.emit(events.make("restored", epoch, step=step - 8, tier="bucket"))
    log.emit(events.make("step", epoch, step=step, loss=1.0))
    log.emit(events.make("attempt_ended", epoch, outcome=ended))
    log.close()


def test_history_joins_submissions_attempts_and_the_cluster(cluster: FakeCluster, ktrain: Any, run: str) -> None:
    launch(ktrain, run)
    first = Submission.from_value(
        json.loads(cluster.store.get(known.CONFIG_MAP, "default", "net")["data"][contract.SUBMISSION_FILE])
    )
    submissions.keep(RunCatalog.open(run, timeouts=TIMEOUTS).tier, first.to_value(), timeouts=TIMEOUTS)
    attempt(run, first.launch, step=20, ended="stopped")
    ktrain("cancel", "net")
    cluster.offer = Offer(version="1.37", jobset="0.13.0-devel")
    ktrain("resume", "net")
    attempt(run, records(run)[1]["launch"], step=25, ended="succeeded")
    attempt(run, None, step=30, ended="succeeded")
    code, out, _ = ktrain("history", "--output", "json", "net")
    found = json.loads(out)
    one, two = found["submissions"]

    assert code == contract.EXIT_OK and found["run"] == run and found["unknown"] == []
    assert (one["number"], one["kubernetes"], one["outcome"], one["exit_code"], one["nodes"]) == (
        1, "1.36", "cancelled", contract.EXIT_STOPPED, 2,
    )  # fmt: skip
    assert (two["number"], two["kubernetes"], two["outcome"]) == (2, "1.37", "starting")
    assert "the cluster answers as Kubernetes 1.37, it was 1.36" in two["changes"]
    assert [(item["attempt"], item["restored_from"], item["nodes"]) for item in one["attempts"]] == [(1, None, 2)]
    [again] = two["attempts"]
    assert (again["restored_from"], again["step"], again["steps_lost"], again["ended"]) == (
        "bucket",
        17,
        3,
        "succeeded",
    )
    assert [item["attempt"] for item in found["attempts"]] == [3]

    code, out, _ = ktrain("history", "net")
    assert "submission 1" in out and "from step 17 (bucket), 3 steps lost, 2 nodes: succeeded" in out


def test_history_of_a_run_is_told_without_a_cluster(capsys: pytest.CaptureFixture[str], run: str) -> None:
    attempt(run, None, step=3, ended="succeeded")
    with pytest.raises(SystemExit) as caught:
        main(("history", "--output", "json", run))
    found = json.loads(capsys.readouterr().out)

    assert caught.value.code == contract.EXIT_OK and found["submissions"] == []
    assert [item["ended"] for item in found["attempts"]] == ["succeeded"]


def test_history_of_a_run_out_of_reach_shows_the_cluster_and_says_so(cluster: FakeCluster, ktrain: Any) -> None:
    launch(ktrain, "/data/net", "--volume", "shared:/data")
    code, out, _ = ktrain("history", "--output", "json", "net")
    found = json.loads(out)

    assert code == contract.EXIT_OK and [item["outcome"] for item in found["submissions"]] == ["starting"]
    assert "this machine does not have that path" in found["unknown"][0]
    assert ktrain("history", "nope")[0] == contract.EXIT_USAGE


# gc


def test_gc_shows_first_and_removes_when_it_is_told_to(cluster: FakeCluster, ktrain: Any, run: str) -> None:
    launch(ktrain, run)
    end(cluster, "net", "Completed")
    code, out, _ = ktrain("gc")
    assert code == contract.EXIT_OK and "would remove: JobSet default/net: the job is done" in out
    assert ktrain("gc", "--confirm", "--dry-run")[0] == contract.EXIT_OK
    assert len(cluster.store.list(known.JOB_SET, "default").items) == 1

    code, out, _ = ktrain("gc", "--confirm", "--output", "json")
    assert [item["name"] for item in json.loads(out)["removed"]] == ["net"]
    assert cluster.store.list(known.JOB_SET, "default").items == [] and list(strays(cluster)) == []
    assert ktrain("gc", "--older-than", "soon")[0] == contract.EXIT_USAGE


def test_gc_keeps_a_failed_job_until_its_run_has_the_record(cluster: FakeCluster, ktrain: Any, run: str) -> None:
    launch(ktrain, run)
    end(cluster, "net")
    code, out, _ = ktrain("gc", "--confirm")
    assert code == contract.EXIT_OK and "has no record of it, so that only this can be resumed" in out

    ktrain("resume", "net")
    end(cluster, "net")
    assert "removed: JobSet default/net: the job is failed" in ktrain("gc", "--confirm")[1]
    code, out, _ = ktrain("resume", run)
    assert code == contract.EXIT_OK and "resumed as submission 3" in out


def test_gc_where_jobsets_may_not_be_listed_knows_nothing(
    cluster: FakeCluster, ktrain: Any, run: str, tmp_path: Path
) -> None:
    launch(ktrain, run)
    cluster.access = Access(rules={"weak": (Rule(("*",), ("",), ("*",)),)}, tokens={"admin": "admin", "weak": "weak"})
    weak = cluster.write_kubeconfig(tmp_path / "weak", "weak")
    code, _, err = ktrain("gc", "--confirm", "--kubeconfig", str(weak))

    assert code == contract.EXIT_UNAVAILABLE and "jobsets" in err


def test_json_of_resume_history_and_gc_has_the_documented_fields(cluster: FakeCluster, ktrain: Any, run: str) -> None:
    launch(ktrain, run)
    attempt(run, None, step=3, ended="succeeded")
    end(cluster, "net")
    page = (Path(__file__).parents[3] / "docs" / "reference" / "cli.md").read_text()
    rows = dict(re.findall(r"^\| `ktrain (\w+)` \| (.+) \|$", page, re.MULTILINE))
    named = {verb: set(re.findall(r"`(\w+)`", rows[verb])) for verb in ("resume", "history", "gc")}
    shown = json.loads(ktrain("resume", "--dry-run", "--output", "json", "net")[1])
    told = json.loads(ktrain("history", "--output", "json", "net")[1])
    left = json.loads(ktrain("gc", "--output", "json")[1])

    assert set(shown) <= named["resume"] and {*told, *told["submissions"][0], *told["attempts"][0]} <= named["history"]
    assert {*left, *left["spared"][0]} <= named["gc"]
