"""`ktrain logs` of a run that is no directory: what agents brought, when pods and nodes are gone."""

from __future__ import annotations

import pytest

from ktrain.base import contract, ids
from ktrain.base.clock import Deadline
from ktrain.cli.main import main
from ktrain.run.attempt_logs import PART_BYTES, Part
from ktrain.tier.location import open_tier


@pytest.fixture
def run() -> str:
    """A run of two attempts of two ranks; rank 1 wrote more than is kept in the second."""
    url = f"memory://{ids.random_id()}/net"
    tier = open_tier(url)
    long = b"y" * (PART_BYTES - 1) + b"\n"
    parts = {
        Part(1, 0, 0): b"first\n",
        Part(2, 0, 0): b"zero\n",
        Part(2, 1, 0): long,
        Part(2, 1, 3): b"newest\n",
    }
    for part, data in parts.items():
        tier.write(part.name, data, deadline=Deadline.after(5.0))
    tier.write("logs/launcher.log", b"other\n", deadline=Deadline.after(5.0))
    tier.close()
    return url


def logs(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(("logs", *arguments))
    return int(caught.value.code or 0)


def test_logs_of_the_last_attempt_or_of_one_that_is_named(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert logs(run, "--rank", "0") == contract.EXIT_OK
    assert capsys.readouterr().out == "zero\n"

    assert logs(run, "--attempt", "1") == contract.EXIT_OK
    assert capsys.readouterr().out == "[1:0] first\n"


def test_logs_say_what_is_not_kept(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert logs(run, "--attempt", "2", "--rank", "1") == contract.EXIT_OK

    out = capsys.readouterr().out
    assert out.startswith("yyy") and out.endswith(f"\n[ktrain: {2 * PART_BYTES} bytes are not kept]\nnewest\n")


def test_logs_of_an_attempt_on_a_cluster_ask_the_run_alone(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = ("--backend", "kubernetes", "--kubeconfig", "/nowhere")

    assert logs(run, *cluster, "--attempt", "2", "--rank", "0") == contract.EXIT_OK
    assert capsys.readouterr().out == "zero\n"
    assert logs(run, *cluster, "--attempt", "2", "--follow") == contract.EXIT_USAGE
    assert logs(run, *cluster, "--attempt", "3") == contract.EXIT_USAGE
    assert "no logs of attempt 3" in capsys.readouterr().err
