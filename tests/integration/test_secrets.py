"""Nothing secret is left behind by a launch, or seen while it runs: a grep through all that it writes and shows."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from ktrain.base import contract, events
from ktrain.base.clock import Deadline
from ktrain.base.events import Event
from ktrain.testing.invariants import find_processes
from ktrain.testing.s3_servers import MotoServer, find_program
from ktrain.tier.location import open_tier
from tests.integration import launch_worker
from tests.integration.launching import Place, place

pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "geheim-schluessel-4711",
    "AWS_SESSION_TOKEN": "geheim-sitzung-4712",
    "KTRAIN_TEST_PASSWORD": "geheim-kennwort-4713",
    "RAY_AUTH_TOKEN": "geheim-fremdes-ray-4714",  # of another cluster: ours has a token of its own
}
URL_PASSWORD = "geheim-in-der-adresse-4715"
KILL = ("--fault", "kill-worker@step=50,rank=1,after=memory")  # so that an error and a restart are among what is shown
STEPS = ("100", "0.1")


@pytest.fixture
def here() -> Iterator[Place]:
    with place() as made:
        shutil.copy(Path(launch_worker.__file__), made.script)
        yield made


def secrets_of(here: Place) -> tuple[bytes, ...]:
    """What nobody may see: the secrets of the environment, and the token of the launch that runs."""
    (token,) = (here.root / "tmp").glob("ktrain-*/*/token")
    assert token.stat().st_mode & 0o777 == 0o600
    return (token.read_bytes().strip(), *(text.encode() for text in SECRETS.values()))


def shown_by_processes(here: Place, secrets: tuple[bytes, ...], *roles: str) -> list[str]:
    """Command lines with a secret in them; and environments that others can read."""
    found = find_processes(str(here.root))
    for role in ("ktrain.run.head ", "ktrain.run.agent ", "ktrain.run.supervisor ", *roles):
        assert any(role in process.command for process in found), f"no process of {role} was looked at"
    wrong = [process.command for process in found if any(secret.decode() in process.command for secret in secrets)]
    for process in found:
        try:
            mode = os.stat(f"/proc/{process.pid}/environ").st_mode
        except FileNotFoundError:
            continue  # it has ended meanwhile
        if mode & (stat.S_IRGRP | stat.S_IROTH):
            wrong.append(f"environment of {process.pid} has mode {mode & 0o777:o}")
    return wrong


def open_to_others(folder: Path, secrets: tuple[bytes, ...]) -> list[str]:
    """Files with a secret that another user could open, while the launch runs."""
    found = holding(folder, secrets)
    assert found, "the launch's own token is found, so that a secret would be"
    return [str(path) for path in found if path.stat().st_mode & 0o077]


def holding(folder: Path, secrets: tuple[bytes, ...]) -> list[Path]:
    """Files below a folder that have a secret in their name or their bytes."""
    found = []
    for path in folder.rglob("*"):
        try:
            data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        except (FileNotFoundError, OSError):
            continue  # a socket, or gone meanwhile
        if any(secret in data or secret.decode() in path.name for secret in secrets):
            found.append(path)
    return found


def test_launch_into_a_directory_leaves_no_secret(here: Place) -> None:
    launch = here.launch("--workers-per-node", "2", *KILL, args=STEPS, **SECRETS)
    here.await_that("a commit", lambda: here.events("committed"))
    secrets = secrets_of(here)
    assert shown_by_processes(here, secrets) == [] and open_to_others(here.root, secrets) == []

    here.await_that("a second attempt", lambda: len(here.events("attempt_started")) == 2)
    assert shown_by_processes(here, secrets) == []

    assert here.end(launch) == contract.EXIT_OK, here.output()
    here.await_nothing_left()
    for folder in (here.root, here.volume):
        assert holding(folder, secrets) == []


@pytest.mark.skipif(find_program("moto_server") is None, reason="moto is not installed")
def test_launch_into_a_bucket_with_peers_leaves_no_secret(here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    with MotoServer() as server:
        server.make_bucket("runs")
        access = {**server.environment(), **SECRETS}
        run = "s3://runs/quiet"
        with open(here.script, "a") as script:  # a script that tells what it should not, as its last word
            script.write('\n    import os\n\n    print("done with", os.environ["KTRAIN_TEST_PASSWORD"])\n')
        for name, text in access.items():
            monkeypatch.setenv(name, text)
        tier = open_tier(run)

        def said(kind: str) -> list[Event]:
            names = [stored.name for stored in tier.list(contract.EVENTS_DIR, deadline=Deadline.after(60.0))]
            lines = [line for name in names for line in tier.read(name, deadline=Deadline.after(60.0)).splitlines()]
            return [event for event in events.parse_lines(lines) if event.kind == kind]

        launch = here.launch("--nodes", "2", "--run", run, *KILL, args=STEPS, **access)
        here.await_that("a replica", lambda: said("replicated"))
        secrets = secrets_of(here)
        assert shown_by_processes(here, secrets, "raylet", "gcs_server") == []
        assert open_to_others(here.root, secrets) == []

        here.await_that("a second attempt", lambda: len(said("attempt_started")) == 2)
        assert shown_by_processes(here, secrets) == []

        assert here.end(launch) == contract.EXIT_OK, here.output()
        here.await_nothing_left()
        for folder in (here.root, here.volume):
            assert holding(folder, secrets) == []
        stored = tier.list("", deadline=Deadline.after(60.0))
        assert any("logs/" in found.name for found in stored) and any("checkpoints/" in found.name for found in stored)
        data = {found.name: tier.read(found.name, deadline=Deadline.after(60.0)) for found in stored}
        assert [name for name, text in data.items() if any(secret in text for secret in secrets)] == []
        masked = b"done with " + b"*" * len(SECRETS["KTRAIN_TEST_PASSWORD"])
        assert all(masked in data[f"logs/attempt-2/rank-{rank}.log"] for rank in (0, 1))
        tier.close()


def test_launch_with_a_password_in_the_url_is_refused_and_shows_it_nowhere(here: Place) -> None:
    launch = here.launch("--run", f"ftp://me:{URL_PASSWORD}@host/run")
    assert here.end(launch) == contract.EXIT_USAGE
    assert "without password, token and query" in here.output() and URL_PASSWORD not in here.output()
    here.await_nothing_left()
    assert holding(here.root, (URL_PASSWORD.encode(),)) == []
