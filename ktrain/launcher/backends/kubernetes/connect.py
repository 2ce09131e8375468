"""The way to a cluster's API server: the only module that knows the package `kubernetes`, and not its models.

That package reads kubeconfig files, runs credential plugins and sets up TLS; requests are sent through its pool.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from ktrain.base.retry import BusyError
from ktrain.errors import ConfigError


class Reply(Protocol):
    """An answer of which only the head has been read. The caller closes it."""

    status: int
    headers: Mapping[str, str]

    def read(self) -> bytes:
        """The body. Raises BusyError where the connection breaks."""

    def pieces(self) -> Iterator[bytes]:
        """The body as it comes. Raises BusyError where the connection breaks or is silent for too long."""

    def close(self) -> None:
        """Gives the connection up."""


class Door(Protocol):
    """One user's way into one cluster."""

    def send(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None, timeout_s: float) -> Reply:
        """Sends a request. Raises BusyError where no answer came: whether it took effect is then unknown."""


def connect(kubeconfig: Path | None = None, context: str | None = None) -> Door:
    """The way that a kubeconfig names; without one, the user's own, or that of the pod that this runs in.

    Raises:
        ConfigError: the package is not there, or the kubeconfig cannot be used.
    """
    try:
        from kubernetes import client as api
        from kubernetes import config
        from kubernetes.config.config_exception import ConfigException
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--backend kubernetes: the package {error.name} is not there; pip install 'ktrain[kubernetes]'"
        ) from error
    settings = api.Configuration()
    settings.retries = False  # nothing below `Client` may ask again by itself (ADR 0013)
    try:
        if kubeconfig is None and context is None:
            config.load_config(client_configuration=settings)
        else:
            name = None if kubeconfig is None else str(kubeconfig)
            config.load_kube_config(name, context, client_configuration=settings, persist_config=False)
    except (ConfigException, OSError, ValueError, TypeError, KeyError) as error:
        where = "the kubeconfig" if kubeconfig is None else f"kubeconfig {kubeconfig}"
        raise ConfigError(f"{where}: it cannot be used: {error}; name one with --kubeconfig and --context") from error
    return _Pool(settings, api.ApiClient(settings).rest_client.pool_manager)


class _Pool:
    """A door through the connections of urllib3."""

    def __init__(self, settings: Any, pool: Any) -> None:
        self._settings = settings
        self._pool = pool

    def send(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None, timeout_s: float) -> Reply:
        import urllib3

        credentials = {
            item["key"]: item["value"] for item in self._settings.auth_settings().values() if item["in"] == "header"
        }
        try:
            answer = self._pool.request(
                method,
                self._settings.host + path,
                headers={**headers, **credentials},
                body=body,
                timeout=urllib3.Timeout(connect=min(timeout_s, 10.0), read=timeout_s),
                preload_content=False,
                redirect=False,
                retries=False,
            )
        except urllib3.exceptions.HTTPError as error:
            raise BusyError(f"{method} {path.partition('?')[0]}: no answer: {error}") from error
        return _Reply(answer)


class _Reply:
    """An answer of urllib3."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer
        self.status: int = answer.status
        self.headers: Mapping[str, str] = answer.headers

    def read(self) -> bytes:
        return b"".join(self.pieces())

    def pieces(self) -> Iterator[bytes]:
        import urllib3

        try:
            yield from self._answer.stream(1 << 16)
        except urllib3.exceptions.HTTPError as error:
            raise BusyError(f"the answer broke off: {error}") from error

    def close(self) -> None:
        self._answer.close()
