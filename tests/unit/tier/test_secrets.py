"""Secrets in URLs, options and errors of clients: none is shown, in messages and in tracebacks with their causes."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.spec import AbstractFileSystem

from ktrain.abc.tier import Tier
from ktrain.base import control
from ktrain.base.clock import Deadline
from ktrain.base.job import WorkDir, canonical_url
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.errors import ConfigError, KtrainError
from ktrain.tier.disk import NodeDisk
from ktrain.tier.location import open_tier

SECRET = "geheimnis-4711"
CALLS: dict[str, Callable[[Tier], Any]] = {
    "write": lambda tier: tier.write("a", b"x", deadline=soon()),
    "create": lambda tier: tier.create("a", b"x", deadline=soon()),
    "read": lambda tier: tier.read("a", deadline=soon()),
    "read_range": lambda tier: tier.read_range("a", 0, 1, deadline=soon()),
    "list": lambda tier: tier.list("", deadline=soon()),
    "delete": lambda tier: tier.delete("a", deadline=soon()),
}


def soon() -> Deadline:
    return Deadline.after(30.0)


class Talkative(AbstractFileSystem):  # type: ignore[misc]
    """A client that quotes its credentials in every error, and in what caused it."""

    protocol = "talkative"
    cachable = False

    def _fail(self, *args: Any, **kwargs: Any) -> Any:
        try:
            raise OSError(errno.EIO, f"connect to https://me:{SECRET}@host/run failed")
        except OSError as error:
            raise RuntimeError(f"GET https://host/run?X-Amz-Signature={SECRET} failed") from error

    ls = cat_file = pipe_file = rm_file = makedirs = _fail


class Whispering(Talkative):
    """It quotes them in the cause alone."""

    protocol = "whispering"

    def _fail(self, *args: Any, **kwargs: Any) -> Any:
        try:
            raise ValueError(f"https://me:{SECRET}@host/run is away")
        except ValueError:
            raise TimeoutError("the store is away") from None

    ls = cat_file = pipe_file = rm_file = makedirs = _fail


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("client", [Talkative, Whispering])
def test_bucket_error_of_a_client_that_quotes_credentials_shows_none(client: type[Talkative], call: str) -> None:
    fsspec.register_implementation(client.protocol, client, clobber=True)
    tier = open_tier(f"{client.protocol}://host/run", timeouts=Timeouts())
    with pytest.raises(KtrainError) as caught:
        CALLS[call](tier)
    shown = "".join(traceback.format_exception(caught.value))
    assert SECRET not in shown
    assert "talkative" in shown or "whispering" in shown


@pytest.mark.parametrize("url", [f"ftp://me:{SECRET}@host/run", f"https://host/run?token={SECRET}"])
@pytest.mark.parametrize(
    "use",
    [
        canonical_url,
        open_tier,
        WorkDir.of_run,
        lambda url: RunCatalog.open(url, timeouts=Timeouts()),
    ],
)
def test_run_url_that_holds_a_secret_is_refused_without_showing_it(url: str, use: Callable[[str], Any]) -> None:
    with pytest.raises(ConfigError, match="password, token and query") as caught:
        use(url)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert "host/run" in str(caught.value)


@pytest.mark.parametrize("url", ["sftp://me@host/run", "s3://bucket/a@b", "/data/what?/run", "runs/a:b@c"])
def test_run_url_without_a_secret_is_taken(url: str) -> None:
    assert canonical_url(url).endswith(url.rsplit("/", 1)[-1])


def test_disk_error_shows_no_secret_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    (tmp_path / "ab").write_bytes(b"")  # a file where the disk's folder should be
    disk = NodeDisk(tmp_path, run="ab", node="node-0", timeouts=Timeouts())
    for name in ("write", "create", "read"):
        with pytest.raises(KtrainError) as caught:
            CALLS[name](disk.tier)
        assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("token", [SECRET, f"{SECRET}-of-another-run"])
def test_control_channel_error_shows_neither_token(tmp_path: Path, token: str) -> None:
    def fails(params: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("handler failed")

    server = control.Server({"fails": fails}, address=f"unix:{tmp_path / 's'}", token=SECRET)
    try:
        client = control.Client(server.address, token)
        with pytest.raises(KtrainError) as caught:
            client.call("fails", {}, timeout_s=30.0)
    finally:
        server.close()
    assert SECRET not in "".join(traceback.format_exception(caught.value)) + repr(client) + repr(server)


def test_control_channel_that_nobody_serves_shows_no_token(tmp_path: Path) -> None:
    with pytest.raises(KtrainError) as caught:
        control.Client(f"unix:{tmp_path / 'none'}", SECRET).call("x", {}, timeout_s=1.0)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
