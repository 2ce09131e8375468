"""Nothing secret of a job stands in anything but Secrets: a grep through all that launching leaves, says and sends."""

from __future__ import annotations

import base64
import json
import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ktrain.base import contract
from ktrain.cli.main import main
from ktrain.launcher.cluster import resources as known
from ktrain.testing.fake_cluster import Access, FakeCluster, Fault, Offer, Rule
from tests.unit.launcher.on_cluster.clusters import CRDS

VALUE, PULL, LOGIN, IGNORED, TYPED = (f"canary-{name}-4711" for name in ("value", "pull", "login", "ignored", "typed"))
JOB = (
    "--run", "memory://bucket/net", "--image", "example/train:1", "--state", "1Gi", "--nodes", "2",
    "--secret", "HF_TOKEN=hub:token", "--set", "pull_secrets=['registry']",
)  # fmt: skip


class Traces:
    """What was printed, said and logged, and what lies in the cluster and was sent to it."""

    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster
        self.texts: list[str] = []

    def found(self, secrets: tuple[str, ...], folder: Path) -> list[str]:
        """Where a secret stands, plain or in base64."""
        texts = {f"output {at}": text for at, text in enumerate(self.texts)}
        for kind in known.known():
            if kind.kind != "Secret":
                texts |= {f"{kind.kind} {at}": json.dumps(item) for at, item in enumerate(self._items(kind))}
        for request in self.cluster.requests():
            if not request.path.endswith("/secrets"):
                texts[f"request {request.method} {request.path}"] = f"{request.query} {request.body!r}"
        for path in folder.rglob("*"):
            if path.is_file():
                texts[f"file {path.name}"] = path.read_bytes().decode("latin-1")
        return [place for place, text in texts.items() if any(form in text for form in _forms(secrets))]

    def _items(self, kind: known.Resource) -> tuple[dict[str, Any], ...]:
        return tuple(self.cluster.store.list(kind, None).items)


def _forms(secrets: tuple[str, ...]) -> Iterator[str]:
    for secret in secrets:
        yield secret
        yield base64.b64encode(secret.encode()).decode().rstrip("=")[:-1]  # its last character depends on what follows


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    with FakeCluster(Offer(version="1.36", jobset="0.12.0"), crds=CRDS) as found:
        everything = (Rule(("*",), ("*",), ("*",)),)
        found.access = Access(rules={"me": everything}, tokens={"admin": "admin", LOGIN: "me"})
        for name, key, text in (("hub", "token", VALUE), ("registry", ".dockerconfigjson", PULL)):
            about = {"name": name, "namespace": "default"}
            found.store.create(
                known.SECRET, {"metadata": about, "data": {key: base64.b64encode(text.encode()).decode()}}
            )
        yield found


@pytest.fixture
def traces(cluster: FakeCluster) -> Traces:
    return Traces(cluster)


@pytest.fixture
def ktrain(traces: Traces, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Any:
    """Runs a command; everything that it printed and logged, at any level, goes to the traces."""
    config = traces.cluster.write_kubeconfig(tmp_path / "kubeconfig", "me")
    caplog.set_level(logging.DEBUG)

    def run(verb: str, *arguments: str) -> tuple[int, str]:
        backend = ("--backend", "kubernetes") if verb in ("launch", "status", "logs", "cancel") else ()
        with pytest.raises(SystemExit) as caught:
            main((verb, *backend, "--kubeconfig", str(config), *arguments))
        printed = capsys.readouterr()
        traces.texts += [printed.out, printed.err, caplog.text]
        return int(caught.value.code or 0), printed.out + printed.err

    return run


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A directory with a file of secrets that git ignores."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "train.py").write_text("print(1)\n")
    (folder / ".gitignore").write_text(".env\n")
    (folder / ".env").write_text(f"PASSWORD={IGNORED}\n")
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True, timeout=60)
    return folder


def token_of(cluster: FakeCluster) -> str:
    """The run's own token, which is made when the job is sent."""
    stored = cluster.store.get(known.SECRET, "default", "net-token")
    return str(stored.get("stringData", {}).get("token") or base64.b64decode(stored["data"]["token"]).decode())


