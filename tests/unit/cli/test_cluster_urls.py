"""Verbs that are given the URL of a run mean the job of that run, and no other with the name that they would expect."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ktrain.base import contract, ids
from ktrain.base.settings import Timeouts
from ktrain.cli.main import main
from ktrain.errors import NotFoundError
from ktrain.jobs import record
from ktrain.launcher.backends.kubernetes import stored
from ktrain.launcher.backends.kubernetes.client import Client
from ktrain.launcher.cluster import resources as known
from ktrain.testing.fake_cluster import FakeCluster, Offer
from tests.unit.launcher.on_cluster.clusters import CRDS, client_of
from tests.unit.launcher.on_cluster.resumes import end

WITH_BACKEND = ("launch", "status", "logs", "cancel", "history")


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    with FakeCluster(Offer(version="1.36", jobset="0.12.0"), crds=CRDS) as found:
        yield found


@pytest.fixture
def client(cluster: FakeCluster, tmp_path: Path) -> Client:
    return client_of(cluster, tmp_path)


@pytest.fixture
def runs() -> tuple[str, str]:
    """Two runs of which a job would be called the same."""
    return f"memory://a-{ids.random_id()}/net", f"memory://b-{ids.random_id()}/net"


@pytest.fixture
def ktrain(cluster: FakeCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command on the cluster; returns its exit code, what it printed and what it said."""
    config = cluster.write_kubeconfig(tmp_path / "kubeconfig")

    def call(verb: str, *arguments: str) -> tuple[int, str, str]:
        backend = ("--backend", "kubernetes") if verb in WITH_BACKEND else ()
        with pytest.raises(SystemExit) as caught:
            main((verb, *backend, "--kubeconfig", str(config), *arguments))
        printed = capsys.readouterr()
        return int(caught.value.code or 0), printed.out, printed.err

    return call


def launch(ktrain: Any, run: str, *more: str) -> None:
    job = ("--run", run, "--image", "example/train:1", "--state", "1Gi", "--nodes", "2")
    code, _, err = ktrain("launch", *job, *more, "train.py")
    assert code == contract.EXIT_OK, err


def jobset(cluster: FakeCluster, name: str = "net") -> dict[str, Any]:
    return dict(cluster.store.get(known.JOB_SET, "default", name))


def place_of(run: str) -> record.ClusterPlace | None:
    return record.read(run, timeouts=Timeouts(10.0)).kubernetes


@pytest.mark.parametrize(
    "verb",
    [
        ("status", "RUN"),
        ("logs", "RUN"),
        ("cancel", "RUN"),
        ("wait", "--timeout", "0", "RUN"),
        ("events", "RUN"),
        ("delete", "RUN"),
        ("exec", "RUN", "--", "true"),
        ("port-forward", "RUN", "8080"),
        ("resume", "RUN"),
    ],
    ids=lambda verb: str(verb[0]),
)
def test_verb_with_the_url_of_a_run_without_a_job_leaves_the_job_of_another_run_alone(
    cluster: FakeCluster, ktrain: Any, runs: tuple[str, str], verb: tuple[str, ...]
) -> None:
    launch(ktrain, runs[0])
    end(cluster, "net")
    before = jobset(cluster)

    code, _, err = ktrain(*(runs[1] if word == "RUN" else word for word in verb))

    assert code == contract.EXIT_USAGE and f"namespace default: there is no job of run {runs[1]}" in err
    assert jobset(cluster) == before


def test_job_with_a_name_of_its_own_is_found_by_the_url_of_its_run(
    cluster: FakeCluster, ktrain: Any, runs: tuple[str, str]
) -> None:
    launch(ktrain, runs[0])
    launch(ktrain, f"{runs[1]}/", "--name", "odd")

    code, out, _ = ktrain("status", "--output", "json", f"{runs[1]}//")
    found = json.loads(out)
    assert code == contract.EXIT_OK and (found["name"], found["run"]) == ("odd", runs[1])
    assert "default/odd: cancelled" in ktrain("cancel", runs[1])[1]
    assert ktrain("resume", runs[1])[1] == "default/odd: resumed as submission 2\n"
    assert ktrain("delete", runs[1])[1] == "default/odd: deleted\n"
    assert jobset(cluster)["metadata"]["annotations"][contract.ANNOTATION_RUN] == runs[0]


