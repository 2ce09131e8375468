"""A run's URL leads to the job that says it, never to one whose name happens to fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ktrain.base import contract
from ktrain.errors import ConfigError, NotFoundError
from ktrain.launcher.backends.kubernetes.client import Client
from ktrain.launcher.backends.kubernetes.find import find_job
from ktrain.launcher.backends.kubernetes.submit import submit, try_job
from ktrain.launcher.cluster import resources as known
from ktrain.testing.fake_cluster import FakeCluster, Offer
from tests.unit.launcher.on_cluster.clusters import CRDS, client_of, job


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    with FakeCluster(Offer(version="1.36", jobset="0.12.0"), crds=CRDS) as found:
        yield found


@pytest.fixture
def client(cluster: FakeCluster, tmp_path: Path) -> Client:
    return client_of(cluster, tmp_path)


def send(client: Client, name: str, run: str) -> None:
    submit(client, try_job(client, job(name=name, run=run)), None)


def test_url_finds_the_job_of_that_run_whatever_both_are_called(client: Client) -> None:
    send(client, "net", "s3://a/net")
    send(client, "odd", "s3://b/net/")

    assert [find_job(client, "default", run) for run in ("s3://a/net", "s3://a/net/", "s3://b/net")] == [
        "net",
        "net",
        "odd",
    ]
    with pytest.raises(NotFoundError, match="no job of run s3://c/net; `ktrain list --namespace default`"):
        find_job(client, "default", "s3://c/net")


def test_name_is_taken_as_it_is_without_a_request(cluster: FakeCluster, client: Client) -> None:
    assert find_job(client, "default", "net") == "net" and cluster.requests() == []


def test_run_with_several_jobs_names_them(client: Client) -> None:
    send(client, "one", "s3://a/net")
    send(client, "two", "s3://a/net")

    with pytest.raises(ConfigError, match="run s3://a/net: 2 jobs are of it; name one of one, two"):
        find_job(client, "default", "s3://a/net")


def test_job_of_an_older_launcher_that_kept_the_slash_is_found(cluster: FakeCluster, client: Client) -> None:
    send(client, "net", "s3://a/net")

    def change(jobset: dict[str, Any]) -> None:
        jobset["metadata"]["annotations"][contract.ANNOTATION_RUN] = "s3://a/net/"

    cluster.store.mutate(known.JOB_SET, "default", "net", change)

    assert find_job(client, "default", "s3://a/net") == "net"