def test_life_of_a_job_shows_no_secret(
    cluster: FakeCluster, traces: Traces, ktrain: Any, code: Path, tmp_path: Path
) -> None:
    sent = (*JOB, "--code", str(code), "train.py")
    for extra in (("--dry-run",), ("--dry-run=server",), ("--dry-run=server", "--output", "json"), ("--explain",)):
        assert ktrain("launch", *extra, *sent)[0] == contract.EXIT_OK
    assert ktrain("launch", *sent)[0] == contract.EXIT_OK
    secrets = (token_of(cluster), VALUE, PULL, LOGIN, IGNORED)
    assert ktrain("launch", *sent)[0] == contract.EXIT_CONFLICT
    for verb in ("status", "list", "events", "logs"):
        ktrain(verb, *(() if verb in ("logs",) else ("--output", "json")), *(() if verb == "list" else ("net",)))
    ktrain("wait", "--timeout", "0", "net")
    assert ktrain("cancel", "net")[0] == contract.EXIT_OK

    (tmp_path / "kubeconfig").unlink()  # it is the user's own, and holds the login
    (code / ".env").unlink()  # likewise
    assert len(secrets[0]) > 20 and traces.found(secrets, tmp_path) == []
    assert traces.found(("memory://bucket/net",), tmp_path) != []  # what is there is found


@pytest.mark.parametrize("status", [422, 403, 503])
def test_refusal_that_quotes_the_secret_is_not_passed_on(
    status: int, cluster: FakeCluster, traces: Traces, ktrain: Any, tmp_path: Path
) -> None:
    """Of any write of a Secret, whose refusal may have the object in it; what was made before is undone."""
    cluster.put_fault(Fault(status=status, method="POST", path="/secrets", times=100, message=f"bad value {TYPED}"))
    assert ktrain("launch", *JOB, "train.py")[0] != contract.EXIT_OK

    (tmp_path / "kubeconfig").unlink()
    assert traces.found((TYPED, VALUE, LOGIN), tmp_path) == []
    assert cluster.store.list(known.JOB_SET, "default").items == []


# Where a secret may be typed by mistake: refused before anything is asked, and not said again

REFUSED = {
    "env by its name": ("--env", f"AWS_SECRET_ACCESS_KEY={TYPED}", "train.py"),
    "env with a URL": ("--env", f"PROXY=https://me:{TYPED}@proxy.example", "train.py"),
    "env without a name": ("--env", TYPED, "train.py"),
    "run with a password": ("--run", f"s3://key:{TYPED}@bucket/net", "train.py"),
    "run with a signature": ("--run", f"https://store.example/net?sig={TYPED}", "train.py"),
    "value for a reference": ("--secret", f"HF_TOKEN={TYPED}", "train.py"),
    "value with a colon for a reference": ("--secret", f"HF_TOKEN={TYPED}:$x", "train.py"),
    "value before a colon": ("--secret", f"HF_TOKEN=$${TYPED}:x", "train.py"),
    "option of the script": ("train.py", "--", "--api-key", TYPED),
    "option with its value": ("train.py", "--", f"--hub-token={TYPED}"),
    "URL among the arguments": ("train.py", "--", "--data", f"https://me:{TYPED}@store.example/x"),
    "URL in an option": ("train.py", "--", f"--data=https://me:{TYPED}@store.example/x"),
    "image with credentials": ("--image", f"me:{TYPED}@registry.example/train:1", "train.py"),
    "overlay": (
        "--set", f"overlay.worker={{ containers = [{{ name = 'trainer', env = [{{ name = 'DB_PASSWORD', value = "
        f"'{TYPED}' }}] }}] }}", "train.py",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_secret_in_the_wrong_place_is_refused_and_not_shown(
    name: str, cluster: FakeCluster, traces: Traces, ktrain: Any, tmp_path: Path
) -> None:
    code, said = ktrain("launch", *JOB, *REFUSED[name])

    assert code == contract.EXIT_USAGE and said.startswith("ktrain: ")
    assert not [item for item in cluster.requests() if item.method != "GET"]
    assert traces.found((TYPED,), tmp_path) == []


@pytest.mark.parametrize(
    "words",
    [
        ("--max-tokens", "5"),
        ("--pad-token", "0"),
        ("--password-file", "/data/p"),
        ("--data", "s3://bucket/x"),
        ("-k", "1"),
    ],
)
def test_option_that_is_no_secret_is_let_pass(words: tuple[str, ...], ktrain: Any) -> None:
    assert ktrain("launch", *JOB, "--dry-run", "train.py", "--", *words)[0] == contract.EXIT_OK