def test_run_whose_job_had_the_name_that_another_run_s_job_has_now_is_not_resumed_over_it(
    cluster: FakeCluster, ktrain: Any, runs: tuple[str, str]
) -> None:
    launch(ktrain, runs[1])
    end(cluster, "net")
    assert ktrain("resume", runs[1])[0] == contract.EXIT_OK  # it is recorded in the run
    assert ktrain("delete", "net")[0] == contract.EXIT_OK
    launch(ktrain, runs[0])
    end(cluster, "net")
    before = jobset(cluster)

    code, _, err = ktrain("resume", runs[1])

    assert code == contract.EXIT_CONFLICT and f"which a job of run {runs[0]} has now" in err
    assert jobset(cluster) == before


def cut_off(cluster: FakeCluster, client: Client, ktrain: Any, run: str) -> None:
    """A resume of the job of a run died after it had deleted the job."""
    launch(ktrain, run)
    end(cluster, "net")
    found = stored.try_read_submission(client, jobset(cluster))
    assert found is not None
    assert ktrain("delete", "net")[0] == contract.EXIT_OK
    stored.write_ticket(client, found.job, found, None)


def test_resume_that_was_cut_off_goes_on_by_the_url_of_its_own_run_alone(
    cluster: FakeCluster, client: Client, ktrain: Any, runs: tuple[str, str]
) -> None:
    cut_off(cluster, client, ktrain, runs[0])

    code, _, err = ktrain("resume", runs[1])
    assert code == contract.EXIT_USAGE and f"there is no job of run {runs[1]}" in err
    assert ktrain("resume", f"{runs[0]}/")[0] == contract.EXIT_OK
    assert jobset(cluster)["metadata"]["annotations"][contract.ANNOTATION_RUN] == runs[0]


def test_history_of_a_run_has_no_ticket_of_another(
    cluster: FakeCluster, client: Client, ktrain: Any, runs: tuple[str, str]
) -> None:
    cut_off(cluster, client, ktrain, runs[0])

    code, _, err = ktrain("history", runs[1])
    assert code == contract.EXIT_USAGE and f"there is no job '{runs[1]}' with a history" in err
    code, out, _ = ktrain("history", "--output", "json", f"{runs[0]}/")
    assert code == contract.EXIT_OK and [item["outcome"] for item in json.loads(out)["submissions"]] == ["cut off"]


# The run's record of its last launch


def test_launch_and_resume_record_in_the_run_which_job_it_is(
    cluster: FakeCluster, ktrain: Any, runs: tuple[str, str]
) -> None:
    launch(ktrain, runs[0], "--name", "one")
    assert place_of(runs[0]) == record.ClusterPlace("default", "one", None)
    end(cluster, "one")
    launch(ktrain, runs[0], "--name", "two")
    assert place_of(runs[0]) == record.ClusterPlace("default", "two", None)
    end(cluster, "two")

    assert ktrain("resume", "one")[0] == contract.EXIT_OK

    assert place_of(runs[0]) == record.ClusterPlace("default", "one", None)


def test_dry_run_records_nothing(ktrain: Any, runs: tuple[str, str]) -> None:
    launch(ktrain, runs[0], "--dry-run=server")

    with pytest.raises(NotFoundError):
        place_of(runs[0])


def test_launch_whose_run_cannot_be_written_from_here_is_sent_and_says_so(cluster: FakeCluster, ktrain: Any) -> None:
    job = ("--run", "nowhere://bucket/net", "--image", "example/train:1", "--state", "1Gi", "--nodes", "2")
    code, out, err = ktrain("launch", *job, "train.py")

    assert code == contract.EXIT_OK and "default/net: submitted" in out and jobset(cluster)
    assert "the job is not recorded in its run; from Python attach('net', on=" in err
